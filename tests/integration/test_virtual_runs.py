"""Runs with virtual tokens from start to export: small checkpoints, another layout, one model whoever opens it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import export_adapter, merge_adapter
from convert.adapter_runs import open_beside, with_virtual
from convert.from_hf import whole_shapes
from convert.opening import open_weights
from convert.source import Source
from convert.to_hf import export
from models import build
from models.generation import SamplingConfig
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from scripts.params import load_model
from tests import cases, peft_reference
from trainer.inference.loading import load_generator

IDS = [5, 9, 200, 31, 7, 77, 4, 120]
PROMPT = ["adapter=prompt", "adapter.tokens=4", "adapter.tokens_init=text", "adapter.init_text=sum up"]
PREFIX = ["adapter=prefix", "adapter.tokens=4"]


@pytest.fixture(scope="module")
def base(world) -> Path:
    """A model with biases and a tied embedding, as a Hugging Face folder with a tokenizer."""
    cfg = dataclasses.replace(load_model("tiny_qwen2", []), tied_embeddings=True, init_std=0.1)
    source = InitSource(cfg, 5)
    weights = ((name, source.tensor(name)) for name in whole_shapes(cfg))
    return export(world.folder / "virtual_base", cfg, weights, world.folder / "tokenizer")


def words(world: Any, base: Path, name: str, steps: int, *more: str) -> list[str]:
    """A short run beside the base."""
    given = world.overrides(run__name=name, model="hf", init_from=base, data__tokenizer="null", run__steps=steps)
    return [*given, "run.save_every=2", "optim.schedule=constant", "optim.eps=1e-4", "optim.lr=3e-2", *more]


def losses(world: Any, name: str, *steps: int) -> list[float]:
    return [world.metrics(name)[step]["train/loss"] for step in steps]


@pytest.mark.parametrize("kind", [PROMPT, PREFIX], ids=["prompt", "prefix"])
def test_a_run_resumes_in_another_layout_and_is_one_model(
    kind: list[str], pool: Any, world: Any, base: Path, tmp_path: Path
) -> None:
    """Its export is the model that writes here, in peft; another run starts from it where this one ended."""
    name, runs = kind[0].partition("=")[2], world.folder / "runs"
    pool(1).run(cases.run_config, words(world, base, f"{name}_whole", 4, *kind))
    pool(2).run(cases.run_config, words(world, base, name, 2, *kind, "parallel=tp2"))
    pool(2).run(cases.run_config, words(world, base, name, 4, *kind, "parallel=pp2"))
    assert losses(world, name, 1, 2, 3, 4) == pytest.approx(losses(world, f"{name}_whole", 1, 2, 3, 4), rel=1e-5)
    saved = sorted((runs / name / "checkpoints").glob("step_*"))[-1]
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in saved.glob("*.safetensors")) < weights / 4

    export_adapter.run([str(runs / name), str(tmp_path / "peft")])
    theirs = peft_reference.adapted(base, tmp_path / "peft")
    generator = load_generator(runs / name, device="cpu")
    with torch.no_grad():
        asked = torch.tensor(IDS)
        ours = generator.model(asked, torch.arange(len(IDS)), [0, len(IDS)], output="head")
        wanted = theirs(input_ids=asked[None]).logits[0, -len(IDS) :]
        plain = peft_reference.hf_model(base)(asked[None]).logits[0]
        written = theirs.generate(input_ids=asked[None], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert float((ours - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float((wanted - plain).abs().max()) > 1e-3
    (found,) = generator.generate([IDS], SamplingConfig(max_new_tokens=8, temperature=0, stop_tokens=()))
    assert list(found.tokens) == written[0, -8:].tolist()

    for refused in (
        lambda: open_weights(runs / name),
        lambda: merge_adapter.opened(tmp_path / "peft", base),
    ):
        with pytest.raises(ValueError, match=r"are no part of any weight.*adapter\.start=OUT"):
            refused()
    again = [word for word in kind if "init" not in word]
    pool(1).run(cases.run_config, words(world, base, f"{name}_on", 1, *again, f"adapter.start={tmp_path / 'peft'}"))
    assert losses(world, f"{name}_on", 1)[0] < losses(world, name, 1)[0]
    log = (runs / name / "log.txt").read_text()
    assert f"trained: {256 if name == 'prompt' else 1024:,} of " in log
    assert ("adapter.init_text has 6 tokens and adapter.tokens=4: its end is cut off" in log) == (name == "prompt")


def pairs_of(world: Any) -> str:
    """Right and wrong sums as a source."""
    path = world.folder / "virtual_pairs.jsonl"
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)} for a in range(4) for b in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.sources=[{{path: {path}, channel: sums}}]"


def test_the_reference_of_a_preference_run_is_the_model_without_them(pool: Any, world: Any, base: Path) -> None:
    """The same losses as beside a second, frozen copy of the base, in a pipeline that computes prompts once."""
    source = pairs_of(world)

    def run(name: str, processes: int, *more: str) -> list[float]:
        given = [word for word in words(world, base, name, 3, *more) if not word.startswith("data.sources")]
        pool(processes).run(cases.run_config, ["stage=dpo", *given, *PROMPT, source])
        return losses(world, name, 1, 2, 3)

    expected = run("virtual_beside_a_copy", 1, f"stage.reference={base}")
    assert expected[2] < expected[0]
    itself = run("virtual_itself", 2, "parallel=pp2", "stage.share_prompt=true")
    assert itself == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_is_that_of_peft(pool: Any, world: Any, base: Path, tmp_path: Path) -> None:
    """Virtual tokens and the score head, which is trained beside them."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    given = [word for word in words(world, base, "virtual_reward", 2, *PROMPT) if not word.startswith("data.sources")]
    pool(1).run(cases.run_config, ["stage=reward", *given, pairs_of(world)])
    run = world.folder / "runs" / "virtual_reward"
    export_adapter.run([str(run), str(tmp_path / "peft")])
    below = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    below.config.pad_token_id = 0
    theirs: Any = PeftModel.from_pretrained(below, str(tmp_path / "peft"))
    opened, adapter = open_beside(run)
    model = build(opened.cfg)
    materialise(model, with_virtual(model, Source(opened, opened.cfg), adapter), WHOLE, torch.device("cpu"))
    asked = torch.tensor(IDS)
    with torch.no_grad():
        ours = model(asked, torch.arange(len(IDS)), [0, len(IDS)], output="head")[-1]
        wanted = theirs(input_ids=asked[None]).logits[0, 0]
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)
