"""Virtual tokens: a learnt prompt before every text, or a learnt prefix of keys and values in every layer.

Prompt tuning (Lester et al. 2021, arXiv:2104.08691) and prefix tuning (Li and Liang 2021, arXiv:2101.00190), as peft
computes and saves them: in plain peft the saved folder says the same.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from llmo.engines import peft
from llmo.engines.applied.base import Applied, read, unfit
from llmo.engines.applied.places import width_of
from llmo.errors import SpecError

TENSOR = "prompt_embeddings"
HEADS = ("classifier", "score")  # as peft finds them
STD = 0.02


class Virtual(Applied):
    """`embeddings` is `[tokens, size]`: what peft saves. `task_type` is peft's name for what the model does."""

    def __init__(self, embeddings: Tensor, task_type: str) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(embeddings)
        self._task_type = task_type
        self._fresh = False

    @property
    def tokens(self) -> int:
        return len(self.embeddings)

    def _hook(self, model: Any) -> list[RemovableHandle]:
        trunk = model.base_model
        return [
            trunk.register_forward_pre_hook(self._before, with_kwargs=True),
            trunk.register_forward_hook(self._after),
        ]

    def _before(self, trunk: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], Any] | None:
        if not self.enabled:
            return None
        names = list(inspect.signature(trunk.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **given}
        past = given.get("past_key_values")
        self._fresh = past is None or past.get_seq_length() == 0
        texts: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        rows = texts.shape[0]  # `len` would fix it in an exported graph
        if given.get("attention_mask") is not None:
            mask = given["attention_mask"]
            given["attention_mask"] = torch.cat([mask.new_ones(rows, self.tokens), mask], 1)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.tokens
        if self._fresh:
            self._put(trunk, given, rows)
        return (), given

    @abstractmethod
    def _put(self, trunk: Any, given: dict[str, Any], rows: int) -> None:
        """The virtual tokens before those of a text that begins."""

    def _after(self, trunk: Any, args: tuple[Any, ...], said: Any) -> Any:
        return said

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Those of peft that are the kind's own."""

    def save(self, folder: Path, model: Any) -> None:
        from peft import PeftConfig, get_peft_config  # seconds, and only saving needs it

        common = {"num_virtual_tokens": self.tokens, "task_type": self._task_type, "inference_mode": True}
        config: PeftConfig = get_peft_config({**common, **self._settings()})
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        # peft looks for the head here too.
        heads = {n: p for n, p in model.named_parameters() if n.partition(".")[0] in HEADS}
        tensors = {TENSOR: self.embeddings, **{f"base_model.{name}": p for name, p in heads.items()}}
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / peft.TENSORS)

    @classmethod
    def open(cls, folder: Path, model: Any) -> Self:
        settings, tensors = read(folder, peft.SETTINGS, peft.TENSORS)
        found = tensors.get(TENSOR)
        if found is None or found.ndim != 2 or not torch.isfinite(found).all():
            raise unfit(f"the adapter holds no finite {TENSOR}", folder)
        if found.shape[1] != cls.size(model):
            raise unfit(f"{TENSOR} is {found.shape[1]} wide, the model wants {cls.size(model)}", folder)
        return cls._made(found.float(), str(settings.get("task_type")), model)

    @classmethod
    @abstractmethod
    def size(cls, model: Any) -> int:
        """Numbers of a virtual token."""

    @classmethod
    def _made(cls, embeddings: Tensor, task_type: str, model: Any) -> Self:
        return cls(embeddings, task_type)


class Prompt(Virtual):
    """Embeddings of tokens that no text has. They start as those of tokens drawn from the vocabulary."""

    kind: ClassVar[str] = "prompt"

    @classmethod
    def new(cls, model: Any, tokens: int, task_type: str) -> Self:
        known = model.get_input_embeddings()
        drawn = torch.randint(0, known.num_embeddings, (tokens,))
        return cls(known.weight.detach()[drawn.to(known.weight.device)].clone(), task_type)

    @classmethod
    def size(cls, model: Any) -> int:
        return width_of(model)

    def _put(self, trunk: Any, given: dict[str, Any], rows: int) -> None:
        embeds = given.pop("inputs_embeds", None)
        ids = given.pop("input_ids", None)
        if embeds is None:
            embeds = trunk.get_input_embeddings()(ids)
        given["inputs_embeds"] = torch.cat([self.embeddings.to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
        if given.get("position_ids") is not None:
            first = torch.arange(self.tokens, device=embeds.device).expand(len(given["position_ids"]), -1)
            given["position_ids"] = torch.cat([first, given["position_ids"]], 1)
        if given.get("token_type_ids") is not None:
            types = given["token_type_ids"]
            given["token_type_ids"] = torch.cat([types.new_zeros(rows, self.tokens), types], 1)

    def _after(self, trunk: Any, args: tuple[Any, ...], said: Any) -> Any:
        # Where the whole text has one answer, peft lets the head read the first virtual token; else they are cut off.
        if self.enabled and self._fresh and self._task_type != "SEQ_CLS":
            said.last_hidden_state = said.last_hidden_state[:, self.tokens :]
        return said

    def _settings(self) -> dict[str, Any]:
        return {"peft_type": "PROMPT_TUNING", "token_dim": self.embeddings.shape[1], "num_transformer_submodules": 1}


class Prefix(Virtual):
    """Keys and values of tokens that no text has, in every layer. They start small."""

    kind: ClassVar[str] = "prefix"

    def __init__(self, embeddings: Tensor, task_type: str, layers: int, heads: int) -> None:
        super().__init__(embeddings, task_type)
        self._layers, self._heads = layers, heads

    @classmethod
    def new(cls, model: Any, tokens: int, task_type: str) -> Self:
        return cls._made(torch.randn(tokens, cls.size(model)) * STD, task_type, model)

    @classmethod
    def size(cls, model: Any) -> int:
        layers, heads, wide = _keys(model)
        return 2 * layers * heads * wide

    @classmethod
    def _made(cls, embeddings: Tensor, task_type: str, model: Any) -> Self:
        layers, heads, _ = _keys(model)
        return cls(embeddings, task_type, layers, heads)

    def _hook(self, model: Any) -> list[RemovableHandle]:
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise SpecError(
                f"'{model.config.model_type}' takes no keys and values from before its text, as method prefix gives it",
                hint="set train.method to prompt, bottleneck or lora",
            )
        return super()._hook(model)

    def _put(self, trunk: Any, given: dict[str, Any], rows: int) -> None:
        found: Tensor = self.embeddings
        if torch.is_autocast_enabled(found.device.type):
            found = found.to(torch.get_autocast_dtype(found.device.type))
        # As peft lays them out: keys and values of a layer side by side, layer after layer.
        parts = found.view(self.tokens, 2 * self._layers, self._heads, -1).permute(1, 2, 0, 3)
        each = [part.expand(rows, -1, -1, -1) for part in parts]
        given["past_key_values"] = DynamicCache(list(zip(each[::2], each[1::2], strict=True)))

    def _settings(self) -> dict[str, Any]:
        wide = self.embeddings.shape[1] // (2 * self._layers)
        return {
            "peft_type": "PREFIX_TUNING",
            "token_dim": wide,
            "num_layers": self._layers,
            "num_attention_heads": self._heads,
            "num_transformer_submodules": 1,
        }


def _keys(model: Any) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and the width of one. Raises SpecError where layers differ in them."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"}:
        raise SpecError(
            f"the layers of '{model.config.model_type}' keep different keys ({', '.join(sorted(kinds))})",
            hint="set train.method to prompt, bottleneck or lora",
        )
    heads = int(config.num_attention_heads)
    wide = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return int(config.num_hidden_layers), int(getattr(config, "num_key_value_heads", None) or heads), int(wide)
