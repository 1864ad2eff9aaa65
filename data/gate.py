"""The data gate: what every channel brings, told before step 1, and the reasons not to start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

import numpy as np

from data.cache_files import BadRow, TokenCache
from data.kinds import KindName
from data.order import RowOrder
from data.samples import Kept, dropped_for

SHOWN_BAD_ROWS = 5

Column = Callable[["ChannelReport"], str]


LIMITS: dict[KindName, str] = {"prompts": "rollout.max_prompt_tokens"}
"""The key that says how long a sample may be, where it is not data.seq_len."""

DROPPED: dict[KindName, str] = {"preference": "pairs", "unpaired": "judged answers", "prompts": "prompts"}
"""What is left out whole."""

REASONS = {
    "too_long": "{what} {tokens} tokens, more than {limit}={seq_len}",
    "equal": "chosen and rejected are the same",
    "empty": "an answer is empty: it has nothing to learn",
}


class GateError(ValueError):
    """The data do not pass; `report` has the whole picture (and the bad rows, for the side file)."""

    def __init__(self, message: str, report: GateReport) -> None:
        super().__init__(message)
        self.report = report


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
        """Every malformed row, source after source, then the well-formed pairs and judged answers that are dropped."""
        for cache in self.caches:
            yield from cache.bad_rows()
        for cache in (cache for cache in self.caches if cache.notes is not None):
            what = "the prompt has" if self.kind == "prompts" else "the two documents together have"
            for name, found_S in dropped_for(cache, np.arange(cache.num_samples), self.seq_len).items():
                for sample in np.flatnonzero(found_S).tolist():
                    tokens = int(cache.samples["length"][sample])
                    said = {"what": what, "tokens": tokens, "limit": self.limit, "seq_len": self.seq_len}
                    yield cache.place(sample, REASONS[name].format(**said))

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
        return f"; dropped {DROPPED[self.kind]}: {', '.join(reasons)}" if reasons else ""


def make_report(
    channels: tuple[str, ...],
    train: Kept,
    held: Kept,
    order: RowOrder,
    caches: tuple[TokenCache, ...],
    kind: KindName = "text",
) -> GateReport:
    """Count what an epoch holds. Every rank computes the same report."""
    pieces, num = train.pieces, len(channels)

    def per_channel(index_P: np.ndarray, values_P: np.ndarray) -> np.ndarray:
        return np.bincount(index_P, weights=values_P, minlength=num)

    tokens_C = per_channel(pieces.channel_P, pieces.length_P)
    targets_C = per_channel(pieces.channel_P, pieces.targets_P)
    drawn_C, filled_C, num_rows, fill = np.zeros(num), np.zeros(num), 0, 0.0
    if _draws_anything(train, order):
        epoch = order.epoch(0)
        num_rows = len(epoch)
        row_P = np.repeat(np.arange(num_rows), np.diff(epoch.starts))
        length_P, channel_P = pieces.length_P[epoch.pieces], pieces.channel_P[epoch.pieces]
        fill_R = np.bincount(row_P, weights=length_P) / order.seq_len
        fill = float(fill_R.mean())
        drawn_C = per_channel(channel_P, length_P)
        filled_C = per_channel(channel_P, length_P * fill_R[row_P])
    reports = tuple(
        ChannelReport(
            channel=name,
            samples=int(train.samples_C[c]),
            tokens=int(tokens_C[c]),
            supervised_tokens=int(targets_C[c]),
            fully_masked_rows=int(train.masked_C[c]),
            truncated_rows=int(train.truncated_C[c]),
            stop_supervised=_stop(int(train.turns_C[c]), int(train.stops_C[c])),
            packing_efficiency=float(filled_C[c] / drawn_C[c]) if drawn_C[c] else 0.0,
            weight_share=float(drawn_C[c] / drawn_C.sum()) if drawn_C.sum() else 0.0,
            eval_samples=int(held.samples_C[c] - held.equal_C[c] - held.empty_C[c] - held.too_long_C[c]),
            equal_pairs=int(train.equal_C[c] + held.equal_C[c]),
            empty_answers=int(train.empty_C[c] + held.empty_C[c]),
            too_long_pairs=int(train.too_long_C[c] + held.too_long_C[c]),
            desirable=int(train.desirable_C[c]),
        )
        for c, name in enumerate(channels)
    )
    num_bad, longest = sum(cache.num_bad for cache in caches), max(train.longest, held.longest)
    return GateReport(reports, num_rows, fill, num_bad, caches, order.seq_len, longest, kind)


def check(report: GateReport, keys: list[tuple[str, str]], max_bad_fraction: float, loss_on: str) -> None:
    """Stop the run if the data are not what training needs.

    Args:
        keys: (config key, path) of each cache of the report.
        loss_on: what is learnt, for the likely reason.

    Raises:
        GateError: everything that is wrong, in one message, the table below it.
    """
    wrong = []
    for (key, path), cache in zip(keys, report.caches, strict=True):
        wrong += _source_problems(key, path, cache, max_bad_fraction)
    for channel in report.channels:
        if channel.samples and not (channel.tokens if report.kind == "prompts" else channel.supervised_tokens):
            wrong.append(_nothing_learnt(channel, report, keys, loss_on))
    if not wrong and not report.rows_per_epoch:
        wrong.append(
            "no sample is left to train on: all are held out (data.eval_fraction) or have data.sources[*].weight 0"
        )
    if wrong:
        raise GateError("the data do not pass the gate:\n- " + "\n- ".join(wrong) + f"\n{report}", report)


def _source_problems(key: str, path: str, cache: TokenCache, max_bad_fraction: float) -> list[str]:
    rows = cache.num_bad + cache.num_samples
    if rows == 0:
        return [f"{key}.path={path} is empty: it has no rows; correct the path or remove the source"]
    if cache.num_samples and cache.num_bad <= max_bad_fraction * rows:
        return []
    shown = [f"\n    {row.file}:{row.line}: {row.reason}" for row in islice(cache.bad_rows(), SHOWN_BAD_ROWS)]
    more = f"\n    and {cache.num_bad - len(shown)} more" if cache.num_bad > len(shown) else ""
    if not cache.num_samples:
        reason, way_out = "all are malformed", f"correct them or {key}.format"
    else:
        reason = f"{cache.num_bad / rows:.2%} is more than data.max_bad_fraction={max_bad_fraction:g} allows"
        way_out = f"correct them or set data.max_bad_fraction={_round_up(cache.num_bad / rows)} to go on without them"
    return [
        f"{key}.path={path}: {cache.num_bad} of {rows} rows are malformed: {reason}; {way_out}{''.join(shown)}{more}"
    ]


def _nothing_learnt(channel: ChannelReport, report: GateReport, keys: list[tuple[str, str]], loss_on: str) -> str:
    what = "prompt left" if report.kind == "prompts" else "supervised token"
    seq_len, longest = report.seq_len, report.longest_dropped
    sources = zip(keys, report.caches, strict=True)
    found = [(*source, cache) for source, cache in sources if channel.channel in cache.channels]
    where = ", ".join(f"{key}.path={path}" for key, path, _ in found) or "data.random_channels"
    tail = found[0][2].example(channel.channel) if found else ""
    if channel.equal_pairs + channel.empty_answers + channel.too_long_pairs:
        reason = (
            f"{channel.equal_pairs} have equal answers, {channel.empty_answers} an empty answer, "
            f"{channel.too_long_pairs} are longer than {report.limit}={seq_len}"
        )
        if report.kind == "prompts":
            reason = f"all are longer than {report.limit}={seq_len}"
        if channel.too_long_pairs:
            reason += f"; set {report.limit}={longest}"
    elif channel.truncated_rows == channel.samples:
        reason = f"every row is cut at data.seq_len={seq_len} before its first answer; raise data.seq_len"
    elif found and loss_on == "assistant" and all(_is_text(cache) for _, _, cache in found):
        reason = "it is plain text, which has no assistant turns; set stage.loss_on=all or use format=prompt_completion"
    else:
        reason = "its conversations have no assistant turn with a next token; check the roles and the chat template"
    return (
        f"channel {channel.channel} ({where}) has no {what} in {channel.samples} samples: {reason}; "
        f"its first text ends with {tail[-120:]!r}"
    )


def _is_text(cache: TokenCache) -> bool:
    return not cache.samples["too_long"].any() and not cache.samples["turns"].any()


def _draws_anything(train: Kept, order: RowOrder) -> bool:
    """Whether the first epoch has a row: a source of weight 0 or a rounded-away share gives none."""
    return any(len(order.draw(0, source)) for source in range(len(order.weights))) if len(train.pieces) else False


def _stop(turns: int, stops: int) -> str:
    if stops == 0:
        return "no"
    return "yes" if stops >= turns else "partly"


_FIRST: dict[str, Column] = {
    "channel": lambda channel: channel.channel,
    "samples": lambda channel: f"{channel.samples:,}",
    "tokens": lambda channel: f"{channel.tokens:,}",
    "supervised": lambda channel: f"{channel.supervised_tokens:,}",
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
}
"""The table's columns, and how each is shown."""


def _round_up(fraction: float) -> float:
    return min(1.0, float(np.ceil(fraction * 1000) / 1000))
