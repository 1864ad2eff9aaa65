"""The tensors of each rank's file, with the rows of Hugging Face tensors they hold."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from convert.boxes import Box, boxes
from convert.megatron.layout import Layout, Rank
from convert.megatron.names import Whole, wholes
from models.config import ModelConfig
from parallel.sharding import Cut


@dataclass(frozen=True)
class Local:
    """One tensor in one rank's file."""

    rank: Rank
    chunk: int
    """Which of the rank's chunks it belongs to: `model{chunk}` in the file where there are several, else `model`."""
    name: str
    """Megatron's name, layers and experts counted from the first one here."""
    whole: Whole
    cut: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.whole.shard.local_shape(self.whole.shape, self.cut)

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """The Hugging Face rows it holds; rows in none of them are padding (zeros)."""
        return tuple(boxes(self.whole.segments, self.whole.shape, self.whole.shard, self.cut))


def locals_of(cfg: ModelConfig, layout: Layout) -> Iterator[Local]:
    """Every tensor of every rank's file, tensor after tensor in the model's order."""
    chunk_of = layout.chunk_of(cfg.num_layers)
    for whole in wholes(cfg, layout):
        if whole.copy and layout.chunks == 1:
            continue
        if whole.layer is not None:
            chunk, layer = chunk_of[whole.layer]
        else:
            chunk, layer = (0 if whole.end == "first" else layout.chunks - 1), 0
        pp, of_rank = layout.rank_of(chunk)
        each = cfg.moe.num_experts // layout.ep if cfg.moe else 1
        expert = whole.expert
        owners = range(layout.ep) if expert is None else (expert // each,)
        name = whole.name.format(layer=layer, expert=(expert or 0) % each)
        for ep in owners:
            for tp in range(layout.tp):
                yield Local(Rank(tp, pp, ep), of_rank, name, whole, Cut(layout.tp, tp))
