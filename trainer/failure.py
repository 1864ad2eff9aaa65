"""How a run ends when something goes wrong: the rank that failed speaks first, the others stay quiet."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from parallel.watch import peer_gone

MAIN_FIRST_S = 3.0
"""A mistake in the config is found by every rank; the launcher ends the others while they wait this long."""

CAUSE_FIRST_S = 5.0


@contextmanager
def told_clearly(rank: int) -> Iterator[None]:
    """Turn an error into one message and an exit code: 2 for the user's mistake, 1 for anything else.

    A ``ValueError`` is shown without a traceback. Rank 0 speaks at once, the others a moment later, so that a mistake
    all of them found is told once: the launcher stops every rank as soon as the first has left.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        if rank:
            time.sleep(MAIN_FIRST_S)
        _say(rank, f"{error}")
        sys.exit(2)
    except Exception as error:
        if peer_gone(error):  # outside the time in which a watch runs: that one ends the job with a page
            time.sleep(CAUSE_FIRST_S)
            _say(rank, f"stopped, because another rank left or did not answer ({_first_line(error)})")
        else:
            _say(rank, traceback.format_exc())
        sys.exit(1)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _say(rank: int, text: str) -> None:
    print(f"\nrank {rank}: {text.strip()}\n" if rank else f"\n{text.strip()}\n", file=sys.stderr, flush=True)
