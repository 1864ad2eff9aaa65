"""A reference that is the trained model itself: without its adapter, or with the adapter that the run started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallel.engine import Engine, Forward
from parallel.frozen import Frozen
from parallel.groups import Groups
from parallel.start import Start
from trainer.adapters import start_of, weights
from trainer.build import WithoutAdapter, fresh_weights, make_frozen
from trainer.config import RunConfig


@dataclass(frozen=True)
class WithStartedAdapter:
    """The model with the adapter it started from, whatever it learnt since. Scores as ``Frozen`` does."""

    engine: Engine
    start: Start

    def score(self, micro_batches: Sequence[Any], forward: Forward) -> list[Any]:
        """As ``Engine.score``."""
        with self.start.back():
            return self.engine.score(micro_batches, forward)


def itself(cfg: RunConfig, engine: Engine) -> WithoutAdapter | WithStartedAdapter | None:
    """The start of the run out of the model that is trained, also after a resume; None where that needs a copy."""
    if cfg.adapter is None or not cfg.adapter.can_be_off:
        return None
    if start_of(cfg) is None:
        return WithoutAdapter(engine)
    return WithStartedAdapter(engine, Start(engine, weights(cfg, fresh_weights(cfg), None)))


def frozen_start(cfg: RunConfig, groups: Groups, offload: bool) -> Frozen:
    """The start of the run as a model of its own."""
    begun = cfg.adapter if start_of(cfg) is not None else None
    base = fresh_weights(cfg)
    source = base if begun is None else weights(cfg, base, None)
    return make_frozen(cfg.model, cfg.engine, groups, source, cfg.parallel, cfg.data.seq_len, offload, begun)


def start_in_words(cfg: RunConfig) -> str:
    """What the run starts from, as the reference."""
    started = start_of(cfg)
    if started is not None:
        return f"what the run starts from, the model with the adapter in {started}"
    if cfg.adapter is not None and cfg.adapter.can_be_off:
        return "the model without its adapter"
    return f"what the run starts from, {cfg.init_from}" if cfg.init_from else "the run's own fresh weights"
