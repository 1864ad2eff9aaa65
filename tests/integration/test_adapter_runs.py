"""A run with an adapter from start to export: small checkpoints, another layout, one model whoever opens it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from convert import export_adapter, merge_adapter
from convert.from_hf import open_hf, whole_shapes
from convert.loom_files import open_loom
from convert.source import Source
from convert.to_hf import export
from models.init import InitSource
from scripts.params import load_model
from tests import cases, peft_reference

IDS = torch.tensor([[5, 9, 200, 31, 7, 77, 4, 120]])


@pytest.fixture(scope="module")
def base(world) -> Path:
    """A model with biases and a tied embedding, as a Hugging Face folder with a tokenizer."""
    cfg = dataclasses.replace(load_model("tiny_qwen2", []), tied_embeddings=True, init_std=0.1)
    source = InitSource(cfg, 5)
    weights = ((name, source.tensor(name)) for name in whole_shapes(cfg))
    return export(world.folder / "adapted_base", cfg, weights, world.folder / "tokenizer")


def words(world, base: Path, name: str, steps: int, *more: str) -> list[str]:
    """A short run beside the base."""
    given = world.overrides(run__name=name, model="hf", init_from=base, data__tokenizer="null", run__steps=steps)
    return [*given, "run.save_every=2", "optim.schedule=constant", "optim.eps=1e-4", *more]


def size(run: Path) -> int:
    """Bytes of the latest checkpoint."""
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    return sum(path.stat().st_size for path in checkpoint.iterdir() if path.suffix == ".safetensors")


def test_a_run_resumes_in_another_layout_and_is_one_model(pool, world, base: Path, tmp_path: Path) -> None:
    """PiSSA saves what LoRA does and what was taken out of the base."""
    adapter, runs = "pissa", world.folder / "runs"
    kind = [f"adapter={adapter}", "adapter.rank=2"]
    pool(1).run(cases.run_config, words(world, base, f"{adapter}_whole", 4, *kind))
    pool(2).run(cases.run_config, words(world, base, adapter, 2, *kind, "parallel=tp2"))
    pool(2).run(cases.run_config, words(world, base, adapter, 4, *kind, "parallel=pp2", "engine=zero1"))
    expected, found = (world.metrics(name) for name in (f"{adapter}_whole", adapter))
    assert [found[step]["train/loss"] for step in (1, 2, 3, 4)] == pytest.approx(
        [expected[step]["train/loss"] for step in (1, 2, 3, 4)], rel=1e-5
    )
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert size(runs / adapter) < weights / 4  # with two moments of what is trained

    export_adapter.run([str(runs / adapter), str(tmp_path / "peft")])
    merge_adapter.run(["--base", str(base), "--adapter", str(tmp_path / "peft"), "--out", str(tmp_path / "one")])
    merge_adapter.run(["--adapter", str(runs / adapter), "--out", str(tmp_path / "two")])
    with torch.no_grad():
        logits = peft_reference.adapted(base, tmp_path / "peft")(IDS).logits
        plain = peft_reference.hf_model(base)(IDS).logits
        merged = [peft_reference.hf_model(tmp_path / name)(IDS).logits for name in ("one", "two")]
    assert float((logits - plain).abs().max()) > 1e-3
    for each in merged:
        assert float((each - logits).abs().max() / logits.abs().max()) < 1e-5
    opened = open_loom(runs / adapter)
    source = Source(opened, opened.cfg)
    source.check()
    name = "layers.1.attn.qkv.weight"
    written = Source(open_hf(tmp_path / "two"), opened.cfg)
    assert torch.equal(source.tensor(name), written.tensor(name))


def test_what_does_not_go_together_is_said(pool, world, base: Path, tmp_path: Path) -> None:
    start = words(world, base, "told", 2, "adapter=lora", "adapter.rank=4")
    pool(1).run(cases.run_config, start)
    run, other = world.folder / "runs" / "told", tmp_path / "base"
    for change, said in (
        (["adapter=lora", "adapter.rank=8"], "adapter.rank: 4 -> 8"),
        (["adapter=ia3"], "adapter.name: lora -> ia3"),
        (["adapter=none"], "it holds an adapter, and this run trains all weights"),
    ):
        with pytest.raises(AssertionError, match=said):
            pool(1).run(cases.run_config, words(world, base, "told", 4, *change))
    state = run / "checkpoints" / "step_0000002" / "state.json"
    about = json.loads(state.read_text())
    shutil.copytree(base, other)
    about["adapter"]["base"] = str(other)
    state.write_text(json.dumps(about))
    open_loom(run)
    weights = next(other.glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-4:] = b"\0\0\0\0"
    weights.write_bytes(bytes(raw))
    with pytest.raises(ValueError, match="has other weights than it was trained with"):
        open_loom(run)
    shutil.rmtree(other)
    with pytest.raises(ValueError, match="is not there any more"):
        open_loom(run)
    with pytest.raises(ValueError, match="holds neither an adapter"):
        merge_adapter.opened(base, base)


def test_the_reference_of_a_preference_run_is_the_model_without_its_adapter(pool, world, base: Path) -> None:
    """The same losses as beside a second, frozen copy of the base; tp 2 as well."""
    pairs = world.folder / "adapter_pairs.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(4) for b in range(4)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def losses(name: str, processes: int, *more: str) -> list[float]:
        given = words(world, base, name, 3, "stage=dpo", "adapter=lora", "adapter.rank=4", *more)
        given = [word for word in given if not word.startswith("data.sources")]
        pool(processes).run(cases.run_config, [*given, f"data.sources=[{{path: {pairs}, channel: sums}}]"])
        return [world.metrics(name)[step]["train/loss"] for step in (1, 2, 3)]

    expected = losses("beside_a_copy", 1, f"stage.reference={base}")
    assert expected[0] == pytest.approx(0.693147, rel=1e-5)
    assert expected[2] < 0.69
    assert losses("itself", 2, "parallel=tp2") == pytest.approx(expected, rel=1e-5)
    assert "reference: the model without its adapter" in (world.folder / "runs" / "itself" / "log.txt").read_text()
