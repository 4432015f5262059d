"""Conversations end to end on a GPU, in rows of few sizes: torch's fused attention keeps each to itself.

Everything is where its shape says, so that a step of a size can be recorded (`recorded`): tokens, sequences and learnt
tokens are filled up to the next size, and what fills them is a sequence of its own with the weight 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from llmo.training import packing
from llmo.training.batches import IGNORED, few

ATTENTION = "llmo-varlen"
UNFIT = ("sliding_window", *packing.DROPOUTS)  # of a config
SMALLEST = 64  # tokens of a row
PROBES, CLOSE = 4, 0.02  # tokens of a sequence that proves, and how far apart two norms in bf16 may be


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where each sequence of a row begins and the last one ends, `[sequences + 1]` int32 on the device; none is longer
    than `longest` tokens."""

    starts: torch.Tensor
    longest: int


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    bounds: Bounds | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """As `packing.attention`, of one row with `bounds`."""
    if bounds is None:
        return packing.attention(module, query, key, value, attention_mask, scaling, dropout, **asked)
    packing.refuse(asked, dropout, bounds.longest)
    dtype = value.dtype  # under autocast rotated queries and keys are fp32; the kernel would round them anyway
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    said = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds.starts, bounds.starts, bounds.longest, bounds.longest, 0.0, True, False, scale=scaling
    )[0]
    return said[None], None


def rows(
    ids: Sequence[NDArray[np.int32]], targets: Sequence[NDArray[np.int64]], pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A row of sequences: `input_ids` and `position_ids` `[1, tokens]`, `starts` `[sequences + 2]`, `longest` (whose
    length is the number: no sequence has more tokens), `places` `[learnt]` of the states before the learnt tokens, and
    as targets those tokens `[learnt]`; -100 fills them up."""
    lengths = [len(one) for one in ids]
    before = np.concatenate([[0], np.cumsum(lengths)])
    total = few(max(SMALLEST, int(before[-1])))
    learnt = [np.flatnonzero(one[1:] != IGNORED) for one in targets]
    count = few(max(SMALLEST, sum(map(len, learnt))))
    tokens, positions = np.full(total, pad_id, np.int64), np.zeros(total, np.int64)
    tokens[: before[-1]] = np.concatenate(ids)
    positions[: before[-1]] = np.concatenate([np.arange(length) for length in lengths])
    places, wanted = np.zeros(count, np.int64), np.full(count, IGNORED, np.int64)
    there = sum(map(len, learnt))
    places[:there] = np.concatenate([first + one for first, one in zip(before, learnt, strict=False)])
    wanted[:there] = np.concatenate([one[1:][which] for one, which in zip(targets, learnt, strict=True)])
    longest = 1 << (max(*lengths, total - int(before[-1])) - 1).bit_length()
    found = {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "starts": np.append(before, total).astype(np.int32),
        "longest": np.empty((longest, 0), np.int8),
        "places": places,
    }
    return {name: torch.from_numpy(x) for name, x in found.items()}, torch.from_numpy(wanted)


def states(trunk: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What stands before each learnt token, `[learnt, width]`, of what `rows` gives."""
    unused = inputs["input_ids"].new_ones((1, 1, 1, 1))  # a mask of four dimensions is left alone
    given = {name: inputs[name] for name in ("input_ids", "position_ids")}
    bounds = Bounds(inputs["starts"], len(inputs["longest"]))
    found = trunk(**given, attention_mask=unused, bounds=bounds, use_cache=False).last_hidden_state[0]
    chosen: torch.Tensor = found.index_select(0, inputs["places"])
    return chosen


@torch.no_grad()
def refusal(network: Any, vocabulary: int) -> str | None:
    """Why a causal model on a GPU cannot run rows of sequences under bf16; None, with its attention set to the one that
    does, where unlike sequences in one row are proved to say what each says alone."""
    config = network.config.get_text_config()
    device = next(network.parameters()).device
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the fused attention needs a GPU of compute capability 8.0 or newer"
    for name in UNFIT:
        if getattr(config, name, None):
            return f"the fused attention does nothing for the architecture's {name}"
    drawn = [np.arange(n * PROBES, n * PROBES + PROBES + n, dtype=np.int32) % vocabulary for n in (3, 1, 2)]
    inputs, _ = rows(drawn, [one.astype(np.int64) for one in drawn], 0)
    there = {name: x.to(device) for name, x in inputs.items()}
    was, training = network.config._attn_implementation, network.training
    network.eval()
    try:
        with torch.autocast(device.type, torch.bfloat16):
            alone = [network.base_model(input_ids=ids[None]).last_hidden_state for ids in _on(drawn, device)]
            expected = torch.cat([one[0, :-1] for one in alone]).float()
            network.set_attn_implementation(ATTENTION)
            found = states(network.base_model, there)[: len(expected)].float()
        if (found - expected).norm() < CLOSE * expected.norm():
            return None
    except packing.FOREIGN:
        pass  # it hands its attention no bounds, or wants something of it that is not done here
    finally:
        network.train(training)
    network.set_attn_implementation(was)
    return f"the architecture '{config.model_type}' is not proved to take rows of sequences"


def _on(drawn: Sequence[NDArray[np.int32]], device: torch.device) -> list[torch.Tensor]:
    return [torch.from_numpy(one.astype(np.int64)).to(device) for one in drawn]


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
