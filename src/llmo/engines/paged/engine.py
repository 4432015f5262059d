"""Our own engine: continuous batching over a paged cache, in plain torch; every other engine is compared with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from llmo.engines.folder import read_config
from llmo.engines.generation import Delta, Finish, GenerationOptions, Prompt, TokenLogprob
from llmo.engines.grammar import Grammars
from llmo.engines.paged.attention import Cache
from llmo.engines.paged.blocks import BLOCK, Blocks, salt
from llmo.engines.paged.config import load_config
from llmo.engines.paged.linear import DTYPES
from llmo.engines.paged.model import Decoder
from llmo.engines.paged.scheduler import Scheduler
from llmo.engines.paged.stream import Piece, Stream
from llmo.engines.sampling import Sampler, log_softmax, token_logprob
from llmo.errors import ConflictError, EnvironmentProblem, InputError, LLMOError, ModelError
from llmo.types import Device


class PagedEngine:
    """Runs Llama, Mistral, Qwen 2 and Qwen 3 folders at fp32, bf16 or int8, on the CPU or one GPU."""

    name: ClassVar[str] = "torch"
    abilities: ClassVar[frozenset[str]] = frozenset({"generate", "score", "grammar"})
    deterministic: ClassVar[bool] = True
    context: int = 0
    vocabulary: int = 0

    def __init__(self) -> None:
        self._model: Decoder | None = None
        self._streams: dict[int, Stream] = {}
        self._failed: list[tuple[int, Exception]] = []
        self._grammars: Grammars | None = None
        self._hits = 0

    def load(self, model: Path, device: Device, options: GenerationOptions) -> None:
        self.close()
        config = load_config(model)
        self._precision = options.precision or _card_precision(model)
        if self._precision not in DTYPES:
            raise InputError(f"unknown precision '{self._precision}'", hint=f"known: {', '.join(DTYPES)}")
        if options.streams < 1 or options.chunk < 1:
            raise InputError("streams and chunk must be at least 1")
        self._device = _torch_device(device)
        torch.set_num_threads(device.cores)
        self._folder, self._options, self._config = model, options, config
        self._cache_dtype = torch.float32 if self._precision == "fp32" else torch.bfloat16
        count = options.cache_bytes // Cache.block_bytes(config, self._cache_dtype)
        if count < 2:
            raise InputError(
                f"the cache of {options.cache_bytes} bytes holds no {2 * BLOCK} tokens",
                hint="raise cache_bytes",
                where="cache_bytes",
            )
        self.context = min(config.positions, options.context or config.positions, (count - 1) * BLOCK)
        self.vocabulary = config.vocabulary
        self._ends = end_ids(model)
        loaded = Decoder(model, config, self._precision, self._device, self.context)
        self._blocks = Blocks(count)
        self._cache = Cache(config, count, self._cache_dtype, self._device)
        self._scheduler = Scheduler(self._blocks, options.streams, options.chunk, self._precision != "int8")
        self._model = loaded

    def add(self, prompt: Prompt) -> None:
        self._loaded()
        if prompt.id in self._streams:
            raise ConflictError(
                f"a stream with the id {prompt.id} is running", hint="give every stream an id of its own"
            )
        ids = [int(token) for token in prompt.input_ids]
        self._check_ids(ids)
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context is {self.context} with the answer",
                hint="shorten it, or deploy with a longer context",
                where="context_length_exceeded",
            )
        if prompt.adapter is not None:
            raise InputError(f"unknown adapter '{prompt.adapter}'", hint="none is loaded")
        grammar = prompt.sampling.grammar
        constraint = None if grammar is None else self._compiler().compile(grammar)
        stream = Stream(
            prompt, Sampler(prompt.sampling, ids), ids, len(ids), salt(prompt.tenant, prompt.adapter), constraint
        )
        self._streams[prompt.id] = stream
        self._scheduler.add(stream)

    def cancel(self, id: int) -> None:
        stream = self._streams.pop(id, None)
        if stream is not None:
            self._scheduler.remove(stream)

    def step(self) -> list[Delta]:
        model = self._loaded()
        pieces = sorted(self._scheduler.plan(), key=_order)
        if not pieces:
            return []
        try:
            logits = self._compute(model, pieces)
        except RuntimeError as error:  # memory, mostly; which stream it was cannot be told
            for piece in pieces:
                self._fail(piece.stream, ModelError(f"the step could not be computed: {str(error)[:200]}"))
            return []
        deltas = []
        for row, piece in zip(logits, (piece for piece in pieces if piece.last), strict=True):
            try:
                deltas.append(self._next(piece.stream, row))
            except LLMOError as error:
                self._fail(piece.stream, error)
        return deltas

    def failed(self) -> list[tuple[int, Exception]]:
        failed, self._failed = self._failed, []
        return failed

    def score(self, sequences: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        model = self._loaded()
        return [self._score(model, [int(token) for token in sequence]) for sequence in sequences]

    def stats(self) -> Mapping[str, Any]:
        self._loaded()
        scheduler, blocks = self._scheduler, self._blocks
        return {
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "cache_tokens": blocks.usable * BLOCK,
            "cache_hits": self._hits,
            "free_tokens": blocks.free * BLOCK,
            "preempted": scheduler.preempted,
        }

    def close(self) -> None:
        if self._model is not None:
            device = self._device
            self._model = self._grammars = None
            del self._cache, self._blocks, self._scheduler
            self._streams.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def _compute(self, model: Decoder, pieces: Sequence[Piece]) -> NDArray[np.float32]:
        """Run the step and give the logits of the rows that a token follows from, `[streams, vocabulary]`."""
        ids = [token for p in pieces for token in p.stream.ids[p.start : p.start + p.count]]
        pad = max(0, model.least_rows - len(ids))
        with torch.inference_mode():
            batch = self._cache.batch(pieces, pad)
            hidden = model.hidden(self._tensor(ids + [0] * pad), self._cache, batch)
            ends = np.cumsum([p.count for p in pieces]) - 1
            rows = [int(end) for end, piece in zip(ends, pieces, strict=True) if piece.last]
            wanted = rows + [0] * max(0, model.least_rows - len(rows))
            logits = model.logits(hidden[self._tensor(wanted)])[: len(rows)] if rows else hidden[:0].float()
        for piece in pieces:
            self._scheduler.computed(piece)
        return logits.cpu().numpy()

    def _next(self, stream: Stream, logits: NDArray[np.float32]) -> Delta:
        """Choose the token that follows, and end the stream where it ends."""
        sampling, constraint = stream.prompt.sampling, stream.constraint
        if len(stream.ids) == stream.asked:
            self._hits += stream.cached
        token = stream.sampler.choose(logits, None if constraint is None else constraint.mask())
        finish: Finish | None = None
        tokens: list[int] = []
        ended = token in self._ends and (constraint is not None or not sampling.ignore_end)
        if ended or token in sampling.stop_ids:
            finish = "stop"
        else:
            tokens = [token]
            stream.ids.append(token)
            if constraint is not None:
                constraint.accept(token)
                finish = "stop" if constraint.complete else None
            if finish is None and (
                len(stream.ids) - stream.asked >= sampling.max_tokens or len(stream.ids) >= self.context
            ):
                finish = "length"
        logprobs: list[TokenLogprob] = []
        if tokens and sampling.logprobs is not None:
            logprobs = [token_logprob(logits, token, sampling.logprobs)]
        if finish is not None:
            self._streams.pop(stream.prompt.id)
            self._scheduler.remove(stream)
        return Delta(stream.prompt.id, tokens, logprobs, finish, stream.cached)

    def _fail(self, stream: Stream, error: Exception) -> None:
        self._streams.pop(stream.prompt.id)
        self._scheduler.remove(stream)
        self._failed.append((stream.prompt.id, error))

    def _score(self, model: Decoder, ids: list[int]) -> NDArray[np.float32]:
        """One sequence, by chunks, over a cache of its own: neither reads nor disturbs the streams'."""
        self._check_ids(ids)
        if len(ids) > self.context:
            raise InputError(f"a sequence of {len(ids)} tokens, the context is {self.context}")
        blocks = -(-len(ids) // BLOCK)
        cache = Cache(self._config, blocks + 1, self._cache_dtype, self._device)
        stream = Stream(Prompt(0, ids), Sampler(Prompt(0, ids).sampling, ()), ids, len(ids), b"", None)
        stream.blocks = list(range(1, blocks + 1))
        found = [np.empty(0, np.float32)]
        for start in range(0, len(ids) - 1, self._options.chunk):
            piece = Piece(stream, start, min(self._options.chunk, len(ids) - start))
            pad = max(0, model.least_rows - piece.count)
            part = ids[start : start + piece.count]
            with torch.inference_mode():
                hidden = model.hidden(self._tensor(part + [0] * pad), cache, cache.batch([piece], pad))
                logits = model.logits(hidden, prompt=len(hidden)).cpu().numpy()
            following = ids[start + 1 : start + 1 + piece.count]
            found.append(log_softmax(logits)[range(len(following)), following])
        return np.concatenate(found)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if not ids:
            raise InputError("the prompt has no tokens")
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            raise InputError(
                f"a token outside the model's {self.vocabulary}", hint="the tokeniser may not belong to this model"
            )

    def _compiler(self) -> Grammars:
        """Made on the first use: reading a tokeniser for grammars takes half a second."""
        if self._grammars is None:
            self._grammars = Grammars(self._folder, self.vocabulary, sorted(self._ends))
        return self._grammars

    def _loaded(self) -> Decoder:
        if self._model is None:
            raise ModelError("the engine is closed", hint="load a model first")
        return self._model

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


def end_ids(folder: Path) -> frozenset[int]:
    """The ids that end an answer: those of the card, else of generation_config.json, else of config.json."""
    found: Any = None
    card, generation = folder / "llmo.json", folder / "generation_config.json"
    if card.is_file():
        found = _json(card).get("task", {}).get("options", {}).get("end_ids")
    if not found and generation.is_file():
        found = _json(generation).get("eos_token_id")
    if found is None:
        found = read_config(folder).get("eos_token_id")
    values = found if isinstance(found, list) else [] if found is None else [found]
    return frozenset(int(value) for value in values)


def _card_precision(folder: Path) -> str:
    card = folder / "llmo.json"
    return str(_json(card).get("precision") or "fp32") if card.is_file() else "fp32"


def _json(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(body, dict):
        raise ModelError(f"{path.name} is not a JSON object", where=str(path))
    return body


def _order(piece: Piece) -> int:
    """Prompts first, then answers that are computed again, then single tokens."""
    return 0 if piece.of_prompt else 1 if piece.count > 1 else 2


def _torch_device(device: Device) -> torch.device:
    if device.kind == "cpu":
        return torch.device("cpu")
    if device.kind == "cuda" and torch.cuda.is_available():
        return torch.device(device.name if ":" in device.name else "cuda")
    raise EnvironmentProblem(
        f"this torch cannot use the device '{device.name}' ({device.kind})",
        hint="install a torch build for it, or run on the CPU; see `llmo doctor`",
    )
