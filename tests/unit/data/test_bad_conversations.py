"""Each thing that can be wrong with a conversation: the row goes with its reason, or the source is refused."""

from __future__ import annotations

import json

import pytest

from llmo.data.profile import profile
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

GOOD = [
    {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]}
    for i in range(4)
]


@pytest.fixture
def chats(tmp_path, import_):
    def go(rows, name="a.jsonl", task="generation", **told):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "\n".join(json.dumps(row) for row in rows))
        return import_(path, task=task, **told)

    return go


def refused(chats, rows, **told) -> DataError:
    with pytest.raises(DataError) as caught:
        chats(rows, **told)
    assert caught.value.hint, "every data error says what to do"
    return caught.value


def turns(*said, roles=("user", "assistant")):
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]}


IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
NO_NAME = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (turns("Only a question?"), "no_answer", "there is no message of the assistant"),
        ({"messages": []}, "no_answer", "there are no messages"),
        ({"messages": None}, "no_answer", "there are no messages"),
        ({"other": 1}, "no_answer", "there are no messages"),
        (turns("", "Hello"), "empty_content", "message 1, of the user, is empty"),
        (turns("Hi", " \n\u200b"), "empty_content", "message 2, of the assistant, is empty"),
        (turns("Hi", None), "empty_content", "message 2, of the assistant, is empty"),
        (turns("Hi", "Hello", roles=("user", "narrator")), "unknown_role", "message 2 is by 'narrator'"),
        ({"messages": [{"content": "Hi"}, {"role": "assistant", "content": "x"}]}, "unknown_role", "message 1 is by"),
        ({"messages": [3]}, "unknown_role", "message 1 is a int without a role"),
        ({"messages": "Hi"}, "not_text", "neither a list nor JSON"),
        ({"messages": {"role": "user"}}, "not_text", "the messages are a dict"),
        (turns("Hello", "Hi", roles=("assistant", "user")), "broken_turns", "message 1 is an answer before any"),
        (turns("Hi", "One", "Two", roles=("user", "assistant"))["messages"], None, ""),
        (turns(IMAGE, "A cat."), "not_text", "message 1 holds image_url"),
        (turns("Hi", {"a": 1}), "not_text", "message 2 is a dict, not a text"),
        ({"messages": [*turns("Hi")["messages"], NO_NAME]}, "broken_tools", "tool call 1 has no name"),
        ({**turns("Hi", "Hello"), "tools": "[{"}, "broken_tools", "the tools are not JSON"),
        ({**turns("Hi", "Hello"), "tools": [{"function": {"name": ""}}]}, "broken_tools", "tool 1 has no name"),
        ({**turns("Hi", "Hello"), "tools": [{"name": "f", "x": float("nan")}]}, "broken_tools", "what JSON cannot say"),
        ({**turns("Hi", "Hello"), "tools": 3}, "broken_tools", "the tools are a int"),
    ],
)
def test_a_bad_row_is_dropped_and_says_why(chats, row, reason, detail):
    if reason is None:
        row, reason, detail = {"messages": [*row[:2], row[1]]}, "broken_turns", "message 3 is a second answer"
    got = chats([*GOOD, row])
    assert got.info["dropped"] == {reason: 1}
    assert got.dropped() == {reason: ["a.jsonl:5"]}
    assert detail in got.data.dropped()[0]["detail"]
    assert any("1 rows were dropped because they" in note and "a.jsonl:5" in note for note in got.notes)


def test_the_result_of_a_tool_that_nobody_called(chats):
    row = {"messages": [*turns("Hi")["messages"], {"role": "tool", "content": "x"}, *turns("Hi", "Hello")["messages"]]}
    assert chats([*GOOD, row]).info["dropped"] == {"broken_turns": 1}


def test_a_conversation_that_ends_on_a_question_is_cut_to_its_last_answer(chats):
    got = chats([turns("Hi", "Hello", "Who are you?", "A program.", "Oh", roles=("user", "assistant"))])
    assert got.texts() == ["user: Hi\nassistant: Hello\nuser: Who are you?\nassistant: A program."]
    assert got.info["changed"] == {"trailing_turns": 1}
    assert any("1 conversations were cut after their last answer" in note for note in got.notes)


def test_two_questions_in_a_row_are_allowed_and_empty_instructions_are_left_out(chats):
    row = turns("Hi", "Are you there?", "Yes.", roles=("user", "user"))
    row["messages"][2]["role"] = "assistant"
    row["messages"].insert(0, {"role": "system", "content": " "})
    got = chats([row])
    assert got.texts() == ["user: Hi\nuser: Are you there?\nassistant: Yes."]
    assert got.info["changed"]["empty_system"] == 1


def test_an_empty_answer_may_be_kept(chats):
    got = chats([*GOOD, turns("Say nothing.", "")], clean={"drop_empty": False})
    assert got.info["dropped"] == {}
    assert "user: Say nothing.\nassistant: " in got.texts()


def test_keys_of_messages_that_mean_nothing_here_are_told(chats):
    row = turns("Hi", "Hello")
    row["messages"][1] |= {"weight": 1, "refusal": None}
    got = chats([row])
    assert got.info["changed"] == {"message_keys": 1}
    assert json.loads(got.rows()[0]["messages"])[1] == {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("bad", "says", "hint"),
    [
        (turns("Only a question?"), "3 of 5 rows have no answer to learn; the first is a.jsonl:3", "data.label"),
        (turns("Hi", "Ho", roles=("user", "narrator")), "message 2 is by 'narrator'", "roles are system"),
        (turns("", "Ho"), "3 of 5 rows hold an empty question or answer", "fill them"),
    ],
)
def test_a_flaw_of_most_rows_is_the_sources(chats, bad, says, hint):
    error = refused(chats, [*GOOD[:2], bad, bad, bad])
    assert says in error.what
    assert hint in error.hint
    assert error.where == "a.jsonl"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "chosen": "x", "rejected": "x "}, "same_answers"),
        ({"prompt": "Hi", "chosen": "x", "rejected": ""}, "no_answer"),
        ({"prompt": "", "chosen": "x", "rejected": "y"}, "empty_content"),
        (
            {"prompt": None, "chosen": turns("A?", "x")["messages"], "rejected": turns("B?", "y")["messages"]},
            "broken_turns",
        ),
        (
            {"prompt": "C?", "chosen": turns("A?", "x")["messages"], "rejected": turns("A?", "y")["messages"]},
            "broken_turns",
        ),
        ({"prompt": None, "chosen": turns("A?", "x")["messages"], "rejected": turns("A?")["messages"]}, "broken_turns"),
        ({"prompt": "Hi", "chosen": 3, "rejected": {"a": 1}}, "not_text"),
    ],
)
def test_bad_preferences(chats, row, reason):
    good = [{"prompt": f"Question {i}?", "chosen": "good", "rejected": "bad"} for i in range(4)]
    got = chats([*good, row])
    assert got.dropped() == {reason: ["a.jsonl:5"]}


def test_halves_of_surrogate_pairs(chats):
    inner = json.dumps([{"role": "user", "content": "half \ud83d pair"}, {"role": "assistant", "content": "\udc00"}])
    plain = {"messages": [{"role": "user", "content": "a \ud83d b"}, {"role": "assistant", "content": "whole 😀"}]}
    got = chats([*GOOD, {"messages": inner}, {**plain, "tools": [{"name": "f\udfff"}]}])
    assert "user: half \ufffd pair\nassistant: \ufffd" in got.texts()
    assert "tools: f\ufffd\nuser: a \ufffd b\nassistant: whole 😀" in got.texts()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"messages": [{"role": }]}', "broken JSON"),
        ('{"messages": ' + "[" * 100_000, "nested too deeply"),
        ('{"messages": [], "tools": ' + '[{"a":' * 40 + "1" + "}]" * 40 + "}", "nested too deeply"),
        ("[]", "an object of columns, this is a list"),
    ],
)
def test_broken_lines_name_their_place(chats, line, says):
    error = refused(chats, json.dumps(GOOD[0]) + "\n\n" + line + "\n")
    assert says in error.what
    assert error.where == "a.jsonl:3"


@pytest.mark.parametrize("inner", ["[" * 100_000, '[{"role": "user", "content": ' + "9" * 5000 + "}]"])
def test_json_in_a_cell_that_cannot_be_read(chats, inner):
    assert chats([*GOOD, {"messages": inner}]).info["dropped"] == {"not_text": 1}


def test_very_long_messages(chats):
    got = chats([*GOOD, turns("x" * 5_000_000, "Long."), turns("\n" * 4_000_000, "Empty.")])
    assert max(map(len, got.texts())) == len("user: \nassistant: Long.") + 5_000_000
    assert got.info["dropped"] == {"empty_content": 1}
    error = refused(chats, [*GOOD, turns(*["x" * 4_000_000] * 4)])
    assert "more than 10,000,000 characters" in error.what
    assert error.where == "a.jsonl:5"


def test_shapes_that_do_not_mix(tmp_path, import_):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text("\n".join(map(json.dumps, GOOD)))
    (tmp_path / "d" / "test.jsonl").write_text('{"text": "plain"}')
    with pytest.raises(DataError, match=r"this is \w+, and what was read before is"):
        import_(tmp_path / "d", task="generation")


def test_texts_with_labels_are_for_another_task(chats):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(4)]
    error = refused(chats, rows)
    assert "texts with labels (column 'label')" in error.what
    assert "task: text-classification" in error.hint
    assert chats(rows, text="text").info["shape"] == "text"  # told, they are learnt as texts
    tagged = refused(chats, [{"tokens": ["Ada"], "ner_tags": ["B-PER"]}])
    assert "task: token-classification" in tagged.hint
    (error,) = [refused(chats, [{"question": "Is it?", "intent": "ask"}])]
    assert "task: text-classification" in error.hint


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
@pytest.mark.parametrize(
    "row",
    [
        GOOD[0],
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Ho"},
        {"question": "Hi", "answer": "Hello"},
    ],
)
def test_conversations_are_not_for_other_tasks(chats, row, task):
    error = refused(chats, [row], task=task)
    assert "these are conversations" in error.what
    assert "say task: generation" in error.hint


def test_other_layouts_of_conversations_are_not_for_other_tasks(chats):
    error = refused(chats, [{"instruction": "Do.", "input": "x", "output": "y"}], task="text-classification")
    assert "say task: generation" in error.hint
    yaml = "conversations:\n- - Hi\n  - Hello\n"
    assert "say task: generation" in refused(chats, yaml, name="a.yml", task="text-classification").hint
    rows = [{"input": f"say {i}", "output": f"said {i}"} for i in range(60)]
    assert "say task: generation" in refused(chats, rows, task="text-classification").hint


@pytest.mark.parametrize(
    ("row", "told", "says"),
    [
        ({"a": 1, "b": 2}, {}, "no columns are called like those of conversations or texts"),
        ({"prompt": "only questions"}, {}, "no columns are called like those of conversations or texts"),
        ({"messages": GOOD[0]["messages"]}, {"text": "mesages"}, "did you mean 'messages'?"),
        ({"prompt": "a", "completion": "b"}, {"text": "prompt", "label": "prompt"}, "both question and answer"),
    ],
)
def test_columns_that_say_nothing(chats, row, told, says):
    assert says in refused(chats, [row], **told).what


def test_binary_and_empty_files_called_txt(tmp_path, import_):
    for name, content, says in (
        ("a.txt", b"PK\x03\x04", "ZIP"),
        ("b.txt", b"", "empty"),
        ("c.txt", b" \n\n", "no rows"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=says):
            import_(tmp_path / name, task="generation")


def test_a_folder_without_texts(tmp_path, import_):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "picture.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no text files here"):
        import_(tmp_path / "d", task="generation")


def test_a_check_says_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(turns("Why?")) for _ in range(3)))
    with pytest.raises(DataError, match="3 of 3 rows have no answer to learn"):
        profile(DataSpec(source=str(tmp_path / "a.jsonl")), TaskSpec(name="generation"))
