"""Adapters answer as peft's merged model does, alone and mixed; they come and go under load; bad ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from llmo import plugins
from llmo.engines.generation import AdapterEngine, Delta, GenerationOptions, Prompt, Sampling
from llmo.errors import ConflictError, InputError, ModelError, NotFoundError
from support.places import ON_GPU, place
from support.tiny_chat import tiny_adapter, tiny_chat_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of peft
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Rank, alpha, modules, and whether the scale is alpha / sqrt(rank).
KINDS: list[tuple[int, float, list[str], bool]] = [
    (4, 8, ALL, False),
    (4, 16, ["q_proj", "v_proj"], False),
    (8, 8, ["down_proj", "up_proj"], True),
    (2, 4, ["k_proj", "o_proj", "gate_proj"], False),
    (3, 6, ALL, True),
]
GREEDY = Sampling(max_tokens=20, temperature=0.0, ignore_end=True, logprobs=3)
DRIVERS = [("torch", "fp32"), ("torch", "bf16"), ("torch", "int8"), ("native", "fp32"), ("native", "int8")]
if ON_GPU:
    DRIVERS = [driver for driver in DRIVERS if driver[0] == "torch"]
ENGINES = sorted({driver[0] for driver in DRIVERS})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [adapter(base, folder / str(i), i) for i in range(len(KINDS))]


def adapter(base: Path, folder: Path, seed: int) -> Path:
    """As peft saves it, with matrices that change the answers."""
    rank, alpha, modules, rooted = KINDS[seed % len(KINDS)]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, use_rslora=rooted)
    tuned = peft.get_peft_model(model, settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    tuned.save_pretrained(folder)
    return folder


def merged(base: Path, folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).merge_and_unload().eval()


@pytest.fixture(params=[(*driver, cores) for driver in DRIVERS for cores in (1, 2, 3, 5)], ids=str)
def engine(base: Path, adapters: list[Path], request: pytest.FixtureRequest) -> Iterator[AdapterEngine]:
    before = torch.get_num_threads()
    name, precision, cores = request.param
    made = loaded(base, precision, cores, name)
    for i, folder in enumerate(adapters):
        made.add_adapter(f"a{i}", folder)
    yield made
    made.close()
    torch.set_num_threads(before)


def loaded(base: Path, precision: str = "fp32", cores: int = 2, engine: str = "torch", **options: Any) -> AdapterEngine:
    made: AdapterEngine = plugins.load("llmo.generators", engine)()
    settings = GenerationOptions(
        **{"cache_bytes": 4 << 20, "chunk": 40, "streams": 8, "precision": precision} | options
    )
    made.load(base, place(cores), settings)
    return made


@pytest.fixture
def opened() -> Iterator[Callable[..., AdapterEngine]]:
    """As `loaded`, and closed at the end."""
    with ExitStack() as stack:
        yield lambda *given, **options: stack.enter_context(closing(loaded(*given, **options)))


def ask(engine: AdapterEngine, asked: Sequence[tuple[list[int], str | None]], tenant: str) -> list[list[Delta]]:
    for i, (ids, name) in enumerate(asked):
        engine.add(Prompt(i, ids, GREEDY, tenant=tenant, adapter=name))
    found: dict[int, list[Delta]] = {i: [] for i in range(len(asked))}
    while deltas := engine.step():
        for delta in deltas:
            found[delta.id].append(delta)
    assert engine.failed() == []
    return list(found.values())


def tokens(deltas: Sequence[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.tokens]


def bits(deltas: Sequence[Delta]) -> list[Any]:
    return [logprob for delta in deltas for logprob in delta.logprobs]


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, 259, length).tolist() for length in lengths]


@pytest.mark.parametrize("name", ENGINES)
def test_each_answers_as_the_merged_model(
    name: str, base: Path, adapters: list[Path], opened: Callable[..., AdapterEngine]
) -> None:
    engine = opened(base, engine=name)
    ids = prompts(30)[0]
    answers = set()
    for i, folder in enumerate(adapters):
        engine.add_adapter(f"a{i}", folder)
        found = tokens(ask(engine, [(ids, f"a{i}")], "")[0])
        with torch.inference_mode():
            out = merged(base, folder).generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, 30),
                max_new_tokens=20,
                do_sample=False,
                eos_token_id=999,
            )
        assert found == out[0][30:].tolist()
        answers.add(tuple(found))
    answers.add(tuple(tokens(ask(engine, [(ids, None)], "")[0])))
    assert len(answers) == len(adapters) + 1


def test_an_answer_in_a_mixed_batch_is_the_answer_alone(engine: AdapterEngine) -> None:
    """Bit for bit, with the base among them, one adapter twice, and long prompts beside short answers."""
    names = ["a0", "a1", None, "a2", "a3", "a4", "a0", None]
    asked = list(zip(prompts(1, 5, 30, 60, 17, 90, 33, 2), names, strict=True))
    alone = [bits(ask(engine, [one], f"alone {i}")[0]) for i, one in enumerate(asked)]
    assert [bits(deltas) for deltas in ask(engine, asked, "together")] == alone


@pytest.mark.parametrize("name", ENGINES)
def test_more_adapters_than_streams_take_turns(
    name: str, base: Path, tmp_path: Path, opened: Callable[..., AdapterEngine]
) -> None:
    engine = opened(base, engine=name, streams=3)
    for i in range(10):
        engine.add_adapter(f"a{i}", adapter(base, tmp_path / str(i), i))
    asked = [(ids, f"a{i % 10}") for i, ids in enumerate(prompts(*range(3, 28)))]
    alone = [tokens(ask(engine, [one], f"alone {i}")[0]) for i, one in enumerate(asked)]
    assert [tokens(deltas) for deltas in ask(engine, asked, "together")] == alone


def test_prefixes_are_not_shared_between_adapters(engine: AdapterEngine) -> None:
    ids = prompts(100)[0]
    cached = [max(delta.cached for delta in ask(engine, [(ids, name)], "t")[0]) for name in ("a0", "a1", None, "a0")]
    assert cached[:3] == [0, 0, 0]
    assert cached[3] > 0


@pytest.mark.parametrize("name", ENGINES)
def test_one_comes_and_goes_while_others_run(
    name: str, base: Path, adapters: list[Path], opened: Callable[..., AdapterEngine]
) -> None:
    engine = opened(base, engine=name)
    ids = prompts(20)[0]
    engine.add_adapter("x", adapters[0])
    expected = [tokens(ask(engine, [(ids, name)], name or "")[0]) for name in ("x", None)]
    engine.add(Prompt(0, ids, GREEDY, adapter="x"))
    engine.add(Prompt(1, ids, GREEDY))
    found: dict[int, list[Delta]] = {0: [], 1: []}
    steps = 0
    while deltas := engine.step():
        for delta in deltas:
            found[delta.id].append(delta)
        steps += 1
        if steps == 3:
            engine.remove_adapter("x")
            with pytest.raises(InputError, match="unknown adapter 'x'"):
                engine.add(Prompt(2, ids, GREEDY, adapter="x"))
        if steps == 6:
            engine.add_adapter("x", adapters[2])
    assert [tokens(found[0]), tokens(found[1])] == expected
    renamed = ask(engine, [(ids, "x")], "x")[0]
    assert max(delta.cached for delta in renamed) == 0  # what the first of that name computed is not this one's
    assert tokens(renamed) != expected[0]
    engine.remove_adapter("x")
    with pytest.raises(NotFoundError):
        engine.remove_adapter("x")


def test_memory_that_does_not_suffice_for_one_is_there_for_the_others(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(loaded(base)) as engine:
        engine.add_adapter("small", tiny_adapter(tmp_path / "small", rank=4))
        engine.add_adapter("large", tiny_adapter(tmp_path / "large", 1, rank=32))
        [ids] = prompts(9)
        before = ask(engine, [(ids, "small")], "t")
        zeros, made = torch.zeros, []

        def scarce(*shape: Any, **options: Any) -> torch.Tensor:
            made.append(shape)
            if len(made) == 3:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return zeros(*shape, **options)

        monkeypatch.setattr(torch, "zeros", scarce)
        engine.add(Prompt(9, ids, GREEDY, tenant="t", adapter="large"))
        while not (failed := engine.failed()):
            engine.step()
        monkeypatch.undo()
        assert [id for id, _ in failed] == [9]
        assert bits(ask(engine, [(ids, "small")], "t")[0]) == bits(before[0])
        assert tokens(ask(engine, [(ids, "large")], "t")[0]) != tokens(before[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_would_not_fit_into_the_memory_set_aside_is_refused(base: Path, tmp_path: Path, precision: str) -> None:
    with closing(loaded(base, precision, adapter_bytes=1 << 20)) as engine:
        names: list[str] = []
        with pytest.raises(ModelError, match=r"need 2 MiB, and 1 MiB are set aside") as refused:
            while True:
                name = f"a{len(names)}"
                engine.add_adapter(name, tiny_adapter(tmp_path / name, len(names), rank=8 + 8 * (len(names) % 2)))
                names.append(name)
        assert "adapters_mib=2" in refused.value.hint
        assert len(names) > 1
        [ids] = prompts(9)
        ask(engine, [(ids, name) for name in names], "t")
        held = engine._adapters
        matrices = [m for kind in (held._down, held._below, held._up) for m in kind.values()]
        matrices += [m for lora in held._loaded.values() for m in (*lora.down.values(), *lora.up.values())]
        assert 1 << 19 < sum(m.nbytes for m in matrices) <= 1 << 20
        engine.remove_adapter(names[0])
        engine.add_adapter("another", tiny_adapter(tmp_path / "another", 99, rank=8))
        ask(engine, [(ids, "another")], "t")


@pytest.mark.parametrize("name", ENGINES)
def test_a_name_is_taken_once(
    name: str, base: Path, adapters: list[Path], opened: Callable[..., AdapterEngine]
) -> None:
    engine = opened(base, engine=name)
    engine.add_adapter("x", adapters[0])
    with pytest.raises(ConflictError):
        engine.add_adapter("x", adapters[1])


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("zero", "changes nothing"),
        ("a matrix is gone", "not all of the adapter applies"),
        ("a layer is gone", "not all of the adapter applies"),
        ("a module is gone", "not all of the adapter applies"),
        ("a layer too many", "not all of the adapter applies"),
        ("another module", "no place for"),
        ("misshapen", "q_proj"),
        ("not finite", "not finite"),
        ("too large a scale", "with its scale"),
        ("cut", "safetensors"),
        ("no weights", "adapter_model"),
        ("no settings", "adapter_config"),
        ("another kind", "not a LoRA"),
        ("dora", "use_dora"),
        ("bias", "bias"),
    ],
)
def test_what_does_not_fit_or_does_nothing_is_refused(
    harm: str, says: str, base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    settings = json.loads((adapters[0] / "adapter_config.json").read_text())
    match harm:
        case "zero":
            tensors = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()}
        case "too large a scale":
            settings["lora_alpha"] = 1e41
        case "a matrix is gone":
            del tensors[Q]
        case "a layer is gone":
            tensors = {k: v for k, v in tensors.items() if ".layers.1." not in k}
        case "a module is gone":
            tensors = {k: v for k, v in tensors.items() if "q_proj" not in k}
        case "a layer too many":
            tensors |= {k.replace(".layers.1.", ".layers.7."): v for k, v in tensors.items()}
        case "another module":
            tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(4, 64)
        case "misshapen":
            tensors[Q] = torch.ones(4, 63)
        case "not finite":
            tensors[Q][0, 0] = float("inf")
        case "another kind":
            settings["peft_type"] = "IA3"
        case "dora":
            settings["use_dora"] = True
        case "bias":
            settings["bias"] = "all"
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    match harm:
        case "cut":
            weights = folder / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-100])
        case "no weights":
            (folder / "adapter_model.safetensors").unlink()
        case "no settings":
            (folder / "adapter_config.json").unlink()
    with closing(loaded(base)) as engine:
        with pytest.raises(ModelError, match=says) as caught:
            engine.add_adapter("x", folder)
        assert caught.value.hint
        with pytest.raises(InputError, match="unknown adapter"):
            engine.add(Prompt(0, [3], GREEDY, adapter="x"))
