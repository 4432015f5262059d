"""Adapters: whether every adapted module is there and changes its layer, and what the model says without them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmo.engines.applied import attached
from llmo.engines.heads import logits_of
from llmo.engines.torch import open_model
from llmo.errors import ModelError
from llmo.tasks.base import Logits
from llmo.tasks.card import ADAPTER
from llmo.verify.checks import Check, difference

PREFIX = "base_model.model."
FORGET = "the merged weights cannot be traced to their adapter: train the model again"
_RANK = 1e-5  # what peft adds to AdaLoRA's number of ranks


@dataclass(frozen=True, slots=True)
class Merged:
    """What an adapter did. `gains`: by parameter what the merge added to it, as far as the adapter alone tells;
    `whole` is False where more than that changed, so that the merge cannot be taken back."""

    gains: Mapping[str, Tensor]
    whole: bool = True


def merged(folder: Path, model: Any) -> Merged:
    """What the folder's adapter added to the weights of its `model`. Modules that lack one of their tensors are left
    out. Raises ModelError when the adapter cannot be read."""
    path = folder / ADAPTER
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = {k.removeprefix(PREFIX): v for k, v in load_file(path / "adapter_model.safetensors").items()}
        if config.get("peft_type") == "IA3":
            return Merged(_scaled(tensors, model))
        if config.get("peft_type") == "ADALORA":
            return Merged(_shared_out(tensors, config))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"the adapter cannot be read: {error}", where=str(path), hint=FORGET) from error
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    found = {}
    for key, a in tensors.items():
        b = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if ".lora_A." in key and b is not None and b.shape[1] == a.shape[0]:
            found[f"{key.partition('.lora_A.')[0]}.weight"] = scale * (b @ a)
    return Merged(found, whole=not config.get("use_dora"))


def checks_of(saved: Path, card: Mapping[str, Any], said: Callable[[Any], Sequence[Logits]]) -> list[Check]:
    """What can be checked of the adapter that the card tells of; nothing where there is none. `said` gives what a model
    says of the golden texts."""
    modules = card.get("adapted_modules") or []
    if not modules and not card.get("applied"):
        return []
    model = open_model(saved)
    beside = attached(model)
    with_it = said(model)
    if beside is not None:
        with beside.without():
            return [effect(difference(said(model), with_it))]
    found = merged(saved, model)
    checks = [applied(model, modules, found, all_change=card["method"] != "adalora")]
    if found.whole:
        with without(model, found):
            checks.append(effect(difference(said(model), with_it)))
    return checks


def _shared_out(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """AdaLoRA: `scale * B @ (A * E)`; a module that kept no rank gained nothing."""
    scale = float(config["lora_alpha"]) / (int(config["init_r"]) + _RANK)
    found = {}
    for key, a in tensors.items():
        b, e = (tensors.get(key.replace("lora_A", other)) for other in ("lora_B", "lora_E"))
        if key.endswith("lora_A") and b is not None and e is not None and b.shape[1] == a.shape[0] == e.shape[0]:
            found[key.replace("lora_A", "weight")] = scale * (b @ (a * e))
    return found


def _scaled(tensors: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """IA3 multiplied inputs (`[1, in]`) or outputs and their bias (`[out, 1]`): `merged - merged / scale`."""
    there = dict(model.named_parameters())
    found = {}
    for key, scale in tensors.items():
        weight, bias = (there.get(key.replace("ia3_l", end)) for end in ("weight", "bias"))
        if not key.endswith("ia3_l") or weight is None or not bool((scale != 0).all()):
            continue
        found[key.replace("ia3_l", "weight")] = weight.detach() * (1.0 - 1.0 / scale)
        if scale.shape[1] == 1 and bias is not None:
            found[key.replace("ia3_l", "bias")] = bias.detach() * (1.0 - 1.0 / scale[:, 0])
    return found


def applied(model: Any, expected: Sequence[str], found: Merged, *, all_change: bool = True) -> Check:
    """Every module that was trained has an update of the right shape that is not zero; where the method may give a
    module up (`all_change` False), one of them at least."""
    there = dict(model.named_parameters())
    fitting = {
        name: update
        for name, update in ((name, found.gains.get(f"{name}.weight")) for name in expected)
        if update is not None and f"{name}.weight" in there and update.shape == there[f"{name}.weight"].shape
    }
    changing = {name for name, update in fitting.items() if bool(update.abs().max() > 0)}
    good = changing if all_change or not changing else set(fitting)
    lacking = sorted(set(expected) - good)
    text = f"adapter modules applied: {len(good)} of {len(expected)}"
    text += f", not {lacking[0]}" if lacking else ""
    return Check("adapter modules", len(good) == len(expected) > 0, len(good), len(expected), text, FORGET)


def effect(value: float) -> Check:
    """`value` is the largest difference of logits with and without the adapter."""
    text = f"effect of the adapter on the logits: {value:.1e} (above 0)"
    return Check("adapter effect", value > 0, value, 0.0, text, "the adapter learnt nothing: train longer")


def logits(model: Any, texts: Sequence[Sequence[int]]) -> list[Logits]:
    """What the model says of each text, alone."""
    with torch.inference_mode():
        given = [torch.tensor([list(ids)]) for ids in texts]
        return [logits_of(model(input_ids=ids), torch.ones_like(ids))[0].numpy() for ids in given]


@contextmanager
def without(model: Any, found: Merged) -> Iterator[None]:
    """The model as it was before the merge; its merged weights are put back bit for bit afterwards."""
    there = dict(model.named_parameters())
    known = {n: update for n, update in found.gains.items() if n in there and update.shape == there[n].shape}
    kept = {name: there[name].detach().clone() for name in known}
    with torch.no_grad():
        for name, update in known.items():
            there[name] -= update
        try:
            yield
        finally:
            for name, weight in kept.items():
                there[name].copy_(weight)
