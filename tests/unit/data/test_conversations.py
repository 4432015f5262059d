"""Every layout of conversations, preferences and plain text becomes the same OpenAI messages."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmo.data.profile import profile
from llmo.specs import DataSpec, TaskSpec

PAIRS = [("What is AI?", "Machines that think."), ("Who are you?", "A program."), ("2 + 2?", "4"), ("Bye", "See you!")]
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TURNS = [[user(question), assistant(answer)] for question, answer in PAIRS]


@pytest.fixture
def chats(tmp_path, import_):
    def go(rows, name="a.jsonl", **told):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return import_(path, task="generation", **told)

    return go


def conversations(got) -> list[list[dict]]:
    """In the order of the first message, since splits mix them."""
    return sorted((json.loads(row["messages"]) for row in got.rows()), key=json.dumps)


def ordered(found):
    return sorted(found, key=json.dumps)


PLAIN = {
    "openai": [{"messages": turns} for turns in TURNS],
    "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in PAIRS],
    "turns": [{"dialog": [q, a]} for q, a in PAIRS],
    "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in PAIRS],
    "prompt-completion": [{"prompt": q, "completion": a} for q, a in PAIRS],
}


@pytest.mark.parametrize("layout", PLAIN)
def test_every_layout_says_the_same(chats, layout):
    got = chats(PLAIN[layout])
    assert conversations(got) == ordered(TURNS)
    assert (got.info["shape"], got.info["layout"]) == ("messages", layout)
    assert got.info["labels"] == {}
    assert got.info["turns"] == {"mean": 2.0, "longest": 2}
    assert any(f"read as {layout} (" in note for note in got.notes)
    assert set(got.rows()[0]) == {"id", "text", "messages", "tools"}
    assert "user: What is AI?\nassistant: Machines that think." in got.texts()


@pytest.mark.parametrize(
    ("question", "answer"),
    [("question", "answer"), ("input", "output"), ("query", "response"), ("prompt", "chosen"), ("问题", "回答")],
)
def test_spellings_of_questions_and_answers(chats, question, answer):
    assert conversations(chats([{question: q, answer: a, "n": 1} for q, a in PAIRS])) == ordered(TURNS)


@pytest.mark.parametrize("roles", [("user", "assistant"), ("human", "bot"), ("User", "chatgpt"), ("prompter", "model")])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content"), ("from", "text")])
def test_spellings_of_messages(chats, roles, keys):
    rows = [
        {"conversation": [dict(zip(keys, pair, strict=True)) for pair in zip(roles, turn, strict=True)]}
        for turn in PAIRS
    ]
    assert conversations(chats(rows)) == ordered(TURNS)


def test_messages_in_a_column_of_any_name(chats):
    assert conversations(chats([{"n": 1, "talk": turns} for turns in TURNS])) == ordered(TURNS)


def test_turns_that_are_objects_of_roles(chats):
    assert conversations(chats([{"conversation": [{"human": q, "assistant": a}]} for q, a in PAIRS])) == ordered(TURNS)


def test_told_columns_win(chats):
    rows = [{"prompt": "not this", "ask": q, "say": a, "answer": "nor this"} for q, a in PAIRS]
    got = chats(rows, text="ask", label="say")
    assert conversations(got) == ordered(TURNS)
    assert got.info["columns"] == {"prompt": "ask", "answer": "say"}


def test_a_table_of_text_holds_messages_as_json(tmp_path, import_):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["messages", "tools"])
        writer.writerows([json.dumps(turns), json.dumps([WEATHER])] for turns in TURNS)
    got = import_(tmp_path / "a.csv", task="generation")
    assert conversations(got) == ordered(TURNS)
    assert {row["tools"] for row in got.rows()} == {json.dumps([WEATHER])}


def test_parquet_fills_what_is_missing_with_null(tmp_path, import_):
    rows = [{"messages": [{**m, "name": None, "tool_calls": None} for m in turns]} for turns in TURNS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    got = import_(tmp_path / "a.parquet", task="generation")
    assert conversations(got) == ordered(TURNS)
    assert "message_keys" not in got.info["changed"]


def test_alpaca_with_input_system_and_history(chats):
    row = {
        "instruction": "Translate.",
        "input": "chat",
        "output": "cat",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    (found,) = conversations(chats([row]))
    assert found == [system("Be brief."), user("Hi"), assistant("Hello"), user("Translate.\n\nchat"), assistant("cat")]


def test_a_question_keeps_its_context(chats):
    (found,) = conversations(chats([{"question": "Who?", "context": "Ada ran.", "answer": "Ada"}]))
    assert found == [user("Who?\n\nAda ran."), assistant("Ada")]


def test_tools_their_calls_and_results_are_kept(chats):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    turns = [
        system("Help."),
        user("Rain?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": {"rain": True}},
        assistant("Yes."),
    ]
    got = chats([{"messages": turns, "tools": [WEATHER]}])
    (found,) = conversations(got)
    called = {**call, "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    result = {"role": "tool", "content": '{"rain": true}', "name": "weather", "tool_call_id": "c1"}
    assert found == [*turns[:2], {"role": "assistant", "content": None, "tool_calls": [called]}, result, turns[4]]
    assert json.loads(got.rows()[0]["tools"]) == [WEATHER]
    assert got.texts() == [
        'tools: weather\nsystem: Help.\nuser: Rain?\nassistant: weather({"city": "Oslo"})\n'
        'tool: {"rain": true}\nassistant: Yes.'
    ]


def test_sharegpt_calls_tools_in_turns_of_their_own(chats):
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "wet"},
        {"from": "gpt", "value": "Yes."},
    ]
    tool = {"name": "weather", "description": "of a city", "parameters": {}}
    got = chats([{"conversations": turns, "system": "Help.", "tools": json.dumps([tool])}])
    (found,) = conversations(got)
    assert [m["role"] for m in found] == ["system", "user", "assistant", "tool", "assistant"]
    assert found[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Oslo"}'}
    assert json.loads(got.rows()[0]["tools"]) == [{"type": "function", "function": tool}]


def test_contents_in_parts_of_text_are_joined(chats):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "AI?"}]
    assert conversations(chats([{"messages": [user(parts), assistant("Maths.")]}])) == [
        [user("What is AI?"), assistant("Maths.")]
    ]


CODE = "Here:\n\n```python\ndef f(x):\n    if x:\n\treturn x  \n\n\n    return <b>1</b>\n```\n\n| a | b |\n|---|---|"


def test_lines_indentation_code_and_html_stay(chats):
    got = chats([{"prompt": "  Write code.\x07 \n", "completion": CODE.replace("\n", "\r\n") + "  \n"}])
    assert conversations(got) == [[user("Write code."), assistant(CODE)]]
    assert got.info["changed"] == {"normalised": 1}


def test_html_goes_when_told(chats):
    got = chats([{"prompt": "<p>Why?</p>", "completion": "<b>So</b>"}], clean={"strip_html": True})
    assert conversations(got) == [[user("Why?"), assistant("So")]]
    assert got.info["changed"]["html"] == 1


def test_damage_is_mended_in_each_message(chats):
    got = chats([{"prompt": "schÃ¶n?", "completion": "l’humanitÃ©\ne\u0301te\u0301"}])
    assert conversations(got) == [[user("schön?"), assistant("l’humanité\nété")]]
    assert got.info["changed"] == {"encoding": 1, "normalised": 1}


BEST = [{"prompt": q, "chosen": a, "rejected": "No idea."} for q, a in PAIRS]


def preferences(got):
    return ordered([json.loads(row[name]) for name in ("messages", "chosen", "rejected")] for row in got.rows())


def whole(question, answer):
    return [user(question), assistant(answer)]


WRITTEN = {
    "texts": BEST,
    "lists of answers": [
        {**row, "chosen": [assistant(row["chosen"])], "rejected": [assistant("No idea.")]} for row in BEST
    ],
    "prompts in messages": [{**row, "prompt": [user(row["prompt"])]} for row in BEST],
    "messages beside answers": [
        {"messages": [user(row["prompt"])], "chosen": row["chosen"], "rejected": row["rejected"]} for row in BEST
    ],
    "whole conversations": [
        {"chosen": whole(r["prompt"], r["chosen"]), "rejected": whole(r["prompt"], r["rejected"])} for r in BEST
    ],
    "whole conversations beside the prompt and the chosen one": [
        {
            "prompt": r["prompt"],
            "messages": whole(r["prompt"], r["chosen"]),
            "chosen": whole(r["prompt"], r["chosen"]),
            "rejected": whole(r["prompt"], r["rejected"]),
            "score_chosen": 9,
        }
        for r in BEST
    ],
    "whole conversations as text": [
        {
            "chosen": f"\n\nHuman: {r['prompt']}\n\nAssistant: {r['chosen']}",
            "rejected": f"\n\nHuman: {r['prompt']}\n\nAssistant: {r['rejected']}",
        }
        for r in BEST
    ],
}


@pytest.mark.parametrize("written", WRITTEN)
def test_preferences(chats, written):
    got = chats(WRITTEN[written])
    assert preferences(got) == ordered([[user(q)], [assistant(a)], [assistant("No idea.")]] for q, a in PAIRS)
    assert (got.info["shape"], got.info["layout"]) == ("preference", "preference")
    assert set(got.rows()[0]) == {"id", "text", "messages", "tools", "chosen", "rejected"}
    assert "user: Bye\nassistant (chosen): See you!\nassistant (rejected): No idea." in got.texts()


def test_preferences_part_after_several_turns(chats):
    begin = [system("Be kind."), user("Hi"), assistant("Hello"), user("How?")]
    got = chats([{"chosen": [*begin, assistant("Well.")], "rejected": [*begin, assistant("Bad."), user("Oh")]}])
    assert preferences(got) == [[begin, [assistant("Well.")], [assistant("Bad.")]]]
    assert got.info["changed"] == {"trailing_turns": 1}


def test_a_system_prompt_goes_before_a_preference(chats):
    got = chats([{"system": "Be kind.", **BEST[0]}])
    assert json.loads(got.rows()[0]["messages"]) == [system("Be kind."), user("What is AI?")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_plain_text_in_a_column(chats, name):
    texts = ["one two three", "  four\n    five", "six"]
    written = "text\n" + "".join(f'"{t}"\n' for t in texts) if name == "a.csv" else [{"text": t} for t in texts]
    got = chats(written, name)
    assert sorted(got.texts()) == sorted(["one two three", "  four\n    five", "six"])
    assert (got.info["shape"], got.info["layout"]) == ("text", "text")
    assert "turns" not in got.info
    assert {(row["messages"], row["tools"]) for row in got.rows()} == {(None, None)}


def test_a_text_file_is_divided_into_paragraphs(chats):
    got = chats("One,\ntwo.\n\n  Three.\n    Four.\n \n\n[Five] {six}", "book.txt")
    assert sorted(got.texts()) == ["  Three.\n    Four.", "One,\ntwo.", "[Five] {six}"]
    assert chats("one\ntwo\nthree\n", "lines.txt").info["rows"]["read"] == 3
    assert got.dropped() == {}


def test_places_in_a_text_file_are_lines(chats):
    got = chats("One,\ntwo.\n\nThree.\n\n\nthree.\n", "book.txt")
    assert [*got.dropped()["duplicate"]] in (["book.txt:4"], ["book.txt:7"])


def test_a_folder_of_text_files_is_a_folder_of_documents(tmp_path, import_):
    for name in ("a/1.txt", "a/2.md", "b/3.txt", "4.txt", ".git/HEAD", "picture.png"):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_text(f"About {name}.\n\nMore of it.")
    got = import_(tmp_path / "d", task="generation")
    assert sorted(got.texts()) == [
        f"About {name}.\n\nMore of it." for name in ("4.txt", "a/1.txt", "a/2.md", "b/3.txt")
    ]
    assert any("1 files were left out" in note for note in got.notes)


@pytest.mark.parametrize("layout", ["train.txt test.txt", "train/a.txt test/a.txt"])
def test_splits_of_text_files(tmp_path, import_, layout):
    train, test = (tmp_path / "d" / name for name in layout.split())
    for path in (train, test):
        path.parent.mkdir(parents=True, exist_ok=True)
    train.write_text("One.\n\nTwo.\n\nThree.")
    test.write_text("Four.")
    got = import_(tmp_path / "d", task="generation", split={"dev": 0.0})
    assert got.texts("test") == ["Four."]
    assert "Two." in "\n".join(got.texts("train"))


def test_yaml_beside_conversations_is_no_data(tmp_path, import_):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "about.yaml").write_text("made: by hand\n")
    (tmp_path / "d" / "a.jsonl").write_text("\n".join(map(json.dumps, PLAIN["openai"])))
    assert conversations(import_(tmp_path / "d", task="generation")) == ordered(TURNS)


def test_a_told_format_wins_over_the_ending(tmp_path, import_):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in PAIRS))
    assert conversations(import_(tmp_path / "d", task="generation", format="csv")) == ordered(TURNS)


def test_json_lines_called_txt_are_json_lines(chats):
    lines = "\n".join(json.dumps(row) for row in PLAIN["openai"])
    assert chats(lines, "a.txt").info["layout"] == "openai"


def test_folders_of_data_files_are_one_source(tmp_path, import_):
    for i, row in enumerate(PLAIN["alpaca"]):
        (tmp_path / "d" / str(i)).mkdir(parents=True)
        (tmp_path / "d" / str(i) / "a.json").write_text(json.dumps([row]))
    assert conversations(import_(tmp_path / "d", task="generation")) == ordered(TURNS)


def test_parts_may_be_laid_out_differently(tmp_path, import_):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("\n".join(map(json.dumps, PLAIN["openai"][:3])))
    (tmp_path / "d" / "test.jsonl").write_text(json.dumps(PLAIN["alpaca"][3]))
    got = import_(tmp_path / "d", task="generation", split={"dev": 0.0})
    assert conversations(got) == ordered(TURNS)
    assert got.info["layout"] in ("openai, alpaca", "alpaca, openai")


def test_the_profile_is_what_the_import_finds(chats, tmp_path):
    got = chats(PLAIN["openai"])
    seen = profile(DataSpec(source=str(tmp_path / "a.jsonl")), TaskSpec(name="generation"))
    assert sorted(row["text"] for row in seen.records) == sorted(got.texts())
    assert seen.samples == got.data.info["samples"]
    assert seen.samples[0]["text"].startswith("user: ")
    assert seen.longest == len("user: What is AI?\nassistant: Machines that think.")
    assert (seen.labels, seen.shape, seen.splits) == ({}, "messages", "seeded")


@pytest.mark.models
@pytest.mark.skipif(find_spec("chatterbot_corpus") is None, reason="chatterbot-corpus is not installed")
def test_the_english_corpus(import_):
    got = import_("package:chatterbot-corpus/chatterbot_corpus/data/english", task="generation")
    rows = got.info["rows"]
    assert rows["read"] == 2026 == rows["train"] + rows["dev"] + rows["test"] + rows["dropped"]
    assert got.info["dropped"]["no_answer"] == 1
    assert got.info["changed"]["trailing_turns"] == 43
    asked = {
        split: {json.loads(r["messages"])[0]["content"].casefold() for r in got.data.split(split)}
        for split in ("train", "test")
    }
    assert not asked["train"] & asked["test"]
    kept = sum(rows[split] for split in ("train", "dev", "test"))
    assert abs(rows["test"] - 0.2 * kept) <= 1
    assert abs(rows["dev"] - 0.1 * kept) <= 1
