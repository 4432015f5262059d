"""Base models made for a data set: the same for the same text and seed, open in transformers, and learn."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from llmo import scratch as recipes
from llmo.context import NullContext
from llmo.data.operation import run as import_data
from llmo.errors import DataError, ModelError, SpecError
from llmo.files import sha256_file
from llmo.specs import DataSpec, TaskSpec
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from llmo.training import pieces, scratch
from llmo.verify import operation as verify
from support.tiny import history_rows, text_rows

Train = Callable[..., dict[str, Any]]
TEXTS = [row["text"] for row in text_rows(200)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def go(source: str, task: str, data: Path, seed: int = 7) -> Path:
        out = tmp_path / f"base-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        spec = recipes.parse(source, task, seed).plain()
        scratch.run(spec, {"data": data}, out, NullContext(1, tmp_path / "none"))
        return out

    return go


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A data set of plain text for a task."""
    source = tmp_path_factory.mktemp("source") / "rows.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")

    def go(task: str) -> Path:
        out = tmp_path_factory.mktemp("documents")
        told = {**DataSpec(source=str(source)).plain(), "task": TaskSpec(name=task).plain()}
        import_data(told, {}, out, NullContext(1))
        return out

    return go


@pytest.fixture(scope="session")
def visits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who go round in a ring of twenty items, three steps at a time: what comes next can be learnt."""
    folder = tmp_path_factory.mktemp("visits")
    lines = ["user,item,time"]
    for row in history_rows(80):
        lines += [f"{row['id']},{item},{time}" for time, item in enumerate([*row["text"].split(), row["label"]])]
    (folder / "visits.csv").write_text("\n".join(lines))
    (folder / "data").mkdir()
    told = {**DataSpec(source=str(folder / "visits.csv")).plain(), "task": TaskSpec(name="next-item").plain()}
    import_data(told, {}, folder / "data", NullContext(1))
    return folder / "data"


def test_the_same_text_in_another_order_and_process_makes_the_same_tokeniser(tmp_path: Path) -> None:
    code = (
        "import json, sys; from llmo.training import pieces as v; texts = json.load(sys.stdin); "
        "print(v.wordpiece(texts, None, cased=False).to_str() + v.byte_bpe(texts, 400).to_str())"
    )
    shuffled = random.Random(1).sample(TEXTS, len(TEXTS))
    told = [
        subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        for texts in (TEXTS, shuffled)
    ]
    assert told[0].stdout == told[1].stdout != ""


def test_a_tokeniser_reads_what_it_was_made_of() -> None:
    words = pieces.wordpiece([*TEXTS, "Café 北京 £5 naïve"] * 2, None, cased=False)
    assert words.encode("Café 北京 £5").tokens[0] == "[CLS]"
    assert "[UNK]" not in words.encode("café naïve 北京 £5 market").tokens
    assert "[UNK]" in words.encode("ж").tokens
    bytes_ = pieces.byte_bpe(TEXTS, None)
    assert bytes_.decode(bytes_.encode("Ж market <|endoftext|>").ids, skip_special_tokens=False).startswith("Ж market")


def test_more_text_has_a_larger_vocabulary_within_bounds() -> None:
    sizes = [pieces.size_for(["one two three four"] * times) for times in (60, 10_000, 40_000, 700_000)]
    assert sizes == [pieces.SMALLEST, 1984, 3968, pieces.LARGEST]
    assert pieces.size_for(["我在北京" * 60]) == pieces.SMALLEST  # each character counts, as each word does


def test_too_little_text_and_too_large_a_vocabulary_are_said() -> None:
    with pytest.raises(DataError, match="hold 2 words, too few"):
        pieces.wordpiece(["two words"], None, cased=False)
    with pytest.raises(SpecError, match="a vocabulary of 5000 was asked for, and the training rows give no more than"):
        pieces.wordpiece(TEXTS, 5000, cased=False)
    with pytest.raises(SpecError, match="a vocabulary of 5000 was asked for"):
        pieces.byte_bpe(TEXTS, 5000)
    with pytest.raises(SpecError, match="there are 3 items"):
        pieces.items(["a b", "b c"], 300)


@pytest.mark.parametrize("name", ["transformer-tiny", "lstm"])
def test_the_same_seed_makes_the_same_folder(make: Callable[..., Path], texts: Path, name: str) -> None:
    source = f"scratch:{name},width=32"
    folders = [make(source, "text-classification", texts, seed) for seed in (7, 7, 8)]
    hashes = [[sha256_file(f / n) for n in ("model.safetensors", "tokenizer.json", "config.json")] for f in folders]
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[2][0]
    assert hashes[0][1:] == hashes[2][1:]


def test_only_training_rows_are_looked_at(make: Callable[..., Path], visits: Path) -> None:
    base = make("scratch:sasrec,width=16", "next-item", visits)
    assert set(load_tokenizer(base).get_vocab()) == {"[PAD]", "[UNK]", *(f"i{n}" for n in range(20))}


@pytest.mark.parametrize("name", ["transformer-tiny,layers=1", "lstm"])
@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_an_encoder_from_scratch_learns_and_is_what_was_trained(
    make: Callable[..., Path], train: Train, texts: Path, spans: Path, tmp_path: Path, name: str, task: str
) -> None:
    data = texts if task == "text-classification" else spans
    base = make(f"scratch:{name},width=32", task, data)
    result = train(data, task=task, model=base, epochs=25 if "transformer" in name else 40, learning_rate=1e-2)
    before, after = (result["test"][when] for when in ("before", "after"))
    metric = load_task(tmp_path / "out").metric
    assert after[metric]["value"] > max(0.6, before[metric]["value"] + 0.2)
    (tmp_path / "report").mkdir()
    assert verify.run({}, {"model": tmp_path / "out"}, tmp_path / "report", NullContext(1))["passed"]
    assert read_card(tmp_path / "out")["base"]["source"] == f"scratch:{name.partition(',')[0]}"


def test_new_weights_take_larger_steps_unless_told(make: Callable[..., Path], train: Train, texts: Path) -> None:
    base = make("scratch:lstm,width=32", "text-classification", texts)
    train(texts, model=base, epochs=0.2)
    card = read_card(next(p for p in base.parent.iterdir() if p.name == "out"))
    assert card["train"]["learning_rate"] == scratch.LEARNING_RATE


def test_masked_lm_learns_and_its_model_is_a_base(
    make: Callable[..., Path], train: Train, documents: Callable[[str], Path], texts: Path, tmp_path: Path
) -> None:
    data = documents("masked-lm")
    base = make("scratch:transformer-tiny,width=32,layers=1", "masked-lm", data)
    result = train(data, "words", task="masked-lm", model=base, epochs=12, learning_rate=5e-3)
    before, after = (result["test"][when]["masked_perplexity"]["value"] for when in ("before", "after"))
    assert after < 0.3 * before
    (tmp_path / "report").mkdir()
    assert verify.run({}, {"model": tmp_path / "words"}, tmp_path / "report", NullContext(1))["passed"]
    evidence = np.array(read_golden(tmp_path / "words")[0]["logits"])
    assert evidence.shape == (len(read_golden(tmp_path / "words")[0]["input_ids"]), 1)
    train(texts, "topics", model=tmp_path / "words", epochs=0.1, learning_rate=1e-9, warmup=0.0)
    opened = transformers.AutoModel.from_pretrained(tmp_path / "topics")
    start = transformers.AutoModel.from_pretrained(tmp_path / "words")
    key = "encoder.layer.0.attention.self.query.weight"
    assert np.allclose(opened.state_dict()[key], start.state_dict()[key], atol=1e-6), "it starts from those weights"


def test_a_causal_model_from_scratch_learns_plain_text(
    make: Callable[..., Path], train: Train, documents: Callable[[str], Path], tmp_path: Path
) -> None:
    data = documents("generation")
    base = make("scratch:causal-tiny,width=32,layers=1,vocabulary=400", "generation", data)
    result = train(data, task="generation", model=base, epochs=4, learning_rate=5e-3, max_length=64)
    before, after = (result["test"][when]["perplexity"]["value"] for when in ("before", "after"))
    assert after < 0.3 * before
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_the_next_item_is_learnt_and_answered(
    make: Callable[..., Path], train: Train, visits: Path, tmp_path: Path
) -> None:
    base = make("scratch:sasrec,width=32,layers=1", "next-item", visits)
    result = train(visits, task="next-item", model=base, epochs=40, learning_rate=5e-3, batch_size=8)
    assert result["test"]["before"]["ndcg@10"]["value"] < 0.5
    assert result["test"]["after"]["ndcg@10"]["value"] > 0.9
    assert result["metric"] == "ndcg@10"
    (tmp_path / "report").mkdir()
    assert verify.run({}, {"model": tmp_path / "out"}, tmp_path / "report", NullContext(1))["passed"]


def test_next_item_wants_a_catalogue_and_no_class_weights(
    make: Callable[..., Path], train: Train, visits: Path, base: Path
) -> None:
    with pytest.raises(ModelError, match="reads text, and next-item learns of items"):
        train(visits, "one", task="next-item", model=base)
    made = make("scratch:sasrec,width=16", "next-item", visits)
    with pytest.raises(SpecError, match="class_weights and label_smoothing are of tasks with classes"):
        train(visits, "two", task="next-item", model=made, class_weights="balanced")
