"""Steps on a GPU as CUDA graphs: a step is recorded the first time its shape is met, and played from then on.

A GPU does a small model's kernel faster than Python can ask for the next one, so that a step takes as long as asking
for all of them. A graph is asked for once. What a recorded step reads and writes stays at its place: inputs are copied
in, and gradients are set to zero and not dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Inputs = dict[str, torch.Tensor]
Rows = NDArray[np.int64]
# Inputs and targets on the device, and the part's share of its batch `[]`: gradients are added, the loss is given back.
Work = Callable[[Inputs, torch.Tensor, torch.Tensor, Rows], torch.Tensor]
Key = tuple[tuple[str, torch.Size, torch.dtype], ...]
TARGETS, SHARE = "targets", "share"
MOST = 96  # recordings that are kept: what one takes beside the memory that all share is a few MB


@dataclass(frozen=True, slots=True)
class Recording:
    """`given` are the tensors that it reads, `loss` the one that it leaves its answer in."""

    graph: torch.cuda.CUDAGraph
    given: Inputs
    loss: torch.Tensor


class Recorder:
    """Does `work`, whose loss must be the same function for all inputs of one shape, by recordings of it.

    `forget` sets the gradients to zero. `refused` says why steps are launched one kernel at a time, when the model
    cannot be recorded (it reads a number back from the GPU, say); `tell` hears it once.
    """

    def __init__(
        self, work: Work, device: torch.device, forget: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        self._work, self._device, self._forget, self._tell = work, device, forget, tell
        self._kept: OrderedDict[Key, Recording] = OrderedDict()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._generator = torch.cuda.default_generators[device.index or 0]
        self._pool: Any = None  # the memory that all recordings share
        self.refused: str | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, inputs: Inputs, targets: torch.Tensor, share: float, rows: Rows) -> torch.Tensor:
        given = {**inputs, TARGETS: targets, SHARE: torch.tensor(share)}
        if self.refused is None and self._pool is None:
            self._warm_up(given, rows)
        if self.refused is not None:
            return self._launched(given, rows)
        key = tuple((name, x.shape, x.dtype) for name, x in given.items())
        found = self._kept.get(key)
        if found is None:
            before = self._generator.clone_state()
            try:
                found = self._kept[key] = self._record(given, rows)
            except RuntimeError as error:  # it has computed nothing
                self._generator.graphsafe_set_state(before)  # the other one believes that it is still being recorded
                if isinstance(error, torch.OutOfMemoryError):
                    raise  # smaller parts of the batch may fit, recorded too
                self.refused = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                self._kept.clear()
                self._tell(f"steps are launched kernel by kernel: recording them was refused ({self.refused})")
                return self._launched(given, rows)
            if len(self._kept) > MOST:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        for name, x in given.items():
            found.given[name].copy_(x)
        found.graph.replay()
        return found.loss

    def _there(self, given: Inputs) -> Inputs:
        return {name: x.to(self._device) for name, x in given.items()}

    def _do(self, there: Inputs, rows: Rows) -> torch.Tensor:
        inputs = {name: x for name, x in there.items() if name not in (TARGETS, SHARE)}
        return self._work(inputs, there[TARGETS], there[SHARE], rows)

    def _launched(self, given: Inputs, rows: Rows) -> torch.Tensor:
        """On the stream that records, so that gradients are added up on one."""
        there, here = self._there(given), torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = self._do(there, rows)
        here.wait_stream(self._stream)
        return loss

    def _warm_up(self, given: Inputs, rows: Rows) -> None:
        """Libraries allocate what they need at their first call, which no recording may contain. The gradients have
        their places afterwards, and the random numbers are as they were."""
        before = self._generator.get_state()
        self._launched(given, rows)
        self._generator.set_state(before)
        self._forget()
        torch.cuda.empty_cache()  # recordings have memory of their own
        self._pool = torch.cuda.graph_pool_handle()

    def _record(self, given: Inputs, rows: Rows) -> Recording:
        graph, there = torch.cuda.CUDAGraph(), self._there(given)
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                loss = self._do(there, rows)
            except BaseException:
                with suppress(RuntimeError):  # what it would say is that something went wrong
                    graph.capture_end()
                raise
            graph.capture_end()
        return Recording(graph, there, loss)


class Update:
    """What comes after the gradients, as one recording once all of them were there: they are clipped, AdamW or Adam
    takes its step, and they are set to zero."""

    def __init__(self, parameters: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer, max_norm: float) -> None:
        self._parameters, self._optimiser, self._max_norm = parameters, optimiser, max_norm
        self._rate = torch.zeros((), device=parameters[0].device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._norm = self._rate
        for group in optimiser.param_groups:
            group["lr"], group["capturable"] = self._rate, True

    @staticmethod
    def fits(optimiser: torch.optim.Optimizer) -> bool:
        """Whether it keeps all it needs on the GPU."""
        return isinstance(optimiser, torch.optim.Adam) and bool(optimiser.defaults["fused"])

    def __call__(self, rate: float) -> torch.Tensor:
        """The norm `[]` of all gradients before."""
        self._rate.fill_(rate)
        if len(self._optimiser.state) < sum(p.grad is not None for p in self._parameters):
            self._graph = None  # it knows nothing of a weight whose first gradient this is
            return self._do()  # which makes the optimiser's state
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):  # NCCL has threads that ask the GPU
                self._norm = self._do()
        self._graph.replay()
        return self._norm

    def _do(self) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=False)
        return norm
