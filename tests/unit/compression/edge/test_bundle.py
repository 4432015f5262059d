"""An edge bundle answers as its model's endpoint does, in a process that has no LLMO, and refuses what was changed."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from llmo.compression.edge import bundle, frame, kinds
from llmo.compression.edge.operation import run
from llmo.context import NullContext
from llmo.errors import GateRefused, InputError, ModelError
from llmo.exports import EDGE_TASKS
from llmo.tasks.base import Task
from llmo.tasks.card import load_tokenizer
from llmo.tasks.extractive_qa import ExtractiveQA
from llmo.tasks.regression import Regression
from llmo.tasks.sentence_embedding import SentenceEmbedding
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.types import Asked
from support.bags import bag_model, logits
from support.tiny import pair_rows, question_rows, rated_rows, span_rows, text_rows

TOPICS = ("business", "sport", "tech")
TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
ODD = [
    "我在北京 爱 london。",
    "a",
    "café-bar👍🏽 new york!!",
    "x" * 300,
    "  the goal \n of  the match ",
    "don't (stop) it's 3.14",
]
CASES: dict[str, tuple[Task, list[dict[str, Any]]]] = {
    "one label": (TextClassification(TOPICS, 16), text_rows(30, seed=1)),
    "several labels": (TextClassification(TOPICS, 16, multi_label=True), text_rows(30, seed=2, multi_label=True)),
    "entities": (TokenClassification(TAGS, 16), span_rows(60, seed=3)),
    "answers": (ExtractiveQA(max_length=32), question_rows(30, seed=4)),
    "answers or none": (ExtractiveQA(max_length=32, unanswerable=True), question_rows(30, seed=5)),
    "numbers": (Regression(max_length=16, mean=35.5, std=11.25), rated_rows(20, seed=6)),
    "vectors": (SentenceEmbedding(max_length=16), pair_rows(20, seed=7)),
}
# As `python -I run.py`, where the packages that a bundle must do without cannot be imported.
ALONE = """\
import runpy, sys
sys.modules.update(dict.fromkeys(("torch", "transformers", "llmo", "onnx", "safetensors", "huggingface_hub")))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(folder: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-I", "-c", ALONE, str(folder / "run.py"), *(str(a) for a in arguments)]


def ask(folder: Path, *arguments: str | Path, stdin: bytes = b"") -> tuple[int, list[Any], str]:
    """The exit code, the answers and what was said beside them."""
    done = subprocess.run(command(folder, *arguments), input=stdin, capture_output=True, timeout=60, check=False)
    said = done.stderr.decode()
    assert "Traceback" not in said, said
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], said


def order(out: Path, **asked: Any) -> dict[str, Any]:
    named = {"model": "tiny@1", "digest": "sha256:0", "original": "tiny@1"}
    return {"target": "edge", "precision": None, "max_mb": None, "out": str(out), **named, **asked}


def export(model: Path, out: Path, **asked: Any) -> dict[str, Any]:
    with TemporaryDirectory() as own:
        return run(order(out, **asked), {"model": model}, Path(own), NullContext(1))


def inputs(task: Task, rows: list[dict[str, Any]]) -> list[Asked]:
    found = [task.asked(row) for row in rows]
    if task.name == "extractive-qa":
        return [*found, {"question": "goal?", "context": " ".join([*ODD, *(row["pair"] for row in rows[:9])])}]
    return [*found, *ODD, *({"text": text} for text in ODD[:2])]


def near(a: Any, b: Any) -> bool:
    """Equal but for the last digits of floats: batches are others."""
    return frame.alike(a, b, 1e-5)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder and its bundle."""
    folder = tmp_path_factory.mktemp("edge")
    task, rows = CASES["one label"]
    model = bag_model(folder / "model", task, [row["text"] for row in rows[:8]])
    export(model, folder / "bundle")
    return model, folder / "bundle"


@pytest.fixture
def changed(classifier: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return shutil.copytree(classifier[1], tmp_path / "bundle")


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_task(case: str, tmp_path: Path) -> None:
    task, rows = CASES[case]
    asked = inputs(task, rows)
    model = bag_model(tmp_path / "model", task, asked[:4])
    export(model, tmp_path / "bundle")
    encodings = task.encode(load_tokenizer(model), asked)
    expected = [
        task.answer(own, encoding, one)
        for own, encoding, one in zip(logits(model, encodings), encodings, asked, strict=True)
    ]
    file = tmp_path / "asked.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in asked))
    code, answers, said = ask(tmp_path / "bundle", "--jsonl", "--file", file)
    assert code == 0, said
    for one, answer, wanted in zip(asked, answers, expected, strict=True):
        assert list(answer) == list(wanted) or set(answer) == set(wanted), one
        assert near(answer, wanted), one
    assert any(answer.get("truncated") for answer in answers) or task.name == "extractive-qa"
    assert len({json.dumps(answer) for answer in answers}) > len(answers) / 2, "the answers are all alike"


def test_what_the_answers_must_differ_in_is_there(tmp_path: Path) -> None:
    """The comparison above would be worth little if no answer had an entity of two words, or none had no answer."""
    task, rows = CASES["entities"]
    encodings = task.encode(load_tokenizer(bag_model(tmp_path / "m", task, ODD)), inputs(task, rows))
    found = [
        task.answer(own, e, "x" * 400) for own, e in zip(logits(tmp_path / "m", encodings), encodings, strict=True)
    ]
    spans = [entity["end"] - entity["start"] for answer in found for entity in answer["entities"]]
    assert len(spans) > 50
    assert max(spans) > 12
    task, rows = CASES["answers or none"]
    asked = inputs(task, rows)
    encodings = task.encode(load_tokenizer(bag_model(tmp_path / "q", task, asked[:2])), asked)
    said = zip(logits(tmp_path / "q", encodings), encodings, asked, strict=True)
    assert {task.answer(*one)["answer"] is None for one in said} == {True, False}
    assert max(len(encoding.ends) for encoding in encodings) > 2


@pytest.mark.parametrize("task", EDGE_TASKS)
def test_the_runner_is_short_and_needs_two_packages(task: str) -> None:
    source = bundle.runner(task)
    assert source.count("\n") < 300
    named = set(re.findall(r"^\s*(?:import|from) (\w+)", source, re.MULTILINE))
    assert named - sys.stdlib_module_names == {"numpy", "onnxruntime", "tokenizers"}
    compile(source, "run.py", "exec")
    assert set(kinds.TASKS) == set(EDGE_TASKS)


def test_the_manifest_names_every_file(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    model, _ = classifier
    told = export(model, tmp_path / "again")
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert names - {"manifest.json"} == set(told["files"])
    assert told["bytes"] == sum(path.stat().st_size for path in (tmp_path / "again").iterdir())
    assert told["precision"] == "fp32"
    assert told["made_of"] == "the very graph that the endpoint runs"
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (model / "model.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "nothing is left beside it"


@pytest.mark.parametrize("place", [0.0, 0.5, 0.999])
def test_a_flipped_byte_of_any_file_is_named(changed: Path, place: float) -> None:
    frame.verify(changed)
    for path in sorted(changed.iterdir()):
        whole = path.read_bytes()
        at = int(place * len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(frame.Problem, match=f"^refused: {path.name} is (missing or )?changed; copy") as caught:
            frame.verify(changed)
        assert caught.value.code == 3
        path.write_bytes(whole)
    frame.verify(changed)


def test_missing_changed_and_foreign_files_are_all_named(changed: Path) -> None:
    (changed / "tokenizer.json").unlink()
    (changed / "golden.json").write_text("[]")
    (changed / "numpy.txt").write_text("x")
    (changed / ".venv").mkdir()
    code, answers, said = ask(changed, "a text")
    assert (code, answers) == (3, [])
    assert said == (
        "run.py: refused: numpy.txt does not belong there, golden.json is changed, tokenizer.json is missing;"
        " copy the folder again\n"
    )


def test_every_way_to_start_refuses_a_damaged_graph(changed: Path) -> None:
    graph = changed / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    for arguments in (["a text"], ["--check"], ["--serve", "--port", "0"]):
        assert ask(changed, *arguments)[::2] == (3, "run.py: refused: model.onnx is changed; copy the folder again\n")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"files": {}}\n', b"\xff", b'{"sha256": "'])
def test_a_manifest_that_is_none_is_refused(changed: Path, content: bytes) -> None:
    (changed / "manifest.json").write_bytes(content)
    with pytest.raises(frame.Problem, match=r"manifest\.json is missing or changed"):
        frame.verify(changed)
    (changed / "manifest.json").unlink()
    with pytest.raises(frame.Problem, match=r"manifest\.json is missing or changed"):
        frame.verify(changed)


def test_other_answers_than_where_it_was_made_are_refused(changed: Path) -> None:
    """As on a processor whose kernels compute otherwise: the files are right, and what they say is not."""
    golden = json.loads((changed / "golden.json").read_text())
    scores = golden[0]["answer"]["scores"]
    scores["sport"] += 0.01
    (changed / "golden.json").write_text(json.dumps(golden))
    (changed / "manifest.json").unlink()
    bundle.write_manifest(changed, {"target": "edge"})
    assert ask(changed, "--check")[::2] == (
        3,
        "run.py: refused: only 7 of 8 golden texts are answered here as they were\n",
    )
    assert ask(changed, "--serve", "--port", "0")[0] == 3
    assert ask(changed, "a text")[0] == 0


def test_the_command_line(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    folder = classifier[1]
    (tmp_path / "texts.txt").write_bytes("\ufeffthe goal\r\n\n我在北京\n".encode())
    code, answers, said = ask(folder, "--file", tmp_path / "texts.txt")
    assert (code, len(answers), said) == (0, 2, "")
    assert ask(folder, "the goal")[1] == answers[:1] == ask(folder, stdin=b"the goal\n")[1]
    many = "".join(f"the goal {i}\n" for i in range(600)).encode()
    assert len(ask(folder, stdin=many)[1]) == 600
    code, answers, said = ask(folder, "--check")
    assert (code, answers, said) == (0, [], "8 of 8 golden texts answered as they were\n")


@pytest.mark.parametrize(
    ("arguments", "stdin", "code", "words"),
    [
        (["--file", "/nowhere/texts.txt"], b"", 2, "No such file"),
        ([], b"one\n\xff\xfe\n", 2, "line 2 is not UTF-8"),
        (["--jsonl"], b'"one"\n{"text": \n', 2, "line 2 is not JSON"),
        (["--jsonl"], b'{"text": "one", "pair": "two"}\n', 2, "text 1: this model takes text, not text and pair"),
        (["--jsonl"], b'{"text": "half \\ud83d"}\n', 2, "valid Unicode"),
        (["--jsonl"], b'["one"]\n', 2, "text 1: text is not a text"),
        ([" "], b"", 2, "text 1: text is not a text"),
        (["--port", "x"], b"", 2, "invalid int value"),
        (["--serve", "--port", "99999"], b"", 1, "port must be"),
    ],
)
def test_bad_input_is_a_sentence(
    classifier: tuple[Path, Path], arguments: list[str], stdin: bytes, code: int, words: str
) -> None:
    found, _, said = ask(classifier[1], *arguments, stdin=stdin)
    assert found == code, said
    assert words in said


@pytest.fixture
def door(classifier: tuple[Path, Path]) -> Iterator[http.client.HTTPConnection]:
    process = subprocess.Popen(
        command(classifier[1], "--serve", "--port", "0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        port = re.match(r"http://127\.0\.0\.1:(\d+)/predict answers", line)
        assert port is not None, line
        client = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=20)
        yield client
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
    finally:
        process.kill()
        _, said = process.communicate()
    assert said == "8 of 8 golden texts answered as they were\n"


def post(client: http.client.HTTPConnection, body: bytes, path: str = "/predict", **headers: str) -> tuple[int, Any]:
    client.request("POST", path, body, headers)
    reply = client.getresponse()
    return reply.status, json.loads(reply.read())


def test_over_http(classifier: tuple[Path, Path], door: http.client.HTTPConnection) -> None:
    door.request("GET", "/health")
    assert json.loads(door.getresponse().read()) == {"status": "ok", "model": "tiny@1", "precision": "fp32"}
    texts = ["the goal of the match", "我在北京", "chip phone network"]
    status, told = post(door, json.dumps({"texts": texts}).encode())
    assert (status, told["model"]) == (200, "tiny@1")
    assert near(told["answers"], ask(classifier[1], *texts)[1])
    assert near(post(door, json.dumps({"text": texts[0]}).encode())[1]["answers"], told["answers"][:1])
    for body, words in (
        (b"", "send JSON"),
        (b"{", "send JSON"),
        (b'{"texts": []}', "1 to 512"),
        (json.dumps({"texts": ["a"] * 513}).encode(), "1 to 512"),
        (b'{"text": 3}', "texts[0]: text is not a text"),
        (b'{"text": "a", "texts": ["b"]}', "not text and texts"),
        (b'{"texts": ["a", "\\ud83d"]}', "texts[1]: text is not a text"),
        (b"[" * 100_000, "send JSON"),
    ):
        status, told = post(door, body)
        assert status == 422
        assert words in told["error"]["what"]
    port, body = door.port, json.dumps({"texts": texts}).encode()
    wanted = post(door, body)[1]

    def at_once(_: int) -> bool:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as client:
            return all(near(post(client, body)[1], wanted) for _ in range(5))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(at_once, range(8)))
    assert post(door, b"{}", path="/other")[0] == 404
    assert post(door, b"", **{"Content-Length": str(frame.MOST_BYTES + 1)})[0] == 413
    assert post(door, b'{"text": "after all that, the goal"}')[0] == 200


def test_a_folder_that_would_be_too_large_is_not_written(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(GateRefused, match=r"at most 0\.01 were allowed; nothing was written") as caught:
        export(classifier[0], tmp_path / "out", max_mb=0.01, original="news@3")
    assert "llmo compress news@3 --target size --max-mb 0.01" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    export(classifier[0], tmp_path / "out", max_mb=1.0)


def test_what_is_there_is_not_touched(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        export(classifier[0], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_what_a_killed_attempt_left_goes_with_the_next(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed when all of it stands beside its place."""
    (tmp_path / "job").mkdir()
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom llmo.compression.edge import operation\n"
        "from llmo.context import NullContext\n"
        "operation.sync_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"operation.run({order(tmp_path / 'out')!r}, {{'model': Path({str(classifier[0])!r})}}, "
        f"Path({str(tmp_path / 'job')!r}), NullContext(1))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    left, _ = sorted(tmp_path.iterdir())
    assert left.name.startswith(".out.")
    assert (left / "manifest.json").is_file()
    export(classifier[0], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "out"]


def test_an_attempt_that_was_tried_again_finds_its_own(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    first = export(classifier[0], tmp_path / "out")
    assert export(classifier[0], tmp_path / "out") == first
    with pytest.raises(InputError, match="is there already"):
        export(classifier[0], tmp_path / "out", digest="sha256:1")


def test_a_graph_that_is_not_what_was_trained_is_refused(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    model = shutil.copytree(classifier[0], tmp_path / "model")
    task, rows = CASES["one label"]
    other = bag_model(tmp_path / "other", task, [row["text"] for row in rows[:8]], seed=9)
    shutil.copyfile(other / "model.onnx", model / "model.onnx")
    with pytest.raises(GateRefused, match=r"repeats \d of the model's 8 golden answers"):
        export(model, tmp_path / "out")


def test_a_model_whose_weights_are_nowhere_is_refused(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    model = shutil.copytree(classifier[0], tmp_path / "model")
    card = json.loads((model / "llmo.json").read_text())
    (model / "llmo.json").write_text(json.dumps(card | {"engine": "native", "precision": "int8"}))
    with pytest.raises(
        ModelError, match="made for native int8, and its weights as they were trained are not in the store"
    ):
        export(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
