"""The llama.cpp engine: transformers' answers, streams that come and go, prefixes within a tenant, errors in words."""

import json
import signal

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from llmo.compression.gguf_file import NAME, write
from llmo.engines.generation import GenerationOptions, Grammar, Prompt, Sampling
from llmo.engines.llamacpp import LlamaCppEngine, library
from llmo.errors import BusyError, EnvironmentProblem, InputError, ModelError
from llmo.types import Device
from support.tiny_chat import END, tiny_chat_model

CPU = Device("cpu", "cpu", 1 << 30, 1 << 30, 1)
OPTIONS = GenerationOptions(streams=4, cache_bytes=32 << 20, chunk=32)
LENGTH_1 = b"\x01" + bytes(7)
GREEDY = Sampling(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tiny_chat_model(tmp_path_factory.mktemp("tiny"))
    write(made, made, "fp32")
    return made


@pytest.fixture
def engine(folder):
    made = LlamaCppEngine()
    made.load(folder, CPU, OPTIONS)
    yield made
    made.close()


def ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def run(engine: LlamaCppEngine, *prompts: Prompt) -> dict[int, list]:
    """The deltas of each prompt, in order, until nothing is left."""
    found: dict[int, list] = {prompt.id: [] for prompt in prompts}
    for prompt in prompts:
        engine.add(prompt)
    while engine.stats()["running"] + engine.stats()["waiting"]:
        for delta in engine.step():
            found[delta.id].append(delta)
    assert engine.step() == []
    return found


def tokens(deltas: list) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def answer(engine: LlamaCppEngine, text: str, sampling: Sampling = GREEDY, **prompt) -> list[int]:
    return tokens(run(engine, Prompt(0, ids(text), sampling, **prompt))[0])


def test_greedy_is_what_transformers_answers_alone_and_together(folder, engine):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = ["Hello", "What is a mill?", "x" * 100, "a short one", "and one more than there are streams"]
    expected = []
    for text in texts:
        with torch.inference_mode():
            found = model.generate(torch.tensor([ids(text)]), do_sample=False, max_new_tokens=24, pad_token_id=0)
        expected.append([token for token in found[0, len(text) :].tolist() if token != END])
    assert [answer(engine, text) for text in texts] == expected
    together = run(engine, *(Prompt(i, ids(text), GREEDY) for i, text in enumerate(texts)))
    assert [tokens(together[i]) for i in range(len(texts))] == expected


def test_every_answer_ends_once_and_says_how(engine):
    deltas = run(engine, Prompt(1, ids("Hello"), GREEDY))[1]
    assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + ["length"]
    first = deltas[4].tokens[0]
    stopped = run(engine, Prompt(1, ids("Hello"), Sampling(max_tokens=24, temperature=0, stop_ids=frozenset({first}))))[
        1
    ]
    assert stopped[-1].finish == "stop"
    assert tokens(stopped) == tokens(deltas)[: tokens(deltas).index(first)]


def test_the_model_s_own_end_token_ends_unless_ignored(engine, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    third = answer(engine, "Hello")[2]
    (tmp_path / "llmo.json").write_text(json.dumps({"task": {"options": {"end_ids": [third]}}}))
    other = LlamaCppEngine()
    other.load(tmp_path, CPU, OPTIONS)
    whole = answer(engine, "Hello")
    assert answer(other, "Hello") == whole[: whole.index(third)]
    assert answer(other, "Hello", Sampling(max_tokens=24, temperature=0, ignore_end=True)) == whole
    other.close()


def test_the_context_bounds_prompt_and_answer(engine):
    room = engine.context - 10
    deltas = run(engine, Prompt(1, ids("x" * room), Sampling(max_tokens=1 << 62, temperature=0, ignore_end=True)))[1]
    assert len(tokens(deltas)) == 10
    assert deltas[-1].finish == "length"
    with pytest.raises(InputError, match="the context 512"):
        engine.add(Prompt(1, ids("x" * 512)))


def test_cancel_frees_at_once_and_nothing_follows(engine):
    whole = engine.stats()["free_tokens"]
    for i in range(6):
        engine.add(Prompt(i, ids(f"{i} times"), Sampling(max_tokens=200, ignore_end=True)))
    engine.step()
    for i in (0, 2, 5):  # two that run and one that waits
        engine.cancel(i)
    assert engine.stats()["running"] == 2
    seen = {delta.id for _ in range(3) for delta in engine.step()}
    assert seen == {1, 3, 4}
    for i in (1, 3, 4, 77):
        engine.cancel(i)
    assert engine.step() == []
    assert engine.stats() == {"running": 0, "waiting": 0, "cache_tokens": 0, "cache_hits": 0, "free_tokens": whole}


def test_many_more_streams_than_the_cache_holds(folder):
    engine = LlamaCppEngine()
    engine.load(folder, CPU, GenerationOptions(streams=4, cache_bytes=1 << 19, context=400))
    assert engine.stats()["free_tokens"] < 4 * 400
    found = run(engine, *(Prompt(i, ids(f"{i:03}" * 50), Sampling(max_tokens=200, ignore_end=True)) for i in range(9)))
    assert [len(tokens(found[i])) for i in range(9)] == [200] * 9
    assert engine.failed() == []
    engine.close()


def test_a_prefix_is_shared_within_a_tenant_and_never_across(engine):
    prompt = "A long beginning that both of them have in common. "
    fresh = answer(engine, prompt + "One", tenant="other")
    engine.cancel(0)
    first = run(engine, Prompt(0, ids(prompt + "Two"), GREEDY, tenant="a"))[0]
    assert first[0].cached == 0
    second = run(engine, Prompt(0, ids(prompt + "One"), GREEDY, tenant="a"))[0]
    assert second[0].cached == len(prompt)
    assert [delta.cached for delta in second[1:]] == [0] * (len(second) - 1)
    assert tokens(second) == fresh
    assert run(engine, Prompt(0, ids(prompt + "One"), GREEDY, tenant="b"))[0][0].cached == 0
    assert engine.stats()["cache_hits"] == len(prompt)


def test_the_same_prompt_again_computes_one_token(engine):
    before = answer(engine, "Once more")
    again = run(engine, Prompt(0, ids("Once more"), GREEDY))[0]
    assert again[0].cached == len("Once more") - 1
    assert tokens(again) == before


def test_prompts_that_arrive_together_compute_their_beginning_once(engine):
    prompt = "The same instructions for everyone who asks, word for word. "
    found = run(engine, *(Prompt(i, ids(prompt + str(i)), GREEDY, tenant="a") for i in range(4)))
    assert [found[i][0].cached for i in range(4)] == [0] + [len(prompt)] * 3


def test_logprobs_are_the_scores_of_the_same_tokens(engine):
    deltas = run(
        engine, Prompt(1, ids("Hello"), Sampling(max_tokens=12, temperature=1.5, top_k=50, seed=5, logprobs=3))
    )[1]
    chosen = tokens(deltas)
    scores = engine.score([ids("Hello") + chosen])[0][len("Hello") - 1 :]
    got = [entry for delta in deltas for entry in delta.logprobs]
    assert [entry.token for entry in got] == chosen
    assert np.abs(np.array([entry.logprob for entry in got]) - scores).max() < 1e-3
    for entry in got:
        assert len(entry.top) == 3
        assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
        assert entry.logprob <= entry.top[0][1] + 1e-6


def test_a_seed_gives_the_same_answer_again(engine):
    sampling = Sampling(max_tokens=40, temperature=1.0, seed=11, ignore_end=True)
    one = answer(engine, "Hello", sampling)
    assert answer(engine, "Hello", sampling) == one
    assert answer(engine, "Hello", Sampling(max_tokens=40, temperature=1.0, seed=12, ignore_end=True)) != one


def test_an_answer_follows_its_grammar(engine):
    digits = answer(engine, "Number?", Sampling(max_tokens=40, seed=1, grammar=Grammar("regex", r"\d{3}-[ab]{2}")))
    text = bytes(_bytes()[token] for token in digits).decode()
    assert len(text) == 6
    assert text[:3].isdigit()
    assert text[3] == "-"
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    sampling = Sampling(max_tokens=40, seed=1, grammar=Grammar("json_schema", json.dumps(schema)))
    found = run(engine, Prompt(1, ids("Json?"), sampling))[1]
    assert found[-1].finish == "stop"
    assert json.loads(bytes(_bytes()[token] for token in tokens(found)))["ok"] in (True, False)


def _bytes() -> dict[int, int]:
    """The tiny tokeniser's tokens as bytes: its alphabet is in the order of the characters that stand for them."""
    from tokenizers.pre_tokenizers import ByteLevel

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shown = {chr(byte): byte for byte in plain}
    shown |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in plain)}
    return {3 + i: shown[sign] for i, sign in enumerate(sorted(ByteLevel.alphabet()))}


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("regex", "(unclosed"),
        Grammar("regex", "a" * 1_000_000),
        Grammar("json_schema", "{not json"),
        Grammar("json_schema", '{"type": "nonsense"}'),
        Grammar("json_schema", '{"type": "string", "pattern": "\ud800"}'),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(engine, grammar):
    with pytest.raises(InputError, match="cannot be used"):
        engine.add(Prompt(1, ids("Hello"), Sampling(grammar=grammar)))
    assert engine.stats()["waiting"] == 0


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        (Prompt(1, []), "no tokens"),
        (Prompt(1, [259]), "outside"),
        (Prompt(1, [-1]), "outside"),
        (Prompt(1, [1 << 40]), "not a list of token ids"),
        (Prompt(1, ids("Hello"), adapter="mine"), "no adapter 'mine'"),
        (Prompt(1, ids("Hello"), Sampling(temperature=float("nan"))), "mean nothing"),
        (Prompt(1, ids("Hello"), Sampling(max_tokens=0)), "mean nothing"),
    ],
)
def test_what_can_never_run_is_refused_when_it_is_added(engine, prompt, why):
    with pytest.raises(InputError, match=why):
        engine.add(prompt)
    assert engine.stats()["waiting"] == 0


def test_settings_at_their_edges_are_taken(engine):
    wild = Sampling(
        max_tokens=1 << 63, temperature=1e-6, top_k=1 << 40, top_p=1e-9, min_p=1.0, repetition_penalty=3.0,
        presence_penalty=2.0, frequency_penalty=-2.0, seed=1 << 63, logprobs=10_000,
        stop_ids=frozenset(range(300, 100_300)),
    )  # fmt: skip
    engine.add(Prompt(1, ids("Hello"), wild))
    assert len(engine.step()[0].logprobs[0].top) == 259
    with pytest.raises(InputError, match="already there"):
        engine.add(Prompt(1, ids("Hello")))


def test_scores_need_room_and_a_context(engine):
    with pytest.raises(InputError, match="longer than the context"):
        engine.score([ids("x" * 513)])
    for i in range(4):
        engine.add(Prompt(i, ids("x" * 500), Sampling(max_tokens=12)))
    engine.step()
    assert len(engine.score([ids("some text"), [5]])[1]) == 0
    engine.close()
    assert engine.step() == []
    with pytest.raises(ModelError, match="closed"):
        engine.score([ids("some text")])


def test_scores_wait_for_room_when_the_cache_is_small(folder):
    engine = LlamaCppEngine()
    engine.load(folder, CPU, GenerationOptions(streams=1, cache_bytes=512 * 2 * 2 * 32 * 4, context=512))
    engine.add(Prompt(1, ids("x" * 400), Sampling(max_tokens=100, ignore_end=True)))
    engine.step()
    with pytest.raises(BusyError, match="no room"):
        engine.score([ids("y" * 400)])
    engine.cancel(1)
    assert len(engine.score([ids("y" * 400)])[0]) == 399
    engine.close()


def test_a_broken_model_fails_its_streams_and_the_engine_goes_on(tmp_path):
    folder = tiny_chat_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + ord("!")] = np.nan  # one token poisons every text that has it
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "tie_word_embeddings": False}))
    weights["lm_head.weight"] = np.nan_to_num(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write(folder, folder, "bf16")
    engine = LlamaCppEngine()
    engine.load(folder, CPU, OPTIONS)
    found = run(engine, Prompt(1, ids("Hello!"), GREEDY), Prompt(2, ids("Hello"), GREEDY))
    [(failed, error)] = engine.failed()
    assert (failed, type(error)) == (1, ModelError)
    assert "not numbers" in str(error)
    assert found[1] == []
    assert len(tokens(found[2])) == 24
    assert engine.failed() == []
    engine.close()


@pytest.mark.parametrize("size", [0, 10, 1000, -1000])
def test_a_cut_file_is_an_error_in_words(folder, tmp_path, size):
    (tmp_path / NAME).write_bytes((folder / NAME).read_bytes()[:size])
    with pytest.raises(ModelError, match="cannot be used"):
        LlamaCppEngine().load(tmp_path, CPU, OPTIONS)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (b"GGUF", b"GGML", "not a GGUF file"),
        (b"GGUF\x03", b"GGUF\x09", "version"),
        (b"llama.block_count", b"llama.clock_count", "does not describe a decoder"),
        (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokexs", "no vocabulary"),
        (b"token_embd.weight", b"token_xxxx.weight", "token_embd.weight"),
        (LENGTH_1 + b"!", LENGTH_1 + b"#", "same text"),  # the library would end the process
        (b"blk.1.attn_q.weight", b"blk.1.attn_x.weight", "attn_q"),
        (b"general.architecture", b"general.architectuxx", "architecture"),
    ],
)
def test_a_header_that_contradicts_itself_is_an_error_in_words(folder, tmp_path, old, new, why):
    raw = (folder / NAME).read_bytes()
    assert old in raw
    (tmp_path / NAME).write_bytes(raw.replace(old, new, 1))
    with pytest.raises(ModelError, match=why):
        LlamaCppEngine().load(tmp_path, CPU, OPTIONS)


def test_an_unknown_architecture_names_itself(folder, tmp_path):
    raw = (folder / NAME).read_bytes().replace(b"llama", b"lxama")
    (tmp_path / NAME).write_bytes(raw)
    with pytest.raises(ModelError, match="unknown model architecture: 'lxama'"):
        LlamaCppEngine().load(tmp_path, CPU, OPTIONS)


def test_what_it_cannot_load_it_does_not_load(folder, tmp_path):
    with pytest.raises(ModelError, match=r"no model\.gguf"):
        LlamaCppEngine().load(tmp_path, CPU, OPTIONS)
    with pytest.raises(ModelError, match="is fp32, not int8"):
        LlamaCppEngine().load(folder, CPU, GenerationOptions(precision="int8"))
    with pytest.raises(EnvironmentProblem, match="runs on the CPU"):
        LlamaCppEngine().load(folder, Device("cuda:0", "cuda", 1, 1, 1), OPTIONS)
    with pytest.raises(EnvironmentProblem, match="keys and values of 2 tokens"):
        LlamaCppEngine().load(folder, CPU, GenerationOptions(cache_bytes=1024))


def test_a_library_of_another_layout_is_not_called(monkeypatch):
    monkeypatch.setitem(library.CONTEXT_DEFAULTS, "n_ubatch", 511)
    with pytest.raises(EnvironmentProblem, match="layout this driver was written for"):
        library.library.__wrapped__()


def test_it_is_silent_listens_nowhere_and_leaves_signals_alone(folder, capfd):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    engine = LlamaCppEngine()
    engine.load(folder, CPU, OPTIONS)
    answer(engine, "Hello")
    assert psutil.Process().net_connections() == []
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    engine.load(folder, CPU, OPTIONS)
    assert answer(engine, "Hello")
    engine.close()
    engine.close()
    assert capfd.readouterr() == ("", "")
