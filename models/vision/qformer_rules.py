"""Where the weights of a Q-Former lie in a Hugging Face checkpoint, before whatever tower: under BLIP-2's names."""

from __future__ import annotations

from collections.abc import Iterator

from models.rules import Concat, Rename, Rule
from models.vision.config import QFormerConfig


def both(ours: str, hf: str) -> Iterator[Rule]:
    """Weight and bias under another name."""
    for kind in ("weight", "bias"):
        yield Rename(f"{ours}.{kind}", f"{hf}.{kind}")


def qformer_rules(cfg: QFormerConfig) -> Iterator[Rule]:
    """Every tensor of a Q-Former, but for the layer to a decoder and what reads texts."""
    yield Rename("connector.body.queries", "query_tokens")
    yield from both("connector.body.norm", "qformer.layernorm")
    for i in range(cfg.num_layers):
        own, theirs = f"connector.body.layers.{i}.", f"qformer.encoder.layer.{i}."
        reads = {"cross": "crossattention"} if i % cfg.cross_every == 0 else {}
        for ours, hf in ({"attn": "attention"} | reads).items():
            inner = f"{theirs}{hf}.attention."
            yield from both(f"{own}{ours}.q", f"{inner}query")
            for kind in ("weight", "bias"):
                yield Concat(f"{own}{ours}.kv.{kind}", (f"{inner}key.{kind}", f"{inner}value.{kind}"),
                             (cfg.hidden_size,) * 2)  # fmt: skip
            yield from both(f"{own}{ours}.out", f"{theirs}{hf}.output.dense")
            yield from both(f"{own}{ours}_norm", f"{theirs}{hf}.output.LayerNorm")
        yield from both(f"{own}mlp.up", f"{theirs}intermediate_query.dense")
        yield from both(f"{own}mlp.down", f"{theirs}output_query.dense")
        yield from both(f"{own}mlp_norm", f"{theirs}output_query.LayerNorm")
