"""The data gate: what every channel brings, told before step 1, and the reasons not to start."""

from __future__ import annotations

from itertools import islice

import numpy as np

from data.cache_files import TokenCache
from data.kinds import KindName
from data.order import RowOrder
from data.report import ChannelReport, GateReport
from data.samples import Kept

SHOWN_BAD_ROWS = 5


class GateError(ValueError):
    """The data do not pass; `report` has the whole picture (and the bad rows, for the side file)."""

    def __init__(self, message: str, report: GateReport) -> None:
        super().__init__(message)
        self.report = report


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
            large_pictures=int(train.large_C[c] + held.large_C[c]),
            pictures=int(train.pictures_C[c]),
            videos=int(train.videos_C[c]),
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


def _round_up(fraction: float) -> float:
    return min(1.0, float(np.ceil(fraction * 1000) / 1000))
