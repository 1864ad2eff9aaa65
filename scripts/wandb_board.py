"""Build the ready wandb board of a project: loss, every channel, throughput, memory and evaluation.

    python scripts/wandb_board.py --project loom --run runs/my_run
    python scripts/wandb_board.py --project loom --entity my_team --channels code,math,chat
    python scripts/wandb_board.py --project loom --channels code,math --dry-run

It saves a new view (a "workspace") of the project and prints its address. ``--dry-run`` prints the view as JSON and
needs neither network nor login.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.logging.history import read

VIEW_NAME = "Loom training"
# The x axis of every panel: the training step, a metric of its own, so that a resumed run draws over itself.
X_AXIS = "step"
_COLUMNS = 3


@dataclass(frozen=True)
class Panel:
    """One line plot: its title, metrics and the unit of its y axis."""

    title: str
    metrics: tuple[str, ...]
    unit: str


@dataclass(frozen=True)
class Section:
    """A row of panels under a heading."""

    name: str
    panels: tuple[Panel, ...]


def board(channels: list[str]) -> tuple[Section, ...]:
    """The sections of the board for these channels, in the order they are read."""
    nats = "nats per token"
    return (
        Section(
            "Loss",
            (
                Panel("Training loss", ("train/loss",), nats),
                Panel("Gradient norm", ("train/grad_norm",), "global L2 norm"),
                Panel("Learning rate", ("train/lr",), "learning rate"),
            ),
        ),
        Section("Channels", tuple(Panel(f"Channel {name}", (f"channel/{name}/loss",), nats) for name in channels)),
        Section(
            "Held out",
            (
                Panel("Held-out loss", ("eval/loss",), nats),
                Panel("Held-out perplexity", ("eval/perplexity",), "perplexity"),
                *(Panel(f"Held-out {name}", (f"eval/{name}/loss",), nats) for name in channels),
            ),
        ),
        Section(
            "Throughput and memory",
            (
                Panel("Throughput", ("perf/tokens_per_s",), "tokens/s, all devices"),
                Panel("Step time", ("perf/step_time",), "seconds"),
                Panel("Achieved FLOP/s", ("perf/tflops",), "TFLOP/s per device"),
                Panel("MFU", ("perf/mfu",), "fraction of the peak"),
                Panel("Peak memory", ("perf/memory_gib",), "GiB, main rank"),
            ),
        ),
        Section(
            "Tokens by channel",
            tuple(Panel(f"Tokens {name}", (f"channel/{name}/tokens",), "tokens") for name in channels),
        ),
    )


def to_workspace(sections: tuple[Section, ...], project: str, entity: str) -> Any:
    """The same board as an object of wandb's workspace library, not yet saved."""
    from wandb_workspaces import workspaces
    from wandb_workspaces.reports.v2 import LinePlot

    made = []
    for section in sections:
        panels: list[Any] = [
            LinePlot(title=panel.title, x=X_AXIS, y=list(panel.metrics), title_x="step", title_y=panel.unit)
            for panel in section.panels
        ]
        if panels:
            # As many rows as it takes: a section otherwise shows six panels and hides the rest behind a page.
            rows = math.ceil(len(panels) / _COLUMNS)
            layout = workspaces.SectionLayoutSettings(columns=_COLUMNS, rows=rows)
            made.append(workspaces.Section(name=section.name, panels=panels, is_open=True, layout_settings=layout))
    return workspaces.Workspace(entity=entity, project=project, name=VIEW_NAME, sections=made)


def chosen_channels(listed: str | None, run_dir: Path | None) -> list[str]:
    """Channels of ``--channels`` or, if not given, those a run has measured.

    Raises:
        ValueError: neither was given, the list is empty or names one twice, or the folder is no run.
    """
    if listed is not None:
        names = [name.strip() for name in listed.split(",") if name.strip()]
        if not names:
            raise ValueError(f"--channels {listed!r}: names no channel; give --channels code,math or --run RUN_DIR")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"--channels {listed}: {', '.join(twice)} is named twice; name each channel once")
        return names
    if run_dir is None:
        raise ValueError("which channels? give --run RUN_DIR (read from its metrics) or --channels code,math")
    return read(run_dir).channels()


def save(sections: tuple[Section, ...], project: str, entity: str | None) -> str:
    """Save the board in wandb and return its address.

    Raises:
        ValueError: the workspace library or the login is missing, or the server refused or could not be reached.
    """
    try:
        import wandb
        import wandb_workspaces  # noqa: F401 (asked for here, so that a missing package is told before the login)
    except ImportError as err:
        raise ValueError(f"package {err.name} is not installed; pip install wandb wandb-workspaces") from err
    try:
        if not wandb.login(prompt=False):
            raise ValueError("wandb has no login; run `wandb login` once, or look at the board with --dry-run")
        owner = entity or wandb.Api(timeout=20).default_entity
        if not owner:
            raise ValueError("the login has no default entity; give --entity with your wandb user or team")
        return to_workspace(sections, project, owner).save().url
    except (wandb.Error, OSError) as err:
        # Covers wandb's own errors and requests' (an OSError): no login, refused, or out of reach.
        raise ValueError(f"wandb: {err}; check `wandb login`, --entity and --project, or use --dry-run") from err


def main(argv: list[str] | None = None) -> int:
    """Command line; 0, or 2 with a message for a user's mistake."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--project", required=True, help="wandb project, log.project of the runs")
    parser.add_argument("--entity", help="wandb user or team (default: the login's)")
    parser.add_argument("--channels", metavar="A,B,C", help="channels to draw")
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="take the channels from this run's metrics")
    parser.add_argument("--dry-run", action="store_true", help="print the board as JSON, save nothing")
    args = parser.parse_args(argv)
    try:
        sections = board(chosen_channels(args.channels, args.run))
        if args.dry_run:
            found = {"project": args.project, "entity": args.entity, "name": VIEW_NAME, "x": X_AXIS}
            print(json.dumps({**found, "sections": [asdict(section) for section in sections]}, indent=2))
        else:
            print(f"wandb board: {save(sections, args.project, args.entity)}")
    except ValueError as err:
        print(f"wandb_board.py: {err}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
