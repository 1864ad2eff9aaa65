"""Whole runs of the preference stages on files of pairs and judged answers: reports, resumes, references, refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import cases, preference_cases
from tests.pool import Pool
from tests.unit.data.conftest import make_tokenizer

STAGES = Path(__file__).resolve().parents[2] / "conf" / "stage"


@dataclass(frozen=True)
class Runs:
    """Starts runs on toy files of sums: two channels, some pairs with a margin."""

    folder: Path
    pool: Callable[[int], Pool]

    def words(self, name: str, stage: str, **more: object) -> list[str]:
        """The command line of a run; ``more`` are further keys with ``__`` for the dot."""
        file = "judged" if "kto" in more.values() else "pairs"
        settings: dict[str, object] = {
            "stage": stage,
            "model": "tiny_llama",
            "data.sources": f"[{{path: {self.folder}/{file}.jsonl, channel_field: topic}}]",
            "data.tokenizer": self.folder / "tokenizer",
            "data.seq_len": 128,
            "data.global_batch_rows": 4,
            "data.micro_batch_rows": 2,
            "data.eval_fraction": 0.2,
            "data.cache_dir": self.folder / "cache",
            "optim.lr": 0.003,
            "optim.eps": 1e-4,  # smaller ones blow the rounding of vanishing gradients up to whole steps
            "optim.schedule": "constant",
            "run.dir": self.folder / "runs",
            "run.name": name,
            "run.steps": 4,
            "run.save_every": 2,
            "log.wandb": "disabled",
            "log.tensorboard": "false",
        }
        settings |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={value}" for key, value in settings.items()]

    def run(self, name: str, stage: str, processes: int = 1, **more: object) -> str:
        """Run to the end; what this start added to log.txt."""
        log = self.folder / "runs" / name / "log.txt"
        before = len(log.read_text()) if log.is_file() else 0
        self.pool(processes).run(cases.run_config, self.words(name, stage, **more))
        return log.read_text()[before:]

    def refused(self, stage: str, **more: object) -> str:
        """The message of the ValueError that a run ends with."""
        with pytest.raises(AssertionError) as failure:
            self.pool(1).run(cases.run_config, self.words("refused", stage, **more))
        text = str(failure.value)
        assert "ValueError: " in text, text
        return text.split("ValueError: ", 1)[1]

    def metrics(self, name: str, kind: str) -> list[dict[str, float]]:
        """The lines of metrics.jsonl of a kind (train, eval)."""
        rows = [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def runs(pool: Callable[[int], Pool], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("preferences")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    pairs: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    for n in range(40):
        row = {"prompt": f"{n}+{n + 1}=", "topic": "odd" if n % 3 else "third"}
        pairs.append(row | {"chosen": f"{2 * n + 1}", "rejected": f"{2 * n} no", "margin": n % 2})
        judged.append(row | {"completion": f"{2 * n + n % 2}", "label": bool(n % 2)})
    for name, rows in (("pairs", pairs), ("judged", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Runs(folder, pool)


def same(a: list[dict[str, float]], b: list[dict[str, float]], tolerance: float = 1e-5) -> None:
    """The same numbers, but for times and speeds; rewards are differences of log-probabilities of tens of nats."""
    assert len(a) == len(b) > 0
    for ours, theirs in zip(a, b, strict=True):
        names = {name for name in ours if name.split("/")[0] in ("train", "eval", "channel")}
        assert names <= theirs.keys()
        apart = {name: abs(ours[name] - theirs[name]) / max(1.0, abs(ours[name])) for name in names}
        assert max(apart.values()) <= tolerance, apart


def test_dpo_learns_reports_by_channel_and_on_held_out_pairs(runs: Runs) -> None:
    log = runs.run("dpo", "dpo", run__steps=12, optim__lr=0.01)
    assert "sigmoid loss (beta 0.1)" in log
    assert "reference: the run's own fresh weights" in log
    steps, held_out = runs.metrics("dpo", "train"), runs.metrics("dpo", "eval")
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), rel=1e-5)  # policy and reference are still the same
    assert steps[0]["train/margin"] == pytest.approx(0, abs=1e-5)
    assert steps[-1]["train/loss"] < 0.5 and steps[-1]["train/accuracy"] == 1
    assert held_out[0]["eval/loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert held_out[-1]["eval/accuracy"] == 1 and held_out[-1]["eval/margin"] > 0.5
    for channel in ("odd", "third"):
        for column in ("loss", "accuracy", "preferred", "margin", "chosen_reward", "rejected_log_prob", "pairs"):
            assert f"eval/{channel}/{column}" in held_out[-1]
            assert f"channel/{channel}/{column}" in steps[-1]
    last = steps[-1]
    pairs = last["channel/odd/pairs"] + last["channel/third/pairs"]
    assert last["train/pairs"] == pairs
    for column in ("loss", "margin"):
        whole = sum(last[f"channel/{c}/{column}"] * last[f"channel/{c}/pairs"] for c in ("odd", "third")) / pairs
        assert whole == pytest.approx(last[f"train/{column}"], rel=1e-9)


def test_two_processes_and_a_resume_go_on_as_one_run(runs: Runs) -> None:
    """The reference stays what the run started from: with the resumed weights it would put the loss back to log 2."""
    runs.run("whole", "dpo")
    runs.run("cut", "dpo", 2, run__steps=2)
    log = runs.run("cut", "dpo", 2, parallel__tp=2)
    assert "resuming from" in log and "step 2" in log
    same(runs.metrics("whole", "train"), runs.metrics("cut", "train"))
    same(runs.metrics("whole", "eval")[-1:], runs.metrics("cut", "eval")[-1:])


def test_a_prompt_that_is_computed_once_changes_nothing(runs: Runs) -> None:
    runs.run("apart", "dpo")
    runs.run("together", "dpo", 2, stage__share_prompt="true")
    same(runs.metrics("apart", "train"), runs.metrics("together", "train"))
    same(runs.metrics("apart", "eval"), runs.metrics("together", "eval"))
    said = runs.refused("dpo", stage__share_prompt="true", model="tiny_mixtral")
    assert "stage.share_prompt = true" in said and "routers" in said and "stage.share_prompt=false" in said


def test_a_reference_computed_once_is_not_in_memory(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.run("live", "dpo")
    frozen = preference_cases.count_frozen
    first = runs.pool(2).run(frozen, runs.words("once", "dpo", stage__precompute_reference="true"))
    again = runs.pool(1).run(frozen, runs.words("again", "dpo", stage__precompute_reference="true"))
    live = runs.pool(1).run(frozen, runs.words("live2", "dpo"))
    assert [made for made, _ in first] == [1, 1], "scored once, by both"
    assert [alive for _, alive in first] == [0, 0], "and gone before the first step"
    assert again == [(0, 0)], "found beside the token cache, by another layout"
    assert live == [(1, 1)]
    for name in ("once", "again"):
        same(runs.metrics("live", "train"), runs.metrics(name, "train"))
        same(runs.metrics("live", "eval"), runs.metrics(name, "eval"))
    log = (runs.folder / "runs" / "again" / "log.txt").read_text()
    assert "its log-probabilities were found beside the token cache" in log
    other = runs.run("seed", "dpo", stage__precompute_reference="true", run__seed=1)
    assert "computed in" in other, "other weights, other numbers"


def test_losses_without_a_reference_load_none(runs: Runs) -> None:
    words = runs.words("simpo", "dpo", stage__loss="simpo", stage__gamma=1.0, stage__reference=runs.folder)
    assert runs.pool(1).run(preference_cases.count_frozen, words) == [(0, 0)]
    log = (runs.folder / "runs" / "simpo" / "log.txt").read_text()
    assert f"stage.reference={runs.folder} is ignored: stage.loss=simpo has no reference" in log
    assert "there is no reference" in log


def test_kto_from_judged_answers(runs: Runs) -> None:
    runs.run("kto", "dpo", stage__loss="kto", run__steps=8)
    steps, held_out = runs.metrics("kto", "train"), runs.metrics("kto", "eval")
    assert steps[0]["train/loss"] == pytest.approx(0.5, rel=1e-5) and steps[0]["train/kl"] == 0
    assert max(step["train/kl"] for step in steps) > 0
    assert steps[-1]["train/desirable_reward"] > steps[-1]["train/undesirable_reward"] + 0.1
    assert held_out[-1]["eval/answers"] == held_out[-1]["eval/desirable"] + held_out[-1]["eval/undesirable"]
    runs.run("kto2", "dpo", 2, stage__loss="kto", run__steps=8, data__micro_batch_rows=1, engine="zero3")
    same(steps, runs.metrics("kto2", "train"))
    same(held_out, runs.metrics("kto2", "eval"))


def test_a_reward_model_from_a_language_model_and_from_itself(runs: Runs) -> None:
    runs.run("lm", "sft", run__steps=1, data__eval_fraction=0, data__sources=sft_rows(runs))
    start = runs.folder / "runs" / "lm"
    log = runs.run("reward", "reward", run__steps=12, optim__lr=0.01, init_from=start, stage__centring=0.01)
    assert "note: the scalar head starts from fresh weights" in log
    held_out = runs.metrics("reward", "eval")
    assert held_out[-1]["eval/accuracy"] == 1 and held_out[-1]["eval/odd/accuracy"] == 1
    assert "eval/margin" in held_out[-1] and "eval/perplexity" not in held_out[-1]
    log = runs.run("more", "reward", run__steps=1, init_from=runs.folder / "runs" / "reward")
    assert "fresh weights" not in log
    assert runs.metrics("more", "eval")[0]["eval/accuracy"] == 1
    said = runs.refused("dpo", init_from=start, stage__reference=runs.folder / "runs" / "reward")
    assert "is a reward model, which has no log-probabilities" in said


def sft_rows(runs: Runs) -> str:
    """A source of texts, as the command line has it."""
    file = runs.folder / "texts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "completion": str(2 * n)}) + "\n" for n in range(8)))
    return f"[{{path: {file}}}]"


@pytest.mark.parametrize(
    ("stage", "more", "said"),
    [
        ("reward", {"model__head": "lm"}, "stage.name=reward cannot train a model that gives no score"),
        ("dpo", {"+model__head": "scalar"}, "gives a score instead of the next token"),
        ("dpo", {"stage__beta": 0}, "stage.beta = 0"),
        ("dpo", {"stage__loss": "robust", "stage__label_smoothing": 0.5}, "below 0.5"),
        ("dpo", {"stage__loss": "kto", "stage__precompute_reference": "true"}, "an answer to another one"),
        ("dpo", {"stage__reference": "nowhere"}, "there is no such folder"),
        ("reward", {"stage__centring": -1}, "cannot be negative"),
        ("reward", {"data__sources": "[{path: JUDGED}]"}, "this stage learns from preference pairs"),
        ("sft", {}, "take stage=dpo or stage=reward"),
    ],
)
def test_refusals(runs: Runs, stage: str, more: dict[str, Any], said: str) -> None:
    given = {key: str(value).replace("JUDGED", f"{runs.folder}/judged.jsonl") for key, value in more.items()}
    assert said in runs.refused(stage, **given)


def test_a_reference_of_another_size_but_not_of_another_vocabulary(runs: Runs) -> None:
    texts = {"data__eval_fraction": 0, "data__sources": sft_rows(runs), "run__steps": 1}
    runs.run("wide", "sft", model__vocab_size=768, **texts)
    said = runs.refused("dpo", stage__reference=runs.folder / "runs" / "wide")
    assert "stage.reference" in said and "768" in said
    runs.run("narrow", "sft", model__hidden_size=32, model__head_dim=8, **texts)
    runs.run("dpo_narrow", "dpo", run__steps=1, stage__reference=runs.folder / "runs" / "narrow")
    (step,) = runs.metrics("dpo_narrow", "train")
    assert abs(step["train/margin"]) > 1e-3, "the reference is another model"


def test_nothing_is_left_to_prefer(runs: Runs) -> None:
    """Pairs of equal texts are the gate's; a run of nothing else does not start."""
    file = runs.folder / "equal.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{n}", "chosen": "a", "rejected": "a"}) + "\n" for n in range(4)))
    with pytest.raises(AssertionError, match="GateError"):
        runs.run("equal", "dpo", data__sources=f"[{{path: {file}}}]")


def test_numbers_are_finite_where_rows_are_few(runs: Runs) -> None:
    """Two held-out pairs on four ranks: some of them have a token that fills up and no pair."""
    runs.run("few", "dpo", 4, run__steps=1, data__eval_fraction=0.04, data__micro_batch_rows=1)
    held_out = runs.metrics("few", "eval")[-1]
    assert held_out["eval/pairs"] < 4
    assert all(np.isfinite(value) for value in held_out.values() if isinstance(value, float))
