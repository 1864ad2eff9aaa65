"""From a source's path to its files, and from files to units of work that ranks share among themselves."""

from __future__ import annotations

import glob
import json
import os
import re
import warnings
from dataclasses import dataclass

from data.config import SourceConfig, nearest_path
from data.readers import READERS, kind_of_suffix

SHARD_SUFFIX = re.compile(r"[-_.]\d{4,}-of-\d{4,}$")


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: str
    kind: str
    """Key of READERS: jsonl | json | parquet | arrow | text."""
    name: str
    """Path below the source's folder: stable when the data move, so it may enter the cache key."""
    channel: str
    """Channel of its rows unless the config or a field says otherwise."""


@dataclass(frozen=True)
class Unit:
    """The part [start, stop) of one file (bytes, row groups or rows, as its reader counts); `size` is its cost."""

    file: int
    start: int
    stop: int
    size: int


def list_files(source: SourceConfig, key: str) -> list[SourceFile]:
    """The files of a source, in the order of their names.

    Raises:
        ValueError: nothing there, or a file whose kind is unknown; names the key and the way out.
    """
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        return _folder_files(path, source, key)
    if os.path.isfile(path):
        return [_one_file(path, os.path.basename(path), source, key, alone=True)]
    found = sorted(glob.glob(path, recursive=True))
    if not found:
        raise ValueError(f"{key}.path={source.path} does not exist; {nearest_path(path)}")
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        saved = [name for name in found if os.path.isfile(os.path.join(name, "state.json"))]
        return [file for name in saved for file in _saved_dataset(name, key)] or _nothing(source, key)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in files])
    return [_one_file(name, os.path.relpath(name, root), source, key, alone=False) for name in files]


def cut_units(files: list[SourceFile]) -> list[Unit]:
    """Units of all files in order; reading them in this order gives the source's rows in order.

    Raises:
        ValueError: a Parquet or Arrow file that cannot be opened.
    """
    return [
        Unit(index, start, stop, size)
        for index, file in enumerate(files)
        for start, stop, size in READERS[file.kind].cut(file.path)
    ]


def share_units(units: list[Unit], rank: int, world: int) -> list[Unit]:
    """The rank's consecutive run of units, about 1/world of the work; all ranks' runs in rank order are all units."""
    total = sum(unit.size for unit in units)
    mine, before = [], 0
    for unit in units:
        middle = before + unit.size / 2
        if min(world - 1, int(middle * world / max(total, 1))) == rank:
            mine.append(unit)
        before += unit.size
    return mine


def _folder_files(folder: str, source: SourceConfig, key: str) -> list[SourceFile]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        return _saved_dict(folder, key)
    if os.path.isfile(os.path.join(folder, "state.json")):
        return _saved_dataset(folder, key)
    found = [os.path.join(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names]
    names = sorted(name for name in (os.path.relpath(path, folder) for path in found) if not _hidden(name))
    if source.format != "text":
        unknown = [name for name in names if kind_of_suffix(name) is None]
        names = [name for name in names if kind_of_suffix(name) is not None]
        if unknown and names:
            shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            warnings.warn(f"{key}.path={folder}: ignored {len(unknown)} files of other kinds ({shown})", stacklevel=2)
    if not names:
        return _nothing(source, key)
    return [_one_file(os.path.join(folder, name), name, source, key, alone=False) for name in names]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split(os.sep))


def _one_file(path: str, name: str, source: SourceConfig, key: str, alone: bool) -> SourceFile:
    kind = kind_of_suffix(name)
    if kind is None and source.format == "text":
        kind = "text"
    if kind is None:
        known = ".jsonl, .json, .parquet, .txt, .md"
        raise ValueError(
            f"{key}.path: {path} is of an unknown kind (known: {known}); "
            f"set {key}.format=text to read any UTF-8 file as one document"
        )
    stem = os.path.splitext(os.path.basename(name))[0]
    if kind == "text" and not alone:  # a folder of documents is one channel, not one for each document
        stem = os.path.basename(_plain_part(os.path.abspath(os.path.expanduser(source.path)))) or stem
    return SourceFile(path, kind, name, SHARD_SUFFIX.sub("", stem))


def _plain_part(pattern: str) -> str:
    """The longest leading folder of a glob that has no wildcard in it."""
    while glob.has_magic(pattern):
        pattern = os.path.dirname(pattern)
    return pattern


def _saved_dict(folder: str, key: str) -> list[SourceFile]:
    splits = sorted(name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name, "state.json")))
    if len(splits) != 1:
        raise ValueError(
            f"{key}.path={folder} holds a dataset with the splits {', '.join(splits) or '(none)'}; "
            f"name one: {key}.path={os.path.join(folder, 'train' if 'train' in splits else (splits or ['SPLIT'])[0])}"
        )
    return _saved_dataset(os.path.join(folder, splits[0]), key)


def _saved_dataset(folder: str, key: str) -> list[SourceFile]:
    """Arrow files of a dataset saved with `save_to_disk`, as its state.json lists them."""
    try:
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as stream:
            state = json.load(stream)
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as err:
        raise ValueError(f"{key}.path={folder}: its state.json is damaged ({err}); save the dataset again") from err
    if state.get("_indices_data_files"):
        raise ValueError(
            f"{key}.path={folder} is a selection kept as indices; call dataset.flatten_indices() and save it again"
        )
    missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ValueError(f"{key}.path={folder}: its state.json names {missing[0]}, which is not there; copy it again")
    parent = os.path.dirname(os.path.abspath(folder))
    is_split = os.path.isfile(os.path.join(parent, "dataset_dict.json"))  # then its name is only train or test
    channel = os.path.basename(parent if is_split else os.path.abspath(folder))
    return [SourceFile(os.path.join(folder, name), "arrow", name, channel) for name in names]


def _nothing(source: SourceConfig, key: str) -> list[SourceFile]:
    hint = "" if source.format == "text" else f"; {key}.format=text reads any UTF-8 file as one document"
    raise ValueError(
        f"{key}.path={source.path} holds no file of a known kind (.jsonl, .json, .parquet, .txt, .md){hint}"
    )
