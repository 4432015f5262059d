"""The operation `verify`: the same texts through training graph, saved model, engine and, if asked, endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from llmo import plugins
from llmo.context import Context
from llmo.engines.base import Engine, Request
from llmo.engines.torch import quiet
from llmo.errors import GateRefused, InputError, ModelError
from llmo.files import digest_of, manifest_of, publish_json, sha256_file
from llmo.tasks.base import Encoding, Logits, Task, gathered, kept, sequences
from llmo.tasks.card import TOKENIZER, load_task, load_tokenizer, read_card, reshaped
from llmo.tasks.generation import Generation
from llmo.types import Device
from llmo.verify import adapter, checks, generation, golden
from llmo.verify.checks import Check

RETRAIN = "the weights are not those of training: train the model again"
RECOMPRESS = "the graph is not what was measured: compress the model again"
REDEPLOY = "the endpoint does not run this model: deploy it again"


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that is verified, with its golden texts encoded by its own tokeniser."""

    folder: Path
    card: Mapping[str, Any]
    task: Task
    golden: golden.Golden
    encodings: list[Encoding]

    @property
    def exact(self) -> bool:
        return bool(self.card["precision"] == "fp32")

    def limit(self, lossy: float) -> float:
        """The largest difference of logits to allow: `lossy` is a share of their range, for int8."""
        return checks.EXACT if self.exact else lossy * checks.spread(self.golden.logits)


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`inputs` are `model` and, for a compressed one, `reference` (the trained model it was made from); `heard` in
    `spec` is what an endpoint answered to the golden texts. Writes `report.json`.

    Returns `{"passed", "checks": [{"name", "passed", "value", "limit", "text"}]}`. Raises GateRefused, with the
    same in `extra`, when a check fails.
    """
    found = _checks(spec, inputs["model"], inputs.get("reference"), ctx)
    report: dict[str, Any] = {
        "passed": all(check.passed for check in found),
        "checks": [check.to_json() for check in found],
    }
    publish_json(out / "report.json", report)
    for check in found:
        if not check.passed:
            raise GateRefused(f"the model is not what was trained: {check.text}", hint=check.hint, **report)
    return report


def _checks(spec: Mapping[str, Any], model: Path, reference: Path | None, ctx: Context) -> list[Check]:
    card = read_card(model)
    found = [_tokenizer_check(model, card)]
    if not found[0].passed:
        return found
    task = load_task(model)
    if isinstance(task, Generation):
        return found + _generation_checks(spec, model, reference, card, task, ctx)
    evidence = golden.read(model)
    subject = Subject(model, card, task, evidence, task.encode(load_tokenizer(model), evidence.texts))
    found += _token_checks(subject)
    if not all(check.passed for check in found):
        return found  # with another tokeniser every later figure would be about other texts
    compressed = "reference" in card
    saved = reference if compressed else model
    if saved is not None:
        ctx.report(1, 3, stage="saved model")
        found += [_reference_check(card, saved)] if compressed else []
        found += _saved_checks(saved, subject, ctx.device) if not reshaped(card) else []
    ctx.report(2, 3, stage=f"engine {card['engine']}")
    found += _engine_checks(subject, ctx.device)
    if spec.get("heard") is not None:
        ctx.report(3, 3, stage="endpoint")
        found += _endpoint_checks(spec["heard"], subject)
    return found


def _generation_checks(
    spec: Mapping[str, Any],
    model: Path,
    reference: Path | None,
    card: Mapping[str, Any],
    task: Generation,
    ctx: Context,
) -> list[Check]:
    evidence = generation.golden_of(model)
    found = generation.token_checks(model, task, evidence)
    if not all(check.passed for check in found):
        return found  # with another tokeniser or template every later figure would be about other prompts
    compressed = "reference" in card
    saved = reference if compressed else model
    if saved is not None:
        ctx.report(1, 3, stage="saved model")
        found += [_reference_check(card, saved)] if compressed else []
        found += generation.saved_checks(saved, evidence)
    ctx.report(2, 3, stage=f"engine {card['engine']}")
    found += generation.engine_checks(model, card, evidence, ctx.device)
    if spec.get("heard") is not None:
        found += generation.endpoint_checks(spec["heard"], card, evidence)
    return found


def _tokenizer_check(model: Path, card: Mapping[str, Any]) -> Check:
    digest = sha256_file(model / TOKENIZER) if (model / TOKENIZER).is_file() else "missing"
    hint = "put the original tokenizer.json back, or train the model again"
    return checks.same_digest("tokenizer", "the tokeniser", digest, str(card.get("tokenizer_sha256")), hint)


def _token_checks(subject: Subject) -> list[Check]:
    ours = [encoding.input_ids for encoding in subject.encodings]
    with quiet():
        try:
            plain = transformers.AutoTokenizer.from_pretrained(subject.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"plain transformers cannot open the tokeniser: {error}", where=str(subject.folder), hint=RETRAIN
            ) from error
        theirs = subject.task.plain_ids(plain, subject.golden.texts)
    return [
        checks.same_tokens("token ids", "of the saved tokeniser", ours, subject.golden.input_ids),
        checks.same_tokens("token ids, transformers", "in plain transformers", theirs, subject.golden.input_ids),
    ]


def _reference_check(card: Mapping[str, Any], saved: Path) -> Check:
    """A compressed model is compared with the very model that it was made from."""
    digest = digest_of(manifest_of(saved))
    recorded = str(card.get("reference", {}).get("digest"))
    hint = "give the trained model this one was compressed from, or compress again"
    return checks.same_digest("reference", "the model it was compressed from", digest, recorded, hint)


def _saved_checks(saved: Path, subject: Subject, device: Device) -> list[Check]:
    """The saved model re-opened by plain transformers, and its adapter where it was trained with one."""
    expected = subject.golden.logits
    with _loaded("torch", saved, device) as engine:
        reopened = _logits(engine, subject.task, subject.encodings)
    found = [checks.same_logits("saved model", "training graph and saved model", reopened, expected, hint=RETRAIN)]
    return found + _adapter_checks(saved, read_card(saved), subject)


def _adapter_checks(saved: Path, card: Mapping[str, Any], subject: Subject) -> list[Check]:
    """That the adapter which the card tells of is there and does something; none for a model without one."""
    texts = sequences(subject.encodings)
    return adapter.checks_of(saved, card, lambda model: adapter.logits(model, texts))


def _engine_checks(subject: Subject, device: Device) -> list[Check]:
    """The model through the engine that will serve it, in one padded batch and each text alone."""
    name, precision = subject.card["engine"], subject.card["precision"]
    hint = RETRAIN if name == "torch" else RECOMPRESS
    with _loaded(name, subject.folder, device) as engine:
        together = _logits(engine, subject.task, subject.encodings)
        alone = [_logits(engine, subject.task, [one])[0] for one in subject.encodings]
    expected, limit = subject.golden.logits, subject.limit(checks.LOSSY_SPREAD)
    served = f"training graph and {name} {precision}"
    batches = checks.same_logits(
        "batch", "a text alone and in a batch", alone, together, subject.limit(checks.LOSSY_BATCH), hint
    )
    return [
        checks.same_logits("engine logits", served, together, expected, limit, hint),
        _answers_check("engine answers", served, together, subject, hint),
        batches,
    ]


def _endpoint_checks(answers: Sequence[Mapping[str, Any]], subject: Subject) -> list[Check]:
    if len(answers) != len(subject.encodings):
        raise InputError(
            f"the endpoint gave {len(answers)} answers to {len(subject.encodings)} golden texts",
            hint="ask it all of the model's golden texts, in their order",
        )
    heard = [np.asarray(answer["logits"], dtype=np.float32) for answer in answers]
    ids = [answer["input_ids"] for answer in answers]
    expected, limit = subject.golden.logits, subject.limit(checks.LOSSY_SPREAD)
    found = [
        checks.same_tokens("endpoint token ids", "of the endpoint", ids, subject.golden.input_ids),
        checks.same_logits("endpoint logits", "training graph and endpoint", heard, expected, limit, REDEPLOY),
    ]
    if found[1].passed:  # logits of another shape answer nothing
        found.append(_answers_check("endpoint answers", "training graph and endpoint", heard, subject, REDEPLOY))
    return found


def _answers_check(name: str, pair: str, found: Sequence[Logits], subject: Subject, hint: str) -> Check:
    share = 1.0 if subject.exact else checks.LOSSY_AGREEMENT
    return checks.same_answers(
        name, pair, subject.task, found, subject.golden.logits, subject.encodings, share, hint
    )  # fmt: skip


@contextmanager
def _loaded(name: str, folder: Path, device: Device) -> Iterator[Engine]:
    engine: Engine = plugins.load("llmo.engines", name)()
    engine.load(folder, device if name == "torch" else replace(device, kind="cpu", name="cpu"))
    try:
        yield engine
    finally:
        engine.close()


def _logits(engine: Engine, task: Task, encodings: Sequence[Encoding]) -> list[Logits]:
    """What is kept of the logits of the texts as one batch."""
    requests = [Request(i, ids) for i, ids in enumerate(sequences(encodings))]
    found = {chunk.id: chunk.data for chunk in engine.run(requests)}
    return kept(task, gathered([found[request.id] for request in requests], encodings), encodings)
