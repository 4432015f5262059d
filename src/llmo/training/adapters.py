"""Puts onto a model what its method trains beside the weights: peft's low-rank updates and scales, or our own parts."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmo.engines.applied import Applied, Bottleneck, MeanHead, Prefix, Prompt
from llmo.engines.applied.places import feed_forward_outputs, hidden_width
from llmo.errors import SpecError
from llmo.methods import LABELS_ONLY
from llmo.specs import TrainSpec
from llmo.tasks.base import Task

# What architectures call the projections to keys and values.
KEYS_AND_VALUES = {"key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "key_proj", "value_proj", "k", "v"}
SHRINK = 2, 3  # AdaLoRA begins with rank * 3 / 2 a module and ends with rank, all modules together
PEFT_TASKS = {"AutoModelForSequenceClassification": "SEQ_CLS", "AutoModelForTokenClassification": "TOKEN_CLS"}


@dataclass(frozen=True, slots=True)
class Wrapped:
    """`model` is what is trained; `adapted` names the modules that peft changed, `applied` is attached to the model."""

    model: nn.Module
    adapted: tuple[str, ...] = ()
    applied: Applied | None = None


def wrap(model: Any, spec: TrainSpec, task: Task, head: list[nn.Module], aside: list[nn.Module]) -> Wrapped:
    """Only what the method adds, and the `head`, learn afterwards; what stands `aside` is not adapted. New weights are
    drawn from torch's generator.

    Raises SpecError for what the model cannot take.
    """
    if spec.method in LABELS_ONLY:
        return _compare(model, spec, task, head)
    if spec.method in ("prefix", "prompt", "bottleneck"):
        return _apply(model, spec, task, head)
    return _adapt(model, spec, head, aside, writes=task.generates)


def _compare(model: Any, spec: TrainSpec, task: Task, head: list[nn.Module]) -> Wrapped:
    """The model's own head stays out of it: it is all zeros, so that nobody takes its answers for the model's."""
    if spec.method == "zero-shot":
        model.requires_grad_(False)
    for parameter in (p for module in head for p in module.parameters()):
        parameter.requires_grad_(False).zero_()
    applied = MeanHead(len(task.labels), hidden_width(model))
    applied.attach(model)
    return Wrapped(model, applied=applied)


def _apply(model: Any, spec: TrainSpec, task: Task, head: list[nn.Module]) -> Wrapped:
    kept = set() if task.generates else {id(p) for module in head for p in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    applied: Applied
    if spec.method == "bottleneck":
        applied = Bottleneck.new(model, spec.bottleneck_width)
    else:
        kind = Prefix if spec.method == "prefix" else Prompt
        applied = kind.new(model, spec.virtual_tokens, PEFT_TASKS.get(task.auto_class, "CAUSAL_LM"))
    applied.attach(model)
    return Wrapped(model, applied=applied)


def _adapt(model: Any, spec: TrainSpec, head: list[nn.Module], aside: list[nn.Module], *, writes: bool) -> Wrapped:
    from peft import get_peft_model  # seconds, and only these methods need it

    wanted = _targets(model, spec, [*head, *aside])
    names = {id(m): name for name, m in model.named_modules()}
    kept = None if writes else [names[id(m)].split(".")[-1] for m in head] or None
    config = _config(model, spec, wanted, {"modules_to_save": kept, "task_type": "CAUSAL_LM" if writes else None})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that is going out of use
        wrapped = get_peft_model(model, config)
    return Wrapped(wrapped, tuple(wanted))


def _config(model: Any, spec: TrainSpec, wanted: list[str], common: dict[str, Any]) -> Any:
    from peft import AdaLoraConfig, IA3Config, LoraConfig

    if spec.method == "ia3":
        fed = [name for name in feed_forward_outputs(model) if name in wanted]
        return IA3Config(target_modules=wanted, feedforward_modules=fed, **common)
    low_rank = {"lora_alpha": spec.lora.alpha, "lora_dropout": spec.lora.dropout, "target_modules": wanted, **common}
    if spec.method == "adalora":
        last, first = SHRINK
        # The steps are not known yet: `along` sets them.
        return AdaLoraConfig(
            target_r=spec.lora.rank, init_r=max(spec.lora.rank + 1, spec.lora.rank * first // last), total_step=3,
            **low_rank,
        )  # fmt: skip
    return LoraConfig(r=spec.lora.rank, use_rslora=spec.method == "rslora", use_dora=spec.method == "dora", **low_rank)


def _targets(model: Any, spec: TrainSpec, aside: list[nn.Module]) -> list[str]:
    """The full names of the modules that change: those that `lora.target_modules` names, or else the method's own.

    Raises SpecError when there is none, and for a rank that is no less than a module is wide.
    """
    inside = {id(m) for top in aside for m in top.modules()}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside}
    known = sorted({name.split(".")[-1] for name in linear})
    asked = spec.lora.target_modules
    if asked is not None:
        wanted = [name for name in linear if any(name == end or name.endswith(f".{end}") for end in asked)]
        if not wanted:
            raise SpecError(
                f"no linear layer is called {' or '.join(asked)}",
                hint=f"train.lora.target_modules may name: {', '.join(known)}",
            )
    elif spec.method == "ia3":
        wanted = [name for name in linear if name.split(".")[-1] in KEYS_AND_VALUES]
        if not wanted:
            raise SpecError(
                f"'{model.config.model_type}' has no projections to keys and values alone, which method ia3 scales",
                hint=f"name the modules in train.lora.target_modules: {', '.join(known)}; or set train.method to lora",
            )
        wanted += [name for name in feed_forward_outputs(model) if name not in wanted]
    else:
        wanted = list(linear)
    if spec.method != "ia3":
        _check_rank(spec, {name: linear[name] for name in wanted})
    return wanted


def _check_rank(spec: TrainSpec, wanted: dict[str, nn.Linear]) -> None:
    narrowest = min(wanted, key=lambda name: min(wanted[name].in_features, wanted[name].out_features))
    width = min(wanted[narrowest].in_features, wanted[narrowest].out_features)
    if spec.lora.rank >= width:
        raise SpecError(
            f"an update of rank {spec.lora.rank} is no smaller than what it updates: {narrowest} is {width} wide",
            hint=f"set train.lora.rank below {width}, or train.method to full",
        )


def merge(model: Any) -> Any:
    """The transformers model with peft's updates within its weights."""
    from peft.utils import ModulesToSaveWrapper

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ModulesToSaveWrapper):  # peft's IA3 fails over heads that are no single layer
                setattr(parent, name, child.modules_to_save[child.active_adapters[0]])
    return model.merge_and_unload()
