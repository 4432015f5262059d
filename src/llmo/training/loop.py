"""The training loop: step, report, evaluate, checkpoint; a resumed run equals the unbroken one bit for bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmo.context import Context, Stopped
from llmo.errors import JobFailed
from llmo.files import digest_of_value
from llmo.specs import TrainSpec
from llmo.tasks.base import Task
from llmo.training import batches, checkpoint, optimiser, vocabulary
from llmo.training.along import Along
from llmo.training.batches import Encoded
from llmo.training.model import Built, set_training
from llmo.training.objectives import Inputs, Objective
from llmo.training.parallel import Command, Group
from llmo.training.precision import Precision
from llmo.training.recorded import Recorder, Update
from llmo.training.sharded import Sharded

SMOOTHING = 0.9  # of the loss that is shown


@dataclass(slots=True)
class State:
    """What a checkpoint says besides tensors; nothing in it depends on the clock."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best
    losses: list[float] = field(default_factory=list)  # since the last evaluation
    history: list[dict[str, float]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Loop:
    """One run. `evaluate` gives the objective's metrics on dev, or is None where there is no dev split.

    `state.extra` is the caller's, kept in checkpoints (what was measured before training, for one). `after_step` may
    end the run by raising.
    """

    def __init__(
        self,
        built: Built,
        task: Task,
        objective: Objective,
        spec: TrainSpec,
        data: Encoded,
        evaluate: Callable[[], dict[str, float]] | None,
        ctx: Context,
        precision: Precision,
        after_step: Callable[[], None] | None = None,
        sharded: Sharded | None = None,
    ) -> None:
        self.built, self.task, self.spec, self.data, self.ctx = built, task, spec, data, ctx
        self._objective, self._evaluate_on_dev, self.precision = objective, evaluate, precision
        self._after_step = after_step
        self.group: Group | None = None
        self.sharded = sharded
        self.narrowed = None if task.hides else vocabulary.narrow(built, data.ids, spec)
        self._named: dict[str, nn.Parameter] = dict(built.trainable()) if sharded is None else sharded.take()
        self._optimiser = optimiser.build(list(self._named.items()), spec)
        self._per_epoch = data.per_epoch(spec.batch_size)
        self.total = max(1, round(self._per_epoch * spec.epochs))
        self._along = Along(built, spec, self._named, self.total)
        self._every = spec.evaluate_every or self._per_epoch
        self._lengths = data.lengths
        self._sizes = np.diff(data.starts).reshape(-1, data.group).sum(1)
        self._order: tuple[int, list[NDArray[np.int64]]] = (-1, [])
        self.recorder: Recorder | None = None
        # A step of one task gives the other tasks' heads no gradient, which a recording would make zeros of.
        self._records = precision.device.type == "cuda" and not len(built.others) and sharded is None
        if self._records and objective.records and not spec.activation_checkpointing:
            self.recorder = Recorder(self._gradients, precision.device, self.forget_gradients, ctx.note)
        self._update: Update | None = None
        if self._records and Update.fits(self._optimiser) and spec.method != "adalora":
            self._update = Update(list(self._named.values()), self._optimiser, spec.max_grad_norm)
        self._best: dict[str, torch.Tensor] = {}
        self._saved_at = time.monotonic()
        self._shown_loss: float | None = None
        self._rate = 0.0
        self._seconds, self._samples, self._tokens = 0.0, 0, 0
        self.state = State()

    @property
    def samples_per_second(self) -> float:
        """Training speed of this attempt, evaluations and checkpoints not counted."""
        return self._samples / self._seconds if self._seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """The same in tokens, padding not counted."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def resume(self) -> bool:
        """Go on from the newest checkpoint of this same run, if there is one, with its number of threads."""
        found = checkpoint.newest(self.ctx.checkpoint(), self._fingerprint())
        if found is None:
            return False
        tensors, state = found
        if self.sharded is not None:
            tensors = self.sharded.parts(tensors)
        checkpoint.unpack(
            {k: v for k, v in tensors.items() if not k.startswith(checkpoint.BEST)}, self._named, self._optimiser
        )
        self._best = {
            k.removeprefix(checkpoint.BEST): v.clone() for k, v in tensors.items() if k.startswith(checkpoint.BEST)
        }
        self._along.restore(tensors)
        self.state = State(**state["state"])
        torch.set_num_threads(state["threads"])
        checkpoint.restore_random_state(state["random"])
        return True

    def join(self, group: Group | None, resumed: bool) -> None:
        """Take this process's share of every batch from now on, with its own cores unless `resumed` with the threads
        that it had; all begin with the first one's weights."""
        self.group = group
        if group is not None:
            if group.rank == 0:
                group.tell(Command.JOIN)
            group.same(self._everywhere())
            if not resumed:
                torch.set_num_threads(group.cores)

    def run(self) -> None:
        """Train to the end. Raises Stopped (after a checkpoint) when asked to, JobFailed when the loss is lost."""
        set_training(self.built.model)
        self.built.others.train()
        while self.state.step < self.total and not self._gave_up():
            self._report(self.step())
            if self._evaluation_is_due():
                with self._along.measured():
                    self._evaluate()
            if self._after_step is not None:
                self._after_step()
            if self.ctx.should_stop():
                self._save()
                raise Stopped
            if time.monotonic() - self._saved_at >= self.spec.checkpoint_seconds:
                self._save()
        self._tell(Command.FINISH)
        self.finish()

    def finish(self) -> None:
        """The steps are over: the model has its final weights from now on."""
        if self._best:
            self._restore_best()
        if self.narrowed is not None:
            self._settle(self.state.best_step if self._best else self.state.step)
            vocabulary.restore(self.built, self.narrowed)
        self._along.finish(best=bool(self._best))

    def step(self) -> float:
        """One step of the optimiser; its loss. Raises JobFailed when that is lost."""
        started = time.monotonic()
        if self.group is not None:
            self.group.begin(self.spec.seed, self.state.step, apart=self._has_share)
        batch = self.batch()
        self._rate = optimiser.rate(self.spec, self.state.step, self.total)
        mean = self.backward(batch)
        self._along.before()
        if self._update is not None:
            size = self._update(self._rate)
        elif self.sharded is not None:
            size = self.sharded.clip(self.spec.max_grad_norm)
        else:
            size = nn.utils.clip_grad_norm_(self._named.values(), self.spec.max_grad_norm)
        loss, norm = map(float, torch.stack([mean, size]).tolist())  # a GPU is waited for once
        self.state.step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise self._lost("loss" if not math.isfinite(loss) else "gradient")
        if self._update is None:
            for group in self._optimiser.param_groups:
                group["lr"] = self._rate
            self._optimiser.step()
        self._along.after(self.state.step)
        if self._update is None:
            self.forget_gradients()
        self.state.losses.append(loss)
        self._seconds += time.monotonic() - started
        self._samples += len(batch)
        self._tokens += int(self._sizes[batch].sum())
        return loss

    def backward(self, batch: NDArray[np.int64]) -> torch.Tensor:
        """Gradients of the mean loss `[]` of the whole batch, however many parts it is computed in."""
        pieces = self._pieces(batch)
        epoch = self.state.step // self._per_epoch
        parts = [self._objective.batch(piece, epoch) for piece, _ in pieces]
        masses = [
            self._objective.mass(targets, piece) if counts else 0.0
            for (piece, counts), (_, targets) in zip(pieces, parts, strict=True)
        ]
        whole = 1.0 if self._has_share else sum(masses) or 1.0  # else what all have is divided by in the end
        loss = torch.zeros((), device=self.precision.device)
        with nullcontext() if self.sharded is None else self.sharded.step():
            for (piece, _), (inputs, targets), mass in zip(pieces, parts, masses, strict=True):
                if self.recorder is not None:
                    loss += self.recorder(inputs, targets, mass / whole, piece)
                    continue
                there = {k: v.to(self.precision.device) for k, v in inputs.items()}
                loss += self._gradients(there, targets.to(self.precision.device), mass / whole, piece)
        whole = 1.0
        if self._has_share and self.group is not None:
            loss, whole = self.group.add_up(self._everywhere(), sum(masses), loss)
        if self.sharded is not None:
            self.sharded.take_gradients(whole)
        return loss

    def _pieces(self, batch: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], bool]]:
        """The parts that this process computes of a batch, and whether each counts: where all processes have to run the
        layers as often, a row is repeated for nothing."""
        mine = self.group.share(self._lengths, batch) if self.group is not None and self._has_share else batch
        count, tokens = self.spec.gradient_accumulation_steps, self._objective.part_tokens
        pieces = [(piece, True) for piece in batches.parts(self._lengths, mine, count, tokens)]
        if self.group is not None and self.sharded is not None:
            pieces += [(batch[:1], False)] * (self.group.most(len(pieces)) - len(pieces))
        return pieces

    @property
    def _has_share(self) -> bool:
        """Whether this process computes some rows of a batch, and other ones the others."""
        return self.group is not None and (self.sharded is None or self.sharded.rows_are_shared_out)

    def _everywhere(self) -> list[nn.Parameter]:
        """The trained weights that every process has whole."""
        return [p for k, p in self._named.items() if self.sharded is None or not self.sharded.is_slice(k)]

    def _tell(self, command: Command) -> None:
        """Have all processes do what this one is about to do, where none has all of the model."""
        if self.group is not None and self.sharded is not None:
            self.group.tell(command)

    def _gradients(
        self, inputs: Inputs, targets: torch.Tensor, share: float | torch.Tensor, rows: NDArray[np.int64]
    ) -> torch.Tensor:
        """Add the gradients of a part that is on the device, and has a `share` of its batch; its part of the loss."""
        with self.precision.autocast():
            part = self._objective.loss(inputs, targets, rows) * share
        part.backward()  # type: ignore[no-untyped-call]
        return part.detach()

    def batch(self) -> NDArray[np.int64]:
        """The rows of the step that is next."""
        epoch, index = divmod(self.state.step, self._per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self.data.order(self.spec.batch_size, self.spec.seed, epoch))
        return self._order[1][index]

    def forget_gradients(self) -> None:
        """Where steps are recorded they stay where they are: these add to them there."""
        self._optimiser.zero_grad(set_to_none=not self._records)

    @property
    def batch_size(self) -> int:
        return self.spec.batch_size

    def _report(self, loss: float) -> None:
        before = self._shown_loss
        self._shown_loss = loss if before is None else SMOOTHING * before + (1 - SMOOTHING) * loss
        self.ctx.report(
            self.state.step,
            self.total,
            loss=self._shown_loss,
            learning_rate=self._rate,
            samples_per_second=self.samples_per_second,
            epoch=self.state.step / self._per_epoch,
        )

    def value_on_dev(self) -> float:
        """The objective's metric on dev, which there must be, of the weights as they would be saved now."""
        last = self.state.history[-1] if self.state.history else {}
        if last.get("step") == self.state.step:
            return last[f"dev_{self._objective.metric}"]  # this step was evaluated already
        with self._along.measured():
            return self._on_dev()[self._objective.metric]

    def _on_dev(self) -> dict[str, float]:
        assert self._evaluate_on_dev is not None  # noqa: S101 (as the caller knows)
        self._settle(self.state.step)
        return self._evaluate_on_dev()

    def _evaluation_is_due(self) -> bool:
        last = self.state.step == self.total
        if self._evaluate_on_dev is None or (last and self.spec.early_stopping is None):
            return False  # the final figures are taken anyway, in full precision
        return last or self.state.step % self._every == 0

    def _evaluate(self) -> None:
        metrics = self._on_dev()
        value, state = metrics[self._objective.metric], self.state
        mean = sum(state.losses) / max(1, len(state.losses))
        state.losses = []
        state.history.append({"step": state.step, "loss": mean, f"dev_{self._objective.metric}": value})
        shown = {f"dev_{k}": v for k, v in metrics.items() if "/" not in k}
        self.ctx.report(state.step, self.total, train_loss=mean, **shown)
        if state.best is not None and not self._better(value, state.best):
            state.stale += 1
            return
        state.best, state.best_step, state.stale = value, state.step, 0
        if self.spec.early_stopping is not None:
            self._tell(Command.KEEP)
            self.keep()

    def keep(self) -> None:
        """The weights as they are now are the best until now."""
        self._best = {name: p.detach().cpu().clone() for name, p in self._named.items()}

    def _settle(self, step: int) -> None:
        """Embeddings that no row uses are those of this step, when the model is looked at."""
        if self.narrowed is not None:
            self.narrowed.shrink = vocabulary.shrunk(self.spec, step, self.total)

    def _better(self, value: float, best: float) -> bool:
        return value > best if self._objective.higher_is_better else value < best

    def _gave_up(self) -> bool:
        return self.spec.early_stopping is not None and self.state.stale >= self.spec.early_stopping

    def _restore_best(self) -> None:
        if self._gave_up():
            self.ctx.note(f"stopped early at step {self.state.step} of {self.total}: no gain on dev")
        with torch.no_grad():
            for name, p in self._named.items():
                p.copy_(self._best[name])
        self.ctx.note(f"kept the weights of step {self.state.best_step}, the best on dev")

    def _save(self) -> None:
        self._tell(Command.PACK)
        tensors = self.tensors()
        epoch, position = divmod(self.state.step, self._per_epoch)
        about = {
            "fingerprint": self._fingerprint(),
            "threads": torch.get_num_threads(),
            "epoch": epoch,
            "position": position,
            "state": {name: getattr(self.state, name) for name in State.__slots__},
            "random": checkpoint.random_state(),
        }
        checkpoint.save(self.ctx.checkpoint(), self.state.step, tensors, about)
        self._saved_at = time.monotonic()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Of a checkpoint; whole ones, whoever has which part of them."""
        tensors = checkpoint.pack(self._named, self._optimiser)
        tensors |= {f"{checkpoint.BEST}{name}": tensor for name, tensor in self._best.items()}
        tensors |= self._along.tensors()
        return tensors if self.sharded is None else self.sharded.whole(tensors)

    def _fingerprint(self) -> str:
        """Names the run by everything its result depends on, so that a checkpoint of another is never taken. In how
        many parts a step is computed changes rounding only, and a run that found no memory goes on in smaller ones."""
        rows = hashlib.sha256(self.data.ids.tobytes() + self.data.starts.tobytes())
        for target in self.data.targets:
            rows.update(target.tobytes())
        spec = self.spec.plain()
        for name in ("checkpoint_seconds", "gradient_accumulation_steps", "part_tokens", "devices", "parallelism"):
            spec.pop(name)
        shapes = self._named if self.sharded is None else self.sharded.weights
        weights = {name: list(p.shape) for name, p in shapes.items()}
        return digest_of_value([spec, self.task.to_card(), rows.hexdigest(), weights, self.precision.name])

    def _lost(self, what: str) -> JobFailed:
        return JobFailed(
            f"the {what} became NaN or infinite at step {self.state.step} of {self.total}",
            hint=f"lower train.learning_rate (the peak is {optimiser.peak(self.spec):g}), or set train.precision: fp32",
        )
