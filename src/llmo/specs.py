"""The specification of a project and of its steps: every key a user can write, its default, and what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from llmo import plugins
from llmo.errors import nearest
from llmo.methods import LABELS_ONLY, METHODS, MethodName, OptimiserName
from llmo.searchspec import TRIALS, parsed, space_of
from llmo.specbase import Fraction, Name, Number, Positive, Seconds, Spec
from llmo.types import ENCODER_ADAPTER_BYTES, GENERATOR_ADAPTER_BYTES, MAX_BATCH_TOKENS


def _known_task(name: str) -> str:
    known = plugins.names("llmo.tasks")
    if name not in known:
        raise ValueError(f"unknown task{nearest(name, known)}; known: {', '.join(known)}")
    return name


class SplitSpec(Spec):
    """How rows are divided when the source has no splits of its own: stratified by label, seeded."""

    test: Fraction = Field(0.2, description="share of rows held out for the final figures")
    dev: Fraction = Field(0.1, description="share of rows held out for early stopping and compression")
    seed: int = Field(13, description="seed of the division")


class CleanSpec(Spec):
    """What is mended in each text, and which rows are dropped; every dropped row is kept with its reason."""

    fix_encoding: bool = Field(True, description="mend mojibake (ftfy)")
    strip_html: bool | None = Field(
        None, description="remove tags, scripts and styles where a text is HTML; default: yes, and no for generation"
    )
    normalise: bool = Field(True, description="drop control characters, fold white space, NFC")
    drop_empty: bool = Field(True, description="drop rows whose text is empty after cleaning")
    drop_duplicates: Literal["near", "exact", "none"] = Field("near", description="within and across splits")
    near_threshold: Fraction = Field(
        0.9, description="Jaccard similarity of word 5-grams above which two texts are near duplicates"
    )


class DataSpec(Spec):
    """Where the text is and how to read it."""

    source: str = Field(description="a file, a folder, package:NAME/FOLDER, or a stored data set NAME@VERSION")
    format: Literal[
        "auto", "csv", "tsv", "json", "jsonl", "parquet", "folders", "conll", "chatterbot", "text", "inter"
    ] = Field("auto", description="how the source is laid out; auto: by name and content")
    encoding: str = Field("auto", description="character encoding of text files; auto: detected per file")
    text: str | None = Field(None, description="the column that holds the text; default: found by name")
    pair: str | None = Field(
        None, description="the column of the second text: a question's context, the other of a pair; default: by name"
    )
    label: str | None = Field(
        None, description="the column that holds the label(s), value, score or answer; default: found by name"
    )
    id: str | None = Field(None, description="the column that identifies a row; default: found by name, else numbered")
    split_column: str | None = Field(None, description="a column that says train, dev or test; default: found by name")
    user: str | None = Field(None, description="next-item: the column of who acted; default: found by name")
    item: str | None = Field(
        None, description="next-item: the column of the item, or of the whole sequence; default: found by name"
    )
    time: str | None = Field(None, description="next-item: the column of when; default: found by name, else row order")
    label_separator: str | None = Field(None, description="splits a label cell into several labels (multi-label)")
    clean: CleanSpec = Field(default_factory=CleanSpec, description="what is mended, dropped and compared")
    split: SplitSpec = Field(default_factory=SplitSpec, description="the shares of dev and test rows, and their seed")


LENGTHS = {"generation": 1024, "extractive-qa": 384}
BASE_TASKS = ("masked-lm",)  # what they train answers nothing: it is a base for other tasks


class TaskSpec(Spec):
    """What is learnt. A plain name is enough: `task: text-classification`."""

    name: Annotated[str, AfterValidator(_known_task)] = Field(
        description="a registered task, e.g. text-classification or token-classification"
    )
    multi_label: bool | None = Field(None, description="several labels for one text; default: seen from the data")
    max_length: Annotated[int, Field(ge=8, le=8192)] = Field(
        128,
        description="tokens a text is cut to; default for generation: 1024; for extractive-qa: 384, the size of the "
        "windows that a long context is read in",
    )
    repeats: bool | None = Field(
        None, description="next-item: an item of the history may be the answer; default: seen from the data"
    )

    @field_validator("repeats")
    @classmethod
    def _repeats(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value is not None and info.data.get("name") != "next-item":
            raise ValueError("it is of task next-item: leave it out")
        return value

    @model_validator(mode="before")
    @classmethod
    def _length(cls, value: Any) -> Any:
        """A conversation is longer than a text that is only told apart from others."""
        if isinstance(value, dict) and value.get("name") in LENGTHS:
            return {"max_length": LENGTHS[value["name"]], **value}
        return value


def _with_a_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("a template has {} once, where the label's name goes")
    return template


class LoraSpec(Spec):
    """The low-rank family: lora, rslora, dora, adalora. Method ia3 takes `target_modules` from here too."""

    rank: Positive = Field(8, description="rank of the update matrices; adalora: of the mean module at the end")
    alpha: Positive = Field(16, description="scale of the update (alpha / rank; rslora: alpha / root of rank)")
    dropout: Fraction = Field(0.0, description="dropout on the adapter's input")
    target_modules: list[str] | None = Field(
        None,
        description="module names; default: every linear layer of the trunk, for ia3 keys, values and feed-forward",
    )


SHARED_OUT = {"fsdp": ("full", "last-n", "lora", "rslora"), "tensor": ("full", "last-n")}


class TrainSpec(Spec):
    """How the model is trained."""

    method: MethodName = Field(
        "full",
        description="what is trained: full, head, last-n, lora, rslora, dora, adalora, ia3, prefix, prompt, "
        "bottleneck, few-shot or zero-shot",
    )
    epochs: Annotated[Number, Field(gt=0)] = Field(
        3.0, description="passes over the training rows; a part of one is allowed"
    )
    batch_size: Positive = Field(16, description="texts per optimiser step")
    gradient_accumulation_steps: Positive = Field(1, description="micro-batches per step")
    devices: Positive = Field(
        1, description="processes that share every batch: one a GPU (--gpus), or each with its part of the cores"
    )
    parallelism: Literal["data", "fsdp", "tensor"] = Field(
        "data",
        description="what several devices share: rows, and with fsdp or tensor the layers too, for a model that does "
        "not fit one of them",
    )
    part_tokens: Positive | None = Field(
        None, description="padded tokens computed at once in one pass over texts; default: by device"
    )
    keep_states: bool = Field(
        True,
        description="what frozen layers say of each text is computed once and kept on disk, for later trainings too",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep a layer's input only and compute the rest again on the way back: less memory, more time",
    )
    learning_rate: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="peak; default by method and optimiser, see docs/methods.md"
    )
    optimizer: OptimiserName = Field("adamw", description="adamw, adam, sgd, rmsprop, adafactor or lion")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="decay after the warm-up")
    warmup: Annotated[Number, Field(ge=0, lt=1)] = Field(0.1, description="share of steps that warm up")
    weight_decay: Annotated[Number, Field(ge=0)] = Field(
        0.01,
        description="not on biases and norms; decoupled with adamw, adafactor and lion, L2 with adam, sgd and rmsprop",
    )
    momentum: Annotated[Number, Field(ge=0, lt=1)] = Field(0.9, description="of SGD")
    dropout: Annotated[Number, Field(ge=0, lt=1)] | None = Field(None, description="overrides the model's own")
    label_smoothing: Annotated[Number, Field(ge=0, lt=1)] = Field(0.0, description="cross-entropy smoothing")
    max_grad_norm: Annotated[Number, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    class_weights: Literal["none", "balanced"] = Field("none", description="balanced: inverse to class frequency")
    early_stopping: Positive | None = Field(None, description="stop after this many evaluations without gain on dev")
    evaluate_every: Positive | None = Field(None, description="steps between dev evaluations; default: once an epoch")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the device computes it natively"
    )
    objective: Literal["auto", "answers", "text", "preference"] = Field(
        "auto",
        description="generation: learn the answers of conversations, all of a plain text, or preferences (DPO); "
        "auto: as the data are",
    )
    beta: Annotated[Number, Field(gt=0)] = Field(0.1, description="preference: how far from the start (DPO's beta)")
    last_n: Positive = Field(2, description="layers trained by method last-n")
    lora: LoraSpec = Field(default_factory=LoraSpec, description="the adapter's rank, scale and modules")
    virtual_tokens: Annotated[int, Field(ge=1, le=512)] = Field(
        20, description="methods prefix and prompt: tokens that are learnt before every text"
    )
    bottleneck_width: Positive = Field(48, description="method bottleneck: width between the two halves of an adapter")
    base_weights: Literal["fp32", "int8", "int4"] = Field(
        "fp32", description="bits of the frozen linear weights under an adapter; int8 and int4 save memory, not time"
    )
    ema: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None, description="evaluate and save an exponential average of the weights, with this decay a step (e.g. 0.999)"
    )
    pairs: Positive = Field(5, description="method few-shot: like and unlike texts that each text is compared with")
    template: Annotated[str, AfterValidator(_with_a_place)] = Field(
        "This text is about {}.", description="method zero-shot: the sentence that a label's name is put into"
    )
    temperature: Annotated[Number, Field(ge=1)] = Field(
        1.0, description="with `also`: of n times the batches, n^(1/temperature) times as many are drawn in an epoch"
    )
    checkpoint_seconds: Annotated[Number, Field(gt=0)] = Field(30.0, description="time between checkpoints")
    seed: int = Field(13, description="of initialisation, order and dropout")

    @model_validator(mode="after")
    def shared_out(self) -> TrainSpec:
        if self.parallelism == "data":
            return self
        if self.devices == 1:
            raise ValueError(f"parallelism {self.parallelism} shares layers out among devices: set train.devices too")
        fitting = SHARED_OUT[self.parallelism]
        if self.method not in fitting:
            raise ValueError(
                f"parallelism {self.parallelism} is of method {', '.join(fitting)}, and the method is {self.method}"
            )
        for name, usual in (("base_weights", "fp32"), ("ema", None)):
            if getattr(self, name) != usual:
                raise ValueError(f"parallelism {self.parallelism} does not go with {name}: leave one of them out")
        if self.optimizer == "adafactor":
            raise ValueError(
                f"adafactor looks at whole matrices, of which parallelism {self.parallelism} leaves each device a "
                "part: set train.optimizer to adamw"
            )
        return self


MOST_TRIALS = 1000
# What no search varies: the run's own bookkeeping, and what would change what the metric means.
FIXED = ("seed", "checkpoint_seconds", "evaluate_every", "objective", "beta", "devices", "parallelism", "temperature")


@cache
def space() -> type[Spec]:
    """What a search may vary."""
    return space_of(TrainSpec, FIXED, {"max_length": TaskSpec.model_fields["max_length"].rebuild_annotation()})


def _space(value: Any) -> Any:
    return value if value is None else parsed(space(), value)


class TuneSpec(Spec):
    """A search for the settings of `train`, before the training itself. See docs/tune.md."""

    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = Field(
        None, description=f"settings tried at most; default: {TRIALS}, with a budget as many as it allows"
    )
    budget: Seconds | None = Field(
        None, description="time for all trials together (90s, 10m, 2h); those that still run then are stopped"
    )
    sampler: Literal["tpe", "random", "grid", "nsga2"] = Field(
        "tpe", description="how settings are chosen; grid: a range counts as its ends and its middle"
    )
    pruner: Literal["asha", "hyperband", "none"] | None = Field(
        None, description="how weak trials are ended early; default: asha, with several objectives none"
    )
    folds: Annotated[int, Field(ge=2, le=20)] | None = Field(
        None, description="cross-validate over train and dev rows together; default: one training, measured on dev"
    )
    objectives: Annotated[list[Literal["quality", "seconds", "memory", "latency"]], Field(min_length=1)] = Field(
        ["quality"], description="what is made good together; with several the result is a Pareto front"
    )
    parallel: Positive | None = Field(
        None, description="trials at once; default: as many as the machine runs, one where time is an objective"
    )
    space: Annotated[dict[str, Any] | None, BeforeValidator(_space)] = Field(
        None,
        description="key of `train`, or `max_length` -> list of values, or {low, high, log, step}; default: by task",
    )
    warm_start: bool = Field(True, description="begin with the best settings of earlier searches, same task and base")
    seed: int = Field(13, description="of the sampler and of the folds")

    @model_validator(mode="after")
    def learnt_together(self) -> TuneSpec:
        if "quality" not in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("the objectives name quality, and each at most once")
        if len(self.objectives) > 1 and self.pruner not in (None, "none"):
            raise ValueError(f"the pruner {self.pruner} compares one figure, and there are several objectives")
        return self

    @property
    def most(self) -> int:
        """Trials at most."""
        return self.trials or (TRIALS if self.budget is None else MOST_TRIALS)

    @property
    def prunes(self) -> str:
        """The pruner that is meant."""
        return self.pruner or ("asha" if len(self.objectives) == 1 else "none")


def measurable(task: TaskSpec, tune: TuneSpec, train: TrainSpec | None) -> None:
    """Raises ValueError for a search whose trials could not be run or measured."""
    if train is not None and train.devices > 1:
        raise ValueError("a search runs its trials side by side, each on one device: leave out train.devices")
    if tune.folds is not None and task.name == "next-item":
        raise ValueError(
            "what a user did last is held out already, and parts of it would be learnt by others: leave out `folds`"
        )
    if "latency" in tune.objectives and task.name == "generation":
        raise ValueError("latency is measured of tasks that answer at once: leave it out of `objectives`")


Variant = Literal[
    "onnx-fp32",
    "onnx-int8",
    "onnx-int8-static",
    "onnx-int8-default",
    "native-int8",
    "torch-bf16",
    "torch-int8",
    "openvino-bf16",
    "openvino-int8",
    "openvino-int4",
    "llamacpp-q8",
]


class CompressSpec(Spec):
    """What may be lost, and for what."""

    max_drop: Annotated[Number, Field(ge=0, lt=1)] = Field(
        0.005, description="largest loss of the task's metric on dev, its standard error included"
    )
    metric: str | None = Field(None, description="the figure that is to be kept; default: the task's metric")
    target: Literal["throughput", "latency", "size", "memory"] = Field(
        "throughput", description="what is sought: many texts at once, one text soon, a small file, little memory"
    )
    max_mb: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="largest size of the weights, in millions of bytes"
    )
    minutes: Annotated[Number, Field(gt=0)] = Field(10.0, description="no further variant is begun after so long")
    shapes: Literal["auto", "none", "all"] = Field(
        "auto",
        description="encoders of fewer layers and tokens, distilled: where the room or the target asks, or always",
    )
    variants: tuple[Variant, ...] | None = Field(
        None, description="what is tried; default: all that this machine can run", min_length=1, strict=False
    )


class ObjectiveSpec(Spec):
    """What an endpoint is to keep to; within it, as many texts a second as can be."""

    p99_ms: Annotated[Number, Field(gt=0)] = Field(description="99 of 100 texts are answered within so long")


class DeploySpec(Spec):
    """How the model is served."""

    endpoint: Name = Field(description="the public name: POST /v1/endpoints/NAME/predict")
    cores: Positive | None = Field(None, description="CPU cores of the replica; default: half of the machine's")
    gpus: Annotated[int, Field(ge=0, le=1)] = Field(0, description="1: the replica computes on a GPU of its own")
    max_batch_tokens: Positive = Field(MAX_BATCH_TOKENS, description="padded tokens in one batch")
    queue: Positive = Field(1024, description="texts or prompts that may wait; more are answered 429")
    slo: ObjectiveSpec | None = Field(
        None, description="over an encoder: threads and batches are chosen by a short load test to keep to this"
    )
    repeats_mib: Annotated[int, Field(ge=0)] = Field(
        16, description="over an encoder: memory for answers to texts that a key asks again, in MiB; 0: none are kept"
    )
    engine: str | None = Field(None, description="generation: the engine; default: the one the model was measured on")
    streams: Positive | None = Field(
        None, description="generation: answers written at once; default: what compressing measured as best, else 16"
    )
    context: Positive | None = Field(None, description="generation: tokens of prompt and answer; default: the model's")
    cache_mib: Positive = Field(1024, description="generation: memory for keys and values, in MiB")
    adapters_mib: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="memory for adapters and heads, in MiB, with an engine that takes them; default: "
        f"{GENERATOR_ADAPTER_BYTES >> 20} where it generates, {ENCODER_ADAPTER_BYTES >> 20} over an encoder",
    )
    deadline_seconds: Annotated[Number, Field(gt=0)] = Field(
        30.0, description="a request older than this is answered 504"
    )
    pinned: bool = Field(False, description="stays up; others are put to sleep when another endpoint needs the room")


def adapter_bytes(deploy: Mapping[str, Any], *, generates: bool) -> int:
    """What all adapters of an endpoint may take, if its engine takes any."""
    wanted = deploy.get("adapters_mib")
    if wanted is None:
        return GENERATOR_ADAPTER_BYTES if generates else ENCODER_ADAPTER_BYTES
    return int(wanted) << 20


class AdapterSpec(Spec):
    """An adapter or head of an endpoint: `model` names the version that holds it."""

    name: Name
    model: str


def as_task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


# One sequence a row, and a head that stands on the trunk.
TOGETHER_TASKS = ("text-classification", "token-classification", "extractive-qa", "regression")


def _shares(task: TaskSpec) -> TaskSpec:
    if task.name not in TOGETHER_TASKS:
        raise ValueError(f"{task.name} is not learnt together with others; what is: {', '.join(TOGETHER_TASKS)}")
    return task


Shared = Annotated[TaskSpec, BeforeValidator(as_task), AfterValidator(_shares)]


def learnt_together(task: TaskSpec, names: Sequence[str], train: TrainSpec) -> None:
    """Raises ValueError for what cannot be learnt together on one trunk."""
    _shares(task)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the name {twice} is given twice, and each is a model's own")
    alone = ("head", *LABELS_ONLY)
    fitting = [name for name, m in METHODS.items() if (m.merges or m.trains == "weights") and name not in alone]
    if train.method not in fitting:
        raise ValueError(
            f"method {train.method} does not teach the trunk's own weights: set train.method to one of "
            + ", ".join(fitting)
        )
    if train.base_weights != "fp32":
        raise ValueError("tasks are learnt together over whole weights: leave out train.base_weights")
    if train.devices > 1:
        raise ValueError("tasks are learnt together on one device: leave out train.devices")


class AlsoSpec(Spec):
    """Another task, learnt together with the project's own on the same trunk. See docs/tasks.md."""

    name: Name = Field(description="what its data set and its model are called in the store")
    task: Shared = Field(description="what is learnt; as the project's `task`")
    data: DataSpec = Field(description="where its text is; as the project's `data`")


class ProjectSpec(Spec):
    """The whole way from text to endpoint. `tune`, `compress` and `deploy` are left out when not written."""

    name: Name = Field(description="what the data sets and models are called in the store")
    task: Annotated[TaskSpec, BeforeValidator(as_task)] = Field(description="what is learnt")
    data: DataSpec = Field(description="where the text is")
    model: str = Field(
        description="the base model: package:NAME, a folder, hf:NAME, a stored model NAME@VERSION, or one that is made "
        "for the data: scratch:NAME"
    )
    train: TrainSpec = Field(default_factory=TrainSpec, description="how the model is trained")
    tune: TuneSpec | None = Field(None, description="search for the settings of `train` first")
    also: list[AlsoSpec] = Field(
        default_factory=list, description="other tasks that are learnt together with this one, on the same trunk"
    )
    compress: CompressSpec | None = Field(None, description="make it smaller and faster within a quality budget")
    deploy: DeploySpec | None = Field(None, description="serve it")

    @field_validator("compress", "deploy")
    @classmethod
    def _answers(cls, value: Spec | None, info: ValidationInfo) -> Spec | None:
        task = info.data.get("task")
        if value is not None and task is not None and task.name in BASE_TASKS:
            raise ValueError(f"a model of {task.name} answers nothing, it is a base for other tasks: leave this out")
        return value

    @field_validator("tune")
    @classmethod
    def _searches(cls, value: TuneSpec | None, info: ValidationInfo) -> TuneSpec | None:
        task = info.data.get("task")
        if value is not None and task is not None:
            measurable(task, value, info.data.get("train"))
        return value

    @field_validator("also")
    @classmethod
    def _fit_together(cls, value: list[AlsoSpec], info: ValidationInfo) -> list[AlsoSpec]:
        known = info.data
        if not value or any(name not in known for name in ("name", "task", "model", "train")):
            return value
        if known.get("tune") is not None:
            raise ValueError("a search is for the settings of one task: leave out `tune`, or `also`")
        if known["model"].startswith("scratch:"):
            raise ValueError("a base from scratch is made for one task's rows: name another `model`, or leave this out")
        learnt_together(known["task"], [known["name"], *(also.name for also in value)], known["train"])
        return value
