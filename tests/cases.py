"""What the pools run: a tiny model trained in a given layout, with everything that must not depend on the layout."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from data.batch import Document, MicroBatch, Row, collate, split_rows
from data.pictures.positions import rotary_positions
from data.pictures.types import Pictures
from models import ModelConfig
from models.init import InitSource
from models.parts import ALL, PartsConfig
from models.routing import RouterBook, RouterReport
from parallel.config import EngineConfig, ParallelConfig
from parallel.engine import Engine
from parallel.groups import ALL_DATA, Groups, LauncherRanks, build_groups
from parallel.sharding import Cut, Shard
from trainer import channels, checkpoint
from trainer.build import make_engine
from trainer.context import local_part
from trainer.optim import OptimConfig
from trainer.stages.next_token import NextToken

NAMES = ("even", "late", "rare")
TINY = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=128,
)


@functools.cache
def here(layout: ParallelConfig = ALL_DATA) -> Groups:
    """The groups of the pool this process belongs to."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    return build_groups(LauncherRanks(rank, size, rank), 300, layout)


@dataclass(frozen=True)
class Rows:
    """What the rows of a step are like."""

    packed: bool = True
    """Up to three documents a row; else one."""
    alike: bool = False
    """There are two different tokens only, so that a router sends them to the same few experts."""
    pretrain: bool = False
    """Every token is learnt; else from one to all of a document's."""
    pictures: Literal["tiles", "queries", "native", "gated", "turned"] | None = None
    """Some documents show some: 2 x 2 patches of 4 pixels that give 4 features, or 3, or blocks of frames of any size
    that give one each; gated: 4, for which one token stands. Most have none, some many; every fourth step has none at
    all. turned: pictures and videos of a model that turns by time, row and column."""


UNEVEN = Rows()


def uneven_rows(step: int, count: int = 8, kind: Rows = UNEVEN) -> list[list[Document]]:
    """``count`` rows of very uneven lengths and supervised tokens (1 to all), channels missing from most rows."""
    random = np.random.default_rng([7, step])
    rows = []
    for index in range(count):
        lengths = random.integers(2, 40, size=random.integers(1, 4))
        channel = 2 if index == step % count else (1 if step > 1 and index % 3 == 0 else 0)
        row = []
        for length in lengths:
            learn = np.zeros(length, dtype=bool)
            learn[1 if kind.pretrain or index % 2 == 0 else -1 :] = True
            tokens = random.integers(0, TINY.vocab_size, size=length)
            tokens = tokens % 2 if kind.alike else tokens
            document = Document(tokens, learn, channel)
            if kind.pictures == "turned":
                row.append(_turned(random, document) if step % 4 < 3 else document)
                continue
            shown, features = _pictures(random, int(length), kind.pictures if step % 4 < 3 else None)
            row.append(replace(document, pictures=shown, features=features))
        rows.append(row if kind.packed else row[:1])
    return rows


def _pictures(
    random: np.random.Generator, length: int, kind: Literal["tiles", "queries", "native", "gated"] | None
) -> tuple[Pictures | None, int]:
    """None to many pictures for a document of so many tokens, and how many features they have."""
    if kind is None or random.random() < 0.6:
        return None, 0
    grids: list[tuple[int, int]] = []
    each = {"tiles": 4, "queries": 3, "native": 1, "gated": 4}[kind]
    for _ in range(random.choice([1, 2, 6])):
        grids.append((2, int(random.choice([2, 4, 6]))) if kind == "native" else (2, 2))
    counts = [each if kind != "native" else columns // 2 for _, columns in grids]
    while sum(counts) > length - 1:
        counts, grids = counts[:-1], grids[:-1]
    if not grids:
        return None, 0
    features, patches = sum(counts), sum(rows * columns for rows, columns in grids)
    patches_PX = random.standard_normal((patches, 3 * (2 if kind == "native" else 1) * 16)).astype(np.float32)
    slots = np.sort(random.choice(length, len(grids) if kind == "gated" else features, replace=False))
    slots = slots.repeat(each) if kind == "gated" else slots
    shown = Pictures(torch.from_numpy(patches_PX), tuple(grids), torch.from_numpy(slots), torch.arange(features))
    return shown, features


def _turned(random: np.random.Generator, document: Document) -> Document:
    """The document with one or two pictures or videos among its tokens, some longer in time than they are wide."""
    length, at, grids = len(document.tokens_L), 0, []
    shapes: list[tuple[int, tuple[int, int, int]]] = []
    for _ in range(random.choice([0, 1, 2])):
        shape = (int(random.choice([1, 3])), int(random.choice([1, 2])), int(random.choice([1, 2, 3])))
        at += int(random.integers(0, 4))
        if at + int(np.prod(shape)) > length:
            break
        shapes.append((at, shape))
        grids += [(2 * shape[1], 2 * shape[2])] * shape[0]
        at += int(np.prod(shape))
    rotary_3L = rotary_positions(length, shapes, [1 + float(random.integers(0, 5)) / 2 for _ in shapes])
    document = replace(document, rotary_3L=rotary_3L)
    if not shapes:
        return document
    slots = np.concatenate([start + np.arange(np.prod(shape)) for start, shape in shapes])
    patches_PX = random.standard_normal((4 * len(slots), 3 * 2 * 16)).astype(np.float32)
    shown = Pictures(torch.from_numpy(patches_PX), tuple(grids), torch.from_numpy(slots), torch.arange(len(slots)))
    return replace(document, pictures=shown, features=len(slots))


class OpenGates(InitSource):
    """Fresh weights; gates, which begin at 0, are not closed."""

    def tensor(self, name: str) -> torch.Tensor:
        return super().tensor(name) + (0.5 if name.endswith("_gate") else 0.0)


def my_micro_batches(step: int, groups: Groups, micro_rows: int, kind: Rows = UNEVEN) -> list[MicroBatch]:
    """This rank's micro-batches of the step's eight rows, cut by the product's own rule."""
    rows = uneven_rows(step, kind=kind)
    light = [Row((i,), tuple(len(doc.tokens_L) for doc in row)) for i, row in enumerate(rows)]
    mine = split_rows(light, groups.dp.rank, groups.dp.size, micro_rows)
    return [collate([doc for row in part for doc in rows[row.pieces[0]]]) for part in mine]


def my_parts(
    step: int, groups: Groups, layout: ParallelConfig, micro_rows: int, kind: Rows = UNEVEN
) -> list[MicroBatch]:
    """The micro-batches, of each this rank's tokens."""
    batches = my_micro_batches(step, groups, micro_rows, kind)
    return [local_part(batch, groups.cp, layout.context) for batch in batches] if groups.cp.size > 1 else batches


def whole(engine: Engine, groups: Groups, kind: str) -> dict[str, torch.Tensor]:
    """Every parameter's flat ``master`` or optimizer state, joined from all ranks' fragments."""
    mine = []
    for f in engine.fragments():
        view = f.master if kind == "master" else f.states.get(kind)
        if view is not None:
            mine.append((f.name, f.cut, f.start, view.detach().clone(), f.shard, f.whole))
    found: dict[str, dict[Cut, list[tuple[int, torch.Tensor]]]] = {}
    records: dict[str, tuple[Shard, tuple[int, ...]]] = {}
    for part in groups.all_gather(mine):
        for name, cut, start, tensor, shard, shape in part:
            found.setdefault(name, {}).setdefault(cut, []).append((start, tensor))
            records[name] = shard, shape
    joined: dict[str, torch.Tensor] = {}
    for name, by_cut in found.items():
        shard, shape = records[name]
        parts = {}
        for cut, pieces in by_cut.items():
            flat = torch.cat([tensor for _, tensor in sorted(pieces, key=lambda piece: piece[0])])
            parts[cut] = flat.view(shard.local_shape(shape, cut))
        cut = next(iter(parts))
        assert set(parts) == set(shard.cuts(cut.tp, cut.ep)), name
        joined[name] = shard.merge(parts).flatten()
    return dict(sorted(joined.items()))


def train(
    zero: Any,
    micro_rows: int,
    steps: int = 4,
    *,
    precision: Any = "fp32",
    recompute: Any = "none",
    offload: bool = False,
    clip: float = 1.0,
    tied: bool = False,
    first: int = 0,
    save_to: str | None = None,
    resume_from: str | None = None,
    layout: ParallelConfig = ALL_DATA,
    model: ModelConfig | None = None,
    rows: Rows = UNEVEN,
    eps: float = 1e-4,
    lr: float = 1e-2,
    parts: PartsConfig = ALL,
) -> dict[str, Any]:
    """Train the tiny model; losses, norms, per-channel numbers, first-step gradients and final weights."""
    groups = here(layout)
    cfg = model or dataclasses.replace(TINY, tied_embeddings=tied)
    # A large eps keeps Adam from blowing rounding noise of vanishing gradients up to a whole step.
    optim = OptimConfig(lr=lr, clip=clip, eps=eps, parts=parts)
    engine_cfg = EngineConfig(zero=zero, precision=precision, recompute=recompute, offload_optimizer=offload)
    saved = checkpoint.Checkpoint(Path(resume_from)) if resume_from else None
    engine = make_engine(cfg, engine_cfg, optim, groups, saved or OpenGates(cfg, seed=3), layout)
    if saved:
        checkpoint.restore(saved, engine, groups)
    stage = NextToken(len(NAMES))
    routers = RouterBook(engine.chunks, len(NAMES))
    if saved:
        routers.restore(*saved.state["routers"])
    out: dict[str, Any] = {"metrics": [], "norm": [], "loads": []}
    for step in range(first, first + steps):
        batches = my_parts(step, groups, layout, micro_rows, rows)
        count, tokens = groups.sum([stage.count(batches), float(sum(len(batch.tokens_T) for batch in batches))])
        routers.begin(groups.data.size * engine.loss_scale.value / tokens)
        result = engine.train_step(batches, stage.forward, count, optim.lr_at(step, 100))
        loads = routers.finish(groups.sum_tensor)
        out["loads"].append(RouterReport.joined(groups.gather_stages(loads)).metrics(NAMES))
        out["metrics"].append(channels.metrics(result.metrics, NAMES, groups.all_gather, "train"))
        out["norm"].append(result.grad_norm)
        if step == first:
            # AdamW's first moment after one step is (1 - beta1) times the gradient.
            moments = whole(engine, groups, "exp_avg")
            out["grads"] = {n: m / (1 - optim.betas[0]) for n, m in moments.items()}
    if save_to:
        state = {"position": 8 * (first + steps), "world": groups.world, "model": {}, "data": ""}
        state["routers"] = groups.gather_stages(routers.state())
        out["saved"] = str(checkpoint.save(Path(save_to), first + steps, engine, state, groups, keep_last=2))
    out["weights"] = whole(engine, groups, "master")
    out["losses"] = [m["train/loss"] for m in out["metrics"]]
    return out


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference between two sets of tensors, relative to the largest value of the tensor; of gates, single
    numbers whose gradients are thousands of terms that cancel, to that of all gates."""
    assert a.keys() == b.keys()
    largest = {name: float(tensor.detach().abs().max()) for name, tensor in a.items()}
    gates = max((value for name, value in largest.items() if name.endswith("_gate")), default=0.0)
    scale = {name: gates if name.endswith("_gate") else value for name, value in largest.items()}
    return max(float((a[n] - b[n]).detach().abs().max()) / max(scale[n], 1e-12) for n in a)


def relative(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference of two series."""
    return max(abs(x - y) / max(abs(x), 1e-12) for x, y in zip(a, b, strict=True))


def accumulate_equal(zero: Any, times: int, layout: ParallelConfig = ALL_DATA) -> float:
    """Distance between the bf16 gradient of one micro-batch and of the same one accumulated ``times`` times."""
    groups = here(layout)
    optim = OptimConfig(lr=0.0, clip=0.0)

    def gradient(repeats: int) -> dict[str, torch.Tensor]:
        source, low = InitSource(TINY, seed=3), EngineConfig(zero=zero, precision="bf16")
        engine = make_engine(TINY, low, optim, groups, source, layout)
        stage = NextToken(len(NAMES))
        batch = my_micro_batches(0, groups, 8)[0]
        engine.train_step([batch] * repeats, stage.forward, repeats * stage.count([batch]), 0.0)
        return whole(engine, groups, "exp_avg")

    return distance(gradient(groups.pp.size), gradient(times))


def run_config(words: list[str]) -> None:
    """``train.py`` with these command-line words, inside this process of the pool."""
    from hydra import compose, initialize_config_dir

    from trainer.door import load
    from trainer.run import run

    conf = Path(__file__).resolve().parents[1] / "conf"
    groups = here()
    with initialize_config_dir(str(conf), version_base="1.3"):
        cfg = compose("config", overrides=words)
    run(load(cfg, groups.world), LauncherRanks(groups.rank, groups.world, groups.rank))


def checkpoint_logits(run: str, ids_T: torch.Tensor) -> torch.Tensor:
    """fp32 logits [T, V] of our own model with the weights of a run's latest checkpoint."""
    from models import build
    from parallel.materialise import materialise
    from parallel.sharding import WHOLE
    from trainer import typed

    folder = checkpoint.find_latest(Path(run) / "checkpoints")
    assert folder is not None
    saved = checkpoint.Checkpoint(folder)
    cfg = typed.build(ModelConfig, saved.state["model"], "model", [], {})
    assert cfg is not None
    model = build(cfg)
    materialise(model, saved, WHOLE, torch.device("cpu"))
    with torch.no_grad():
        return model(ids_T, torch.arange(len(ids_T)), [0, len(ids_T)], output="head")
