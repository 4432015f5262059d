"""Builds the model that is trained: the base with the task's head, and which of its weights may change."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from llmo.engines.folder import position_limit
from llmo.engines.torch import quiet
from llmo.errors import ModelError, SpecError
from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.base import Task
from llmo.training import dropout
from llmo.training.architecture import check_config

PLAIN_ATTENTION_UP_TO = 512  # tokens; past it the fused attention's smaller memory is worth more than speed
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout"),
    *("hidden_dropout", "activation_dropout", "embedding_dropout", "mlp_dropout", "seq_classif_dropout"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "pooler_dropout"),
)


@dataclass(frozen=True, slots=True)
class Built:
    """`model` is what is trained (wrapped by peft for LoRA); `trained` and `parameters` count numbers."""

    model: nn.Module
    trained: int
    parameters: int
    adapted: tuple[str, ...]  # modules that carry a LoRA adapter

    @property
    def network(self) -> Any:
        """The transformers model itself."""
        return self.model.get_base_model() if self.adapted else self.model  # type: ignore[operator]

    @property
    def pad_id(self) -> int:
        """What fills a batch; it is masked out, so any id serves where the config names none."""
        found = self.network.config.pad_token_id
        return found if isinstance(found, int) and found >= 0 else 0

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)


def build(base: Path, task: Task, spec: TrainSpec, on_cpu: bool = True) -> Built:
    """Open `base` with the task's head (kept when it has the same labels, else new) and freeze what is not trained.

    A causal model's projection to the vocabulary is no head: it has to be there, LoRA leaves it out, and last-n frees
    the norm before it instead. Uses torch's generator for new weights: seed it before. Raises ModelError for a base
    that cannot be opened and SpecError for a request that does not fit it.
    """
    if not task.labels and spec.method == "head":
        what = "a model that writes" if task.generates else f"a model for {task.name}"
        raise SpecError(
            f"method head trains a new head on a frozen trunk, and {what} has no head of its own",
            hint="set train.method to lora, last-n or full",
        )
    model = _open(base, task, spec, on_cpu)
    if on_cpu:
        dropout.replace_dropout(model)
    if not task.labels and not task.generates:
        for module in _pooler(model):
            module.requires_grad_(False)  # vectors are made before it
    adapted: tuple[str, ...] = ()
    trained: nn.Module = model
    if spec.method == "lora":
        trained, adapted = _with_lora(model, spec.lora, task)
    elif spec.method != "full":
        top = _final_norms(model) if task.generates else _head(model)
        free = [top] if spec.method == "head" else [top, _last_layers(model, spec.last_n)]
        kept = {id(p) for group in free for module in group for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
    total = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for n, p in trained.named_parameters() if adapted and ("lora_" in n or ".original_module." in n)
    )
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    return Built(trained, count, total, adapted)


def set_training(model: nn.Module) -> None:
    """Training mode, but frozen parts without dropout: they are a fixed function."""
    model.train()
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


def merged(built: Built) -> Any:
    """The plain transformers model that says the same: LoRA's update added into the weights."""
    return built.model.merge_and_unload() if built.adapted else built.model  # type: ignore[operator]


def _open(base: Path, task: Task, spec: TrainSpec, on_cpu: bool) -> Any:
    written = check_config(base)
    limit = position_limit(written)
    if limit is not None and task.max_length > limit:
        raise SpecError(
            f"max_length is {task.max_length}, but this model reads at most {limit} tokens",
            hint=f"set task.max_length to {limit} or less",
        )
    with quiet():
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    renew = bool(task.labels) and _label(config, written, task) and task.has_classes
    if spec.dropout is not None:
        for name in DROPOUTS:
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, spec.dropout)
    model, info = _load(base, task, config, _attention(written, task, on_cpu))
    _check_loaded(
        model, info, base, set() if task.generates else _names(model, [*_outside_trunk(model), *_pooler(model)])
    )
    model.name_or_path = config._name_or_path = ""  # a path of this machine, which would be saved with the model
    if renew:
        _renew_answers(model, len(task.labels))
    return model


def _label(config: Any, written: dict[str, Any], task: Task) -> bool:
    """Put the task's labels into the config; whether they are others than it had."""
    labels = dict(enumerate(task.labels))
    known = {int(k): v for k, v in (written.get("id2label") or {}).items()}
    config.id2label, config.label2id = labels, {label: i for i, label in labels.items()}
    config.problem_type = task.problem_type
    if config.pad_token_id is None:
        config.pad_token_id = 0
    return known != labels


def _renew_answers(model: Any, labels: int) -> None:
    """An answer layer of as many labels, but other ones, is worth nothing. (transformers skips what it has loaded.)"""
    for part in (part for module in _outside_trunk(model) for part in module.modules()):
        if isinstance(part, nn.Linear) and part.out_features == labels:
            nn.init.normal_(part.weight, std=getattr(model.config, "initializer_range", 0.02))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def _attention(config: dict[str, Any], task: Task, on_cpu: bool) -> str:
    if not on_cpu or task.max_length > PLAIN_ATTENTION_UP_TO:
        return "sdpa"
    return dropout.ATTENTION if config["model_type"] in dropout.SAME_ATTENTION else "eager"


def _load(base: Path, task: Task, config: Any, attention: str) -> tuple[Any, dict[str, Any]]:
    auto_class = getattr(transformers, task.auto_class)
    if type(config) not in auto_class._model_mapping:
        raise ModelError(
            f"transformers has no {task.auto_class} for the architecture '{config.model_type}'",
            hint="take a causal model such as SmolLM2, Llama or Qwen for this task"
            if task.generates
            else "take an encoder such as BERT or RoBERTa for this task",
            where=str(base),
        )
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                base,
                config=config,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"transformers cannot open the base model: {(str(error).strip().splitlines() or [repr(error)])[0][:200]}",
            hint="import it again with `base-model`",
            where=str(base),
        ) from error
    return model, dict(info)


def _names(model: Any, modules: list[nn.Module]) -> set[str]:
    mine = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in mine}


def _check_loaded(model: Any, info: dict[str, Any], base: Path, new: set[str]) -> None:
    """Only a head (and the pooler that leads to it) may be new: anything else means the wrong weights."""
    missing = sorted(set(info["missing_keys"]) - new)
    wrong = sorted({str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]} - new)
    if missing or wrong:
        what = f"lack {len(missing)} tensors, such as {missing[0]}" if missing else f"have another shape at {wrong[0]}"
        raise ModelError(
            f"the weights do not fit the config: they {what}",
            hint="config.json and model.safetensors are of different models",
            where=str(base),
        )


def _outside_trunk(model: Any) -> list[nn.Module]:
    """Nothing, where the model is a bare trunk."""
    if model.base_model is model:
        return []
    prefix = model.base_model_prefix
    return [
        module for name, module in model.named_children() if name != prefix and any(True for _ in module.parameters())
    ]


def _head(model: Any) -> list[nn.Module]:
    """What stands on the trunk, and the trunk's pooler that feeds it."""
    outside = _outside_trunk(model)
    return [*outside, *_pooler(model)] if outside else []


def _pooler(model: Any) -> list[nn.Module]:
    pooler = getattr(model.base_model, "pooler", None)
    return [pooler] if isinstance(pooler, nn.Module) else []


def _final_norms(model: Any) -> list[nn.Module]:
    """What stands between a causal model's last layer and its projection."""
    return [
        module
        for module in model.base_model.children()
        if not isinstance(module, nn.ModuleList | nn.Embedding) and any(True for _ in module.parameters())
    ]


def _last_layers(model: Any, count: int) -> list[nn.Module]:
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=None)
    if layers is None or count > len(layers):
        raise SpecError(
            f"last_n is {count}, but the model has {len(layers) if layers is not None else 0} layers",
            hint="set train.last_n lower, or train.method to full",
        )
    return list(layers[-count:])


def _with_lora(model: Any, spec: LoraSpec, task: Task) -> tuple[nn.Module, tuple[str, ...]]:
    from peft import LoraConfig, get_peft_model  # seconds, and only this method needs it

    head = {id(m) for top in [*_head(model), *_pooler(model)] for m in top.modules()}
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in head]
    wanted = linear
    if spec.target_modules is not None:
        ends = tuple(spec.target_modules)
        wanted = [name for name in linear if name.split(".")[-1] in ends or name.endswith(tuple("." + e for e in ends))]
        if not wanted:
            known = sorted({name.split(".")[-1] for name in linear})
            raise SpecError(
                f"no linear layer is called {' or '.join(spec.target_modules)}",
                hint=f"train.lora.target_modules may name: {', '.join(known)}",
            )
    names = {id(m): name for name, m in model.named_modules()}
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=wanted,
        modules_to_save=None if task.generates else [names[id(m)].split(".")[-1] for m in _head(model)] or None,
        task_type="CAUSAL_LM" if task.generates else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that is going out of use
        wrapped = get_peft_model(model, config)
    return wrapped, tuple(wanted)
