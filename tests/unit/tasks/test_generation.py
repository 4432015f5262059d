"""What of a conversation is learnt, how it is cut, and what prompts are; on templates of several families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from llmo.errors import DataError, InputError, ModelError
from llmo.tasks.card import load_tokenizer
from llmo.tasks.generation import IGNORED, Generation, Passage
from llmo.tasks.template import DEFAULT
from support.tiny import chat_rows
from support.tiny_chat import SPECIAL, tiny_chat_model, tiny_chat_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}<call>{{ m.tool_calls | tojson }}</call>{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}<think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi? 👍🏽"},
    {"role": "assistant", "content": "Hé,\nyou."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No 王芳."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = tiny_chat_tokenizer()
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|start|>", "<|stop|>", "<|eot|>")])
    return made


def task(template: str = TOOLS, end: str = "<|im_end|>", max_length: int = 512, **keys: Any) -> Generation:
    known = {name: i for i, name in enumerate(SPECIAL)} | {"</s>": 260, "<|eot|>": 263}
    return Generation(
        (),
        max_length,
        template=template,
        special={"bos_token": "<s>", "eos_token": "</s>" if end == "</s>" else "<|im_end|>"},
        end_ids=[known[end]],
        **keys,
    )


def row(messages: list[dict[str, Any]] | None, text: str = "", tools: Any = None, **more: Any) -> dict[str, Any]:
    found = {"id": "r", "text": text, "messages": json.dumps(messages) if messages is not None else None}
    return {**found, "tools": json.dumps(tools) if tools else None, **more}


def learnt(passage: Passage, tokenizer: Tokenizer) -> list[str]:
    """The runs of learnt tokens as text, special tokens shown."""
    runs: list[list[int]] = []
    before = False
    for token, own in zip(passage.input_ids, passage.learnt, strict=True):
        if own and not before:
            runs.append([])
        if own:
            runs[-1].append(token)
        before = own
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("template", "end"), [(TOOLS, "<|im_end|>"), (LLAMA3, "<|eot|>"), (MISTRAL, "</s>"), (DEFAULT, "</s>")]
)
def test_exactly_the_answers_and_their_ends_are_learnt(tokenizer: Tokenizer, template: str, end: str) -> None:
    turns = TURNS if template != MISTRAL else TURNS[1:]
    made = task(template, end)
    passage = made.passage(tokenizer, row(turns))
    space = " " if template in (MISTRAL, DEFAULT) else ""
    assert learnt(passage, tokenizer) == [f"{space}Hé,\nyou.{end}", f"{space}No 王芳.{end}"]
    text = made.template.render(turns)
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    assert passage.input_ids == whole[: len(passage.input_ids)]
    assert whole.count(259) == passage.input_ids.count(259) == int(template in (LLAMA3, MISTRAL))  # one <s>
    target = made.target({}, passage)
    assert [t for t in target if t != IGNORED] == [
        i for i, own in zip(passage.input_ids, passage.learnt, strict=True) if own
    ]


def test_a_template_without_an_end_token_learns_the_last_answer_and_gets_one(tokenizer: Tokenizer) -> None:
    passage = task(ALPACA).passage(tokenizer, row(TURNS))
    assert learnt(passage, tokenizer) == ["No 王芳.<|im_end|>"]
    assert passage.input_ids[-1] == 2


def test_calls_of_tools_are_answers_too(tokenizer: Tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    turns = [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
    passage = task().passage(tokenizer, row(turns, tools=[{"name": "f"}]))
    assert learnt(passage, tokenizer) == [f"<call>[{json.dumps(call)}]</call><|im_end|>", "It is 42.<|im_end|>"]
    assert tokenizer.decode(passage.input_ids).startswith('[{"name": "f"}]')


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="writes turn 3 otherwise"):
        task(FORGETFUL).passage(tokenizer, row(TURNS))


def test_a_refused_conversation_names_its_row(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="user first") as raised:
        task("{{ raise_exception('user first') }}").passage(tokenizer, row(TURNS))
    assert raised.value.where == "row r"


def test_plain_text_is_learnt_whole_with_its_end(tokenizer: Tokenizer) -> None:
    passage = task().passage(tokenizer, row(None, "abc"))
    assert learnt(passage, tokenizer) == ["abc<|im_end|>"]
    assert task().target({}, passage)[0] == IGNORED  # nothing stands before it
    everything = task(learns="text").passage(tokenizer, row(TURNS))
    assert all(everything.learnt)


@pytest.mark.parametrize("length", [1, 7, 8, 14, 15, 50])
def test_a_long_plain_text_is_learnt_in_pieces(tokenizer: Tokenizer, length: int) -> None:
    made, text = task(max_length=8), "abcdefgh" * 7
    whole = [*tokenizer.encode(text[:length]).ids, 2]
    pieces = [e for _, e in made.lessons(tokenizer, [row(None, text[:length])])]
    assert all(len(piece.input_ids) <= 8 and not piece.truncated for piece in pieces)
    learnt_ids = [int(t) for piece in pieces for t in made.target({}, piece) if t != IGNORED]
    assert learnt_ids == whole[1:]
    (measured,) = made.encode_rows(tokenizer, [row(None, text[:length])])
    assert measured.truncated == (len(whole) > 8)


def test_of_a_preference_only_the_answer_is_learnt(tokenizer: Tokenizer) -> None:
    pair = row(TURNS[:4], chosen=json.dumps([TURNS[4]]), rejected=json.dumps([{"role": "assistant", "content": "Ugh"}]))
    assert learnt(task().passage(tokenizer, pair), tokenizer) == ["No 王芳.<|im_end|>"]
    assert learnt(task().passage(tokenizer, pair, "rejected"), tokenizer) == ["Ugh<|im_end|>"]


@pytest.mark.parametrize("limit", [8, 20, 60, 100])
@pytest.mark.parametrize("lengths", [(200, 5), (5, 200), (200, 200), (90, 20)])
def test_what_is_cut_is_counted_and_keeps_some_answer(
    tokenizer: Tokenizer, limit: int, lengths: tuple[int, int]
) -> None:
    turns = [{"role": "user", "content": "q" * lengths[0]}, {"role": "assistant", "content": "a" * lengths[1]}]
    passage = task(max_length=limit).passage(tokenizer, row(turns))
    assert len(passage.input_ids) == limit
    assert passage.truncated
    assert passage.length == len(task().passage(tokenizer, row(turns)).input_ids)
    assert any(passage.learnt)
    if lengths[1] == 5 and limit >= 20:
        assert learnt(passage, tokenizer) == ["aaaaa<|im_end|>"]


def test_what_nobody_answered_teaches_nothing(tokenizer: Tokenizer) -> None:
    assert not any(task().passage(tokenizer, row(TURNS[:2])).learnt)
    assert not any(task().passage(tokenizer, row([TURNS[2]])).learnt)


def test_the_prompt_is_that_of_transformers(folder: Path) -> None:
    made = Generation(max_length=64, **Generation.of_base(folder))
    tokenizer, plain = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for messages in (TURNS[:2], TURNS[:4], TURNS):
        expected = plain.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert made.prompt(tokenizer, messages) == expected
    assert made.prompt_of(tokenizer, row(TURNS)) == made.prompt(tokenizer, TURNS[:4])
    assert made.prompt_of(tokenizer, row(None, "abcdef")) == tokenizer.encode("abc").ids
    with pytest.raises(InputError, match="no messages"):
        made.prompt(tokenizer, [])
    with pytest.raises(InputError, match="hold no text"):
        task("{{ '' }}").prompt(tokenizer, TURNS)


def test_the_ends_are_the_configs_and_the_templates(folder: Path, tmp_path: Path) -> None:
    assert Generation.of_base(folder)["end_ids"] == [2]
    other = tiny_chat_model(tmp_path / "m", eos_token_id=0)
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 0]}))
    assert Generation.of_base(other)["end_ids"] == [2, 1, 0]
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 9999}))
    with pytest.raises(ModelError, match="not among its 259"):
        Generation.of_base(other)


def test_figures_of_known_likelihoods() -> None:
    made = task()
    outputs = [np.log(np.array([[0.5], [0.25]], np.float32)), np.log(np.array([[0.125]], np.float32))]
    outputs = [np.hstack([x, [[1]] * len(x)]).astype(np.float32) for x in outputs]
    outputs[1][0, 1] = 0
    tally = made.tally(outputs, [{}] * 2, [])
    found = {name: float(value) for name, value in made.scores(tally.totals()).items()}
    assert found["loss"] == pytest.approx(2 * np.log(2), abs=1e-5)
    assert found["perplexity"] == pytest.approx(4.0, abs=1e-4)
    assert found["token_accuracy"] == pytest.approx(2 / 3)
    assert made.details(tally) == {"tokens": 3}
    intervals = made.intervals(tally)["perplexity"]
    assert intervals["low"] < intervals["value"] < intervals["high"]
    assert made.drop(10.0, 10.1) == pytest.approx(0.01)


def test_scores_of_an_engine_give_the_same_figures(tokenizer: Tokenizer) -> None:
    made, rows = task(), chat_rows(6)
    encodings = made.encode_rows(tokenizer, rows)
    rng = np.random.default_rng(0)
    scores = [rng.normal(-2, 1, len(e.input_ids) - 1).astype(np.float32) for e in encodings]
    picked = [
        s[np.flatnonzero(made.target({}, e)[1:] != IGNORED)][:, None] for s, e in zip(scores, encodings, strict=True)
    ]
    ours = made.intervals(made.tally_scores(scores, rows, encodings))
    assert ours == made.intervals(made.tally(picked, rows, encodings))
    assert "token_accuracy" not in ours


def test_a_loss_beyond_measure_is_still_a_number() -> None:
    tally = task().tally([np.array([[-5000.0]], np.float32)], [{}], [])
    assert np.isfinite(task().scores(tally.totals())["perplexity"])
