"""The reference engine: the saved model as plain transformers opens it, at fp32, on the CPU or one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from llmo.engines.base import Chunk, Request
from llmo.engines.batch import Ids, chunks, means, pad
from llmo.engines.folder import pad_token_id, position_limit, read_config, require
from llmo.engines.place import torch_device
from llmo.errors import ModelError
from llmo.tasks.card import load_task
from llmo.types import Device


class TorchEngine:
    """What every other engine is compared with."""

    name: ClassVar[str] = "torch"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify", "embed"})

    def __init__(self) -> None:
        self._model: Any = None
        self._device = torch.device("cpu")
        self._pad_id = 0
        self._vocabulary = 0
        self._positions: int | None = None

    def load(self, model: Path, device: Device) -> None:
        self._device = torch_device(device)
        torch.set_num_threads(device.cores)
        config = read_config(model)
        self._pad_id, self._positions = pad_token_id(config), position_limit(config)
        self._model = open_model(model).to(self._device)
        self._vocabulary = self._model.get_input_embeddings().num_embeddings

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        if requests:
            yield from chunks(requests, self._through(lambda model: model, "logits", requests))

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        if requests:
            yield from means(requests, self._through(lambda model: model.base_model, "last_hidden_state", requests))

    def _through(self, part: Callable[[Any], Any], output: str, requests: Sequence[Request]) -> NDArray[np.float32]:
        """What a part of the model says of the padded batch."""
        if self._model is None:
            raise ModelError("the engine is closed", hint="load a model first")
        ids, mask = pad(requests, self._pad_id)
        try:
            self._check(ids)
            with torch.inference_mode():
                inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
                said = part(self._model)(**{name: value.to(self._device) for name, value in inputs.items()})
                found: NDArray[np.float32] = getattr(said, output).float().cpu().numpy()
        except (IndexError, RuntimeError) as error:
            raise ModelError(
                f"the model cannot run this batch of {ids.shape[0]} x {ids.shape[1]} tokens: {_first_line(error)}",
                hint="the tokenizer may not belong to this model, or the text is longer than its positions",
            ) from error
        return found

    def _check(self, ids: Ids) -> None:
        """Raises IndexError, as a CPU does; a GPU that is asked for a row that is not there never answers again."""
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise IndexError(f"a token outside the model's {self._vocabulary}")
        if self._positions is not None and ids.shape[1] > self._positions:
            raise IndexError(f"the model reads at most {self._positions}")

    def close(self) -> None:
        self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def open_model(folder: Path) -> Any:
    """The saved model with its head, at fp32 and in eval mode, opened by the class its task names.

    Raises ModelError when weights are missing, broken or do not fit the config.
    """
    config = read_config(folder)
    require(folder, "model.safetensors")
    if config.get("auto_map"):
        raise ModelError(
            "the model wants to run code of its own (auto_map in config.json)",
            hint="LLMO runs no code from model folders; use an architecture that transformers knows",
            where=str(folder),
        )
    auto_class = getattr(transformers, load_task(folder).auto_class)
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"transformers cannot open the model: {_first_line(error)}",
            hint="make the folder again, or check it with `llmo verify`",
            where=str(folder),
        ) from error
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if missing or wrong:
        what = f"lack {len(missing)} tensors, such as {missing[0]}" if missing else f"have another shape at {wrong[0]}"
        raise ModelError(
            f"the weights do not fit the config: they {what}",
            hint="a base model has no head yet: train it first" if missing else "make the folder again",
            where=str(folder),
        )
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports out of the job's output; LLMO reports what matters."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
