"""A saved encoder of the BERT family as the int8 file that the native engine reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmo.compression.shapes.anatomy import Layer, anatomy
from llmo.compression.shapes.fake import rounded
from llmo.engines.folder import card_applied
from llmo.engines.native.encoder_model import FILE, FORMAT, LANES
from llmo.engines.torch import open_model
from llmo.errors import ModelError

# The kinds of GELU differ by less than what rounding to 8 bits costs.
ACTIVATIONS = {
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu"),
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}


FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")


def write(folder: Path, out: Path) -> float:
    """Write the model of a saved folder into the folder `out`; heads of attention that say nothing are left out.
    Returns bits a weight, scales included.

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
    weights.take_trunk(dim)
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
    return 8 * size / sum(int(parameter.numel()) for parameter in model.parameters())


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

    def take_trunk(self, dim: int) -> None:
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
        for number, layer in enumerate(anatomy(self._model)):
            self._layer(f"layer.{number}.", layer, dim)

    def _layer(self, name: str, layer: Layer, dim: int) -> None:
        kept = ~layer.silent(dim)
        if not kept.any():
            kept[0] = True
        rows = kept.repeat_interleave(dim)
        self._rounded(f"{name}qkv", torch.cat([linear.weight[rows] for linear in layer.attention]))
        self.made[f"{name}qkv.bias"] = torch.cat([linear.bias[rows] for linear in layer.attention])
        self._rounded(f"{name}out", layer.merge.weight[:, rows], layer.merge.bias)
        for short, linear in (("up", layer.up), ("down", layer.down)):
            self._rounded(f"{name}{short}", linear.weight, linear.bias)
        for short, norm in zip(("attended", "fed"), layer.norms, strict=True):
            self._norm(f"{name}{short}", norm)

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
        steps, scale = rounded(weight, torch.int8)
        self.made[name], self.made[f"{name}.scale"] = steps, scale.flatten()
        if bias is not None:
            self.made[f"{name}.bias"] = bias.detach()

    def _norm(self, name: str, norm: Any) -> None:
        self.made[f"{name}.weight"], self.made[f"{name}.bias"] = norm.weight.detach(), norm.bias.detach()
