"""What each operation is asked for: a section of a project with what only the system adds, and what it works on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from llmo.specbase import Name, Number, Positive, Spec
from llmo.specs import (
    CompressSpec,
    DataSpec,
    DeploySpec,
    Shared,
    TaskSpec,
    TrainSpec,
    TuneSpec,
    as_task,
    learnt_together,
    measurable,
)


class ImportSpec(DataSpec):
    """The operation `import`: a data section, the task it is for, and the content it had when it was asked for."""

    task: Annotated[TaskSpec, BeforeValidator(as_task)] = Field(description="what is learnt")
    source_digest: str | None = None
    uploads: str | None = None


class BaseModelSpec(Spec):
    """The operation `base-model`."""

    source: str
    source_digest: str | None = None
    uploads: str | None = None


class ScratchSpec(Spec):
    """The operation `scratch-model`: what `scratch:NAME,KEY=VALUE` asks for."""

    architecture: Literal["transformer-tiny", "lstm", "causal-tiny", "sasrec"]
    vocabulary: Annotated[int, Field(ge=300, le=200_000)] | None = Field(
        None, description="entries of the tokeniser; default: by how much text there is"
    )
    width: Annotated[int, Field(ge=16, le=2048, multiple_of=8)] | None = Field(
        None, description="width of the hidden states; default: lstm 256, sasrec 64, the others 128"
    )
    layers: Annotated[int, Field(ge=1, le=48)] | None = Field(
        None, description="default: lstm 1, causal-tiny 4, the others 2"
    )
    seed: int = Field(13, description="of the weights; default: train.seed")


class ForeignAdapterSpec(BaseModelSpec):
    """The operation `adapter`."""


class PlainSpec(Spec):
    """The operation `plain`."""


class AlsoJobSpec(Spec):
    """Another task of the operation `train`, whose rows are the input `data:NAME`."""

    name: Name
    task: Shared


class TrainJobSpec(TrainSpec):
    """The operation `train`."""

    task: Annotated[TaskSpec, BeforeValidator(as_task)] = Field(description="what is learnt")
    also: list[AlsoJobSpec] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fit_together(self) -> TrainJobSpec:
        if self.also:
            learnt_together(self.task, [also.name for also in self.also], self)
        return self


class PartSpec(Spec):
    """The operation `part`: the model of another task that the input `model` was trained together with."""

    name: Name


class FoldSpec(Spec):
    """Part `index` of `of`, from 0: its rows of train and dev together are dev, all others train."""

    index: Annotated[int, Field(ge=0)]
    of: Annotated[int, Field(ge=2)]
    seed: int


class RungSpec(Spec):
    """After this share of the steps dev is measured; a trial that is worse than `bar`, if there is one, ends."""

    share: Annotated[Number, Field(gt=0, lt=1)]
    bar: Number | None = None


class TrialSpec(TrainJobSpec):
    """The operation `trial`: a training of which only the figures are kept."""

    fold: FoldSpec | None = None
    rungs: list[RungSpec] = Field(default_factory=list)
    latency: bool = False


class TuneJobSpec(TuneSpec):
    """The operation `tune`. `width` trials run at once, each on at most `cores` cores: set for the machine when it is
    submitted (`llmo.searches`)."""

    task: Annotated[TaskSpec, BeforeValidator(as_task)] = Field(description="what is learnt")
    train: TrainSpec = Field(default_factory=TrainSpec, description="what the search does not vary")
    width: Positive = 1
    cores: Positive = 1

    @model_validator(mode="after")
    def _searches(self) -> TuneJobSpec:
        measurable(self.task, self, self.train)
        return self


class EvaluateSpec(Spec):
    """The operation `evaluate`."""

    split: Literal["train", "dev", "test"] = Field("test", description="which rows")
    answers: Annotated[int, Field(ge=0)] = Field(
        0, description="generation: rows that are answered too, greedily, and compared with their references"
    )


class ExportSpec(Spec):
    """The operation `export`, which only this machine's own doors ask for: it writes where they say.

    `model` and `digest` name what is exported, `original` what it was compressed from, if it was.
    """

    target: Literal["edge", "onnx", "openvino"] = "edge"
    out: str
    precision: Literal["fp32", "int8"] | None = None
    max_mb: Annotated[Number, Field(gt=0)] | None = None
    model: str
    digest: str
    original: str


class HeardSpec(Spec):
    """What an endpoint answered to one golden text: logits `[labels]` or `[tokens, labels]`, or the tokens it wrote."""

    input_ids: list[int]
    logits: list[Number] | list[list[Number]] = Field(default_factory=list)
    tokens: list[int] | None = None


class VerifySpec(Spec):
    """The operation `verify`. `heard`, an endpoint's answers to the model's golden texts in their order, is compared
    too; whoever asks for it asks the endpoint, so that no job holds an address or a key."""

    heard: list[HeardSpec] | None = None


ALSO = "data:"  # begins the names of the inputs of `train` that hold other tasks' rows
# What each operation works on: its inputs by name, and those it can do without.
INPUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "scratch-model": (("data",), ()),
    "plain": (("model",), ()),
    "adapter": (("model",), ()),
    "train": (("data", "model"), ()),
    "part": (("data", "model"), ()),
    "explain": (("data", "model"), ()),
    "tune": (("data", "model"), ()),
    "evaluate": (("data", "model"), ("against",)),
    "compress": (("data", "model"), ()),
    "verify": (("model",), ("reference",)),
    "serve": (("model",), ()),
}

OPERATIONS: dict[str, type[Spec]] = {
    "import": ImportSpec,
    "base-model": BaseModelSpec,
    "scratch-model": ScratchSpec,
    "plain": PlainSpec,
    "adapter": ForeignAdapterSpec,
    "train": TrainJobSpec,
    "part": PartSpec,
    "explain": TrainJobSpec,
    "tune": TuneJobSpec,
    "evaluate": EvaluateSpec,
    "compress": CompressSpec,
    "verify": VerifySpec,
    "serve": DeploySpec,
}
