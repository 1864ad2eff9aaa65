"""The one calm line of a step: which numbers, in which order, in how many columns."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

from tqdm.utils import disp_len

# Intervals the remaining time is judged by, and the columns of a line that no terminal limits (file or pipe).
_ETA_WINDOW = 50
PLAIN_WIDTH = 180


class Eta:
    """Remaining time from the median step duration of the last 50 intervals.

    The interval that ends at the first observed step is left out: it holds compilation, warm caches and the start-up.
    The median makes one evaluation, save or stall weigh nothing; their own time is therefore not part of the estimate.
    """

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._last: tuple[int, float] | None = None
        self._step_seconds: deque[float] = deque(maxlen=_ETA_WINDOW)

    def observe(self, step: int, now: float) -> None:
        """Record that ``step`` ended at ``now`` (seconds of a monotonic clock)."""
        if self._last is not None and step > self._last[0]:
            self._step_seconds.append((now - self._last[1]) / (step - self._last[0]))
        self._last = (step, now)

    def seconds_left(self) -> float | None:
        """Seconds until the last step, None before two steps were observed."""
        if self._last is None or not self._step_seconds:
            return None
        return statistics.median(self._step_seconds) * max(self._total - self._last[0], 0)


def duration(seconds: float) -> str:
    """``45s``, ``12m30s``, ``3h05m`` or ``2d04h``."""
    whole = max(round(seconds), 0)
    minutes, secs = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def _loss(value: float) -> str:
    """Four decimals; what is not finite says so in capitals, because it ends a run."""
    return f"{value:.4f}" if math.isfinite(value) else str(value).upper()


def _rate(value: float) -> str:
    """Thousands with a comma, from 100,000 on in k, from ten million on in M."""
    if value >= 1e7:
        return f"{value / 1e6:.1f}M"
    return f"{value / 1e3:.1f}k" if value >= 1e5 else f"{value:,.0f}"


def _flops(metrics: Mapping[str, float]) -> str | None:
    """Model FLOP utilisation where the device's peak is known, else achieved FLOP/s per device."""
    if "perf/mfu" in metrics:
        return f"MFU {100 * metrics['perf/mfu']:.1f}%"
    if "perf/tflops" not in metrics:
        return None
    tflops = metrics["perf/tflops"]
    return f"{tflops:.1f} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.1f} GFLOP/s"


def _of_channels(metrics: Mapping[str, float], prefix: str, what: str) -> list[str]:
    """``<name> <loss>`` (or reward) of every channel below ``prefix``, in the order of the metrics."""
    found = []
    for key, value in metrics.items():
        name = key.removeprefix(prefix).removesuffix(f"/{what}")
        if key == f"{prefix}{name}/{what}":
            printable = "".join(char if char.isprintable() else "?" for char in name)
            found.append(f"{printable} {_loss(value)}")
    return found


def _fit_channels(channels: list[str], room: int) -> str:
    """As many channels as fit into ``room`` columns, the rest counted: ``[code 1.20  math 2.11  +3]``."""
    for shown in range(len(channels), 0, -1):
        rest = [f"+{len(channels) - shown}"] if shown < len(channels) else []
        text = "[" + "  ".join(channels[:shown] + rest) + "]"
        if disp_len(text) <= room:
            return text
    text = f"[+{len(channels)}]"
    return text if channels and len(text) <= room else ""


def _assemble(head: list[str], channels: list[str], tail: list[tuple[int, str | None]], width: int) -> str:
    """Join the parts by two spaces within ``width`` columns.

    ``tail`` holds (importance, text); in a narrow terminal the least important leave first, then channels are counted
    instead of shown. The head always stays.
    """
    kept = [(importance, text) for importance, text in tail if text is not None]

    def columns() -> int:
        return len("  ".join([*head, *(text for _, text in kept)]))

    while kept and columns() > width:
        kept.remove(min(kept, key=lambda part: part[0]))
    shown = _fit_channels(channels, width - columns() - 2)
    return "  ".join([*head, *([shown] if shown else []), *(text for _, text in kept)])


def _head(word: str, step: int, total_steps: int) -> str:
    return f"{word} {step:>{len(str(total_steps))}}/{total_steps}"


def step_line(
    step: int, total_steps: int, metrics: Mapping[str, float], seconds_left: float | None, width: int = PLAIN_WIDTH
) -> str:
    """The line of one training step, at most ``width`` columns (longer only if step and loss alone need more)."""
    head = [_head("step", step, total_steps)]
    shown = "reward" if "rollout/reward" in metrics else "loss"
    if shown == "reward":
        head.append(f"reward {_loss(metrics['rollout/reward'])}")
    if "train/loss" in metrics:
        head.append(f"loss {_loss(metrics['train/loss'])}")
    channels = _of_channels(metrics, "channel/", shown)

    def part(key: str, template: str) -> str | None:
        return template.format(metrics[key]) if key in metrics else None

    speed = f"{_rate(metrics['perf/tokens_per_s'])} tok/s" if "perf/tokens_per_s" in metrics else None
    tail = [
        (4, part("train/grad_norm", "norm {:.3f}")),
        (3, part("train/lr", "lr {:.2e}")),
        (5, speed),
        (2, _flops(metrics)),
        (1, f"idle {metrics['perf/pipeline_idle']:.0%}" if "perf/pipeline_idle" in metrics else None),
        (1, f"wait {metrics['perf/data_wait']:.0%}" if "perf/data_wait" in metrics else None),
        (1, part("perf/memory_gib", "mem {:.1f}G")),
        (6, f"left {duration(seconds_left)}" if seconds_left is not None else None),
    ]
    return _assemble(head, channels, tail, width)


def eval_line(step: int, total_steps: int, metrics: Mapping[str, float], width: int = PLAIN_WIDTH) -> str:
    """The line of one evaluation: held-out loss and perplexity, or reward, and that of each channel."""
    head = [_head("eval", step, total_steps)]
    shown = "reward" if "eval/reward" in metrics else "loss"
    if shown == "reward":
        head.append(f"reward {_loss(metrics['eval/reward'])}")
    if "eval/loss" in metrics:
        head.append(f"loss {_loss(metrics['eval/loss'])}")
    if "eval/perplexity" in metrics:
        head.append(f"ppl {metrics['eval/perplexity']:.4g}")
    for found in ("caption@1", "picture@1"):
        if f"eval/{found}" in metrics:
            head.append(f"{found} {metrics[f'eval/{found}']:.1%}")
    channels = _of_channels(metrics, "eval/", shown)
    return _assemble(head, channels, [], width)
