"""Open whatever lies in a folder: a Hugging Face folder, a Megatron checkpoint, a checkpoint of a run of Loom."""

from dataclasses import replace
from pathlib import Path

from convert.from_hf import open_hf
from convert.hf_files import INDEX, SINGLE
from convert.loom_files import open_loom
from convert.megatron.reading import find_folder, open_megatron
from convert.megatron.writing import TRACKER
from convert.opened import Opened

LOOKED_FOR = f"""\
  Hugging Face:      config.json with {SINGLE} or {INDEX}
  Megatron:          {TRACKER}, or iter_*/ or release/, with mp_rank_*/ or .metadata inside
  a run of Loom:     checkpoints/step_*/state.json"""


def open_weights(path: str | Path, files: Path | None = None) -> Opened:
    """Open a checkpoint of any kind; names and shapes are checked, no value is read.

    Args:
        path: its folder; of a Megatron checkpoint or a run of Loom also one of the steps in it.
        files: a folder with config.json and tokenizer, where the checkpoint has none or others are wanted.

    Raises:
        ValueError: nothing known is there, or it is truncated, incomplete or of a model that is not here.
    """
    if files is not None and not files.is_dir():
        raise ValueError(f"{files} is not a folder; name one with config.json and tokenizer")
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{folder} is not there; {_nearest(folder)}")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; name the folder it lies in")
    if folder.name.startswith("mp_rank_"):
        raise ValueError(f"{folder} is one rank's part of a checkpoint; name the whole: {folder.parent}")
    if is_loom(folder):
        return replace(opened := open_loom(folder), files=files or opened.files)
    if is_megatron(folder):
        inner = folder if (folder / ".metadata").is_file() else find_folder(folder)[1]
        if (inner / ".metadata").is_file():
            from convert.megatron.dist import open_dist  # torch.distributed.checkpoint: 0.7 s that others do not need

            return open_dist(folder, files)
        return open_megatron(folder, files)
    if (folder / "config.json").is_file() or (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        return replace(opened := open_hf(folder), files=files or opened.files)
    raise ValueError(
        f"{folder} holds no checkpoint that is known here. Looked for\n{LOOKED_FOR}\nand found {_in(folder)}"
    )


def is_loom(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run of Loom, the folder of several, or a run's folder."""
    return any(
        (below / "state.json").is_file() or any(below.glob("step_*/state.json"))
        for below in (folder, folder / "checkpoints")
    )


def is_megatron(folder: Path) -> bool:
    """Whether a folder is the root of a Megatron checkpoint, or one iteration of it."""
    if (folder / TRACKER).is_file() or (folder / ".metadata").is_file():
        return True
    return any(found.is_dir() for word in ("mp_rank_*", "iter_*", "release") for found in folder.glob(word))


def _in(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return (", ".join(names[:8]) + more) or "nothing: it is empty"


def _nearest(path: Path) -> str:
    above = next(parent for parent in path.absolute().parents if parent.exists())
    return f"in {above} lie {_in(above)}" if above.is_dir() else f"{above} is a file"
