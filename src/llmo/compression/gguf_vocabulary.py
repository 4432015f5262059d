"""What a GGUF file says of its tokeniser, from a Hugging Face folder's `tokenizer.json`.

LLMO feeds llama.cpp token ids and never asks it to split text, so nothing here can change an answer; it is written
all the same, so that the file also works in other programs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from llmo.engines.folder import require
from llmo.errors import ModelError

TOKENIZER = "tokenizer.json"
SPECIAL = ("bos", "eos", "unk", "pad")
# llama.cpp knows a splitting rule by name; these are the ones of the families written here, by a part of their regex.
PRE_BY_REGEX = (("\\p{N}{1,3}", "llama-bpe"), ("|\\p{N}|", "qwen2"))


def add_vocabulary(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Tokens, types, merges, special ids and chat template; `rows` is how many rows the embedding table has.

    Raises ModelError for a tokeniser that is not byte-pair encoding, or has more tokens than the table has rows.
    """
    path = require(folder, TOKENIZER)
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        model = tokenizer["model"]
        vocabulary: dict[str, int] = model["vocab"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unusable(path, "it is not a byte-pair encoding") from error
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict):
        raise _unusable(path, f"it is a {model.get('type')} model, not byte-pair encoding")
    added = {token["id"]: token for token in tokenizer.get("added_tokens", [])}
    names = {i: token for token, i in vocabulary.items()} | {i: token["content"] for i, token in added.items()}
    if max(names, default=-1) >= rows:
        raise _unusable(path, f"it has tokens up to id {max(names)}, the model's embedding table {rows} rows")
    sentencepiece = bool(model.get("byte_fallback"))
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _pre(tokenizer.get("pre_tokenizer")))
    tokens = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    if len(set(tokens)) < rows:
        raise _unusable(path, "two of its tokens are the same text")
    writer.add_token_list(tokens)
    writer.add_token_types([_type(i, names, added, sentencepiece) for i in range(rows)])
    if sentencepiece:
        writer.add_token_scores([-float(i) for i in range(rows)])  # ids follow the merges' order
    else:
        # llama.cpp refuses a file without merges; where there are none, this one can never apply
        writer.add_token_merges(merges or [f"{names[0]} {names[0]}"])
    _add_special(writer, folder, names)


def _type(i: int, names: dict[int, str], added: dict[int, Any], sentencepiece: bool) -> gguf.TokenType:
    if i not in names:
        return gguf.TokenType.UNUSED
    if i in added:
        return gguf.TokenType.CONTROL if added[i].get("special") else gguf.TokenType.USER_DEFINED
    if sentencepiece and len(names[i]) == 6 and names[i].startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _pre(pre_tokenizer: Any) -> str:
    """llama.cpp's name for the way the text is split before merging."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    regexes = [str((part.get("pattern") or {}).get("Regex", "")) for part in parts if isinstance(part, dict)]
    for mark, name in PRE_BY_REGEX:
        if any(mark in regex for regex in regexes):
            return name
    kinds = [part.get("type") for part in parts if isinstance(part, dict)]
    if kinds == ["Digits", "ByteLevel"]:
        return "smollm"
    return "gpt-2" if kinds == ["ByteLevel"] else "default"


def _add_special(writer: gguf.GGUFWriter, folder: Path, names: dict[int, str]) -> None:
    settings = _json(folder / "tokenizer_config.json")
    config = _json(folder / "config.json") | _json(folder / "generation_config.json")
    ids = {token: i for i, token in names.items()}
    add = (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id, writer.add_pad_token_id)
    for kind, write in zip(SPECIAL, add, strict=True):
        token = settings.get(f"{kind}_token")
        found: Any = ids.get(token["content"] if isinstance(token, dict) else token) if token else None
        if found is None:
            value = config.get(f"{kind}_token_id")
            found = value[0] if isinstance(value, list) and value else value
        if isinstance(found, int) and found in names:
            write(found)
    writer.add_add_bos_token(bool(settings.get("add_bos_token", False)))
    template = folder / "chat_template.jinja"
    source = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(source, str):
        writer.add_chat_template(source)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _unusable(path: Path, why: str) -> ModelError:
    return ModelError(
        f"a GGUF file cannot hold this tokeniser: {why}", where=str(path), hint="serve it with the torch engine"
    )
