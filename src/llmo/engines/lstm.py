"""A bidirectional LSTM as a transformers model, for labels of texts and of tokens; importing this registers it.

Transformers has none. A folder of it opens in plain transformers once this is imported: nothing in it is code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput


class LstmConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """`hidden_size` is that of both directions together, and of the embeddings."""

    model_type = "llmo-lstm"

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 1
    hidden_dropout_prob: float = 0.2
    initializer_range: float = 0.05
    pad_token_id: int | None = 0


class Bidirectional(nn.Module):
    """One layer, both ways; each text is read backwards from its own end, so that padding changes nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.forwards = nn.LSTM(width, width // 2, batch_first=True)
        self.backwards = nn.LSTM(width, width // 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[texts, tokens, width]` in and out; `mask` `[texts, tokens]` is 1 for tokens, which are on the left."""
        place = torch.arange(x.shape[1], device=x.device)[None]
        length = mask.sum(1, keepdim=True)
        mirror = torch.where(place < length, length - 1 - place, place)[..., None]
        there = self.forwards(x)[0]
        back = self.backwards(x.gather(1, mirror.expand(x.shape)))[0]
        return torch.cat([there, back.gather(1, mirror.expand(back.shape))], -1)


class _Lstm(PreTrainedModel):  # type: ignore[no-untyped-call]
    config_class = LstmConfig
    base_model_prefix = "lstm"
    _supports_sdpa = True  # there is no attention, so any will do


class LstmModel(_Lstm):  # type: ignore[no-untyped-call]
    """Embeddings and layers, with dropout before each layer and after the last."""

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.embeddings: nn.Module = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.layers = nn.ModuleList(Bidirectional(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = _whole(hidden) if attention_mask is None else attention_mask
        for layer in self.layers:
            hidden = layer(self.dropout(hidden), mask)
        return BaseModelOutput(last_hidden_state=self.dropout(hidden))


class _WithHead(_Lstm):  # type: ignore[no-untyped-call]
    """A linear layer on what `_read` takes of the tokens' states."""

    _output: ClassVar[type[SequenceClassifierOutput | TokenClassifierOutput]]

    def __init__(self, config: LstmConfig) -> None:
        super().__init__(config)
        self.lstm = LstmModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(config.id2label or {}))
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        said = self.lstm(input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds)
        hidden = said.last_hidden_state
        mask = _whole(hidden) if attention_mask is None else attention_mask
        return self._output(logits=self.classifier(self._read(hidden, mask)))

    def _read(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden


class LstmForSequenceClassification(_WithHead):  # type: ignore[no-untyped-call]
    """The largest value of each unit over the text's tokens (Conneau et al. 2017), and a linear layer on it."""

    _output = SequenceClassifierOutput

    def _read(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden.masked_fill(mask[..., None] == 0, torch.finfo(hidden.dtype).min).amax(1)


class LstmForTokenClassification(_WithHead):  # type: ignore[no-untyped-call]
    """A linear layer on each token."""

    _output = TokenClassifierOutput


def _whole(hidden: Tensor) -> Tensor:
    """The mask of texts without padding."""
    return hidden.new_ones(hidden.shape[:2], dtype=torch.int64)


AutoConfig.register(LstmConfig.model_type, LstmConfig)
AutoModel.register(LstmConfig, LstmModel)
AutoModelForSequenceClassification.register(LstmConfig, LstmForSequenceClassification)
AutoModelForTokenClassification.register(LstmConfig, LstmForTokenClassification)
