"""The reference engine: the saved model as plain transformers opens it, at fp32 or bf16, on the CPU or one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from llmo.engines import (
    applied,
    lowered,
    lstm,  # noqa: F401 (transformers opens it once it is registered)
)
from llmo.engines.base import Chunk, Facts, Request, closed
from llmo.engines.batch import Ids, chunks, means, pad
from llmo.engines.folder import card_applied, card_precision, pad_token_id, position_limit, read_config, require
from llmo.engines.place import torch_device
from llmo.engines.trunk import Row, Said, Trunk
from llmo.errors import ModelError
from llmo.tasks.card import ADAPTER, load_task
from llmo.types import ENCODER_ADAPTER_BYTES, Device


class TorchEngine:
    """What every other engine is compared with, at fp32. A card that names bf16 has everything computed in it."""

    name: ClassVar[str] = "torch"
    abilities: ClassVar[frozenset[str]] = frozenset({"classify", "embed", "adapters"})

    def __init__(self) -> None:
        self._model: Any = None
        self._trunk: Trunk | None = None
        self._device = torch.device("cpu")
        self._pad_id = 0
        self._vocabulary = 0
        self._positions: int | None = None

    def load(self, model: Path, device: Device, *, adapter_bytes: int = ENCODER_ADAPTER_BYTES) -> None:
        self._device = torch_device(device)
        torch.set_num_threads(device.cores)
        config = read_config(model)
        precision = card_precision(model) or "fp32"
        lowered.check(precision, self._device, model)
        self._pad_id, self._positions = pad_token_id(config), position_limit(config)
        opened = self._model = lowered.lower(open_model(model), precision).to(self._device)
        self._vocabulary = opened.get_input_embeddings().num_embeddings
        self._trunk = Trunk(opened, self._device, adapter_bytes, _architecture)

    def run(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        return self._through(Trunk.logits, chunks, requests)

    def embed(self, requests: Sequence[Request]) -> Iterator[Chunk]:
        return self._through(Trunk.hidden, means, requests)

    def facts(self) -> Facts:
        self._loaded()
        precision = lowered.precision_of(self._model)
        return Facts(
            precision=precision,
            rest=precision,
            kernels=dict(lowered.kernels(self._model)),
            instructions=lowered.instructions_of(precision, self._device),
            threads=torch.get_num_threads(),
            streams=1,
            library=f"torch {torch.__version__}",
        )

    def add_adapter(self, name: str, folder: Path) -> None:
        trunk = self._loaded()
        if lowered.precision_of(self._model) != "fp32":
            raise ModelError(
                "further models join a trunk at fp32, and this one runs at a lower precision",
                hint="deploy the model as it was trained",
                where=str(folder),
            )
        trunk.add(name, folder)

    def remove_adapter(self, name: str) -> None:
        self._loaded().remove(name)

    def _loaded(self) -> Trunk:
        if self._trunk is None:
            raise closed()
        return self._trunk

    def _through(
        self,
        part: Callable[[Trunk, Sequence[Row], torch.Tensor, torch.Tensor], Said],
        cut: Callable[[Sequence[Request], NDArray[np.float32]], Iterator[Chunk]],
        requests: Sequence[Request],
    ) -> Iterator[Chunk]:
        """What a part of the model says of the padded batch, cut into chunks."""
        if not requests:
            return
        rows = self._loaded().rows(requests)
        padded = pad([request for request, _ in rows], self._pad_id)
        try:
            self._check(padded[0])
            with torch.inference_mode():
                ids, mask = (torch.from_numpy(array).to(self._device) for array in padded)
                found = [(some, said.float().cpu().numpy()) for some, said in part(self._loaded(), rows, ids, mask)]
        except (IndexError, RuntimeError) as error:
            count, longest = padded[0].shape
            raise ModelError(
                f"the model cannot run this batch of {count} x {longest} tokens: {_first_line(error)}",
                hint="the tokenizer may not belong to this model, or the text is longer than its positions",
            ) from error
        for some, said in found:
            yield from cut(some, said)

    def _check(self, ids: Ids) -> None:
        """Raises IndexError, as a CPU does; a GPU that is asked for a row that is not there never answers again."""
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise IndexError(f"a token outside the model's {self._vocabulary}")
        if self._positions is not None and ids.shape[1] > self._positions:
            raise IndexError(f"the model reads at most {self._positions}")

    def close(self) -> None:
        self._trunk = self._model = None
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def open_model(folder: Path) -> Any:
    """The saved model with its head, at fp32 and in eval mode, opened by the class its task names, with what it runs
    with beside its weights.

    Raises ModelError when weights are missing, broken or do not fit the config.
    """
    auto_class = _auto_class(folder)
    require(folder, "model.safetensors")
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
    beside = card_applied(folder)
    if beside is not None:
        applied.attach(beside, folder / ADAPTER, model)
    return model.eval()


def _architecture(folder: Path) -> tuple[Any, Callable[[Any], Any]]:
    """The folder's config, and what makes a model of it without its weights. Raises ModelError."""
    auto_class = _auto_class(folder)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot open the model: {_first_line(error)}", where=str(folder)) from error
    return config, partial(auto_class.from_config, dtype=torch.float32)


def _auto_class(folder: Path) -> Any:
    """The class of transformers that opens the folder. Raises ModelError for one that brings code of its own."""
    if read_config(folder).get("auto_map"):
        raise ModelError(
            "the model wants to run code of its own (auto_map in config.json)",
            hint="LLMO runs no code from model folders; use an architecture that transformers knows",
            where=str(folder),
        )
    return getattr(transformers, load_task(folder).auto_class)


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
