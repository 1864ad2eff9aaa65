"""Content hashes of data files, shared among ranks, with a memo so that a warm start does not read gigabytes again."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
import warnings

from data.peers import Peers

CHUNK_BYTES = 4 << 20
SETTLED_NS = 2_000_000_000
"""A file changed this recently may change again within the clock's grain: its hash is used but not kept."""

Memo = dict[str, tuple[int, int, str]]
"""Absolute path -> (size, mtime_ns, digest)"""


def hash_files(paths: list[str], cache_dir: str, peers: Peers) -> list[str]:
    """Content hash of each file, in order; unknown ones are read by all ranks, each its share.

    Args:
        paths: files, the same on every rank.
        cache_dir: where the memo is kept.
    """
    stats = peers.from_first(lambda: [_stamp(path) for path in paths])
    memo = peers.from_first(lambda: _read_memo(cache_dir))
    known: dict[int, str] = {}
    for index, (path, (size, changed)) in enumerate(zip(paths, stats, strict=True)):
        entry = memo.get(os.path.abspath(path))
        if entry is not None and tuple(entry[:2]) == (size, changed):
            known[index] = entry[2]
    unknown = sorted((index for index in range(len(paths)) if index not in known), key=lambda i: -stats[i][0])
    mine = unknown[peers.rank :: peers.world]
    for part in peers.run(lambda: {index: hash_file(paths[index]) for index in mine}):
        known.update(part)
    if unknown:
        entries = {os.path.abspath(paths[index]): (*stats[index], known[index]) for index in unknown}
        peers.from_first(lambda: _keep(cache_dir, entries))
    return [known[index] for index in range(len(paths))]


def hash_file(path: str) -> str:
    """BLAKE2b of a file's content, 128 bits, hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _stamp(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def _read_memo(cache_dir: str) -> Memo:
    try:
        with open(os.path.join(cache_dir, "hashes.json"), encoding="utf-8") as stream:
            memo = json.load(stream)
    except (OSError, ValueError):
        return {}  # no memo, a damaged or an unreachable one: files are hashed again, and writing the cache tells
    return memo if isinstance(memo, dict) else {}


def _keep(cache_dir: str, entries: Memo) -> None:
    """Add what has settled to the memo; without a memo the next start is only slower, so that is worth a warning."""
    now = time.time_ns()
    settled = {path: entry for path, entry in entries.items() if now - entry[1] > SETTLED_NS}
    try:
        if settled:
            _write_memo(cache_dir, {**_read_memo(cache_dir), **settled})
    except OSError as err:
        warnings.warn(f"data.cache_dir={cache_dir}: content hashes cannot be kept ({err})", stacklevel=2)


def _write_memo(cache_dir: str, memo: Memo) -> None:
    """Atomic; of two runs that write at once one wins, and the other's files are only hashed once more."""
    os.makedirs(cache_dir, exist_ok=True)
    part = os.path.join(cache_dir, f".hashes-{uuid.uuid4().hex}")
    with open(part, "w", encoding="utf-8") as stream:
        json.dump(memo, stream)
    os.replace(part, os.path.join(cache_dir, "hashes.json"))
