"""The OpenVINO engine: transformers' numbers, the same answer alone and in any company, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmo.compression.openvino_graph import write
from llmo.engines.generation import Delta, GenerationOptions, Grammar, Prompt, Sampling
from llmo.engines.openvino import OpenVinoEngine
from llmo.engines.openvino.runner import BLOCK, GRAPH
from llmo.errors import ConflictError, EnvironmentProblem, InputError, ModelError
from llmo.types import Device
from support.tiny_chat import END, POSITIONS, tiny_chat_model

CPU = Device("cpu", "cpu", memory=0, free=0, cores=2)
OPTIONS = GenerationOptions(streams=8, cache_bytes=4 << 20, chunk=64)
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_end=True)
PRECISIONS = ("fp32", "bf16", "int8", "int4")
LENGTHS = (1, 2, 31, 32, 33, 65, 97, 150)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for precision in PRECISIONS:
        made[precision] = tiny_chat_model(tmp_path_factory.mktemp("models") / precision)
        write(made[precision], made[precision], precision)
    return made


@pytest.fixture(params=PRECISIONS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def engine(folder: Path) -> Iterator[OpenVinoEngine]:
    made = loaded(folder)
    yield made
    made.close()


def loaded(folder: Path, options: GenerationOptions = OPTIONS, cores: int = 2) -> OpenVinoEngine:
    made = OpenVinoEngine()
    made.load(folder, Device("cpu", "cpu", memory=0, free=0, cores=cores), options)
    return made


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 259, length).tolist() for length in lengths]


def finished(engine: OpenVinoEngine, asked: Sequence[Prompt]) -> dict[int, list[Delta]]:
    """The deltas of these prompts, added together, but for those that only say that a prompt is on its way."""
    for prompt in asked:
        engine.add(prompt)
    found: dict[int, list[Delta]] = {prompt.id: [] for prompt in asked}
    while deltas := engine.step():
        for delta in deltas:
            if delta.id in found and (delta.tokens or delta.finish):
                found[delta.id].append(delta)
    assert engine.failed() == []
    assert all(answer[-1].finish for answer in found.values())
    return found


def tokens(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def alone(engine: OpenVinoEngine, ids: Sequence[int], sampling: Sampling = GREEDY) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one answer with nothing beside it, and no prefix shared."""
    deltas = finished(engine, [Prompt(0, ids, sampling, tenant=str(np.random.default_rng().integers(2**60)))])[0]
    return tokens(deltas), [entry.logprob for delta in deltas for entry in delta.logprobs]


def reference(folder: Path, ids: Sequence[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: np.ndarray = model(input_ids=torch.tensor([list(ids)])).logits[0].log_softmax(-1).numpy()
    return logits


def test_scores_are_those_of_transformers(folder: Path, engine: OpenVinoEngine) -> None:
    most = {"fp32": 1e-5, "bf16": 0.05, "int8": 0.15, "int4": 1.5}[folder.name]
    sequences = prompts((2, 3, 65, 66, 129, 150))
    for ids, found in zip(sequences, engine.score(sequences), strict=True):
        expected = reference(folder, ids)[range(len(ids) - 1), ids[1:]]
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < most
    assert engine.score([[5]])[0].shape == (0,)


def test_greedy_answers_at_fp32_are_those_of_transformers(folders: dict[str, Path]) -> None:
    engine = loaded(folders["fp32"])
    for ids in prompts((1, 33, 97)):
        answer, _ = alone(engine, ids)
        following = reference(folders["fp32"], ids + answer)[len(ids) - 1 : -1].argmax(-1)
        assert answer == following.tolist()
    engine.close()


def test_answers_and_their_last_bits_are_the_same_alone_and_together(engine: OpenVinoEngine) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_end=True, logprobs=0)
    expected = [alone(engine, ids, sampling) for ids in prompts()]
    together = finished(engine, [Prompt(i, ids, sampling) for i, ids in enumerate(prompts())])
    for i, (answer, logs) in enumerate(expected):
        assert tokens(together[i]) == answer
        assert [entry.logprob for delta in together[i] for entry in delta.logprobs] == logs


@pytest.mark.parametrize("chunk", [1, 7, 33, 64, 512])
def test_answers_do_not_depend_on_how_prompts_are_cut(folder: Path, engine: OpenVinoEngine, chunk: int) -> None:
    sampling = Sampling(max_tokens=6, temperature=0.0, ignore_end=True, logprobs=0)
    cut = loaded(folder, GenerationOptions(streams=2, cache_bytes=4 << 20, chunk=chunk), cores=1)
    for ids in prompts((2, 33, 65)):
        assert alone(cut, ids, sampling) == alone(engine, ids, sampling)
    cut.close()


def test_a_seeded_answer_is_the_same_under_load(engine: OpenVinoEngine) -> None:
    sampling = Sampling(max_tokens=12, temperature=0.9, top_p=0.95, seed=11, ignore_end=True)
    ids = prompts((50,))[0]
    expected, _ = alone(engine, ids, sampling)
    others = [Prompt(i, ids, Sampling(max_tokens=30, ignore_end=True)) for i in range(1, 6)]
    assert tokens(finished(engine, [*others, Prompt(9, ids, sampling)])[9]) == expected
    assert alone(engine, ids, Sampling(max_tokens=12, seed=12, ignore_end=True))[0] != expected


def test_a_shared_prefix_is_not_computed_again_and_changes_nothing(engine: OpenVinoEngine) -> None:
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_end=True, logprobs=0)
    for ids in prompts((2 * BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5)):
        first, second = (finished(engine, [Prompt(0, ids, sampling, tenant="a")])[0] for _ in range(2))
        assert first[0].cached == 0
        assert second[0].cached == (len(ids) - 1) // BLOCK * BLOCK
        assert [delta.logprobs for delta in second] == [delta.logprobs for delta in first]
    assert engine.stats()["cache_hits"] > 0


def test_a_prefix_is_never_shared_between_tenants(engine: OpenVinoEngine) -> None:
    ids = prompts((100,))[0]
    found = [finished(engine, [Prompt(0, ids, GREEDY, tenant=tenant)])[0][0].cached for tenant in ("a", "b", "a", "b")]
    assert found == [0, 0, 96, 96]


def test_streams_that_give_way_for_want_of_blocks_write_the_same(folder: Path, engine: OpenVinoEngine) -> None:
    sampling = Sampling(max_tokens=70, temperature=0.0, ignore_end=True)
    asked = prompts((40, 41, 42, 43))
    expected = [alone(engine, ids, sampling)[0] for ids in asked]
    blocks = engine.stats()["cache_tokens"] // BLOCK + 1
    tight = loaded(folder, GenerationOptions(streams=4, cache_bytes=(4 << 20) // blocks * 11, chunk=64))
    together = finished(tight, [Prompt(i, ids, sampling, tenant=str(i)) for i, ids in enumerate(asked)])
    assert tight.stats()["preempted"] > 0
    assert [tokens(together[i]) for i in range(4)] == expected
    assert tight.stats()["free_tokens"] == tight.stats()["cache_tokens"]
    tight.close()


def test_a_cancelled_stream_is_forgotten_at_once(engine: OpenVinoEngine) -> None:
    free = engine.stats()["free_tokens"]
    for i, ids in enumerate(prompts((70, 80))):
        engine.add(Prompt(i, ids, GREEDY))
    engine.step()
    engine.cancel(0)
    engine.cancel(7)
    assert {delta.id for _ in range(3) for delta in engine.step()} == {1}
    engine.cancel(1)
    assert engine.step() == []
    assert engine.stats() | {"running": 0, "waiting": 0, "free_tokens": free} == engine.stats()


def test_scoring_between_steps_disturbs_no_stream(engine: OpenVinoEngine) -> None:
    ids = prompts((70,))[0]
    expected, _ = alone(engine, ids)
    engine.add(Prompt(0, ids, GREEDY, tenant="scored"))
    written = []
    while deltas := engine.step():
        written += tokens(deltas)
        engine.score(prompts((90,)))
    assert written == expected


def test_an_answer_ends_where_it_should(engine: OpenVinoEngine) -> None:
    ids = prompts((20,))[0]
    answer, _ = alone(engine, ids)
    stopped = finished(engine, [Prompt(0, ids, Sampling(temperature=0.0, stop_ids=frozenset({answer[2]})))])[0]
    place = answer.index(answer[2])
    assert (tokens(stopped), stopped[-1].finish) == (answer[:place], "stop")
    full = finished(engine, [Prompt(0, prompts((POSITIONS - 3,))[0], GREEDY)])[0]
    assert (len(tokens(full)), full[-1].finish) == (3, "length")


def test_an_answer_keeps_to_its_grammar(engine: OpenVinoEngine) -> None:
    sampling = Sampling(max_tokens=30, seed=1, grammar=Grammar("regex", "(ab|cd){2}[0-9]"))
    done = finished(engine, [Prompt(0, prompts((9,))[0], sampling)])[0]
    alphabet = json.loads((engine._folder / "tokenizer.json").read_text())["model"]["vocab"]
    text = "".join({i: token for token, i in alphabet.items()}[token] for token in tokens(done))
    assert done[-1].finish == "stop"
    assert text[:4] in {"abab", "abcd", "cdab", "cdcd"}
    assert text[4:].isdigit()


@pytest.mark.parametrize(
    ("prompt", "kind", "reason"),
    [
        (Prompt(1, []), InputError, "no tokens"),
        (Prompt(1, [5, 259]), InputError, "outside"),
        (Prompt(1, [-1]), InputError, "outside"),
        (Prompt(1, [5] * POSITIONS), InputError, "context"),
        (Prompt(1, [5], adapter="mine"), InputError, "adapter"),
        (Prompt(1, [5], Sampling(temperature=float("nan"))), InputError, "temperature"),
        (Prompt(1, [5], Sampling(grammar=Grammar("regex", "("))), InputError, "grammar"),
        (Prompt(0, [5]), ConflictError, "id 0"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_and_the_engine_goes_on(
    prompt: Prompt, kind: type[Exception], reason: str, engine: OpenVinoEngine
) -> None:
    engine.add(Prompt(0, [5, 6, 7], GREEDY))
    with pytest.raises(kind, match=reason):
        engine.add(prompt)
    with pytest.raises(InputError):
        engine.score([[5] * (POSITIONS + 1)])
    assert len(finished(engine, [Prompt(2, [8, 9], GREEDY)])[2]) == GREEDY.max_tokens


def test_the_precision_is_what_the_graph_holds_or_is_refused(folders: dict[str, Path]) -> None:
    ids = prompts((60,))
    scores = []
    for precision in ("fp32", "bf16"):
        engine = loaded(folders["fp32"], GenerationOptions(precision=precision))
        scores.append(engine.score(ids)[0])
        engine.close()
    assert 1e-4 < np.abs(scores[0] - scores[1]).mean() < 0.1
    for made, asked in (
        ("fp32", "int8"),
        ("int8", "fp32"),
        ("bf16", "fp32"),
        ("int8", "bf16"),
        ("int4", "int8"),
        ("int8", "int4"),
    ):
        with pytest.raises(ModelError, match=f"are {made}.*{asked}"):
            loaded(folders[made], GenerationOptions(precision=asked))


@pytest.mark.parametrize("harm", ["no graph", "no weights", "cut graph", "cut weights", "another graph"])
def test_a_broken_folder_is_refused_with_the_engine_that_can(
    folders: dict[str, Path], harm: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folders["fp32"], broken)
    graph, weights = broken / GRAPH, (broken / GRAPH).with_suffix(".bin")
    match harm:
        case "no graph":
            graph.unlink()
        case "no weights":
            weights.unlink()
        case "cut graph":
            graph.write_bytes(graph.read_bytes()[:-1000])
        case "cut weights":
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "another graph":
            graph.write_text(graph.read_text().replace("llmo_precision", "somebody_elses"))
    with pytest.raises(ModelError) as caught:
        loaded(broken)
    assert "llmo compress" in caught.value.hint


def test_what_it_cannot_be_loaded_with_is_said(folders: dict[str, Path]) -> None:
    with pytest.raises(EnvironmentProblem, match="cuda:0"):
        OpenVinoEngine().load(folders["fp32"], Device("cuda:0", "cuda", memory=0, free=0, cores=1), OPTIONS)
    for wrong in (GenerationOptions(streams=0), GenerationOptions(chunk=0), GenerationOptions(cache_bytes=1000)):
        with pytest.raises(InputError):
            loaded(folders["fp32"], wrong)


def test_it_closes_twice_says_so_and_loads_again(folder: Path) -> None:
    engine = loaded(folder)
    first, _ = alone(engine, prompts((40,))[0])
    engine.close()
    engine.close()
    for call in (engine.step, engine.stats, lambda: engine.add(Prompt(0, [5])), lambda: engine.score([[5, 6]])):
        with pytest.raises(ModelError, match="closed"):
            call()
    engine.load(folder, CPU, OPTIONS)
    assert alone(engine, prompts((40,))[0])[0] == first
    engine.close()


def test_it_serves_without_torch(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from llmo import plugins; from llmo.types import Device\n"
        "from llmo.engines.generation import GenerationOptions, Prompt, Sampling, Grammar\n"
        "engine = plugins.load('llmo.generators', 'openvino')()\n"
        "engine.load(Path(sys.argv[1]), Device('cpu', 'cpu', 0, 0, 1), GenerationOptions())\n"
        "engine.add(Prompt(0, [5, 6], Sampling(max_tokens=3, grammar=Grammar('regex', 'a+'))))\n"
        "while engine.step(): pass\n"
        "engine.close(); print(sorted({'torch', 'transformers', 'openvino_genai'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folders["int8"])], capture_output=True, text=True, check=True
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_end_tokens_end_an_answer_unless_they_are_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    folder: Any = tmp_path / "ending"
    shutil.copytree(folders["fp32"], folder)
    engine = loaded(folder)
    ids = prompts((20,))[0]
    answer, _ = alone(engine, ids)
    engine.close()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, answer[3]]}))
    engine = loaded(folder)
    ended = finished(engine, [Prompt(0, ids, Sampling(temperature=0.0))])[0]
    assert (tokens(ended), ended[-1].finish) == (answer[: answer.index(answer[3])], "stop")
    assert alone(engine, ids)[0] == answer
    engine.close()
