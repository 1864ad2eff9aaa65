"""Runs that train parts of a model: the same gradients as when all is trained, small checkpoints, one whole model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.from_hf import whole_shapes
from convert.loom_files import Checkpoint, find_checkpoint
from convert.opening import open_weights
from convert.source import Source
from convert.to_hf import export
from models.init import InitSource
from models.parts import LayeredPartConfig, PartConfig, PartsConfig
from scripts.export_hf import export_run
from scripts.params import load_model
from tests import cases
from tests.integration.matrix.rows import model_of

SEES = PartsConfig(LayeredPartConfig(True, 0.5, 1), PartConfig(True, 2.0), LayeredPartConfig(last_layers=1))
LAST = ["optim.parts.decoder.last_layers=1", "optim.parts.decoder.lr_scale=0.5"]


def test_parts_learn_as_in_the_whole_model_at_their_own_rates(pool: Any) -> None:
    """Of one step without clipping: the same gradients, and each part moves by its scale times what it would."""
    cfg, plan = model_of("llama_sees_tiles"), {"clip": 0.0, "rows": cases.Rows(pictures="tiles")}
    whole = pool(1).run(cases.train, 1, 8, 1, model=cfg, **plan)[0]
    found = pool(1).run(cases.train, 1, 8, 1, model=cfg, parts=SEES, **plan)[0]
    scales = {"vision.layers.1.": 0.5, "connector.": 2.0, "layers.1.": 1.0, "norm.": 1.0, "head.": 1.0}
    wanted = [name for name in whole["grads"] if name.startswith(tuple(scales))]
    assert list(found["grads"]) == wanted
    assert cases.distance({name: whole["grads"][name] for name in wanted}, found["grads"]) <= 1e-6
    start = InitSource(cfg, 3)
    for name in wanted:
        scale = next(scale for key, scale in scales.items() if name.startswith(key))
        before = start.tensor(name).flatten()
        moved, would = found["weights"][name] - before, whole["weights"][name] - before
        assert torch.allclose(moved, scale * would, atol=1e-6), name
    idle = {name for name in found["weights"] if name not in wanted}
    assert idle == {n for n in whole_shapes(cfg) if n.startswith(("vision.layers.2.", "vision.norm."))}  # never run


@pytest.fixture(scope="module")
def base(world) -> Path:
    """A model with biases and a tied embedding, as a Hugging Face folder with a tokenizer."""
    cfg = dataclasses.replace(load_model("tiny_qwen2", []), tied_embeddings=True, init_std=0.1)
    source = InitSource(cfg, 5)
    weights = ((name, source.tensor(name)) for name in whole_shapes(cfg))
    return export(world.folder / "parts_base", cfg, weights, world.folder / "tokenizer")


def words(world: Any, base: Path, name: str, steps: int, *more: str) -> list[str]:
    """A short run from the base."""
    given = world.overrides(run__name=name, model="hf", init_from=base, data__tokenizer="null", run__steps=steps)
    return [*given, "run.save_every=2", "optim.schedule=constant", "optim.eps=1e-4", "optim.lr=1e-2", *more]


def test_a_run_resumes_elsewhere_and_is_one_model(pool: Any, world: Any, base: Path, tmp_path: Path) -> None:
    """The last layer alone: its checkpoint holds nothing else; others go on from it, start from it and export it."""
    runs = world.folder / "runs"
    pool(1).run(cases.run_config, words(world, base, "parts_whole", 4, *LAST))
    pool(2).run(cases.run_config, words(world, base, "parts", 2, *LAST, "parallel=tp2"))
    pool(2).run(cases.run_config, words(world, base, "parts", 4, *LAST, "parallel=pp2"))
    straight, resumed = (
        [world.metrics(name)[step]["train/loss"] for step in (1, 2, 3, 4)] for name in ("parts_whole", "parts")
    )
    assert cases.relative(straight, resumed) <= 1e-5

    saved = Checkpoint(find_checkpoint(runs / "parts") or runs)
    assert all(name.startswith(("layers.3.", "norm.")) for name in saved.tensors)
    opened, start = open_weights(runs / "parts"), open_weights(base)
    ours, theirs = Source(opened, opened.cfg), Source(start, start.cfg)
    for name in whole_shapes(opened.cfg):
        same = torch.equal(ours.tensor(name), theirs.tensor(name))
        assert same == (name not in saved.tensors), name
    export_run(runs / "parts", tmp_path / "out", torch.float32, False, None)
    again = Source(open_weights(tmp_path / "out"), opened.cfg)
    assert all(torch.equal(again.tensor(name), ours.tensor(name)) for name in whole_shapes(opened.cfg))

    with pytest.raises(AssertionError, match="last 1 layers of decoder, and this run trains all parts"):
        pool(1).run(cases.run_config, words(world, base, "parts", 6))
    on = [f"init_from={runs / 'parts'}", "data.tokenizer=null"]
    pool(1).run(cases.run_config, [*words(world, base, "parts_on", 1), *on])
    assert world.metrics("parts_on")[1]["train/loss"] < 0.9 * straight[0]  # the same rows, and four steps learnt
