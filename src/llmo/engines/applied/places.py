"""Where in a transformers model an adapter has its place: its layers, and in each what the feed-forward part says."""

from __future__ import annotations

from typing import Any

from torch import nn

from llmo.errors import ModelError


def width_of(model: Any) -> int:
    """Of a token's embedding."""
    return int(model.get_input_embeddings().embedding_dim)


def layers(model: Any) -> list[nn.Module]:
    """The trunk's layers in order. Raises ModelError for an architecture that has none."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    found = max(lists, key=len, default=None)
    if found is None:
        raise ModelError(
            f"'{model.config.model_type}' has no layers that an adapter could be put into",
            hint="set train.method to full or head",
        )
    return list(found)


def feed_forward_outputs(model: Any) -> dict[str, nn.Linear]:
    """Of each layer the last linear module that leads back to the width of the model, by its full name."""
    width = hidden_width(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for layer in layers(model):
        back = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.out_features == width]
        if not back:
            raise ModelError(
                f"a layer of '{model.config.model_type}' has no linear module that leads back to its width",
                hint="set train.method to lora or full",
            )
        found[names[id(back[-1])]] = back[-1]
    return found


def hidden_width(model: Any) -> int:
    """What a layer passes on: the config's, for some models' embeddings are narrower."""
    found = getattr(model.config.get_text_config(), "hidden_size", None)
    return int(found) if isinstance(found, int) else width_of(model)
