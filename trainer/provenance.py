"""What a run was: its resolved config, its environment and its loss contract, written into the run folder."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch

# Seconds git may take before the run goes on without it.
_GIT_TIMEOUT = 10.0


def write(run_dir: Path, resolved_yaml: str, contract: str, world: int) -> None:
    """Write ``config.yaml``, ``environment.json`` and ``contract.txt`` into the run folder.

    Each is written beside and then renamed, so that it is whole at any moment. A resumed run whose file differs keeps
    the earlier one as ``config.1.yaml``, ``config.2.yaml`` and so on.

    Args:
        run_dir: the run folder; made if missing.
        resolved_yaml: the whole run's config after Hydra resolved it.
        contract: the loss contract in words.
        world: number of processes of the run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    facts = json.dumps(environment(world), indent=2, ensure_ascii=False)
    for name, text in (("config.yaml", resolved_yaml), ("environment.json", facts), ("contract.txt", contract)):
        _write_keeping(run_dir / name, text if text.endswith("\n") else text + "\n")


def environment(world: int) -> dict[str, object]:
    """Interpreter, machine, devices, packages, source and command of this process."""
    return {
        "command": [sys.executable, *sys.argv],
        "world_size": world,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": platform.node(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "memory_gib": _gib(psutil.virtual_memory().total)},
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "git": git_state(Path(__file__).resolve().parents[1]),
        "packages": dict(sorted((d.name, d.version) for d in metadata.distributions() if d.name)),
    }


def git_state(root: Path) -> dict[str, object]:
    """Commit and cleanliness of the work tree at ``root``; ``{"commit": None, "reason": ...}`` where there is none.

    A copy of the source without its repository, inside some other repository, is not that repository's commit.
    """
    try:
        top = _git(root, "rev-parse", "--show-toplevel")
        if Path(top).resolve() != root.resolve():
            return {"commit": None, "reason": "the source is not the top of a git work tree"}
        commit = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain").splitlines()
    except FileNotFoundError:
        return {"commit": None, "reason": "git is not installed"}
    except subprocess.TimeoutExpired:
        return {"commit": None, "reason": f"git took longer than {_GIT_TIMEOUT:.0f} s"}
    except subprocess.CalledProcessError as err:
        lines = err.stderr.strip().splitlines()
        return {"commit": None, "reason": lines[-1] if lines else f"git ended with {err.returncode}"}
    return {"commit": commit, "dirty": bool(changed), "changed_files": [line[3:] for line in changed]}


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(root), *args],
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=_GIT_TIMEOUT,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.rstrip("\n")


def _gib(num_bytes: int) -> float:
    return round(num_bytes / 2**30, 2)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, object]]:
    """GPUs this process sees; the other nodes' are not known here."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_gib": _gib(gpu.total_memory)} for gpu in properties]


def _write_keeping(path: Path, text: str) -> None:
    """Replace ``path`` atomically; an earlier file with other content moves to the next free number."""
    if path.is_file():
        if path.read_text(encoding="utf-8", errors="replace") == text:
            return
        number = 1
        while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        write_atomically(kept, path.read_bytes())
    write_atomically(path, text.encode("utf-8"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
