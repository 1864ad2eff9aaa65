"""`manifest.json` in a run's folder, beside its checkpoints: what the run is, for the runs that start from it.

It says which stage it was, what it started from, with a fingerprint of those weights, and what the next stage has to
agree with: tokenizer, chat template, vocabulary, rotary embedding, ties (`chain.py` compares).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.loom_files import find_checkpoint, step_of
from data.identity import files_hash, template_hash, vocabulary_of
from models.config import ModelConfig
from trainer.provenance import git_state, write_atomically

NAME = "manifest.json"
FORMAT = 1
WEIGHTS = ("*.safetensors", "*.distcp", "mp_rank_*/*", "*/mp_rank_*/*", "*/*.distcp")
"""Where weights lie below the folder of a checkpoint of any kind."""
SAMPLES, SAMPLE_BYTES = 16, 65536
"""Of a file of weights so many blocks are read; training changes every one of them."""


@dataclass(frozen=True)
class Parent:
    """What a run starts from, or measures itself by."""

    key: str
    """The key of the config that names it."""
    path: str
    """The checkpoint it meant at that time."""
    fingerprint: str
    """Of its weights."""
    stage: str | None = None
    """The stage it was trained in; None where it says nothing of that."""


@dataclass(frozen=True)
class Manifest:
    """What a run is. Hashes are those of `data.identity`."""

    stage: str
    model: dict[str, Any]
    """Family and sizes, rotary embedding and ties included."""
    vocabulary: str
    """Which id each token has."""
    tokens: int | None
    """How many there are; None where the tokenizer's files do not say."""
    cutting: str
    """How text becomes tokens."""
    files: str
    """Of the tokenizer's files: where it is the same, so are the tokens."""
    chat_template: str | None
    """None: there is none, or the stage writes no conversation."""
    tokenizer: str
    """The tokenizer's folder."""
    data: str
    """Fingerprint of the data and their order."""
    parents: tuple[Parent, ...]
    lineage: tuple[str, ...]
    """The stages behind the weights it started from, the first one first."""
    commit: str | None
    """Of Loom's source; None where it is not known."""
    format: int = FORMAT


def describe(
    stage: str, model: ModelConfig, tokenizer: str, template: str | None, data: str, named: dict[str, str]
) -> Manifest:
    """The manifest of a run that starts now.

    Args:
        template: a file with the chat template, where it is not the tokenizer's own.
        data: fingerprint of the data.
        named: what it starts from, path by config key.

    Raises:
        ValueError: something of that cannot be read.
    """
    words = vocabulary_of(tokenizer)
    commit = git_state(Path(__file__).resolve().parents[1])["commit"]
    return Manifest(
        stage=stage,
        model=_plain(model),
        vocabulary=words.vocabulary,
        tokens=None if words.tokens is None else len(words.tokens),
        cutting=words.cutting,
        files=files_hash(tokenizer),
        chat_template=None if stage == "pretrain" else template_hash(tokenizer, template),
        tokenizer=str(Path(tokenizer).absolute()),
        data=data,
        parents=tuple(parent_of(key, path) for key, path in named.items()),
        lineage=lineage(named["init_from"]) if "init_from" in named else (),
        commit=commit if isinstance(commit, str) else None,
    )


def parent_of(key: str, path: str) -> Parent:
    """What stands in a folder now."""
    theirs, place = read(path), find_checkpoint(Path(path)) or Path(path)
    return Parent(key, str(place.absolute()), fingerprint(path), theirs.stage if theirs else None)


def write(run_dir: Path, manifest: Manifest) -> None:
    """Keep it in the run's folder; a crash leaves the old one or the new one."""
    text = json.dumps(dataclasses.asdict(manifest), indent=2, ensure_ascii=False) + "\n"
    write_atomically(run_dir / NAME, text.encode("utf-8"))


def read(path: str | Path) -> Manifest | None:
    """The manifest of the run whose folder, or one of whose checkpoints, lies there; None: there is none.

    Raises:
        ValueError: it is damaged.
    """
    checkpoint = find_checkpoint(Path(path))
    file = Path(path) / NAME if checkpoint is None else checkpoint.parent.parent / NAME
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        parents = tuple(Parent(**parent) for parent in found.pop("parents"))
        return Manifest(**{**found, "parents": parents, "lineage": tuple(found["lineage"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is damaged or of another version of Loom ({error!r}); remove it, and the run's tokenizer and chat "
            "template are compared as they lie in its folders now"
        ) from error


def carry(path: str | Path, folder: Path) -> None:
    """Put the manifest of the run that lies in a path beside its weights in another folder, so that a stage that starts
    from there is checked as one that starts from the run; nothing where the run has none.

    Raises:
        ValueError: it is damaged.
    """
    made = read(path)
    if made is not None:
        write(folder, made)


def lineage(path: str) -> tuple[str, ...]:
    """The stages that led to the weights in a folder, its own last; only the folder where nothing says more."""
    theirs, checkpoint = read(path), find_checkpoint(Path(path))
    step = f", step {step_of(checkpoint)}" if checkpoint else ""
    return (path,) if theirs is None else (*theirs.lineage, f"{theirs.stage} ({path}{step})")


def fingerprint(path: str | Path) -> str:
    """Of the weights in a folder: names and sizes of their files, and blocks out of each. Milliseconds a file."""
    folder = find_checkpoint(Path(path)) or Path(path)
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file()})
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _fingerprint(str(folder), stamps)


@functools.lru_cache(maxsize=8)
def _fingerprint(folder: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, size, _ in stamps:
        digest.update(f"{Path(name).relative_to(folder)}:{size}:".encode())
        with open(name, "rb") as stream:
            for sample in range(SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _plain(model: ModelConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(model)))
