"""Builds the model that is trained: the base with the task's head, and which of its weights may change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from llmo import methods
from llmo.engines.applied import Applied, attached
from llmo.engines.folder import card_applied, position_limit
from llmo.engines.torch import quiet
from llmo.errors import ModelError, SpecError
from llmo.specs import TrainSpec
from llmo.tasks.base import Task
from llmo.training import adapters, dropout, narrow, norms
from llmo.training.architecture import check_config

PLAIN_ATTENTION_UP_TO = 512  # tokens; past it the fused attention's smaller memory is worth more than speed
DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout", "attention_dropout"),
    *("hidden_dropout", "activation_dropout", "embedding_dropout", "mlp_dropout", "seq_classif_dropout"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "pooler_dropout"),
)


@dataclass(frozen=True, slots=True)
class Built:
    """`model` is what is trained (wrapped by peft where it adapts modules); `trained` and `parameters` count numbers,
    those that the method added among the first only."""

    model: nn.Module
    trained: int
    parameters: int
    adapted: tuple[str, ...] = ()  # modules that carry an adapter of peft's
    applied: Applied | None = None  # what the model runs with beside its weights
    others: nn.ModuleList = field(default_factory=nn.ModuleList)  # heads of other tasks that learn on its trunk

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
        named = chain(self.model.named_parameters(), self.others.named_parameters(prefix="others"))
        return ((name, p) for name, p in named if p.requires_grad)


def build(base: Path, task: Task, spec: TrainSpec, on_cpu: bool = True) -> Built:
    """Open `base` with the task's head (kept when it has the same labels, else new) and freeze what is not trained.

    A causal model's projection to the vocabulary is no head: it has to be there, LoRA leaves it out, and last-n frees
    the norm before it instead. Uses torch's generator for new weights: seed it before. Raises ModelError for a base
    that cannot be opened and SpecError for a request that does not fit it.
    """
    methods.check(spec.method, spec.base_weights, task.name, has_head=task.has_head)
    model = open_base(base, task, spec, on_cpu)
    if on_cpu:
        dropout.replace_dropout(model)
    norms.replace_norms(model)
    if not task.labels and not task.generates:
        for module in _pooler(model):
            module.requires_grad_(False)  # vectors are made before it
    if spec.activation_checkpointing:
        _checkpoint_activations(model, spec)
    total = sum(p.numel() for p in model.parameters())
    wrapped = adapters.Wrapped(model)
    if spec.base_weights != "fp32":
        narrow.narrow(model, spec.base_weights, _head(model))
    if spec.method not in ("full", "head", "last-n"):
        wrapped = adapters.wrap(model, spec, task, _head(model), _pooler(model))
    elif spec.method in ("head", "last-n"):
        top = _final_norms(model) if task.generates else _head(model)
        free = [top] if spec.method == "head" else [top, _last_layers(model, spec.last_n)]
        kept = {id(p) for group in free for module in group for p in module.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
    count = sum(p.numel() for p in wrapped.model.parameters() if p.requires_grad)
    return Built(wrapped.model, count, total, wrapped.adapted, wrapped.applied)


def set_training(model: nn.Module) -> None:
    """Training mode, but frozen parts without dropout: they are a fixed function, unless what is applied beside them
    learns through them."""
    model.train()
    if attached(model) is not None:
        return
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(p.requires_grad for p in own):
            module.eval()


def merged(built: Built) -> Any:
    """The plain transformers model, with peft's updates within its weights; what is applied beside them is detached.
    `built` is spent afterwards."""
    narrow.widen(built.model)
    if built.applied is not None:
        built.applied.detach(built.model)
    return adapters.merge(built.model) if built.adapted else built.model


def open_base(base: Path, task: Task, spec: TrainSpec, on_cpu: bool) -> Any:
    """The transformers model of `base` with a head for the task, all of which learns. Raises as `build` does."""
    written = check_config(base)
    if card_applied(base) is not None:
        raise ModelError(
            f"the base runs with a {card_applied(base)} beside its weights, which training on it would lose",
            hint="train on the model that it was trained on",
            where=str(base),
        )
    methods.check_length(spec.method, spec.virtual_tokens, task.max_length, position_limit(written))
    with quiet():
        config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    renew = bool(task.labels) and _label(config, written, task) and task.has_classes
    if spec.dropout is not None:
        for name in DROPOUTS:
            if isinstance(getattr(config, name, None), float):
                setattr(config, name, spec.dropout)
    model, info = load(base, task, config, _attention(written, task, on_cpu))
    check_loaded(
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


def load(base: Path, task: Task, config: Any, attention: str) -> tuple[Any, dict[str, Any]]:
    """The transformers model of the folder as `config` says, and how its weights fitted. Raises ModelError."""
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


def _checkpoint_activations(model: Any, spec: TrainSpec) -> None:
    """Chen et al. 2016. The second pass has the first one's random numbers and precision: the gradients are equal."""
    if spec.method == "prefix":
        raise SpecError(
            "transformers leaves out what comes before a text when it computes activations again, and a prefix is that",
            hint="leave train.activation_checkpointing out, or set train.method to prompt or lora",
        )
    if not model.supports_gradient_checkpointing:
        raise SpecError(
            f"transformers has no activation checkpointing for the architecture '{model.config.model_type}'",
            hint="leave train.activation_checkpointing out; gradient_accumulation_steps saves memory too",
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def _names(model: Any, modules: list[nn.Module]) -> set[str]:
    mine = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in mine}


def check_loaded(model: Any, info: dict[str, Any], base: Path, new: set[str]) -> None:
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


def layers(model: Any) -> nn.ModuleList:
    """The trunk's layers, of the same kind one after the other; empty where there are none."""
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _last_layers(model: Any, count: int) -> list[nn.Module]:
    found = layers(model)
    if count > len(found):
        raise SpecError(
            f"last_n is {count}, but the model has {len(found)} layers",
            hint="set train.last_n lower, or train.method to full",
        )
    return list(found[-count:])
