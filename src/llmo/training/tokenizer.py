"""Gives a base model its `tokenizer.json`: as it came, or made from a slow tokeniser's files by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from llmo.engines.torch import quiet
from llmo.errors import ModelError
from llmo.tasks.card import TOKENIZER, load_tokenizer
from llmo.training import gguf_source

VOCABULARIES = (TOKENIZER, "vocab.txt", "vocab.json", "tekken.json", "entity_vocab.json")
PROBES = ("Hello, World! 42", "Élan naïve CAFÉ e\u0301", "我在北京", "👍🏽 ok", "a_b-c  d\te\nf", "don't U.S. 3.14")


@dataclass(frozen=True, slots=True)
class Brought:
    """`origin` says in words how the tokeniser came about."""

    origin: str
    vocabulary: int


def bring(source: Path, out: Path, config: Mapping[str, Any]) -> Brought:
    """Write `out/tokenizer.json`, without padding or truncation, and check that plain transformers agrees with it.

    `source` may be a GGUF file. The rest of the files, such as the chat template, is the caller's to copy.

    Raises ModelError when there is no tokeniser, or one with more entries than the model has embeddings.
    """
    file = gguf_source.find(source)
    if file is not None:
        with TemporaryDirectory() as aside:
            gguf_source.tokenizer(file, Path(aside))
            return bring(Path(aside), out, config)
    backend = _backend(source)
    path = out / TOKENIZER
    origin = "converted to tokenizer.json"
    if (source / TOKENIZER).is_file():
        own = load_tokenizer(source)
        same = all(own.encode(text).ids == backend.encode(text).ids for text in PROBES)
        # tokenizer_config.json may override the file (lower-casing, for one); what transformers does is what counts
        backend = own if same else backend
        origin = "as it came" if same else "as transformers reads it (tokenizer_config.json overrides tokenizer.json)"
    backend.save(str(path))
    vocabulary = backend.get_vocab_size()
    largest = max(backend.get_vocab().values(), default=0)
    embeddings = config.get("vocab_size")
    if isinstance(embeddings, int) and largest >= embeddings:
        raise ModelError(
            f"the tokeniser has ids up to {largest}, the model only {embeddings} embeddings",
            hint="the tokeniser belongs to another model: copy the right one beside the weights",
            where=str(source),
        )
    return Brought(origin, vocabulary)


def _backend(source: Path) -> Tokenizer:
    if not any(p.name in VOCABULARIES or p.suffix in (".model", ".tiktoken") for p in source.iterdir()):
        raise ModelError(  # transformers would make an empty tokeniser of nothing
            "the folder holds no tokeniser",
            hint="put tokenizer.json (or vocab.txt, or the sentencepiece model) beside the weights",
            where=str(source),
        )
    try:
        with quiet():
            loaded = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises anything, from OSError to the Rust library's bare class
        raise ModelError(
            f"transformers cannot open the tokeniser: {_first_line(error)}",
            hint="put tokenizer.json (or vocab.txt, or the sentencepiece model) beside the weights",
            where=str(source),
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{type(loaded).__name__} has no fast form (tokenizer.json), which serving needs",
            hint="take a model whose tokeniser has one",
            where=str(source),
        )
    own = Tokenizer.from_str(backend.to_str())
    own.no_padding()
    own.no_truncation()
    return own


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
