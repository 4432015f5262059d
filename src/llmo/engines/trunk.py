"""One encoder trunk and the further models that were trained on it, mixed in one batch.

A model of method `head` has the trunk as it is, one of method `lora` with an update. Either way the trunk runs once for
a batch, and each row goes on through its own model's head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from llmo.engines import updates
from llmo.engines.applied import attached
from llmo.engines.base import Request
from llmo.engines.folder import card_applied, require
from llmo.engines.heads import Head, logits_of
from llmo.engines.named import Named
from llmo.engines.updates import Update, Updates
from llmo.errors import ModelError
from llmo.tasks.card import ADAPTER

_log = logging.getLogger("llmo.engines")
_ALONE = "deploy it by itself"
_PROBE = (2, 3)  # texts and tokens
_ROUNDING = 1e-5  # of the largest weight (or of 1): how far a merged one may be from the sum of its parts


@dataclass(frozen=True, slots=True)
class Further:
    """A model on the trunk: its head, and its update of the trunk (empty where it has none)."""

    head: Head
    update: Update

    @property
    def nbytes(self) -> int:
        return self.head.nbytes + sum(side.nbytes for pair in self.update.values() for side in pair)


Row = tuple[Request, Further | None]  # None: the model that was loaded
Said = Iterator[tuple[Sequence[Request], Tensor]]


class Trunk(Named[Further]):
    """The models beside the one that was loaded, `model` (fp32, in eval mode), by name. What is not of `Named` is the
    engine's own. `architecture` gives a folder's config, and what makes a model of it. A batch holds what it runs with,
    so nothing is taken and given back here.
    """

    def __init__(
        self,
        model: Any,
        device: torch.device,
        memory: int,
        architecture: Callable[[Path], tuple[Any, Callable[[Any], Any]]],
    ) -> None:
        super().__init__(memory)
        self._model = model
        self._device = device
        self._architecture = architecture
        self._modules = _mixable(model, device)
        self._updates = Updates(self._modules or {})

    def rows(self, requests: Sequence[Request]) -> list[Row]:
        """The requests with their models, those of one model side by side, those with updates first.

        Raises InputError for a model that is not loaded.
        """
        rows = []
        for request in requests:
            further = None if request.adapter is None else self.get(request.adapter)
            rows.append((request, further))
        return sorted(rows, key=lambda row: (not (row[1] and row[1].update), row[0].adapter or ""))

    def logits(self, rows: Sequence[Row], ids: Tensor, mask: Tensor) -> Said:
        """The logits of the rows of each model; `ids` and `mask` are `[rows, longest]`."""
        if all(further is None for _, further in rows):
            said = self._model(input_ids=ids, attention_mask=mask)
            yield [request for request, _ in rows], logits_of(said, mask)
            return
        ((_, hidden),) = self.hidden(rows, ids, mask)
        start = 0
        for _, group in groupby(rows, key=lambda row: row[0].adapter):
            some = list(group)
            end = start + len(some)
            head = some[0][1].head if some[0][1] is not None else self._own
            yield [request for request, _ in some], head(hidden[start:end], mask[start:end])
            start = end

    def hidden(self, rows: Sequence[Row], ids: Tensor, mask: Tensor) -> Said:
        """The last hidden states of all rows."""
        self._updates.apply([further.update for _, further in rows if further is not None and further.update])
        try:
            said = self._model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        finally:
            self._updates.apply([])
        yield [request for request, _ in rows], said[:, -ids.shape[1] :]  # virtual tokens stand before the text

    @cached_property
    def _own(self) -> Head:
        """That of the loaded model, by itself. Raises ValueError where it cannot be taken off."""
        return Head(self._model.config, type(self._model), self._model.state_dict())

    def _size(self, adapters: Sequence[Further]) -> int:
        return sum(further.nbytes for further in adapters)

    def _read(self, folder: Path) -> Further:
        """Raises ModelError for a model of another trunk or shape, one that says the same of every text, or whose
        adapter changes nothing or does not apply in every module."""
        path = require(folder, "model.safetensors")
        kind = card_applied(folder)
        if kind is not None:
            raise _unfit(
                f"it runs with a {kind} beside its weights, which the served trunk has no place for", path, _ALONE
            )
        if self._modules is None:
            raise _unfit(
                "the model that is served does not run without its head, or runs with more than its weights",
                path,
                _ALONE,
            )
        config, make = self._architecture(folder)
        try:
            weights = {name: tensor.to(self._device) for name, tensor in load_file(path).items()}
        except (SafetensorError, OSError) as error:
            raise _unfit(f"it is no whole safetensors file: {error}", path, "make the folder again") from error
        try:
            own = self._own
            head = Head(config, make, weights)
            speaks = head.says()
        except KeyError as error:
            raise _unfit(f"it has no tensor {error}", path) from error
        except (ValueError, RuntimeError) as error:
            raise _unfit(f"its head cannot be taken off its trunk: {error}", path, _ALONE) from error
        if not speaks:
            raise _unfit("its head says the same of every text", path, "train it before it is served")
        update: Update = {}
        if (folder / ADAPTER).is_dir():
            update = updates.read(folder / ADAPTER, self._modules, head.names, self._device)
        self._check_trunk(weights, own.names | head.names, update, path)
        return Further(head, update)

    def _check_trunk(self, weights: Mapping[str, Tensor], heads: frozenset[str], update: Update, path: Path) -> None:
        """Every tensor that is no head's must be the loaded model's own, but for the update."""
        ours = {name: tensor for name, tensor in self._model.state_dict().items() if name not in heads}
        theirs = weights.keys() - heads
        if ours.keys() != theirs:
            raise _unfit(f"its trunk is another one: {min(ours.keys() ^ theirs)} is in one of them only", path)
        for name, tensor in ours.items():
            pair = update.get(name.removesuffix(".weight"))
            same = tensor.shape == weights[name].shape
            if same and pair is None:
                same = torch.equal(tensor, weights[name])
            elif same and pair is not None:
                gap = (tensor + pair[1].T @ pair[0] - weights[name]).abs().max()
                same = bool(gap <= _ROUNDING * max(1.0, float(tensor.abs().max())))
            if not same:
                raise _unfit(f"its trunk is another one: {name} differs from what is served", path)


def _mixable(model: Any, device: torch.device) -> dict[str, nn.Linear] | None:
    """The trunk's linear modules that see each text of a batch apart. (DeBERTa's project distances too, for all texts
    at once: there no row can have an update of its own.) None for a model whose trunk does not run by itself, or that
    runs with something beside its weights, which would be another model's too."""
    if attached(model) is not None:
        return None
    prefix = f"{model.base_model_prefix}."
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)}
    shapes: dict[str, set[tuple[int, ...]]] = {name: set() for name in linear}

    def look(name: str, _: Any, given: tuple[Tensor, ...]) -> None:
        shapes[name].add(tuple(given[0].shape[:-1]))

    hooks = [module.register_forward_pre_hook(partial(look, name)) for name, module in linear.items()]
    ids = torch.zeros(_PROBE, dtype=torch.int64, device=device)
    try:
        with torch.inference_mode():
            model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # transformers raises what it likes; the model may yet run as a whole
        _log.warning("nothing can be added to this model's trunk, which does not run by itself", exc_info=True)
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in linear.items() if shapes[name] == {_PROBE}}


def _unfit(what: str, path: Path, hint: str = "") -> ModelError:
    hint = hint or f"train it on what is served with method head or lora, or {_ALONE}"
    return ModelError(what, hint=hint, where=str(path))
