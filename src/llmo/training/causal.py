"""Log-probabilities of chosen tokens under a causal model: the vocabulary is projected where they are, a chunk a time.

Logits of every position would be the largest thing in memory by far (50,000 numbers a token), and most positions of a
conversation are not learnt at all. What all rows of a batch begin with (the template's system message, for one) is
run once, not once a row: with short conversations that is a third of the work. The rest goes end to end, without
padding, where the architecture is proved to take it: by `packing` on a CPU, by `varlen` on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from llmo.errors import ModelError
from llmo.training import packing, varlen

CHUNK_BYTES, ON_GPU = 64 << 20, 2  # of fp32 logits at once, and how many times as much on a GPU
IGNORED = -100
PROBES = 4  # tokens that prove that trunk and projection are the whole model
CLOSE = 1e-3
WORTH_SHARING = 8  # tokens that a whole batch begins with


class Speaker:
    """A causal transformers model (`Built.network`) in two parts: its trunk, and the projection to the vocabulary.
    `packs` (on a CPU) and `varlen` (on a GPU) say whether rows go end to end, and `why` why not.

    Unless it `shares`, its layers run once for every batch, whatever its rows are. Raises ModelError for an
    architecture that does something else between the two than the known scalings.
    """

    def __init__(self, network: Any, shares: bool = True) -> None:
        self.network = network
        self.trunk: nn.Module = network.base_model
        self._head: Any = network.get_output_embeddings()
        self._cast: torch.Tensor | None = None
        config = network.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._factor = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._recomputes = any(getattr(module, "gradient_checkpointing", False) for module in self.trunk.modules())
        self._shares = self.packs = self.varlen = False
        self.why = "on a GPU they go end to end in bf16 only, and never for preferences"
        if self._recomputes:
            self.why = "activations are computed again"
        self._window = getattr(config, "sliding_window", None)
        self._prove(shares)

    def flow(self) -> bool:
        """On a GPU that computes bf16: have rows end to end from now on, if the architecture is proved to take them."""
        if not self._recomputes:
            refused = varlen.refusal(self.network, self.vocabulary)
            self.varlen, self.why = refused is None, refused or ""
        return self.varlen

    @property
    def weights(self) -> list[nn.Parameter]:
        """Those of the projection that are trained."""
        return [p for p in self._head.parameters() if p.requires_grad]

    @property
    def frozen(self) -> bool:
        """Whether the projection is a plain matrix that is not trained."""
        return type(self._head) is nn.Linear and not self.weights

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `[n, vocabulary]`."""
        logits: torch.Tensor = self._linear(hidden) if self.frozen else self._head(hidden)
        if self._factor != 1.0:
            logits = logits.float() * self._factor
        return logits if self._cap is None else torch.tanh(logits.float() / self._cap) * self._cap

    @torch.no_grad()
    def slopes(self, hidden: torch.Tensor, ids: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The log-probabilities `[n]` of a frozen projection, and by how much each grows with its state `[n, width]`:
        target less softmax, back through the projection."""
        logits = self.project(hidden)
        logs = _logs(logits)
        scores = _scores(logs, ids, smoothing)
        over = logs.exp_()
        if smoothing:
            over -= smoothing / self.vocabulary
        over.scatter_add_(1, ids[:, None], over.new_full((len(ids), 1), smoothing - 1.0))
        if self._cap is not None:
            over *= 1.0 - (logits / self._cap) ** 2
        weight = self._weight(hidden.device.type)
        return scores, (over.to(weight.dtype) @ weight).mul_(-self._factor).to(hidden.dtype)

    def _linear(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self._weight(hidden.device.type), self._head.bias)

    def _weight(self, device: str) -> torch.Tensor:
        """The frozen projection in the format that is computed in, cast to it once and not for every chunk."""
        weight: torch.Tensor = self._head.weight
        wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if wanted == weight.dtype:
            return weight
        if self._cast is None or self._cast.dtype != wanted:
            self._cast = weight.detach().to(wanted)
        return self._cast

    def hidden(self, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What stands before each learnt token, `[n, width]`, and the tokens, `[n]`, row after row."""
        wanted = targets[:, 1:] != IGNORED
        if self.packs and (self._window is None or wanted.shape[1] < self._window):
            return self._packed(inputs, wanted), targets[:, 1:][wanted]
        # With activation checkpointing transformers keeps no cache, and what all rows begin with would need one.
        shares = self._shares and not (self._recomputes and self.network.training)
        begin = self._common(inputs, wanted) if shares else 0
        states = self._after(inputs, begin) if begin else self.trunk(**inputs, use_cache=False).last_hidden_state
        where = wanted[:, begin:]
        return states[:, :-1][where], targets[:, 1 + begin :][where]

    def log_probs(self, inputs: dict[str, torch.Tensor], targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
        """Of each learnt token `[n]`, row after row, with a gradient; smoothed towards the mean over the vocabulary."""
        return self.log_probs_of(*self.hidden(inputs, targets), smoothing)

    def log_probs_of(self, states: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
        """The same of tokens `[n]`, from what stands before each, `[n, width]`."""
        given = (states, ids, self, smoothing, self._rows, *self.weights)
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
            found.append(torch.stack([_scores(_logs(logits), ids[part], 0.0), likeliest.float()], 1))
        return torch.cat(found) if found else states.new_zeros((0, 2), dtype=torch.float32)

    def _common(self, inputs: dict[str, torch.Tensor], wanted: torch.Tensor) -> int:
        """How many tokens all rows begin with, before the first state that is wanted; 0 when it is not worth it."""
        ids = inputs["input_ids"]
        shared = (ids == ids[:1]).all(0) & inputs["attention_mask"].bool().all(0)
        same = (shared[:-1] & ~wanted.any(0)).long().cumprod(0).sum()
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

    def _packed(self, inputs: dict[str, torch.Tensor], wanted: torch.Tensor) -> torch.Tensor:
        """The wanted states, of all rows in one without what pads them."""
        ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
        begin = self._common(inputs, wanted)
        found = packing.layout(real.sum(1).tolist(), begin, ids.device)
        rest = real[:, begin:]
        states = self._run_packed(torch.cat([ids[0, :begin], ids[:, begin:][rest]]), found)
        chosen: torch.Tensor = nn.functional.pad(wanted, (0, 1))[:, begin:][rest]
        return states[begin:][chosen]

    def _run_packed(self, ids: torch.Tensor, layout: packing.Layout) -> torch.Tensor:
        """States `[tokens, width]` of a packed row. A mask of four dimensions is one that transformers leaves alone."""
        unused = ids.new_ones((1, 1, 1, 1))
        given = {"input_ids": ids[None], "position_ids": layout.positions[None], "attention_mask": unused}
        states: torch.Tensor = self.trunk(**given, packed=layout, use_cache=False).last_hidden_state[0]
        return states

    @property
    def _rows(self) -> int:
        times = ON_GPU if self.network.device.type == "cuda" else 1
        return max(16, CHUNK_BYTES * times // (4 * self.vocabulary))

    @torch.no_grad()
    def _prove(self, shares: bool) -> None:
        was = self.network.training
        self.network.eval()
        ids = torch.arange(PROBES, device=next(self.network.parameters()).device)[None] % self.vocabulary
        whole = self.network(input_ids=ids, use_cache=False).logits.float()
        states = self.trunk(input_ids=ids, use_cache=False).last_hidden_state
        parts = self.project(states).float()
        self._shares = shares and self._proves_sharing(ids, states)
        self.packs = not self._recomputes and ids.device.type == "cpu" and self._proves_packing(ids.device)
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
        except packing.FOREIGN:
            return False  # a cache of another kind, as state-space models have
        expected = states[:, PROBES // 2 :].expand(2, -1, -1)
        return shared.shape == expected.shape and torch.allclose(shared, expected, rtol=CLOSE, atol=CLOSE)

    def _proves_packing(self, device: torch.device) -> bool:
        """Whether sequences of unlike lengths in one row say what each says alone. If so, the network's attention is
        from now on the one that knows packed rows, and is torch's own for all others."""
        config, common = self.network.config, PROBES // 2
        if any(getattr(config.get_text_config(), name, 0.0) for name in packing.DROPOUTS):
            self.why = "its attention has dropout"
            return False
        self.why = f"the architecture '{config.model_type}' is not proved to take packed rows"
        probes = [torch.arange(PROBES * n, PROBES * n + size, device=device) for n, size in enumerate((5, 3, 4), 1)]
        rows = [torch.cat([torch.arange(common, device=device), own]) % self.vocabulary for own in probes]
        alone = [self.trunk(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows]
        expected = torch.cat([alone[0][:common], *(states[common:] for states in alone)])
        layout = packing.layout([len(row) for row in rows], common, device)
        was = config._attn_implementation
        try:
            self.network.set_attn_implementation(packing.ATTENTION)
            found = self._run_packed(torch.cat([rows[0][:common], *(row[common:] for row in rows)]), layout)
            if torch.allclose(found, expected, rtol=CLOSE, atol=CLOSE):
                return True
        except packing.FOREIGN:
            pass  # it knows no packed rows, or wants something of attention that they do not have
        self.network.set_attn_implementation(was)
        return False


class _LogProbs(torch.autograd.Function):
    """One chunk's logits at a time, forward and backward.

    A frozen projection is done once: each token's log-probability depends on its own hidden state only, so the
    gradients can be taken on the way forward and scaled later. Any other is done again on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        ids: torch.Tensor,
        speaker: Speaker,
        smoothing: float,
        rows: int,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        device = states.device.type
        ctx.cast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.speaker, ctx.smoothing, ctx.rows, ctx.weights = speaker, smoothing, rows, weights
        ctx.once = speaker.frozen
        found: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        for part in _parts(len(ids), rows):
            if ctx.once:
                scores, slope = speaker.slopes(states[part], ids[part], smoothing)
                slopes.append(slope)
            else:
                scores = _scores(_logs(speaker.project(states[part])), ids[part], smoothing)
            found.append(scores)
        ctx.save_for_backward(_joined(slopes, states) if ctx.once else states, ids)
        return torch.cat(found) if found else states.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = outer
        saved, ids = ctx.saved_tensors
        if ctx.once:
            return (saved * gradient[:, None].to(saved.dtype), None, None, None, None)
        slopes = []
        sums = [torch.zeros_like(w) for w in ctx.weights]
        device, dtype, enabled = ctx.cast
        for part in _parts(len(ids), ctx.rows):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                own = saved[part].detach().requires_grad_()
                scores = _scores(_logs(ctx.speaker.project(own)), ids[part], ctx.smoothing)
            first, *rest = torch.autograd.grad(scores, [own, *ctx.weights], gradient[part])
            slopes.append(first)
            for total, one in zip(sums, rest, strict=True):
                total.add_(one)
        return (_joined(slopes, saved), None, None, None, None, *sums)


def _logs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1, dtype=torch.float32)


def _scores(logs: torch.Tensor, ids: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Of `[n, vocabulary]` log-probabilities, those of the tokens."""
    picked = logs.gather(-1, ids[:, None])[:, 0]
    return picked if not smoothing else (1.0 - smoothing) * picked + smoothing * logs.mean(-1)


def _parts(count: int, rows: int) -> Iterator[slice]:
    return (slice(first, first + rows) for first in range(0, count, rows))


def _joined(parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros_like(like)
