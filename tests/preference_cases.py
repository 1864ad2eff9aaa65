"""What the pools run of preference stages: a tiny model trained on made-up pairs or judged answers in a layout, with
everything that must not depend on the layout."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.batch import Document, MicroBatch, Row, collate, empty_micro_batch, split_ragged, split_rows
from data.mismatched import mismatched
from models import ModelConfig
from models.init import InitSource
from models.routing import RouterBook
from parallel.config import EngineConfig, ParallelConfig
from parallel.engine import Engine
from parallel.frozen import Frozen
from parallel.groups import ALL_DATA, Groups
from tests.cases import NAMES, TINY, here, run_config, whole
from trainer import channels
from trainer.build import make_engine, make_frozen
from trainer.context import local_part
from trainer.optim import OptimConfig
from trainer.preparation import Preparation
from trainer.stages import build_stage
from trainer.stages.dpo import DpoConfig
from trainer.stages.reward import RewardConfig

ROWS, SEQ_LEN = 8, 64
STAGES: dict[str, Any] = {
    "reward": RewardConfig(margin=0.25, label_smoothing=0.1, centring=0.05),
    "dpo": DpoConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.2),
    "reward_shared": RewardConfig(margin=0.25, label_smoothing=0.1, centring=0.05, share_prompt=True),
    "dpo_shared": DpoConfig(beta=0.3, label_smoothing=0.1, sft_weight=0.2, share_prompt=True),
    "ipo": DpoConfig(loss="ipo", beta=0.3),
    "simpo": DpoConfig(loss="simpo", beta=2.0, gamma=0.5),
    "orpo": DpoConfig(loss="orpo", beta=0.3),
    "kto": DpoConfig(loss="kto", beta=0.3, desirable_weight=1.2, sft_weight=0.1),
}


def samples(step: int, unpaired: bool, vocab: int) -> list[list[list[Document]]]:
    """Eight rows of one or two samples each: pairs with a common prompt and uneven answers, or judged answers."""
    random = np.random.default_rng([13, step])
    rows = []
    for index in range(ROWS):
        row = []
        for _ in range(1 + (index + step) % 2):
            channel = 2 if index == step % ROWS else int(step > 1 and index % 3 == 0)
            prompt = random.integers(0, vocab, size=random.integers(1, 8))
            sides = []
            for side in range(1 if unpaired else 2):
                answer = random.integers(0, vocab, size=random.integers(1, 25))
                learn_L = np.r_[np.zeros(len(prompt), dtype=bool), np.ones(len(answer), dtype=bool)]
                facts = {"side": float(side), "margin": float(index % 3) / 2}
                label = {"label": float(random.random() < 0.6)}
                sides.append(Document(np.r_[prompt, answer], learn_L, channel, label if unpaired else facts))
            row.append(sides)
        rows.append(row)
    return rows


def in_one(rows: Sequence[list[list[Document]]]) -> list[Document]:
    """The documents of a micro-batch; pairs are numbered in it."""
    found = []
    for number, sample in enumerate(sample for row in rows for sample in row):
        for doc in sample:
            facts = {**doc.facts, "pair": float(number)} if "side" in doc.facts else doc.facts
            found.append(dataclasses.replace(doc, facts=facts))
    return found


def light_rows(rows: Sequence[list[list[Document]]]) -> list[Row]:
    """The rows as the dealer sees them."""
    return [Row((i,), tuple(len(doc.tokens_L) for sample in row for doc in sample)) for i, row in enumerate(rows)]


def train_preferences(
    stage_cfg: Any,
    zero: Any = 1,
    micro_rows: int = 1,
    steps: int = 4,
    *,
    layout: ParallelConfig = ALL_DATA,
    model: ModelConfig = TINY,
    recompute: Any = "none",
) -> dict[str, Any]:
    """Train; losses, norms, per-channel numbers, first-step gradients, final weights, metrics of held-out rows."""
    groups = here(layout)
    reward = isinstance(stage_cfg, RewardConfig)
    cfg = dataclasses.replace(model, head="scalar" if reward else "lm")
    optim, engine_cfg = OptimConfig(lr=3e-3, clip=1.0, eps=1e-3), EngineConfig(zero=zero, recompute=recompute)
    engine = make_engine(cfg, engine_cfg, optim, groups, InitSource(cfg, seed=3), layout)
    stage = build_stage(stage_cfg, len(NAMES), groups.cp)
    unpaired = stage_cfg.learns_from == "unpaired"
    share = "pair" if stage_cfg.share_prompt else None
    rows: list[Any] = []

    def local(batch: MicroBatch) -> MicroBatch:
        return local_part(batch, groups.cp, layout.context)

    def others(_: Any) -> list[MicroBatch]:
        found = mismatched([doc for row in rows for sample in row for doc in sample], SEQ_LEN)
        light = [Row((i,), (len(doc.tokens_L),)) for i, doc in enumerate(found)]
        mine = split_ragged(light, groups.dp.rank, groups.dp.size, 2)
        return [
            local(collate([found[i] for row in part for i in row.pieces]) if part else empty_micro_batch())
            for part in mine
        ]

    prepare: Any = lambda batches, _: batches  # noqa: E731
    if not reward:
        reference = None
        if stage_cfg.needs_reference:
            # other weights than the policy's, or the first step would not show them
            reference = make_frozen(cfg, engine_cfg, groups, InitSource(cfg, seed=8), layout)
        prepare = Preparation(stage, groups, engine, reference, others)  # pyright: ignore[reportArgumentType]
    routers = RouterBook(engine.chunks, len(NAMES))
    out: dict[str, Any] = {"metrics": [], "norm": []}
    for step in range(steps):
        rows = samples(step, unpaired, cfg.vocab_size)
        mine = split_rows(light_rows(rows), groups.dp.rank, groups.dp.size, micro_rows)
        batches = [local(collate(in_one([rows[row.pieces[0]] for row in part]), share)) for part in mine]
        count, tokens = groups.sum([stage.count(batches), float(sum(len(batch.tokens_T) for batch in batches))])
        batches = prepare(batches, [])
        routers.begin(groups.data.size / tokens)
        result = engine.train_step(batches, stage.forward, count, optim.lr_at(step, 100))
        routers.finish(groups.sum_tensor)
        out["metrics"].append(channels.metrics(result.metrics, NAMES, groups.all_gather, "train", stage.columns))
        out["norm"].append(result.grad_norm)
        if step == 0:
            moments = whole(engine, groups, "exp_avg")
            out["grads"] = {n: m / (1 - optim.betas[0]) for n, m in moments.items()}
    out["weights"] = whole(engine, groups, "master")
    out["losses"] = [m["train/loss"] for m in out["metrics"]]
    out["metrics"].append(_held_out(stage, engine, groups, prepare, unpaired, local, cfg.vocab_size))
    return out


def _held_out(
    stage: Any, engine: Any, groups: Groups, prepare: Any, unpaired: bool, local: Any, vocab: int
) -> dict[str, float]:
    """Metrics of three rows that nothing was learnt from: some ranks have none of them and fill up."""
    rows = samples(99, unpaired, vocab)[:3]
    mine = split_ragged(light_rows(rows), groups.dp.rank, groups.dp.size, 1)
    names = ("label",) if unpaired else ("side", "pair", "margin")
    batches = [
        local(collate(in_one([rows[row.pieces[0]] for row in part])) if part else empty_micro_batch(names))
        for part in mine
    ]
    terms = engine.evaluate(prepare(batches, None), stage.forward)
    return channels.metrics(terms, NAMES, groups.all_gather, "eval", stage.columns)


def count_frozen(words: list[str]) -> tuple[int, int]:
    """A run, and how many frozen models it made, and had when it took its first step."""
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    real, step = Frozen.__init__, Engine.train_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(weakref.ref(self))
        real(self, *args, **kwargs)

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(ref() is not None for ref in made))
        return step(self, *args, **kwargs)

    Frozen.__init__, Engine.train_step = counted, first
    try:
        run_config(words)
    finally:
        Frozen.__init__, Engine.train_step = real, step
    return len(made), alive[0]
