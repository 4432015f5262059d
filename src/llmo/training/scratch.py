"""The operation `scratch-model`: a base model that is made for a data set, with a tokeniser trained on its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmo import sources
from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.errors import DataError
from llmo.files import publish_json, storage_errors
from llmo.jobspecs import ScratchSpec
from llmo.scratch import SCHEME, is_scratch
from llmo.specfile import validate
from llmo.tasks.card import TOKENIZER, load_tokenizer
from llmo.training import pieces, weights
from llmo.training.base import SOURCE, origin
from llmo.training.pieces import CLS, END, FILL, MASK, PAD, SEP, UNKNOWN

POSITIONS = {"transformer-tiny": 512, "lstm": 8192, "causal-tiny": 1024, "sasrec": 512}
WIDTHS = {"transformer-tiny": 128, "lstm": 256, "causal-tiny": 128, "sasrec": 64}
LAYERS = {"transformer-tiny": 2, "lstm": 1, "causal-tiny": 4, "sasrec": 2}  # the first as BERT-Tiny (Turc et al. 2019)
HEAD = 64  # of the width, where it divides
LEAST_ENTRIES = 64  # of an embedding table
LEARNING_RATE = 1e-3  # the peak, where none is written
CASED_TASKS = ("token-classification",)  # names are told by their capitals


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `ScratchSpec.plain()`, `inputs` the folder `data`; only its training rows are looked at.

    Writes a Hugging Face folder with random weights. Raises DataError for too little text and SpecError for a
    vocabulary that the text does not give.
    """
    asked = validate(dict(spec), ScratchSpec)
    data = Dataset.open(inputs["data"])
    rows = data.split("train")
    with storage_errors(out):
        ctx.report(0, 2, phase="train the tokeniser")
        config = describe(asked, str(data.info.get("task")), texts_of(rows), out)
        ctx.report(1, 2, phase="make the weights")
        parameters = _make(out, asked.seed)
    entries = load_tokenizer(out).get_vocab_size()
    source = f"{SCHEME}:{asked.architecture}"
    publish_json(out / SOURCE, {"source": source, "digest": sources.fingerprint(out / weights.FILE), **asked.plain()})
    ctx.note(f"{asked.architecture}, {parameters / 1e6:.2f}M parameters; tokeniser of {entries} entries")
    ctx.report(2, 2, phase="done")
    return {
        "source": source,
        "model_type": config["model_type"],
        "parameters": parameters,
        "weights_bytes": (out / weights.FILE).stat().st_size,
        "max_positions": POSITIONS[asked.architecture],
        "vocabulary": entries,
        "tokenizer": "trained on the training rows",
    }


def texts_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All text that rows hold: one or two of them each."""
    return [row[name] for row in rows for name in ("text", "pair") if row.get(name)]


def is_new(base: Path) -> bool:
    """Whether a base model's weights are those it was made with, which want larger steps than trained ones."""
    return is_scratch(str(origin(base).get("source", "")))


def describe(spec: ScratchSpec, task: str, texts: Sequence[str], out: Path) -> dict[str, Any]:
    """Write all of the folder but the weights; returns its config. No torch. Raises as `run`."""
    if not len(texts):
        raise DataError("there are no training rows", hint="look at what was dropped: llmo data show NAME")
    if spec.architecture == "sasrec":
        tokenizer = pieces.items(texts, spec.vocabulary)
        special = {"pad_token": PAD, "unk_token": UNKNOWN}
    elif spec.architecture == "causal-tiny":
        tokenizer = pieces.byte_bpe(texts, spec.vocabulary)
        special = {"pad_token": FILL, "eos_token": END}
    else:
        tokenizer = pieces.wordpiece(texts, spec.vocabulary, cased=task in CASED_TASKS)
        special = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
    tokenizer.save(str(out / TOKENIZER))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS[spec.architecture],
        "clean_up_tokenization_spaces": False,
        "truncation_side": "left" if spec.architecture == "sasrec" else "right",
        **special,
    }
    config = _config(spec, max(LEAST_ENTRIES, tokenizer.get_vocab_size()))
    publish_json(out / "tokenizer_config.json", settings)
    publish_json(out / "config.json", config)
    return config


def _config(spec: ScratchSpec, entries: int) -> dict[str, Any]:
    name = spec.architecture
    width, layers = spec.width or WIDTHS[name], spec.layers or LAYERS[name]
    common = {
        "vocab_size": entries,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": next(n for n in range(max(1, width // HEAD), 0, -1) if width % n == 0),
        "max_position_embeddings": POSITIONS[name],
        "pad_token_id": 0,
    }
    if name == "transformer-tiny":
        return common | {"model_type": "bert", "architectures": ["BertModel"], "intermediate_size": 4 * width}
    if name == "causal-tiny":
        return common | {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_key_value_heads": common["num_attention_heads"],
            "intermediate_size": round(width * 8 / 3 / 32) * 32,  # as much as 4 * width without a gate
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 1,
        }
    if name == "sasrec":  # as Kang & McAuley 2018: left to right, learnt positions, norms before, much dropout
        return common | {
            "model_type": "opt",
            "architectures": ["OPTModel"],
            "ffn_dim": 4 * width,
            "activation_function": "gelu",
            "dropout": 0.2,
            "attention_dropout": 0.2,
            "use_cache": False,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    del common["num_attention_heads"], common["max_position_embeddings"]
    return common | {"model_type": "llmo-lstm", "architectures": ["LstmModel"], "hidden_dropout_prob": 0.2}


def _make(folder: Path, seed: int) -> int:
    """Random weights of the folder's config, the same for a seed; returns how many."""
    import torch  # `describe` does without these
    import transformers

    from llmo.engines.torch import quiet

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        writes = any(str(name).endswith("ForCausalLM") for name in config.architectures)
        auto_class = transformers.AutoModelForCausalLM if writes else transformers.AutoModel
        model = auto_class.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        if config.model_type == "opt":
            model.get_input_embeddings().weight.data[1] = 0  # an unknown item says nothing
        model.save_pretrained(folder)
    return int(sum(p.numel() for p in model.parameters()))
