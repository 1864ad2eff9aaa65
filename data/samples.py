"""From samples in caches to pieces that fit in a row: channels, the held-out split, cutting and truncation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.cache_files import TokenCache
from data.encode import CUT, DROP, TRUNCATE
from data.notes import EMPTY, EQUAL, FINE
from data.order import Pieces

HOLD_OUT, CHANNEL = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
"""Salts: which samples are held out has nothing to do with which random channel they get."""


@dataclass(frozen=True)
class Kept:
    """The pieces of one side (training or held out), and what was lost on the way, per channel [C]."""

    pieces: Pieces
    samples_C: np.ndarray
    """Samples, the fully masked ones included."""
    masked_C: np.ndarray
    """Samples of which nothing is learnt (before or after truncation); they are dropped."""
    truncated_C: np.ndarray
    """Samples that lost their end."""
    turns_C: np.ndarray
    """Endings to learn."""
    stops_C: np.ndarray
    """Of them with a learnt stop token."""
    too_long_C: np.ndarray
    """Pairs and prompts that do not fit; they are dropped."""
    equal_C: np.ndarray
    """Pairs whose two documents are the same; they are dropped."""
    empty_C: np.ndarray
    """Pairs and judged answers with nothing to learn in an answer; they are dropped."""
    large_C: np.ndarray
    """Samples with a picture that alone is longer than a row; they are dropped."""
    desirable_C: np.ndarray
    """Judged answers that were found good."""
    pictures_C: np.ndarray
    """Pictures."""
    videos_C: np.ndarray
    """Videos."""
    longest: int
    """Tokens of the longest sample that was dropped because it does not fit; 0 if none was."""


COUNTS = ("samples_C", "masked_C", "truncated_C", "turns_C", "stops_C")
COUNTS += ("too_long_C", "equal_C", "empty_C", "large_C", "desirable_C", "pictures_C", "videos_C")


def channel_names(caches: list[TokenCache], random_channels: int) -> tuple[str, ...]:
    """All channels, in the order of sources and rows."""
    if random_channels:
        return tuple(f"random_{index}" for index in range(random_channels))
    return tuple(dict.fromkeys(name for cache in caches for name in cache.channels))


def sample_channels(cache: TokenCache, channels: tuple[str, ...], random_channels: int, seed: int) -> np.ndarray:
    """Channel of every sample of a cache, int64 [S]."""
    if random_channels:
        salt = (CHANNEL + seed * HOLD_OUT) % (1 << 64)
        return (_mix(cache.samples["hash"], salt) % np.uint64(random_channels)).astype(np.int64)
    own = np.array([channels.index(name) for name in cache.channels], dtype=np.int64)
    return own[cache.samples["channel"]] if len(own) else np.zeros(0, dtype=np.int64)


def held_out(cache: TokenCache, fraction: float) -> np.ndarray:
    """Which samples are held out, bool [S]: by content alone, so a sample stays on its side when data move or grow."""
    if fraction == 0:
        return np.zeros(cache.num_samples, dtype=bool)
    return _mix(cache.samples["hash"], HOLD_OUT) < np.uint64(fraction * 2.0**64)


def keep(
    caches: list[TokenCache], chosen: list[np.ndarray], channel_of: list[np.ndarray], num_channels: int, seq_len: int
) -> Kept:
    """Cut the chosen samples of all caches into pieces of at most seq_len tokens.

    Documents are cut into consecutive pieces, so nothing is lost; conversations and completions keep their beginning;
    a pair is one piece or none. No cut goes through a picture: it falls before it.

    Args:
        chosen: bool [S] of each cache.
        channel_of: int64 [S] of each cache.
    """
    parts = [
        _keep_one(*each, num_channels, seq_len)
        for each in zip(range(len(caches)), caches, chosen, channel_of, strict=True)
    ]
    if not parts:
        none, zero = np.zeros(0, dtype=np.int64), np.zeros(num_channels, dtype=np.int64)
        return Kept(Pieces(none, none, none, none, none, none, none), **dict.fromkeys(COUNTS, zero), longest=0)
    names = ("source_P", "sample_P", "start_P", "length_P", "targets_P", "channel_P", "patches_P")
    joined = {name: np.concatenate([getattr(part.pieces, name) for part in parts]) for name in names}
    sums = {name: np.sum([getattr(part, name) for part in parts], axis=0) for name in COUNTS}
    return Kept(Pieces(**joined), **sums, longest=max(part.longest for part in parts))


def _keep_one(
    number: int, cache: TokenCache, chosen_S: np.ndarray, channel_S: np.ndarray, num_channels: int, seq_len: int
) -> Kept:
    samples = np.flatnonzero(chosen_S)
    table = cache.samples[samples]
    channel = channel_S[samples]
    length, targets = table["length"].copy(), table["targets"].copy()
    turns, stops = table["turns"].astype(np.int64), table["stops"].astype(np.int64)
    truncated = (length > seq_len) & (table["too_long"] == TRUNCATE)
    length[truncated] = seq_len
    for index in np.flatnonzero(truncated):
        length[index] = cut_before(cache, int(samples[index]), 0, seq_len)
        learn_L = cache.learn(int(samples[index]), 0, max(1, int(length[index])))
        targets[index] = learn_L[1:].sum()
        begun = int(learn_L[0]) + int((learn_L[1:] & ~learn_L[:-1]).sum())
        turns[index], stops[index] = begun, min(stops[index], begun - int(learn_L[-1]))  # the cut turn never stops
    faults = dropped_for(cache, samples, seq_len)
    masked = (targets == 0) & (cache.kind != "prompts") & np.logical_not(np.any(list(faults.values()), axis=0))
    # A document of one token teaches nothing either, but it is not masked: there is nothing before it.
    masked &= (table["turns"] == 0) | (table["too_long"] != CUT)

    def count(values: np.ndarray) -> np.ndarray:
        return np.bincount(channel, weights=values, minlength=num_channels).astype(np.int64)

    alive = np.flatnonzero(~np.any([masked, *faults.values()], axis=0))
    cuts = {
        int(i): _cuts(cache, int(samples[i]), int(length[i]), seq_len)
        for i in _around_pictures(cache, samples, alive, length, seq_len)
    }
    num_pieces = -(-length[alive] // seq_len)
    if cuts:
        num_pieces = np.array(
            [len(cuts[i]) if i in cuts else n for i, n in zip(alive.tolist(), num_pieces, strict=True)]
        )
    owner = np.repeat(alive, num_pieces)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    start = nth * seq_len
    piece_length = np.minimum(length[owner] - start, seq_len)
    several = np.repeat(num_pieces, num_pieces) > 1
    piece_targets = np.where(several, piece_length - 1, targets[owner])  # only documents are cut: all of it is learnt
    for index, parts in cuts.items():
        mine = owner == index
        start[mine], piece_length[mine] = np.array(parts).T
        piece_targets[mine] = [int(cache.learn(int(samples[index]), *part)[1:].sum()) for part in parts]
    pieces = Pieces(
        source_P=np.full(len(owner), number, dtype=np.int64),
        sample_P=samples[owner],
        start_P=start,
        length_P=piece_length,
        targets_P=piece_targets,
        channel_P=channel[owner],
        patches_P=_patches(cache, samples[owner], start, piece_length),
    )
    good = np.zeros(len(samples))
    if cache.notes is not None and cache.kind == "unpaired":
        good = cache.notes["value"][samples]
    counted = {"samples": np.ones(len(samples)), "masked": masked, "truncated": truncated, "turns": turns}
    shown = cache.pictures.records
    seen, videos = (
        np.bincount(part["sample"], minlength=cache.num_samples)[samples]
        for part in (shown[shown["frames"] == 0], shown[(shown["frames"] > 0) & (shown["frame"] == 0)])
    )
    counted |= {"stops": stops, "desirable": good, "pictures": seen, "videos": videos, **faults}
    longest = int(length[faults["too_long"]].max(initial=0))
    return Kept(pieces, **{f"{name}_C": count(values) for name, values in counted.items()}, longest=longest)


def dropped_for(cache: TokenCache, samples: np.ndarray, seq_len: int) -> dict[str, np.ndarray]:
    """Which of the samples are left out whole, by reason: bool [len(samples)] each; a sample has at most one."""
    table = cache.samples[samples]
    fault = np.zeros(len(samples), dtype=np.int32) if cache.notes is None else cache.notes["fault"][samples]
    too_long = (table["length"] > seq_len) & (table["too_long"] == DROP) & (fault == FINE)
    large = np.zeros(len(samples), dtype=bool)
    if len(cache.pictures):
        large = np.isin(samples, too_large(cache, seq_len)["sample"]) & (fault == FINE) & ~too_long
    return {"too_long": too_long, "equal": fault == EQUAL, "empty": fault == EMPTY, "large": large}


def too_large(cache: TokenCache, seq_len: int) -> np.ndarray:
    """The records of pictures that are longer than a row."""
    records = cache.pictures.records
    return records[records["before"] + records["tokens"] + records["after"] > seq_len]


def cut_before(cache: TokenCache, sample: int, start: int, stop: int) -> int:
    """The last place in (start, stop] at which the sample can be cut without cutting a picture; start if there is
    none."""
    for record in cache.pictures.of(sample):
        first = int(record["start"] - record["before"])
        if first < stop < int(record["start"] + record["tokens"] + record["after"]):
            return max(start, first)
    return stop


def _around_pictures(
    cache: TokenCache, samples: np.ndarray, alive: np.ndarray, length: np.ndarray, seq_len: int
) -> np.ndarray:  # fmt: skip
    """Which of the samples are cut in pieces and have pictures."""
    if not len(cache.pictures):
        return np.zeros(0, dtype=np.int64)
    long = alive[length[alive] > seq_len]
    return long[np.isin(samples[long], cache.pictures.records["sample"])]


def _cuts(cache: TokenCache, sample: int, length: int, seq_len: int) -> list[tuple[int, int]]:
    """(start, length) of the pieces of a document with pictures, none of which is longer than a row."""
    pieces, start = [], 0
    while start < length:
        stop = cut_before(cache, sample, start, min(start + seq_len, length))
        assert stop > start, "a picture longer than a row was let through"
        pieces.append((start, stop - start))
        start = stop
    return pieces


def _patches(cache: TokenCache, sample_P: np.ndarray, start_P: np.ndarray, length_P: np.ndarray) -> np.ndarray:
    """Patches of the pictures in each piece."""
    if not len(cache.pictures):
        return np.zeros(len(sample_P), dtype=np.int64)
    spans = zip(sample_P.tolist(), start_P.tolist(), length_P.tolist(), strict=True)
    return np.array([cache.pictures.of(n, at, at + size)["patches"].sum() for n, at, size in spans], dtype=np.int64)


def _mix(hash_S: np.ndarray, salt: int) -> np.ndarray:
    """SplitMix64 of hash + salt (Steele, Lea, Flood 2014): independent-looking 64-bit values."""
    with np.errstate(over="ignore"):
        z = hash_S + np.uint64(salt)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
