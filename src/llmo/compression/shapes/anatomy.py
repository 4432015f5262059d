"""What the layers of an encoder are made of, by architecture: the parts that are cut, by the names they have there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmo.errors import ModelError
from llmo.training.model import layers


@dataclass(frozen=True, slots=True)
class Names:
    """Of the linear layers within a layer: into attention, out of it, and up to and down from the feed-forward width,
    which `inner` names in the config."""

    attention: tuple[str, str, str]
    merge: str
    up: str
    down: str
    inner: str = "intermediate_size"


_BERT = Names(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Names(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", "ffn.lin1", "ffn.lin2",
        "hidden_dim",
    ),
    "mpnet": Names(
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o", "intermediate.dense",
        "output.dense",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """Linear layers of one layer; weights are `[out, in]`."""

    attention: tuple[nn.Linear, nn.Linear, nn.Linear]
    merge: nn.Linear
    up: nn.Linear
    down: nn.Linear

    @property
    def linear(self) -> tuple[nn.Linear, ...]:
        return (*self.attention, self.merge, self.up, self.down)


def names_of(model_type: str) -> Names:
    """Raises ModelError for an architecture whose layers are not known."""
    found = FAMILIES.get(model_type)
    if found is None:
        raise ModelError(
            f"what a layer of the architecture '{model_type}' is made of is not known here",
            hint=f"vocabulary and layers can be made fewer; columns and heads are cut of {', '.join(FAMILIES)}",
        )
    return found


def anatomy(model: Any) -> list[Layer]:
    """The model's layers, bottom to top. Raises ModelError for an architecture that is not known."""
    names = names_of(model.config.model_type)
    found = []
    for layer in layers(model):
        query, key, value = (layer.get_submodule(name) for name in names.attention)
        merge, up, down = (layer.get_submodule(name) for name in (names.merge, names.up, names.down))
        found.append(Layer((query, key, value), merge, up, down))  # type: ignore[arg-type]
    return found


def count(asked: int, there: int, what: str) -> int:
    """How many are kept. Raises ModelError for a number that is not below what is there."""
    if not 0 < asked < there:
        raise ModelError(f"{asked} {what} cannot be kept of {there}", hint=f"give a number from 1 to {there - 1}")
    return asked


def stack(model: Any) -> tuple[nn.Module, str]:
    """Where the model's layers are: what holds their list, and its name there."""
    found = layers(model)
    for module in model.modules():
        for name, child in module.named_children():
            if child is found:
                return module, name
    raise ModelError("the model has no list of layers", hint="its vocabulary alone can be made smaller")


def spread(count: int, total: int) -> Sequence[int]:
    """The numbers of `count` of `total` layers, evenly spread, the last one among them."""
    return [round((i + 1) * total / count) - 1 for i in range(count)]
