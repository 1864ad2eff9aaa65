"""What the pools run to test that a trained model can be its own start for a while."""

from __future__ import annotations

from typing import Any

from models import ModelConfig
from models.adapters.config import AdapterConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import ALL_DATA
from parallel.start import Start
from tests.adapter_cases import LR, source_of
from tests.cases import NAMES, here, my_parts, whole
from trainer import channels
from trainer.build import make_engine
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken


def there_and_back(
    cfg: ModelConfig, adapter: AdapterConfig, *, zero: Any = 1, layout: ParallelConfig = ALL_DATA
) -> dict[str, Any]:
    """Losses of a batch: before training, when trained, with the start back, after that; and of two further steps, with
    looks at the start in between or not."""
    groups, out = here(layout), {}
    optim = OptimConfig(lr=LR, clip=0.0, weight_decay=0.0)
    for looks in (True, False):
        source = source_of(cfg, adapter)
        engine = make_engine(cfg, EngineConfig(zero=zero), optim, groups, source, layout, adapter=adapter, seed=5)
        stage, losses = NextToken(len(NAMES)), []
        start = Start(engine, source)

        def loss_of(terms: list[Any]) -> float:
            return channels.metrics(terms, NAMES, groups.all_gather, "train")["train/loss"]

        def asked() -> float:
            return loss_of(engine.evaluate(batches(9), stage.forward))  # noqa: B023  of this turn

        def batches(step: int) -> list[Any]:
            return my_parts(step, groups, layout, 4)

        if looks:
            out["fresh"] = asked()
        for step in range(4):
            if looks and step >= 2:
                out["trained"] = asked()
                with start.back():
                    out[f"back_{step}"] = asked()
                out["again"] = asked()
                assert out["again"] == out["trained"], "it came back as another model"
            (count,) = groups.sum([stage.count(batches(step))])
            losses.append(loss_of(engine.train_step(batches(step), stage.forward, count, LR).metrics))
        out["looked" if looks else "plain"] = losses
        out["looked_weights" if looks else "plain_weights"] = whole(engine, groups, "master")
    return out
