"""``scripts/verify.py`` passes what is right, and finds every fault planted in the processes of a layout.

Tolerance: 1e-5 of a tensor's largest value, the product's own.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models import problems as model_problems
from parallel.config import ParallelConfig
from parallel.sharding import Cut, Shard
from scripts import verify
from scripts.params import load_model
from tests import verify_cases
from tests.pool import Pool
from trainer.layouts import Layout
from trainer.layouts import problems as layout_problems
from trainer.verify import processes
from trainer.verify.compare import Comparison, compare, held
from trainer.verify.record import Record
from trainer.verify.report import verdict
from trainer.verify.shrink import Small, processes_for, shrunk

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., Comparison]


@functools.cache
def small(words: str, processes: int | None = None) -> Small:
    return shrunk(*verify.load(words.split(), processes))


@pytest.fixture(scope="session")
def run(pool: Callable[[int], Pool]) -> Run:
    """Compare a layout with one process, if asked with a fault planted; one process runs once for each training."""
    alone: dict[str, Record] = {}

    def compared(words: str, processes: int, fault: str | None = None) -> Comparison:
        made = small(words, processes)
        key = repr(made.alone)  # a config with rewards in it cannot be hashed
        if key not in alone:
            alone[key] = pickle.loads(pool(1).run(verify_cases.recorded, made.alone)[0])
        ranks = pool(processes).run(verify_cases.recorded, made.cfg, fault)
        return compare(alone[key], [pickle.loads(rank) for rank in ranks])

    return compared


CLEAN = {
    "tp=2 with sequence parallel": ("model=tiny_llama parallel=tp2", 2),
    "pp=2 1f1b": ("model=tiny_qwen2 parallel.pp=2", 2),
    "cp=2": ("model=tiny_llama parallel.cp=2", 2),
    "ep=2": ("model=tiny_deepseek_v3 parallel.ep=2", 2),
    "zero 3": ("model=tiny_llama engine=zero3 engine.recompute=full", 2),
    "tp=2 pp=2": ("model=tiny_qwen2 parallel=tp2_pp2", 4),
    "reward, tp=2 with sequence parallel": ("model=tiny_llama parallel=tp2 stage=reward stage.share_prompt=true", 2),
    "dpo, cp=2": ("model=tiny_llama parallel.cp=2 stage=dpo stage.sft_weight=0.5", 2),
    "kto, pp=2": ("model=tiny_qwen2 parallel.pp=2 stage=dpo stage.loss=kto", 2),
    "a model that sees, tp=2 with sequence parallel": ("model=llava_next_7b parallel=tp2", 2),
    "a native one, pp=2": ("model=tiny_qwen2_vl parallel.pp=2", 2),
    "queries, zero 3, dpo": ("model=tiny_blip2 engine=zero3 stage=dpo", 2),
    "clip, zero 3": ("model=tiny_clip engine=zero3 stage=clip data.seq_len=64", 2),
    "qformer, zero 3": ("model=tiny_blip2_itm engine=zero3 stage=qformer data.seq_len=64", 2),
    "ppo, ep=2": ("model=tiny_deepseek_v3 parallel.ep=2 stage=ppo stage.kl=loss stage.kl_estimator=k2", 2),
}


@pytest.mark.parametrize("layout", CLEAN)
def test_a_right_layout_passes(run: Run, layout: str) -> None:
    seen = run(*CLEAN[layout])
    assert seen.equal, verdict(seen, 3)
    assert verdict(seen, 3).startswith("PASS")
    assert all(seen.found.values()), "something was not compared"


FOUND = {
    # fault: (words, first thing that differs, the words of the verdict)
    "missing_all_reduce": (
        "model=tiny_llama parallel.tp=2",
        ("the output of layers.1.mlp differs first", "gradient of layers.1.mlp.", "all-reduce", "is missing"),
    ),
    "missing_backward_sum": (
        "model=tiny_llama parallel.tp=2",
        ("every module's output is right", "layers.1.mlp_norm differs first", "a sum in the backward"),
    ),
    "missing_partial_sum": (
        "model=tiny_llama parallel=tp2",
        ("every module's output is right", "norm differs first: gradient of norm.weight", "over tp is missing"),
    ),
    "mask_leaks": (
        "model=tiny_llama parallel.tp=2",
        ("the output of layers.0.attn differs first", "gradient of layers.0.attn.", "documents see each other"),
    ),
    "swapped_kv_heads": (
        "model=tiny_llama parallel.tp=2",
        ("layers.0.attn begins with other weights", "layers.0.attn.qkv.weight", "of k and v", "Key/value heads"),
    ),
    "scaled_weight": (
        "model=tiny_llama parallel.tp=2",
        ("layers.0.attn begins with other weights: layers.0.attn.out.weight by", "its cut"),
    ),
    "token_learnt_across_the_cut": (
        "model=tiny_llama parallel.cp=2",
        ("what the model is given (targets_T) differs first", "counted twice"),
    ),
    "denominator_counts_twice": (
        "model=tiny_llama parallel.cp=2",
        ("every module's output is right", "head.weight", "0.5 times", "more than once (2 times)"),
    ),
    "loss_reported_twice": (
        "model=tiny_llama parallel.tp=2",
        ("every output and gradient is right", "train/tokens step 1", "counted twice"),
    ),
    "stale_tied_end": (
        "model=tiny_qwen2 parallel.pp=2",
        ("embed differs first: gradient of embed.weight", "only the embedding differs", "(tied)"),
    ),
    "rows_stay_with_their_experts": (
        "model=tiny_deepseek_v3 parallel.ep=2",
        ("the output of layers.1.mlp differs first", "gradient of layers.1.mlp.", "1 on the ep axis", "experts"),
    ),
    "bias_on_every_rank": (
        "model=tiny_llama model.qkv_bias=true model.attention_out_bias=true parallel.tp=2",
        ("the output of layers.0.attn differs first", "gradient of layers.0.attn."),
    ),
    "shared_heads_keep_their_part": (
        "model=tiny_llama parallel.tp=4",
        ("every module's output is right", "layers.1.attn.qkv.weight", "of k and v", "on several tp ranks"),
    ),
    "norm_counts_twice": (
        "model=tiny_llama parallel.tp=2",
        ("every output and gradient is right", "train/grad_norm", "their norm is not"),
    ),
    "pairs_count_on_every_rank": (
        "model=tiny_llama parallel.cp=2 stage=dpo",
        ("every module's output is right", "head.weight", "0.5 times", "more than once (2 times)"),
    ),
    "half_a_document": (
        "model=tiny_llama parallel.cp=2 stage=dpo stage.sft_weight=0.5",
        (
            "every module's output is right",
            "gradient of head.weight",
            "what the head gives is right and the loss is not",
        ),
    ),
    "reference_of_the_policy": (
        "model=tiny_llama parallel.tp=2 stage=dpo",
        (
            "every module's output is right",
            "gradient of head.weight",
            "what the head gives is right and the loss is not",
        ),
    ),
    "pairs_reported_twice": (
        "model=tiny_llama parallel.tp=2 stage=dpo",
        ("every output and gradient is right", "pairs are counted twice or left out: "),
    ),
    "features_of_own_rows_only": (
        "model=llava_next_7b parallel=tp2",
        ("every module's output is right", "connector differs first: gradient of connector.", "a sum in the backward"),
    ),
}


def test_every_planted_fault_has_its_row() -> None:
    assert set(FOUND) == set(verify_cases.FAULTS)


@pytest.mark.parametrize("fault", FOUND)
def test_a_planted_fault_is_found_and_named(run: Run, fault: str) -> None:
    words, told = FOUND[fault]
    seen = run(words, 4 if "tp=4" in words else 2, fault)
    text = verdict(seen, 3)
    assert not seen.equal and text.startswith("FAIL: ")
    missing = [words for words in told if words not in text]
    assert not missing, f"{missing} not in\n{text}"


# ---- the parts it is made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("ep", [1, 2])
def test_what_a_place_holds_is_worked_out_twice(tp: int, ep: int) -> None:
    """``held`` and ``Shard.slice`` know nothing of each other and agree, padding included."""
    shapes = {
        (48, 3): Shard(0, (32, 8, 8), (8, 2, 2)),
        (50, 3): Shard(0, (50,), pad=True),
        (5, 24): Shard(1, (24,)),
        (4, 16, 3): Shard(1, (8, 8), experts=True),
        (7,): Shard(),
    }
    for shape, shard in shapes.items():
        whole = torch.arange(1, torch.Size(shape).numel() + 1).view(shape)
        for tp_rank in range(tp):
            for ep_rank in range(ep):
                cut = Cut(tp, tp_rank, ep, ep_rank)
                assert torch.equal(held(shard, cut, shape) + 1, shard.slice(whole, cut)), (shard, cut)


MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "hf")
LAYOUTS = (
    ParallelConfig(tp=4),
    ParallelConfig(tp=2, sequence_parallel=True, pp=2),
    ParallelConfig(cp=2, context="ulysses"),
    ParallelConfig(pp=2, schedule="zbv"),
)
PAIRS = {
    "clip": "stage=clip data.seq_len=64",
    "siglip": "stage=clip stage.loss=sigmoid data.seq_len=64",
    "bert": "stage=qformer data.seq_len=64",
}
"""The stages of families that compare pictures and texts."""
KEPT = ("family", "qkv_bias", "qk_norm", "tied_embeddings", "mlp_bias", "attention_out_bias", "head")


@pytest.mark.parametrize("model", MODELS)
def test_every_model_shrinks_to_a_legal_one(model: str) -> None:
    """Small, of the same family, with the same options and the same way to be cut; legal where the asked one is."""
    family = load_model(model, []).family
    stage = PAIRS.get(family, "stage=pretrain data.seq_len=128")
    asked, _ = verify.load(f"model={model} {stage} engine.precision=bf16".split(), None)
    before, shrank = asked.model, 0
    for layout in [ParallelConfig(tp=2)] if family in PAIRS else LAYOUTS:
        world = processes_for(layout)
        given = dataclasses.replace(asked, parallel=layout)
        rows = dataclasses.replace(asked.data, global_batch_rows=64)
        if layout_problems(Layout(before, layout, asked.engine, rows), world):
            continue
        cfg = shrunk(given, world).cfg
        after, shrank = cfg.model, shrank + 1
        assert not model_problems(after)
        assert not layout_problems(Layout(after, cfg.parallel, cfg.engine, cfg.data), world)
        assert after.hidden_size <= 256 and after.num_layers <= 6 and cfg.engine.precision == "fp32"
        assert after.vocab_size % layout.tp == before.vocab_size % layout.tp
        assert before.num_heads // before.num_kv_heads == after.num_heads // after.num_kv_heads
        kinds = [{(m.window(i) is None, m.is_moe(i)) for i in range(m.num_layers)} for m in (before, after)]
        assert kinds[0] == kinds[1]
        assert all(getattr(before, name) == getattr(after, name) for name in KEPT)
    assert shrank, f"{model} could be verified in none of {LAYOUTS}"


def test_too_many_processes_are_told_with_smaller_sizes() -> None:
    with pytest.raises(ValueError, match=r"takes at least 32 processes(.|\n)*add: parallel\.tp=4 parallel\.pp=2\n"):
        verify.load(["model=llama3_8b", "parallel.tp=8", "parallel.pp=4"], None)
    smaller = "model=llama3_8b parallel.tp=4 parallel.pp=2"
    assert small(smaller).world == 8
    assert small("model=llama3_8b parallel.tp=8 parallel.pp=4", 32).world == 32


def test_a_stage_keeps_its_loss_and_says_what_it_leaves_out() -> None:
    made = small("model=tiny_llama parallel.tp=2 stage=dpo stage.loss=ipo stage.precompute_reference=true adapter=lora")
    assert (made.cfg.stage.name, getattr(made.cfg.stage, "loss", "")) == ("dpo", "ipo")
    assert {"the reference is asked in every step", "adapter lora -> none, all weights are trained"} <= {*made.changes}
    made = small("model=tiny_llama parallel.tp=2 stage=ppo")  # rewards are made up as well
    assert "no critic" in made.changes and any("update alone is checked" in change for change in made.changes)


def test_stages_given_by_hand_stay_uneven() -> None:
    made = small("model=llama3_8b parallel.pp=4 parallel.stage_layers=[5,9,9,9]")
    assert made.cfg.parallel.stage_layers == (1, 2, 2, 2) and made.cfg.model.num_layers == 7


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("model=tiny_llama parallel.tpp=2", "parallel.tp"),
        ("model=tiny_llama parallel.tp=3", "does not divide model.num_heads=4"),
        ("model=tiny_llama engine.zero=3 parallel.pp=2", "engine.zero = 3"),
        ("model=tiny_llama --tp 2", "--processes N"),
        ("model=tiny_llama --processes two", "must be a number"),
        ("model=tiny_llama parallel.tp=2 --processes 3", "no multiple"),
        ("model=tiny_llama optim.lr=-1", "optim.lr"),
    ],
)
def test_a_mistake_is_told_as_in_training(words: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        verify.main(words.split())
    assert told in str(error.value), error.value
    assert "data.sources" not in str(error.value) and "data.tokenizer" not in str(error.value)


def test_exit_code_and_page_of_a_difference(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = run("model=tiny_llama parallel=tp2", 2)
    wrong = dataclasses.replace(seen.ranks[1].weights[0], values=seen.ranks[1].weights[0].values + 1)
    other = dataclasses.replace(seen.ranks[1], weights=[wrong, *seen.ranks[1].weights[1:]])
    records = {"equal": list(seen.ranks), "different": [seen.ranks[0], other]}
    pages = {}
    for case, ranks in records.items():
        monkeypatch.setattr(processes, "records", lambda _, ranks=ranks: (seen.reference, ranks))
        code = verify.main(["model=tiny_llama", "parallel=tp2", "--processes", "2"])
        assert code == {"equal": 0, "different": 1}[case]
        pages[case] = capsys.readouterr().out
    assert "PASS" in pages["equal"] and "2 processes against one" in pages["equal"]
    assert "after the update" in pages["different"]
    assert all(len(page.splitlines()) < 30 for page in pages.values())


def test_the_command_starts_its_own_processes() -> None:
    """From the shell, with every process forked by the command itself; and one that dies is told."""
    words = ["model=tiny_qwen3", "stage=sft", "parallel=tp2", "--processes", "2"]
    done = subprocess.run(
        [sys.executable, "scripts/verify.py", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nPASS" in done.stdout and done.stderr == ""


def test_the_process_that_failed_first_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those that only miss it; and the user's mistake before everything."""
    said: dict[int, Exception] = {0: RuntimeError("Connection closed by peer"), 1: RuntimeError("the cause")}

    def recorded(job: Any) -> Record:
        if job.world > 1:
            raise said[job.rank]
        return Record(0, {})

    monkeypatch.setattr(processes, "_recorded", recorded)
    asked = small("model=tiny_llama parallel=tp2", 2)
    with pytest.raises(processes.Failed, match=r"rank 1 of 2 failed:(.|\n)*the cause"):
        processes.records(asked)
    said[0] = ValueError("model.x = 3 is too many")
    with pytest.raises(ValueError, match="too many"):
        processes.records(asked)


def test_processes_are_as_many_as_the_layout_needs() -> None:
    asked = {"": 2, "parallel.tp=2": 4, "parallel=tp2_pp2": 4, "parallel.tp=2 parallel.cp=2 parallel.pp=2": 8}
    for words, count in asked.items():
        cfg, world = verify.load(f"model=tiny_qwen2 {words}".split(), None)
        assert world == processes_for(cfg.parallel) == count
