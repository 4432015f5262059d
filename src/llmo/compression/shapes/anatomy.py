"""What the layers of an encoder are made of, by architecture: the parts that are cut, by the names they have there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llmo.errors import ModelError
from llmo.training.model import layers


@dataclass(frozen=True, slots=True)
class Names:
    """Of the linear layers within a layer: into attention, out of it, and up to and down from the feed-forward width,
    which `inner` names in the config; and of the two norms, after attention and after the feed-forward part."""

    attention: tuple[str, str, str]
    merge: str
    up: str
    down: str
    norms: tuple[str, str]
    inner: str = "intermediate_size"


_BERT = Names(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
    ("attention.output.LayerNorm", "output.LayerNorm"),
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Names(
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin", "ffn.lin1", "ffn.lin2",
        ("sa_layer_norm", "output_layer_norm"), "hidden_dim",
    ),
    "mpnet": Names(
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"), "attention.attn.o", "intermediate.dense",
        "output.dense", ("attention.LayerNorm", "output.LayerNorm"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Layer:
    """Linear layers of one layer, whose weights are `[out, in]`, and its norms."""

    attention: tuple[nn.Linear, nn.Linear, nn.Linear]
    merge: nn.Linear
    up: nn.Linear
    down: nn.Linear
    norms: tuple[nn.LayerNorm, nn.LayerNorm]

    @property
    def linear(self) -> tuple[nn.Linear, ...]:
        return (*self.attention, self.merge, self.up, self.down)

    def silent(self, size: int) -> Tensor:
        """`[heads]`: which heads, `size` wide, say nothing, whatever the text: all that is read of them is zero, or all
        their values are. Without these an engine computes the same; it may be all of them, and then attention adds
        the bias of `merge` alone."""
        value = self.attention[2]
        said = value.weight.detach().view(-1, size, value.in_features).any(2).any(1)
        if value.bias is not None:
            said |= value.bias.detach().view(-1, size).any(1)
        return ~(said & self.merge.weight.detach().view(self.merge.out_features, -1, size).any(2).any(0))


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
        attended, fed = (layer.get_submodule(name) for name in names.norms)
        found.append(Layer((query, key, value), merge, up, down, (attended, fed)))  # type: ignore[arg-type]
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
