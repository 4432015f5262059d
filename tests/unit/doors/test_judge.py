"""`llmo judge` with models that really answer and judge: pairs, ties, what is left out and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmo.doors.client import Client
from llmo.doors.sdk import Dataset, Deployed
from llmo.tasks import pairwise
from llmo.types import Kind
from support.chatting import Place, chat_place
from support.project import Said, llmo

LONG = "long " * 50_000
QUESTIONS = ["Hello there", "What is a cat?", "Count to three", LONG]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    talks = [
        {
            "messages": [
                {"role": "user", "content": f"{number}: {text}"},
                {"role": "assistant", "content": f"so be it {number}"},
            ]
        }
        for number, text in enumerate(QUESTIONS * 4)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"a text {n} of no use " + "xyzw"[n % 4] * n}) + "\n" for n in range(9))
    )
    for name in ("talks", "texts"):
        told = ("--name", name, "--task", "generation", "--set", "clean.drop_duplicates=none")
        said = llmo("data", "import", folder / f"{name}.jsonl", *told, LLMO_HOME=str(folder / "store"))
        assert said.code == 0, said.err
    with chat_place(folder) as found:
        yield found


def judge(place: Place, *arguments: str | Path, data: str = "talks", split: str = "train") -> Said:
    return llmo("judge", *arguments, "--data", data, "--split", split, **place.env())


def test_answers_are_judged_in_both_orders_and_written_down(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    warm = ("--set", "temperature=1", "--set", "max_tokens=12")
    said = judge(place, "assistant", "other", "--by", "assistant", *warm, "--jsonl", file, "--rows", "8", "--json")
    assert said.code == 0, said.err
    found = said.json
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == found["questions"] == 8
    judged = [line for line in lines if "problem" not in line]
    assert found["left_out"] == len(lines) - len(judged) > 0
    assert all("context" in line["problem"] for line in lines if "problem" in line)
    assert any(len(line["messages"][0]["content"]) < 100 for line in judged)
    assert any(a != b for a, b in (line["answers"] for line in judged))
    assert {verdict for line in judged for verdict in line["verdicts"]} <= set(pairwise.POINTS)
    wins = [pairwise.points(tuple(line["verdicts"])) for line in judged]
    assert wins == [line["points"] for line in judged]
    assert found["win_rate"]["value"] == pytest.approx(sum(wins) / len(wins))
    assert found["wins"] + found["losses"] + found["ties"] == len(judged)
    assert "so be it" in lines[0]["reference"]


def test_the_same_answers_are_ties(place: Place) -> None:
    said = judge(place, "assistant", "other", "--by", "other", "--rows", "3", "--set", "max_tokens=4")
    assert said.code == 0, said.err
    assert "no difference can be told" in said.out
    assert "0.500 (0.500 to 0.500)" in said.out


def test_in_python(place: Place) -> None:
    with Client(place.url, place.key) as api:
        data = Dataset(api.artifact("talks", Kind.DATASET), api)
        found = Deployed("assistant", api).against(
            "other", by="other", data=data, split="train", rows=2, max_tokens=4, temperature=0
        )
    assert (found["first"], found["second"], found["ties"]) == ("assistant", "other", 2 - found["left_out"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("assistant", "assistant", "--by", "other"), "compared with itself"),
        (("assistant", "news", "--by", "other"), "text-classification"),
        (("assistant", "nope", "--by", "other"), "nope"),
        (("assistant", "assistant:nope", "--by", "other"), "nope"),
        (("assistant", "other", "--by", "nope"), "nope"),
        (("assistant", "other", "--by", "other", "--set", "temprature=1"), "did you mean 'temperature'"),
        (("assistant", "other", "--by", "other", "--set", "temperature=9"), "temperature"),
        (("assistant", "other", "--by", "other", "--rows", "0"), "--rows"),
    ],
)
def test_what_cannot_be_judged_is_said(place: Place, arguments: tuple[str, ...], words: str) -> None:
    warm = () if "--set" in arguments else ("--set", "temperature=1")
    said = judge(place, *arguments, *warm)
    assert said.code == 2, said.out
    assert words in said.err


def test_data_without_conversations_is_refused(place: Place) -> None:
    said = judge(place, "assistant", "other", "--by", "other", data="texts")
    assert said.code == 2
    assert "no conversation" in said.err
    assert judge(place, "assistant", "other", "--by", "other", split="nope").code == 2
