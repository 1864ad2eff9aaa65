"""Train a model: ``torchrun --nproc_per_node N train.py stage=sft model=llama7b …``; ``--help`` lists the rest."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from parallel.groups import LauncherRanks, leave_groups
from trainer.door import load, preflight, strip_launcher_args
from trainer.failure import told_clearly


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose_and_run(cfg: DictConfig) -> None:
    """Hydra's entry: the composed config becomes typed, then the run starts."""
    ranks = LauncherRanks.read()
    try:
        with told_clearly(ranks.rank):
            typed = load(cfg, ranks.world)
            from trainer.run import run  # after the config is known to be good: the engine takes seconds to import

            run(typed, ranks)
    finally:
        leave_groups()


def main() -> None:
    """Check the command line before Hydra reads it, then compose and run."""
    ranks = LauncherRanks.read()
    with told_clearly(ranks.rank):
        preflight(sys.argv[1:], ranks.world)  # the words as they were typed, since messages quote them
    sys.argv[1:] = strip_launcher_args(sys.argv[1:])
    compose_and_run()


if __name__ == "__main__":
    main()
