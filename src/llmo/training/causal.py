"""Log-probabilities of chosen tokens under a causal model: the vocabulary is projected where they are, a chunk a time.

Logits of every position would be the largest thing in memory by far (50,000 numbers a token), and most positions of a
conversation are not learnt at all. What all rows of a batch begin with (the template's system message, for one) is
run once, not once a row: with short conversations that is a third of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from llmo.errors import ModelError

CHUNK_BYTES = 64 << 20  # of fp32 logits at once
IGNORED = -100
PROBES = 4  # tokens that prove that trunk and projection are the whole model
CLOSE = 1e-3
WORTH_SHARING = 8  # tokens that a whole batch begins with

Project = Callable[[torch.Tensor], torch.Tensor]


class Speaker:
    """A causal transformers model (`Built.network`) in two parts: its trunk, and the projection to the vocabulary.

    Raises ModelError for an architecture that does something else between the two than the known scalings.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self.trunk: nn.Module = network.base_model
        self._head: nn.Module = network.get_output_embeddings()
        config = network.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.trunk.modules())
        self._shares = False
        self._prove()

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those of the projection that are trained."""
        return [p for p in self._head.parameters() if p.requires_grad]

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[n, vocabulary]` in fp32."""
        logits: torch.Tensor = self._head(hidden).float() * self._factor
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def hidden(self, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands before each learnt token, `[n, width]`, and the tokens, `[n]`, row after row."""
        wanted = targets[:, 1:] != IGNORED
        # With activation checkpointing transformers keeps no cache, and what all rows begin with would need one.
        shares = self._shares and not (self._recomputes and self.network.training)
        begin = self._common(inputs["input_ids"], wanted) if shares else 0
        states = self._after(inputs, begin) if begin else self.trunk(**inputs, use_cache=False).last_hidden_state
        where = wanted[:, begin:]
        return states[:, :-1][where], targets[:, 1 + begin :][where]

    def log_probs(self, inputs: dict[str, torch.Tensor], targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Of each learnt token `[n]`, row after row, with a gradient; smoothed towards the mean over the vocabulary."""
        states, ids = self.hidden(inputs, targets)
        given = (states, ids, self.project, smoothing, self._rows, *self.weights)
        found: torch.Tensor = _LogProbs.apply(*given)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def judge(self, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
        """Of each learnt token its log-probability and whether it is the likeliest, `[n, 2]`."""
        states, ids = self.hidden(inputs, targets)
        found = []
        for part in _parts(len(ids), self._rows):
            logits = self.project(states[part])
            likeliest = logits.argmax(-1) == ids[part]
            found.append(torch.stack([_scores(logits, ids[part], 0.0), likeliest.float()], 1))
        return torch.cat(found) if found else states.new_zeros((0, 2), dtype=torch.float32)

    def _common(self, ids: torch.Tensor, wanted: torch.Tensor) -> int:
        """How many tokens all rows begin with, before the first state that is wanted; 0 when it is not worth it."""
        same = ((ids == ids[:1]).all(0)[:-1] & ~wanted.any(0)).long().cumprod(0).sum()
        return int(same) if len(ids) > 1 and same >= WORTH_SHARING else 0

    def _after(self, inputs: dict[str, torch.Tensor], begin: int) -> torch.Tensor:
        """The states from column `begin` on; the columns before it are run for the first row only."""
        ids = inputs["input_ids"]
        cache = self.trunk(input_ids=ids[:1, :begin], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        rest = self.trunk(
            input_ids=ids[:, begin:], attention_mask=inputs["attention_mask"], past_key_values=cache, use_cache=True
        )
        states: torch.Tensor = rest.last_hidden_state
        return states

    @property
    def _rows(self) -> int:
        return max(16, CHUNK_BYTES // (4 * self.vocabulary))

    @torch.no_grad()
    def _prove(self) -> None:
        was = self.network.training
        self.network.eval()
        ids = torch.arange(PROBES, device=next(self.network.parameters()).device)[None] % self.vocabulary
        whole = self.network(input_ids=ids, use_cache=False).logits.float()
        states = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        parts = self.project(states)
        self._shares = self._proves_sharing(ids, states)
        self.network.train(was)
        if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=CLOSE, atol=CLOSE):
            raise ModelError(
                f"'{self.network.config.model_type}' makes its logits in a way LLMO does not know",
                hint="take a model of another family, such as Llama, Qwen, Gemma or SmolLM",
            )

    def _proves_sharing(self, ids: torch.Tensor, states: torch.Tensor) -> bool:
        """Whether the architecture's cache can be copied to several rows, and says the same then."""
        inputs = {"input_ids": ids.expand(2, -1), "attention_mask": torch.ones_like(ids).expand(2, -1)}
        try:
            shared = self._after(inputs, PROBES // 2)
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return False  # a cache of another kind, as state-space models have
        expected = states[:, PROBES // 2 :].expand(2, -1, -1)
        return shared.shape == expected.shape and torch.allclose(shared, expected, rtol=CLOSE, atol=CLOSE)


class _LogProbs(torch.autograd.Function):
    """One chunk's logits at a time, forward and backward.

    A frozen projection is done once: each token's log-probability depends on its own hidden state only, so the
    gradients can be taken on the way forward and scaled later. A trained one is done again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        ids: torch.Tensor,
        project: Project,
        smoothing: float,
        rows: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        device = states.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.project, ctx.smoothing, ctx.rows, ctx.weights = project, smoothing, rows, weights
        found: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        for part in _parts(len(ids), rows):
            with torch.set_grad_enabled(not weights):
                own = states[part].detach().requires_grad_(not weights)
                scores = _scores(project(own), ids[part], smoothing)
            if not weights:
                slopes += torch.autograd.grad(scores, own, torch.ones_like(scores))
            found.append(scores.detach())
        ctx.save_for_backward(states if weights else _joined(slopes, states), ids)
        return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = outer
        saved, ids = ctx.saved_tensors
        if not ctx.weights:
            return (saved * gradient[:, None].to(saved.dtype), None, None, None, None)
        slopes = []
        sums = [torch.zeros_like(w) for w in ctx.weights]
        device, dtype, enabled = ctx.cast
        for part in _parts(len(ids), ctx.rows):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                own = saved[part].detach().requires_grad_()
                scores = _scores(ctx.project(own), ids[part], ctx.smoothing)
            first, *rest = torch.autograd.grad(scores, [own, *ctx.weights], gradient[part])
            slopes.append(first)
            for total, one in zip(sums, rest, strict=True):
                total.add_(one)
        return (_joined(slopes, saved), None, None, None, None, *sums)


def _scores(logits: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
    whole = logits.logsumexp(-1)
    picked = logits.gather(-1, ids[:, None])[:, 0] - whole
    return picked if not smoothing else (1.0 - smoothing) * picked + smoothing * (logits.mean(-1) - whole)


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(first, first + rows) for first in range(0, count, rows))


def _joined(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros_like(like)
