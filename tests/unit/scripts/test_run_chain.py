"""Chains of named runs: their order, the words for all, and what is refused; torchrun is stood in for."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = '#!/bin/bash\nprintf "%s|" "$@" >>"$SAID"; echo >>"$SAID"\n[[ "$*" != *"$FAILS"* ]]\n'


def chain(
    folder: Path, *words: str, fails: str = "no run is called so", **env: str
) -> tuple[int, list[list[str]], str]:
    """Exit code, the words of each call of torchrun, and what was said about mistakes."""
    for name in ("torchrun", "python"):
        (folder / name).write_text(TORCHRUN)
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SAID": str(folder / "said"), "FAILS": fails} | env
    script = str(ROOT / "scripts" / "run_chain.sh")
    done = subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True, timeout=60)
    said = (folder / "said").read_text().splitlines() if (folder / "said").is_file() else []
    return done.returncode, [line.split("|")[:-1] for line in said if "train.py" in line], done.stderr


@pytest.mark.parametrize("name", ["r1", "instructgpt", "zephyr", "llava", "qwen_vl", "internvl", "blip2"])
def test_every_run_of_a_chain_starts_from_an_earlier_one(tmp_path: Path, name: str) -> None:
    code, calls, _ = chain(tmp_path, name)
    assert code == 0
    done: list[str] = []
    for words in calls:
        run = words[-1].removeprefix("run=")
        text = (ROOT / "conf" / "run" / f"{run}.yaml").read_text()
        named = re.findall(r"\$\{run\.dir\}/(\w+)", text.partition("defaults:")[2])
        assert set(named) <= set(done), run
        assert bool(named) == bool(done), "the first starts from nothing, the others from it"
        assert OmegaConf.create(text).run.name == run
        done.append(run)
    assert len(done) >= 2


def test_words_for_all_arrive_whole_and_a_failure_ends_the_chain(tmp_path: Path) -> None:
    word = "data.sources=[{path: a b.jsonl, channel: x}]"
    code, calls, _ = chain(tmp_path, "zephyr", "--", word, "run.threads=2", fails="run=arithmetic_sft")
    assert code != 0
    assert [words[-3:] for words in calls] == [["run=arithmetic_sft", word, "run.threads=2"]]


def test_one_process_needs_no_launcher(tmp_path: Path) -> None:
    assert chain(tmp_path, "r1", PROCESSES="1")[1] == [
        ["train.py", "run=arithmetic_sft"],
        ["train.py", "run=arithmetic_grpo"],
    ]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name a chain"),
        (("r2",), "there is no conf/run/r2.yaml"),
        (("r1", "--", "run.name=mine"), "run.name=mine would put all runs into one folder"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    code, calls, shown = chain(tmp_path, *words)
    assert code == 2 and not calls and says in shown
