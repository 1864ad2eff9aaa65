"""Check that a layout computes what one process computes, on your own config: no data, weights or GPU needed.

    python scripts/verify.py model=qwen3_8b parallel.tp=2 parallel.pp=2 engine=zero1
    python scripts/verify.py <the words of any training command> [--processes N]

Shrinks the model, trains it for three steps of the config's own stage on made-up rows in the asked layout (CPU
processes) and in one process, and compares outputs of modules, losses, channels, gradients and weights. Of ppo and grpo
that is the update of the policy from made-up samples. Exit code 0: equal; 1: they differ, with the
first module and tensor that do; 2: the config has a mistake.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from parallel.config import ParallelConfig
from trainer import overrides, typed
from trainer.config import Machine, RunConfig, check, own_problems
from trainer.door import judge, strip_launcher_args
from trainer.failure import told_clearly
from trainer.problems import Problem, format_problems
from trainer.verify.shrink import processes_for, shrunk

INSIDE = "--on-the-cpu"
CPU_ONLY = ("CUDA_VISIBLE_DEVICES=", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1")
MADE_UP = (
    "data.sources",
    "data.eval_sources",
    "data.tokenizer",
    "data.chat_template",
    "rollout.rewards",
    "run.resume",
)
"""What a run needs and a verification does not."""
ANY_MACHINE = Machine(gpu=True, flash_attn=True)
"""The config is judged for the machine it is meant for, not for this one."""


def main(argv: Sequence[str]) -> int:
    """Print the page; gives the exit code.

    Raises:
        ValueError: the words or the config have a mistake.
    """
    if not argv or {"--help", "-h"} & set(argv):
        print(__doc__)
        return 0
    words, asked = _split(argv)
    cfg, world = load(words, asked)
    small = shrunk(cfg, world)
    from trainer.verify.compare import compare  # the engine takes seconds to import
    from trainer.verify.processes import Failed, records
    from trainer.verify.report import introduction, verdict

    print(introduction(cfg, small), flush=True)
    try:
        seen = compare(*records(small))
    except Failed as failure:
        print(f"FAIL: {failure}")
        return 1
    print(verdict(seen, small.cfg.run.steps or 0))
    return 0 if seen.equal else 1


def _split(argv: Sequence[str]) -> tuple[list[str], int | None]:
    """Training words, and what --processes says."""
    words: list[str] = []
    asked = None
    rest = iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag == "--processes":
            value = value if equals else next(rest, "")
            if not value.isdecimal() or int(value) < 1:
                raise ValueError(f"--processes {value}: must be a number of processes, such as --processes 4")
            asked = int(value)
        elif word.startswith("-"):
            raise ValueError(f"{word}: takes the key=value words of train.py, and --processes N")
        else:
            words.append(word)
    return words, asked


def load(words: Sequence[str], asked: int | None) -> tuple[RunConfig, int]:
    """The typed config and the processes to verify it on, through the door of training.

    Raises:
        ValueError: one message with everything that is wrong.
    """
    problems, tree = overrides.judge(words, typed.keys(RunConfig))
    if not problems:
        with initialize_config_dir(str(overrides.CONF), version_base="1.3"):
            tree = compose("config", overrides=strip_launcher_args(words))
    cfg, world, more = _judged(tree, asked) if tree is not None else (None, 1, [])
    told = {problem.key for problem in problems}
    problems += [problem for problem in more if problem.key not in told]
    if problems or cfg is None:
        raise ValueError(format_problems(problems))
    return cfg, world


def _judged(tree: DictConfig, asked: int | None) -> tuple[RunConfig | None, int, list[Problem]]:
    if OmegaConf.is_missing(tree.data, "sources"):
        tree.data.sources = []
    section: Any = OmegaConf.to_container(tree.parallel)
    parallel = typed.build(ParallelConfig, section, "parallel", [], {})
    if parallel is None or parallel.problems():
        parallel = ParallelConfig()  # its mistakes are told by the checks
    world = processes_for(parallel, asked)
    cfg, problems = judge(tree, world)
    if cfg is not None:
        # Rows are made up to suit, so how many there are in a step is no matter here.
        many = cfg.data.micro_batch_rows * world * 8 * parallel.pp
        roomy = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, global_batch_rows=many))
        crossing = check(roomy, world, ANY_MACHINE)
        told = {problem.key for problem in crossing}
        problems = crossing + [problem for problem in own_problems(cfg) if problem.key not in told]
    return cfg, world, [problem for problem in problems if not _made_up(problem)]


def _made_up(problem: Problem) -> bool:
    return problem.key.startswith(MADE_UP) or (problem.key == "run.steps" and problem.value is None)


if __name__ == "__main__":
    if sys.argv[1:2] != [INSIDE]:  # begin again with GPUs out of sight, before anything has looked for them
        os.execvp("env", ["env", *CPU_ONLY, sys.executable, __file__, INSIDE, *sys.argv[1:]])
    with told_clearly(0):
        sys.exit(main(sys.argv[2:]))
