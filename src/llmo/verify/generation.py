"""What is checked of a model that generates: template, token ids, saved weights, adapter, engine and endpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from llmo import plugins
from llmo.engines.generation import GenerationEngine, GenerationOptions, Prompt, Sampling
from llmo.engines.torch import open_model, quiet
from llmo.errors import InputError, ModelError
from llmo.tasks.card import load_tokenizer, read_card, read_golden
from llmo.tasks.generation import Generation
from llmo.tasks.verbatim import Verbatim
from llmo.types import Device
from llmo.verify import adapter, checks
from llmo.verify.checks import Check

Scores = NDArray[np.float32]

ENGINE = 1e-3  # nats: another order of sums over thirty layers
LOSSY_LOGPROB = 0.25  # mean difference of log-probabilities in nats: int8 loses 0.01 to 0.05, a wrong layer whole nats
LOSSY_SAME = 0.5  # share of golden answers whose first tokens must be the same
FIRST = 4  # tokens that count as the beginning of an answer
STREAMS = 8
CACHE_BYTES = 256 << 20
RETRAIN = "the weights are not those of training: train the model again"
RECOMPRESS = "the files of the engine are not what was measured: compress the model again"
REDEPLOY = "the endpoint does not run this model: deploy it again"
TEMPLATE = "chat_template.jinja is not the one of training: put it back, or train the model again"


@dataclass(frozen=True, slots=True)
class Golden:
    """What the training graph did with one prompt before it was saved; `logprobs` are of `input_ids + greedy`."""

    messages: Sequence[Mapping[str, Any]]
    rendered: str
    input_ids: list[int]
    greedy: list[int]
    logprobs: NDArray[np.float32]

    @property
    def ids(self) -> list[int]:
        return [*self.input_ids, *self.greedy]


def golden_of(folder: Path) -> list[Golden]:
    """Raises ModelError when there is no evidence, or when it cannot be read."""
    hint = "train the model again"
    try:
        found = [
            Golden(
                item["messages"] or (),
                str(item["rendered"]),
                [int(i) for i in item["input_ids"]],
                [int(i) for i in item["greedy"]],
                np.asarray(item["logprobs"], np.float32),
            )
            for item in read_golden(folder)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the golden evidence cannot be read: {error!r}", where=str(folder), hint=hint) from error
    if not found or any(len(g.logprobs) != len(g.ids) - 1 for g in found):
        raise ModelError("the golden evidence proves nothing", where=str(folder), hint=hint)
    return found


def token_checks(folder: Path, task: Generation, golden: Sequence[Golden]) -> list[Check]:
    """Template bytes and token ids, by our own code and by plain transformers, against those of training."""
    tokenizer = load_tokenizer(folder)
    spoken = [g for g in golden if g.messages]
    ours, ids = [], []
    for g in spoken:
        text, own = task.rendered(tokenizer, g.messages)
        ours.append(text)
        ids.append(own)
    with quiet():
        try:
            plain = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"plain transformers cannot open the tokeniser: {error}", where=str(folder), hint=RETRAIN
            ) from error
        theirs = [
            str(plain.apply_chat_template([dict(m) for m in g.messages], add_generation_prompt=True, tokenize=False))
            for g in spoken
        ]
        their_ids = [list(plain(text, add_special_tokens=False)["input_ids"]) for text in theirs]
    expected, wanted = [g.rendered for g in spoken], [g.input_ids for g in spoken]
    # To transformers a message that spells a special token holds one; to us it is text.
    ordinary = [not Verbatim.of(tokenizer, g.messages).mark for g in spoken]
    their_ids, their_wanted = list(compress(their_ids, ordinary)), list(compress(wanted, ordinary))
    return [
        checks.same_texts("template", "rendered by the saved template", ours, expected, TEMPLATE),
        checks.same_texts("template, transformers", "rendered by plain transformers", theirs, expected, TEMPLATE),
        checks.same_tokens("token ids", "of the saved tokeniser", ids, wanted),
        checks.same_tokens("token ids, transformers", "in plain transformers", their_ids, their_wanted),
    ]


def saved_checks(saved: Path, golden: Sequence[Golden]) -> list[Check]:
    """The saved weights re-opened by plain transformers, and the adapter where they were trained with one."""
    model = open_model(saved)
    expected, answers = [g.logprobs for g in golden], [g.greedy for g in golden]
    reopened = [_logprobs(model, g.ids) for g in golden]
    written = [_greedy(model, g) for g in golden]
    result = [
        _close("saved model", "training graph and saved model", reopened, expected, checks.EXACT, RETRAIN),
        checks.same_tokens("saved model, greedy", "of greedy answers in plain transformers", written, answers),
    ]
    return result + adapter.checks_of(
        saved, read_card(saved), lambda opened: [_logprobs(opened, g.ids) for g in golden]
    )


def engine_checks(folder: Path, card: Mapping[str, Any], golden: Sequence[Golden], device: Device) -> list[Check]:
    """The model through the engine that will serve it: log-probabilities, and answers alone and in one batch."""
    name, precision = card["engine"], card["precision"]
    exact = precision == "fp32"
    served = f"training graph and {name} {precision}"
    with _loaded(name, folder, device, precision) as engine:
        scores = engine.score([g.ids for g in golden])
        together = _answers(engine, golden)
        alone = [_answers(engine, [g])[0] for g in golden]
    expected = [g.logprobs for g in golden]
    hint = RETRAIN if name == "torch" else RECOMPRESS
    if exact:
        found = [_close("engine", served, scores, expected, ENGINE, hint)]
    else:
        found = [_near("engine", served, scores, expected, hint)]
    found.append(_same_answers("engine answers", served, together, golden, exact, hint))
    if engine.deterministic:
        found.append(checks.same_tokens("batch", "of answers alone and in a batch", alone, together))
    return found


def endpoint_checks(
    heard: Sequence[Mapping[str, Any]], card: Mapping[str, Any], golden: Sequence[Golden]
) -> list[Check]:
    """What an endpoint answered to the golden prompts, greedily: `input_ids` and `tokens`."""
    if len(heard) != len(golden):
        raise InputError(
            f"the endpoint gave {len(heard)} answers to {len(golden)} golden prompts",
            hint="ask it all of the model's golden prompts, in their order",
        )
    exact = card["precision"] == "fp32"
    ids, tokens = [list(a["input_ids"]) for a in heard], [list(a.get("tokens") or ()) for a in heard]
    return [
        checks.same_tokens("endpoint token ids", "of the endpoint", ids, [g.input_ids for g in golden]),
        _same_answers("endpoint answers", "training graph and endpoint", tokens, golden, exact, REDEPLOY),
    ]


def _close(name: str, pair: str, found: Sequence[Scores], expected: Sequence[Scores], limit: float, hint: str) -> Check:
    worst = checks.difference(found, expected)
    text = f"largest difference of log-probabilities, {pair}: {worst:.1e} (limit {limit:.1e})"
    return Check(name, worst <= limit, worst, limit, text, hint)


def _near(name: str, pair: str, found: Sequence[Scores], expected: Sequence[Scores], hint: str) -> Check:
    """For a lower precision: the mean is held, since a single unlikely token may move far."""
    whole = np.concatenate([np.abs(a - b) for a, b in zip(found, expected, strict=True)])
    mean = float(whole.mean())
    text = f"mean difference of log-probabilities, {pair}: {mean:.1e} nats (limit {LOSSY_LOGPROB:.1e})"
    return Check(name, mean <= LOSSY_LOGPROB, mean, LOSSY_LOGPROB, text, hint)


def _same_answers(
    name: str, pair: str, found: Sequence[Sequence[int]], golden: Sequence[Golden], exact: bool, hint: str
) -> Check:
    """Greedy answers: all tokens of all of them at fp32; at a lower precision the first few of most."""
    most = None if exact else FIRST
    agreed = sum(list(a[:most]) == g.greedy[:most] for a, g in zip(found, golden, strict=True))
    needed = len(golden) if exact else math.ceil(LOSSY_SAME * len(golden))
    what = "same greedy answer" if exact else f"same first {FIRST} tokens"
    text = f"{what}, {pair}: {agreed} of {len(golden)} prompts (needed {needed})"
    return Check(name, agreed >= needed, agreed, needed, text, hint)


def _logprobs(model: Any, ids: Sequence[int]) -> Scores:
    """Log-probabilities of `ids[1:]`, by plain transformers."""
    with torch.inference_mode():
        tokens = torch.tensor([list(ids)])
        logits = model(input_ids=tokens).logits[0, :-1].float()
        found: Scores = torch.log_softmax(logits, -1).gather(1, tokens[0, 1:, None])[:, 0].numpy()
    return found


def _greedy(model: Any, golden: Golden) -> list[int]:
    """As many tokens as the training graph wrote."""
    with torch.inference_mode(), quiet():
        prompt = torch.tensor([golden.input_ids])
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max(1, len(golden.greedy)),
            do_sample=False,
            **dict.fromkeys(("temperature", "top_p", "top_k", "repetition_penalty")),
        )
    return [int(token) for token in written[0, len(golden.input_ids) :]][: len(golden.greedy)]


def _answers(engine: GenerationEngine, golden: Sequence[Golden]) -> list[list[int]]:
    """Greedy answers to these prompts, all at once."""
    written: list[list[int]] = [[] for _ in golden]
    for number, g in enumerate(golden):
        sampling = Sampling(max_tokens=max(1, len(g.greedy)), temperature=0.0)
        engine.add(Prompt(number, g.input_ids, sampling, tenant="verify"))
    left = len(golden)
    while left:
        for delta in engine.step():
            written[delta.id] += delta.tokens
            left -= delta.finish is not None
        for _, error in engine.failed():
            raise error
    return [tokens[: len(g.greedy)] for tokens, g in zip(written, golden, strict=True)]


@contextmanager
def _loaded(name: str, folder: Path, device: Device, precision: str) -> Iterator[GenerationEngine]:
    engine: GenerationEngine = plugins.load("llmo.generators", name)()
    options = GenerationOptions(streams=STREAMS, cache_bytes=CACHE_BYTES, precision=precision)
    engine.load(folder, device if name == "torch" else replace(device, kind="cpu", name="cpu"), options)
    try:
        yield engine
    finally:
        engine.close()
