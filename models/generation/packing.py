"""Packed copies of a decoder's weights, for as long as it makes texts."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import psutil
from torch import nn

from models.blocks.mla import DownLinear
from models.blocks.mlp import SwiGLU
from models.decoder import Decoder
from models.heads import LMHead
from parallel.layers import ColumnLinear, RowLinear
from parallel.matmul import packed_weights

ROWS = 64
"""What the copies are made for; other numbers of rows are as fast or nearly."""
FEWEST_STEPS = 16
"""Making the copies takes as long as they save in about so many steps, with one row or with many."""
FREE_TIMES = 4
"""So many times what the copies take must be free."""


def packed_decoder(model: Decoder, steps: int) -> AbstractContextManager[None]:
    """The model's linear layers, experts aside, through packed copies of their weights, where that pays (see
    `parallel.matmul.packed_weights`).

    Args:
        steps: how many will be made while it lasts, at most.
    """
    # Layers with adapters do more than their weight says.
    gate_ups = [module.gate_up for module in model.modules() if isinstance(module, SwiGLU)]
    pairs = [gate_up.weight for gate_up in gate_ups if type(gate_up) is ColumnLinear]
    gated = set(pairs)
    weights = {weight: None for weight in _weights(model) if weight not in gated}
    size = sum(weight.numel() * weight.element_size() for weight in (*weights, *pairs))
    if steps < FEWEST_STEPS or size * FREE_TIMES > psutil.virtual_memory().available:
        return nullcontext()
    return packed_weights(weights, ROWS, pairs)


def _weights(model: Decoder) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, (ColumnLinear, RowLinear, DownLinear, LMHead)):
            yield module.weight
