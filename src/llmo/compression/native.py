"""A saved encoder of the BERT family as the int8 file that the native engine reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmo.engines.folder import card_applied
from llmo.engines.native.encoder_model import FILE, FORMAT, LANES
from llmo.engines.torch import open_model
from llmo.errors import ModelError

# The kinds of GELU differ by less than what rounding to 8 bits costs.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu"),
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}
TINY = 1e-10  # keeps the scale of an all-zero row above zero


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family calls its parts: below its trunk the layers, and below each layer the rest."""

    layers: str
    queries: tuple[str, str, str]  # query, key and value
    out: str
    attended: str
    up: str
    down: str
    fed: str


_BERT = _Family(
    "encoder.layer",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_DISTILBERT = _Family(
    "transformer.layer",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.lin2",
    "output_layer_norm",
)
FAMILIES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _BERT),
    "distilbert": _DISTILBERT,
}


@dataclass(frozen=True, slots=True)
class Written:
    """`bits` a weight, scales included."""

    bits: float


def write(folder: Path, out: Path) -> Written:
    """Write the model of a saved folder into the folder `out`. Heads of attention that are all zero are left out.

    Raises ModelError for an architecture that the engine does not compute.
    """
    beside = card_applied(folder)
    if beside is not None:
        raise _cannot(f"that runs with a {beside} beside its weights", folder)
    model = open_model(folder)
    config = model.config
    kind = config.model_type
    activation = str(getattr(config, "hidden_act", None) or getattr(config, "activation", None))
    hidden, dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    unusual = [
        f"of the family '{kind}'" if kind not in FAMILIES else "",
        f"activated by '{activation}'" if activation not in ACTIVATIONS else "",
        "with relative positions" if getattr(config, "position_embedding_type", "absolute") != "absolute" else "",
        "that is a decoder" if getattr(config, "is_decoder", False) else "",
        f"{hidden} wide with heads of {dim}, which are no multiples of {LANES}"
        if hidden % LANES or dim % LANES
        else "",
    ]
    for what in filter(None, unusual):
        raise _cannot(what, folder)
    weights = _Weights(model)
    weights.take_trunk(FAMILIES[kind], dim)
    sizes = {
        "format": FORMAT,
        "layers": config.num_hidden_layers,
        "hidden": hidden,
        "dim": dim,
        "activation": ACTIVATIONS[activation],
        "eps": getattr(config, "layer_norm_eps", 1e-12),
        "head": weights.take_head(folder),
    }
    save_file(weights.made, out / FILE, {"llmo": json.dumps(sizes)})
    size = sum(tensor.nbytes for tensor in weights.made.values())
    return Written(8 * size / sum(parameter.numel() for parameter in model.parameters()))


def _cannot(what: str, folder: Path) -> ModelError:
    return ModelError(
        f"the native engine cannot run a model {what}",
        hint=f"it is for {', '.join(FAMILIES)}; the torch and onnx engines run others",
        where=str(folder),
    )


class _Weights:
    """One use: the tensors of the file, taken from a model of transformers."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._trunk = model.base_model
        self.made: dict[str, Tensor] = {}

    def take_trunk(self, family: _Family, dim: int) -> None:
        embeddings = self._trunk.embeddings
        places = embeddings.position_embeddings.weight
        padding = getattr(embeddings.position_embeddings, "padding_idx", None)
        if padding is not None:
            places = places[padding + 1 :]
        kinds = getattr(embeddings, "token_type_embeddings", None)
        if kinds is not None:
            places = places + kinds.weight[0]
        self._rounded("words", embeddings.word_embeddings.weight)
        self._rounded("places", places)
        self._norm("embedded", embeddings.LayerNorm)
        for number, layer in enumerate(self._trunk.get_submodule(family.layers)):
            self._layer(f"layer.{number}.", layer, family, dim)

    def _layer(self, name: str, layer: Any, family: _Family, dim: int) -> None:
        part = layer.get_submodule
        out = part(family.out)
        kept = out.weight.view(len(out.weight), -1, dim).abs().amax(dim=(0, 2)) > 0  # heads that say something
        if not kept.any():
            kept[0] = True
        rows = kept.repeat_interleave(dim)
        queries = [part(query) for query in family.queries]
        self._rounded(f"{name}qkv", torch.cat([query.weight[rows] for query in queries]))
        self.made[f"{name}qkv.bias"] = torch.cat([query.bias[rows] for query in queries])
        self._rounded(f"{name}out", out.weight[:, rows], out.bias)
        self._norm(f"{name}attended", part(family.attended))
        for short, long in (("up", family.up), ("down", family.down)):
            self._rounded(f"{name}{short}", part(long).weight, part(long).bias)
        self._norm(f"{name}fed", part(family.fed))

    def take_head(self, folder: Path) -> dict[str, Any] | None:
        """What the file says of the head; None for a bare trunk."""
        model = self._model
        if model is self._trunk:
            return None
        pooler: Any = getattr(self._trunk, "pooler", None)
        classifier: Any = getattr(model, "classifier", None)
        if hasattr(model, "qa_outputs"):
            dense, activation, last, first = None, "none", model.qa_outputs, False
        elif hasattr(classifier, "out_proj"):
            dense, activation, last, first = classifier.dense, "tanh", classifier.out_proj, True
        elif classifier is not None and hasattr(model, "pre_classifier"):
            dense, activation, last, first = model.pre_classifier, "relu", classifier, True
        elif classifier is not None and pooler is not None:
            dense, activation, last, first = pooler.dense, "tanh", classifier, True
        elif classifier is not None:
            dense, activation, last, first = None, "none", classifier, False
        else:
            raise _cannot(f"with the head of {type(model).__name__}", folder)
        if dense is not None:
            self._rounded("head.dense", dense.weight, dense.bias)
        self.made["head.weight"], self.made["head.bias"] = last.weight.detach(), last.bias.detach()
        return {"activation": activation, "first": first}

    def _rounded(self, name: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """A matrix `[rows, columns]` as int8 with a scale a row."""
        scale = weight.detach().abs().amax(dim=1).clamp_min(TINY) / 127
        self.made[name] = (weight.detach() / scale[:, None]).round().to(torch.int8).contiguous()
        self.made[f"{name}.scale"] = scale
        if bias is not None:
            self.made[f"{name}.bias"] = bias.detach()

    def _norm(self, name: str, norm: Any) -> None:
        self.made[f"{name}.weight"], self.made[f"{name}.bias"] = norm.weight.detach(), norm.bias.detach()
