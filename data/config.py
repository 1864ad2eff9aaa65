"""The `data` section of the config, and what can be wrong with it without looking at other sections."""

from __future__ import annotations

import difflib
import glob
import os
from dataclasses import dataclass

from data.kinds import FORMAT_NAMES

PACKINGS = ("best_fit", "none")
PILLOWS_LIMIT = 178_956_970
"""Pixels of a picture beyond which Pillow takes it for a decompression bomb."""

Problem = tuple[str, object, str, str]
"""(key, value, reason, way out)"""


@dataclass(frozen=True)
class SourceConfig:
    path: str
    """A file, a folder (also a Hugging Face dataset saved with `save_to_disk`) or a glob (`**` crosses folders)."""
    channel: str | None = None
    """Channel of every sample; None = the file's stem (for documents in a folder, the folder's name)."""
    channel_field: str | None = None
    """Field of each row that names its channel; excludes `channel`."""
    weight: float = 1.0
    """How often a sample is seen in one epoch: 2 = twice, 0.5 = half of them, drawn anew each epoch; 0 = never."""
    format: str = "auto"
    """auto (from the first rows' fields and what the stage learns from) | text | messages | sharegpt | alpaca |
    prompt_completion; of preferences preference | unpaired; of prompts prompt | messages | sharegpt | preference; of
    captions caption | messages | sharegpt | text."""
    as_chat: bool = False
    """A prompt that is a string becomes a user's message, the answers to it the assistant's, written down by the chat
    template; else such rows are plain text."""
    image_dir: str | None = None
    """Folder that the paths of pictures in the rows start from; null = that of the rows' file."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    sources: tuple[SourceConfig, ...]
    """What to train on."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out sources; their weights are not used: each sample is seen once per evaluation."""
    eval_fraction: float = 0.0
    """Share of each channel held out for evaluation, chosen by the sample's content, so it survives reordering."""
    tokenizer: str | None = None
    """Folder of the tokenizer; None = the one in `init_from` or `init_parts.decoder`."""
    chat_template: str | None = None
    """Path of a jinja chat template that replaces the tokenizer's own."""
    seq_len: int
    """Tokens in a row: no row is longer."""
    packing: str = "best_fit"
    """best_fit (rows filled with several documents) | none (one document a row)."""
    micro_batch_rows: int
    """Rows of one forward pass on one rank."""
    global_batch_rows: int
    """Rows of one optimizer step over all ranks; a multiple of ranks x micro_batch_rows."""
    cache_dir: str = ".cache/tokens"
    """Where token caches live; every rank must see the same folder."""
    max_bad_fraction: float = 0.0
    """Share of malformed rows of one source up to which the run goes on without them."""
    max_picture_pixels: int = PILLOWS_LIMIT
    """Pixels of a picture up to which it is decoded; a small file may hold far more."""
    picture_workers: int = 2
    """Threads of each process that read pictures ahead of the step that needs them."""
    video_frames: int = 8
    """Frames taken of a video at most, at even distances from its first."""
    random_channels: int = 0
    """k > 0: samples get a channel random_0 .. random_{k-1} by a seeded hash instead of their own (experiments)."""


def problems(cfg: DataConfig) -> list[Problem]:
    """Everything that is wrong with the section in itself, as (key, value, reason, way out)."""
    found: list[Problem] = []
    if not cfg.sources:
        found.append(("data.sources", [], "there is nothing to train on", "add data.sources=[{path: FILE}]"))
    for group in ("sources", "eval_sources"):
        for index, source in enumerate(getattr(cfg, group)):
            found += source_problems(f"data.{group}[{index}]", source)
    if cfg.sources and all(source.weight == 0 for source in cfg.sources):
        found.append(("data.sources[*].weight", 0, "every source has weight 0", "give one of them a weight above 0"))
    for name in ("seq_len", "micro_batch_rows", "global_batch_rows"):
        value = getattr(cfg, name)
        if value < 1:
            found.append((f"data.{name}", value, "must be at least 1", f"data.{name}=1 or more"))
    if cfg.seq_len == 1:
        found.append(("data.seq_len", 1, "one token has no next token to learn", "data.seq_len=2 or more"))
    micro, whole = cfg.micro_batch_rows, cfg.global_batch_rows
    if micro >= 1 and whole >= 1 and whole % micro:
        lower, upper = whole // micro * micro, (whole // micro + 1) * micro
        choice = f"{lower} or {upper}" if lower else f"{upper}"
        reason = f"is not a multiple of data.micro_batch_rows ({micro})"
        found.append(("data.global_batch_rows", whole, reason, f"data.global_batch_rows={choice}"))
    if cfg.packing not in PACKINGS:
        found.append(("data.packing", cfg.packing, "unknown packing", f"data.packing={nearest(cfg.packing, PACKINGS)}"))
    if not 0 <= cfg.eval_fraction < 1:
        found.append(("data.eval_fraction", cfg.eval_fraction, "must be at least 0 and below 1", "0.01 is usual"))
    if not 0 <= cfg.max_bad_fraction <= 1:
        found.append(
            ("data.max_bad_fraction", cfg.max_bad_fraction, "must lie in 0..1", "0 stops at the first bad row")
        )
    if cfg.random_channels < 0:
        found.append(("data.random_channels", cfg.random_channels, "must not be negative", "0 turns it off"))
    for name in ("max_picture_pixels", "picture_workers", "video_frames"):
        if getattr(cfg, name) < 1:
            found.append((f"data.{name}", getattr(cfg, name), "must be at least 1", f"data.{name}=1 or more"))
    if cfg.max_picture_pixels > PILLOWS_LIMIT:
        reason = "Pillow itself refuses larger pictures"
        way = f"data.max_picture_pixels={PILLOWS_LIMIT}"
        found.append(("data.max_picture_pixels", cfg.max_picture_pixels, reason, way))
    for key, path, test in (
        ("data.tokenizer", cfg.tokenizer, os.path.isdir),
        ("data.chat_template", cfg.chat_template, os.path.isfile),
    ):
        if path is not None and not test(os.path.expanduser(path)):
            kind = "folder" if test is os.path.isdir else "file"
            found.append((key, path, f"no such {kind}", nearest_path(path)))
    return found


def source_problems(key: str, source: SourceConfig) -> list[Problem]:
    """Problems of one source; `key` is its name in the config, such as `data.sources[0]`."""
    found: list[Problem] = []
    if not source.path:
        found.append((f"{key}.path", source.path, "is empty", "name a file, a folder or a glob"))
    elif not os.path.exists(os.path.expanduser(source.path)) and not _matches_something(source.path):
        found.append((f"{key}.path", source.path, "does not exist", nearest_path(source.path)))
    if not 0 <= source.weight < float("inf"):
        found.append((f"{key}.weight", source.weight, "must be 0 or more", f"{key}.weight=1.0"))
    legal = ("auto", *FORMAT_NAMES)
    if source.format not in legal:
        way_out = f"{key}.format={nearest(source.format, legal)} (one of {', '.join(legal)})"
        found.append((f"{key}.format", source.format, "unknown format", way_out))
    if source.image_dir is not None and not os.path.isdir(os.path.expanduser(source.image_dir)):
        found.append((f"{key}.image_dir", source.image_dir, "no such folder", nearest_path(source.image_dir)))
    if source.channel is not None and source.channel_field is not None:
        reason = f"{key}.channel_field={source.channel_field} names the channel too"
        found.append((f"{key}.channel", source.channel, reason, "keep one of the two"))
    return found


def nearest(value: str, legal: tuple[str, ...]) -> str:
    """The legal choice that looks most like `value`."""
    return max(legal, key=lambda name: difflib.SequenceMatcher(None, value.lower(), name).ratio())


def nearest_path(path: str) -> str:
    """A way out for a path that does not exist: the nearest name in the deepest folder of it that does."""
    path = os.path.expanduser(path)
    folder, missing = os.path.split(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder, missing = os.path.split(folder)
    close = difflib.get_close_matches(missing, os.listdir(folder), n=1, cutoff=0.5)
    if close:
        return f"did you mean {os.path.join(folder, close[0])}?"
    return f"{folder} has no '{missing}' nor a name like it"


def _matches_something(path: str) -> bool:
    return next(glob.iglob(os.path.expanduser(path), recursive=True), None) is not None
