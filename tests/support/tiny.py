"""Small stand-ins for tests: a two-layer BERT without a head, rows that can be learnt, and a data set folder."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

HIDDEN, LAYERS, HEADS, INNER, POSITIONS = 32, 2, 2, 64, 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOPICS = {
    "business": "market shares profit bank trade price company growth",
    "sport": "match goal team coach league player win cup",
    "tech": "software phone chip network game computer internet data",
}
FILLER = "the a of in on and to was said year new good people time today"
NAMES = {
    "person": ["alice", "bob smith", "carol", "王 芳", "josé"],
    "place": ["london", "new york", "北京", "zürich", "paris"],
}


def tiny_model(folder: Path, seed: int = 0, *, layers: int = LAYERS) -> Path:
    """A Hugging Face BERT folder (hidden 32, 128 positions, uncased WordPiece) with random weights and no head."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": POSITIONS, **names}
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "vocab_size": tokenizer.get_vocab_size(),
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", names),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    save_file(_weights(tokenizer.get_vocab_size(), layers, seed), folder / "model.safetensors", {"format": "pt"})
    return folder


def tiny_tokenizer() -> Tokenizer:
    """Uncased WordPiece that strips accents, knows ASCII letters as pieces, the words of the rows, and some Chinese."""
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = " ".join([*TOPICS.values(), FILLER, *(n for names in NAMES.values() for n in names if n.isascii())]).split()
    vocabulary = [*SPECIAL, *letters, *("##" + x for x in letters if x.isalnum()), *words, *"王芳北京我在爱了"]
    unique = list(dict.fromkeys(vocabulary))
    tokenizer = Tokenizer(WordPiece({token: i for i, token in enumerate(unique)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def text_rows(count: int, seed: int = 0, *, multi_label: bool = False, longest: int = 24) -> list[dict[str, Any]]:
    """Rows whose topic words give the label away, of mixed length."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        topics = rng.sample(sorted(TOPICS), rng.randint(1, 2) if multi_label else 1)
        words = rng.choices(FILLER.split(), k=rng.randint(2, longest))
        for topic in topics:
            words += rng.choices(TOPICS[topic].split(), k=3)
        rng.shuffle(words)
        label = {"labels": sorted(topics)} if multi_label else {"label": topics[0]}
        rows.append({"id": f"r{i}", "text": " ".join(words), **label})
    return rows


def span_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with names of persons and places as spans, with emoji and accents around them."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        parts: list[tuple[str, str | None]] = [(w, None) for w in rng.choices(FILLER.split(), k=rng.randint(1, 8))]
        for _ in range(rng.randint(0, 2)):
            label = rng.choice(sorted(NAMES))
            parts.insert(rng.randrange(len(parts) + 1), (rng.choice(NAMES[label]), label))
        parts.append((rng.choice(["👍🏽", "!", "café"]), None))
        text, spans = "", []
        for word, label in parts:
            text += " " if text else ""
            if label is not None:
                spans.append({"start": len(text), "end": len(text) + len(word), "label": label})
            text += word
        rows.append({"id": f"r{i}", "text": text, "spans": spans})
    return rows


def history_rows(count: int, seed: int = 0, *, items: int = 20) -> list[dict[str, Any]]:
    """Users who go round a ring of items, three steps at a time: what comes next can be learnt."""
    rng = random.Random(seed)
    rows = []
    for user in range(count):
        at, steps = rng.randrange(items), rng.randrange(4, 10)
        names = [f"i{(at + 3 * step) % items}" for step in range(steps)]
        rows.append({"id": f"u{user}", "text": " ".join(names[:-1]), "label": names[-1]})
    return rows


def tiny_history_model(folder: Path, *, items: int = 20) -> Path:
    """The tokeniser of that ring, as a folder: what a task reads off its base."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = ["[PAD]", "[UNK]", *(f"i{n}" for n in range(items))]
    tokenizer = Tokenizer(WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def question_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions after a topic's word in a text, in words of its own; every fourth has no answer there."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        topic, other = rng.sample(sorted(TOPICS), 2)
        words = rng.choices(FILLER.split(), k=rng.randint(4, 12))
        answer = rng.choice(TOPICS[topic].split())
        at = rng.randrange(len(words))
        text = "café " + " ".join([*words[:at], answer, *words[at:]])
        answered = i % 4 != 3
        start = len("café " + "".join(f"{word} " for word in words[:at]))
        found = {"answers": [answer], "answer_start": start} if answered else {"answers": [], "answer_start": None}
        rows.append({"id": f"r{i}", "text": " ".join(TOPICS[topic if answered else other].split()[:3]), "pair": text})
        rows[-1] |= found
    return rows


def rated_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose value is 20 and 5 more for each word of sport among ten."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        sport = rng.randint(0, 6)
        words = rng.choices(TOPICS["sport"].split(), k=sport) + rng.choices(FILLER.split(), k=10 - sport)
        rng.shuffle(words)
        rows.append({"id": f"r{i}", "text": " ".join(words), "value": 20.0 + 5.0 * sport})
    return rows


def pair_rows(count: int, seed: int = 0, kind: str = "pairs") -> list[dict[str, Any]]:
    """Texts of one topic and one number; `kind` is "pairs", "triples" or "scored" (1 of the same topic, else 0)."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        topic, other = rng.sample(sorted(TOPICS), 2)
        same = kind != "scored" or rng.random() < 0.5
        texts = [
            f"{i} " + " ".join(rng.choices(TOPICS[t].split(), k=4)) for t in (topic, topic if same else other, other)
        ]
        more = {"negative": texts[2] if kind == "triples" else None, "score": float(same) if kind == "scored" else None}
        rows.append({"id": f"r{i}", "text": texts[0], "pair": texts[1], **more})
    return rows


MADE = {
    "token-classification": span_rows,
    "extractive-qa": question_rows,
    "regression": rated_rows,
    "sentence-embedding": pair_rows,
}
_SPAN = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("label", pa.string())])
COLUMNS = {
    "token-classification": [("spans", pa.list_(_SPAN))],
    "extractive-qa": [("pair", pa.string()), ("answers", pa.list_(pa.string())), ("answer_start", pa.int64())],
    "regression": [("value", pa.float64())],
    "sentence-embedding": [("pair", pa.string()), ("negative", pa.string()), ("score", pa.float64())],
}


def tiny_dataset(
    folder: Path,
    task: str = "text-classification",
    *,
    multi_label: bool = False,
    sizes: Mapping[str, int] = {"train": 96, "dev": 32, "test": 32},
    seed: int = 0,
) -> Path:
    """A data set folder as the operation `import` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, size) in enumerate(sizes.items()):
        one = seed * 100 + number
        rows = MADE[task](size, one) if task in MADE else text_rows(size, one, multi_label=multi_label)
        write_split(folder / f"{split}.arrow", rows, task, multi_label=multi_label)
    dropped = pa.schema([(name, pa.string()) for name in ("id", "text", "reason", "detail", "source")])
    _write(folder / "dropped.arrow", pa.Table.from_pylist([], dropped))
    info = {
        "format": 1,
        "task": task,
        "columns": {"text": "text"},
        "rows": {"read": sum(sizes.values()), **sizes, "dropped": 0},
        "dropped": {},
        "changed": {},
        "labels": {},
        "encodings": {},
        "source": "tests",
        "source_digest": "",
        "multi_label": multi_label,
        "samples": [],
    }
    (folder / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def write_split(path: Path, rows: Sequence[Mapping[str, Any]], task: str, *, multi_label: bool = False) -> None:
    """One split as an Arrow IPC file with the columns of the task."""
    columns: list[tuple[str, pa.DataType]] = [("id", pa.string()), ("text", pa.string())]
    if task in COLUMNS:
        columns += COLUMNS[task]
    else:
        columns.append(("labels", pa.list_(pa.string())) if multi_label else ("label", pa.string()))
    _write(path, pa.Table.from_pylist([dict(row) for row in rows], pa.schema(columns)))


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _weights(vocabulary: int, layers: int, seed: int) -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (vocabulary, HIDDEN),
        "embeddings.position_embeddings.weight": (POSITIONS, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    inner = {"attention.output.dense": (HIDDEN, HIDDEN), "intermediate.dense": (INNER, HIDDEN)}
    inner |= {f"attention.self.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value")}
    inner["output.dense"] = (HIDDEN, INNER)
    for layer in range(layers):
        for name, shape in inner.items():
            shapes[f"encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (HIDDEN,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (HIDDEN,)
    shapes["pooler.dense.weight"] = (HIDDEN, HIDDEN)
    shapes["pooler.dense.bias"] = (HIDDEN,)
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("LayerNorm.weight"):
            weights[name] = np.ones(shape, np.float32)
        elif name.endswith(".bias"):
            weights[name] = np.zeros(shape, np.float32)
        else:
            weights[name] = rng.normal(0.0, 0.18, shape).astype(np.float32)
    return weights


def chat_rows(count: int, seed: int = 0, shape: str = "messages") -> list[dict[str, Any]]:
    """Conversations whose answers can be learnt: the topic of a question, said politely; sometimes two turns.

    `shape` is "messages", "text" (the same as plain text) or "preference" (polite is chosen, rude is rejected).
    """
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        messages: list[dict[str, str]] = []
        for _ in range(1 if shape == "preference" else rng.choice([1, 1, 2])):
            topic = rng.choice(sorted(TOPICS))
            messages.append({"role": "user", "content": " ".join(rng.sample(TOPICS[topic].split(), 2)) + "?"})
            messages.append({"role": "assistant", "content": f"It is {topic}."})
        text = "\n".join(f"{m['role']}: {m['content']}" for m in messages)
        row: dict[str, Any] = {"id": f"r{i}", "text": text, "messages": json.dumps(messages), "tools": None}
        if shape == "text":
            row["messages"] = None
        if shape == "preference":
            answer = messages.pop()["content"]
            row["messages"] = json.dumps(messages)
            row["chosen"] = json.dumps([{"role": "assistant", "content": f"Please: {answer}"}])
            row["rejected"] = json.dumps([{"role": "assistant", "content": f"{answer} Go away."}])
        rows.append(row)
    return rows


def tiny_chat_dataset(
    folder: Path,
    shape: str = "messages",
    *,
    sizes: Mapping[str, int] = {"train": 48, "dev": 16, "test": 24},
    seed: int = 0,
) -> Path:
    """A data set folder for generation as the operation `import` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, size) in enumerate(sizes.items()):
        write_chat_split(folder / f"{split}.arrow", chat_rows(size, seed * 100 + number, shape))
    info = {
        "format": 1,
        "task": "generation",
        "shape": shape,
        "rows": {"read": sum(sizes.values()), **sizes, "dropped": 0},
        "labels": {},
        "source": "tests",
        "source_digest": "",
    }
    (folder / "dataset.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def write_chat_split(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One split of conversations, plain texts or preferences."""
    names = ["id", "text", "messages", "tools", *(["chosen", "rejected"] if rows and "chosen" in rows[0] else [])]
    _write(path, pa.Table.from_pylist([dict(row) for row in rows], pa.schema([(name, pa.string()) for name in names])))
