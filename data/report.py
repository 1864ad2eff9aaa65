"""What every channel brings, as the table before step 1 and the numbers of data_report.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import numpy as np

from data.cache_files import BadRow, TokenCache
from data.kinds import KindName
from data.samples import dropped_for, too_large

Column = Callable[["ChannelReport"], str]

LIMITS: dict[KindName, str] = {"prompts": "rollout.max_prompt_tokens"}
"""The key that says how long a sample may be, where it is not data.seq_len."""

DROPPED: dict[KindName, str] = {"preference": "pairs", "unpaired": "judged answers", "prompts": "prompts"}
"""What is left out whole."""

REASONS = {
    "too_long": "{what} {tokens} tokens, more than {limit}={seq_len}",
    "equal": "chosen and rejected are the same",
    "empty": "an answer is empty: it has nothing to learn",
    "large": "a {what} alone takes {picture} tokens, more than {limit}={seq_len}",
}


@dataclass(frozen=True)
class ChannelReport:
    """One channel, before step 1."""

    channel: str
    samples: int
    """Training samples of the sources, the fully masked ones included."""
    tokens: int
    """Tokens kept, each sample once."""
    supervised_tokens: int
    """Tokens that are the target of some position, each sample once."""
    fully_masked_rows: int
    """Samples of which nothing is learnt: dropped."""
    truncated_rows: int
    """Conversations and completions longer than data.seq_len: they lost their end."""
    stop_supervised: str
    """yes | partly | no: is the stop token learnt at the end of every answer (or text)."""
    packing_efficiency: float
    """How full the rows are in which the channel's tokens sit (mean over its tokens, first epoch), 0..1."""
    weight_share: float
    """The channel's part of the tokens of the first epoch, 0..1, weights applied."""
    eval_samples: int
    """Samples held out or from eval_sources."""
    equal_pairs: int = 0
    """Pairs whose two answers are the same tokens: dropped."""
    empty_answers: int = 0
    """Pairs and judged answers with an answer that has no text or nothing to learn: dropped."""
    too_long_pairs: int = 0
    """Pairs that do not fit in a row together: dropped, because half a pair says nothing. Of prompts, those longer than
    rollout.max_prompt_tokens."""
    desirable: int = 0
    """Judged answers that were found good."""
    large_pictures: int = 0
    """Samples with a picture that alone is longer than a row: dropped."""
    pictures: int = 0
    """Pictures in the training samples."""
    videos: int = 0
    """Videos in them."""


@dataclass(frozen=True)
class GateReport:
    """All channels, and the malformed rows of all sources."""

    channels: tuple[ChannelReport, ...]
    rows_per_epoch: int
    packing_efficiency: float
    """Tokens / (rows x seq_len) of the first epoch."""
    bad_row_count: int
    caches: tuple[TokenCache, ...] = field(repr=False)
    seq_len: int = 0
    longest_dropped: int = 0
    """Tokens of the longest pair that was dropped for its length; 0 if none was."""
    kind: KindName = "text"

    @property
    def limit(self) -> str:
        """The key that says how long a sample may be."""
        return LIMITS.get(self.kind, "data.seq_len")

    def bad_rows(self) -> Iterator[BadRow]:
        """Every malformed row, source after source, then the well-formed samples that are dropped whole."""
        for cache in self.caches:
            yield from cache.bad_rows()
            yield from self._large(cache)
        for cache in (cache for cache in self.caches if cache.notes is not None):
            what = "the prompt has" if self.kind == "prompts" else "the two documents together have"
            dropped = dropped_for(cache, np.arange(cache.num_samples), self.seq_len)
            for name, found_S in ((name, found_S) for name, found_S in dropped.items() if name != "large"):
                for sample in np.flatnonzero(found_S).tolist():
                    tokens = int(cache.samples["length"][sample])
                    said = {"what": what, "tokens": tokens, "limit": self.limit, "seq_len": self.seq_len}
                    yield cache.place(sample, REASONS[name].format(**said))

    def _large(self, cache: TokenCache) -> Iterator[BadRow]:
        """Rows with a picture that does not fit."""
        for record in too_large(cache, self.seq_len):
            if record["frame"]:
                continue  # told with the first frame of its video
            what, tokens = ("video", _whole(record)) if record["frames"] else ("picture", int(record["tokens"]))
            said = {"what": what, "picture": tokens, "limit": self.limit, "seq_len": self.seq_len}
            yield cache.place_of_picture(record, REASONS["large"].format(**said))

    def write_bad_rows(self, path: str) -> None:
        """Write a JSON line {file, line, reason} for every malformed or dropped row; replaces the file at once."""
        part = f"{path}.part"
        with open(part, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(asdict(row)) + "\n" for row in self.bad_rows())
        os.replace(part, path)

    def to_dict(self) -> dict[str, object]:
        """Plain values for data_report.json."""
        return {
            "channels": [asdict(channel) for channel in self.channels],
            "rows_per_epoch": self.rows_per_epoch,
            "packing_efficiency": self.packing_efficiency,
            "bad_rows": self.bad_row_count,
        }

    def __str__(self) -> str:
        columns = COLUMNS[self.kind]
        seen = {name: show for name, show in _SEEN.items() if any(getattr(each, name) for each in self.channels)}
        if seen:
            columns = {**_FIRST, **seen, **{name: show for name, show in columns.items() if name not in _FIRST}}
        lines = [tuple(columns), *(tuple(show(channel) for show in columns.values()) for channel in self.channels)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
        table = [
            "  ".join(
                cell.ljust(w) if not column else cell.rjust(w)
                for column, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        full, bad = self.packing_efficiency, self.bad_row_count
        rows = f"{self.rows_per_epoch:,} rows an epoch, {full:.1%} full"
        if self.kind == "prompts":
            rows = f"{self.rows_per_epoch:,} prompts an epoch"
        foot = f"{rows}; {bad:,} bad rows{self._dropped()}"
        return "\n".join([*table, foot])

    def _dropped(self) -> str:
        """What was left out although its rows are well formed, and what would keep it."""
        reasons = []
        if too_long := sum(channel.too_long_pairs for channel in self.channels):
            keep = f"{self.limit}={self.longest_dropped} keeps all"
            reasons.append(f"{too_long:,} longer than {self.limit}={self.seq_len} ({keep})")
        if equal := sum(channel.equal_pairs for channel in self.channels):
            reasons.append(f"{equal:,} with equal answers")
        if empty := sum(channel.empty_answers for channel in self.channels):
            reasons.append(f"{empty:,} with an empty answer")
        if large := sum(channel.large_pictures for channel in self.channels):
            reasons.append(f"{large:,} with a picture or video longer than {self.limit}={self.seq_len}")
        return f"; dropped {DROPPED.get(self.kind, 'samples')}: {', '.join(reasons)}" if reasons else ""


def _whole(record: np.void) -> int:
    """Tokens of a picture or video with those around it."""
    return int(record["before"] + record["tokens"] + record["after"])


_FIRST: dict[str, Column] = {
    "channel": lambda channel: channel.channel,
    "samples": lambda channel: f"{channel.samples:,}",
    "tokens": lambda channel: f"{channel.tokens:,}",
    "supervised": lambda channel: f"{channel.supervised_tokens:,}",
}
_SEEN: dict[str, Column] = {
    "pictures": lambda channel: f"{channel.pictures:,}",
    "videos": lambda channel: f"{channel.videos:,}",
}
_LOST: dict[str, Column] = {
    "masked rows": lambda channel: f"{channel.fully_masked_rows:,}",
    "truncated": lambda channel: f"{channel.truncated_rows:,}",
}
_EMPTY: dict[str, Column] = {"empty": lambda channel: f"{channel.empty_answers:,}"}
_SHARES: dict[str, Column] = {
    "share": lambda channel: f"{channel.weight_share:.1%}",
    "eval": lambda channel: f"{channel.eval_samples:,}",
}
_LAST: dict[str, Column] = {
    "stop": lambda channel: channel.stop_supervised,
    "packed": lambda channel: f"{channel.packing_efficiency:.1%}",
    **_SHARES,
}
_TOO_LONG: dict[str, Column] = {"too long": lambda channel: f"{channel.too_long_pairs:,}"}
_PAIRS: dict[str, Column] = {"equal": lambda channel: f"{channel.equal_pairs:,}", **_EMPTY, **_TOO_LONG}
_GOOD: dict[str, Column] = {"good": lambda channel: f"{channel.desirable:,}"}
COLUMNS: dict[KindName, dict[str, Column]] = {
    "text": {**_FIRST, **_LOST, **_LAST},
    "preference": {**_FIRST, **_PAIRS, **_LAST},
    "unpaired": {**_FIRST, **_GOOD, **_LOST, **_EMPTY, **_LAST},
    "prompts": {**{name: _FIRST[name] for name in ("channel", "samples", "tokens")}, **_TOO_LONG, **_SHARES},
    "captions": {**_FIRST, "truncated": _LOST["truncated"], **_SHARES},
}
"""The table's columns, and how each is shown."""
