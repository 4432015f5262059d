"""How much an encoder computes: the multiply-adds of its matrix products, told by its config and its texts' lengths.

What a run truly does may be more (padding) or less (a graph that leaves out a last layer's unused tokens): this is the
work of the model as it is defined, so that speeds of engines, precisions and machines share one scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmo.errors import ModelError

_NAMES = {"hidden_size": ("dim",), "num_hidden_layers": ("n_layers",), "intermediate_size": ("hidden_dim",)}
_GATED = ("modernbert", "nomic_bert", "gte")  # whose feed-forward has a third matrix, of the gate
_RELATIVE = ("deberta", "deberta-v2")  # attention to positions beside that to tokens


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of one text of n tokens: `token` * n + `pair` * n^2 + `text`."""

    token: int
    pair: int
    text: int

    def of(self, lengths: Iterable[int]) -> int:
        """Of several texts, each run at its own length. One multiply-add is two operations."""
        return sum(self.token * n + self.pair * n * n + self.text for n in lengths)


def nominal_work(config: Mapping[str, Any]) -> Work:
    """The work of the encoder that a `config.json` describes, with the head that its `architectures` names.

    A layer of width h and feed-forward width i multiplies four matrices of h x h (queries, keys, values, output) and
    two of h x i (three, where it is gated) with each token, and compares and mixes each pair of tokens at h each.
    Embeddings are looked up and cost nothing. Raises ModelError for a config without these sizes, or of a family whose
    attention has further products.
    """
    kind = str(config.get("model_type", ""))
    if kind in _RELATIVE:
        raise ModelError(
            f"the attention of '{kind}' has products whose number is not known",
            where="config.json",
            hint="its share of the machine's peak cannot be told",
        )
    hidden, layers, inner = (_size(config, name) for name in _NAMES)
    matrices = 4 * hidden * hidden + (3 if kind in _GATED else 2) * hidden * inner
    narrow = int(config.get("embedding_size") or hidden)  # ELECTRA and ALBERT look up narrow vectors and widen them
    token = layers * matrices + (narrow * hidden if narrow != hidden else 0)
    more, text = _head(config, hidden)
    return Work(token + more, 2 * layers * hidden, text)


def _head(config: Mapping[str, Any], hidden: int) -> tuple[int, int]:
    """Multiply-adds of the head for each token, and for each text."""
    labels = len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)
    architecture = str((config.get("architectures") or [""])[0])
    if architecture.endswith("ForSequenceClassification"):
        return 0, hidden * hidden + hidden * labels  # a dense layer over the first token, then the labels
    if architecture.endswith("ForTokenClassification"):
        return hidden * labels, 0
    if architecture.endswith("ForQuestionAnswering"):
        return 2 * hidden, 0
    if architecture.endswith("ForMaskedLM"):
        return hidden * hidden + hidden * _size(config, "vocab_size"), 0
    return 0, 0


def _size(config: Mapping[str, Any], name: str) -> int:
    for known in (name, *_NAMES.get(name, ())):
        value = config.get(known)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    raise ModelError(
        f"there is no '{name}'", where="config.json", hint="its share of the machine's peak cannot be told"
    )
