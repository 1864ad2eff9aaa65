"""A rank that dies, sleeps or goes astray ends the job within seconds, with a page that says who waited where."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import pytest

from parallel.watch import EXIT_LOST
from tests import programs
from tests.integration.conftest import ROOT

CASES = str(ROOT / "tests" / "watch_cases.py")
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PAGE = re.compile(f"{'-' * 100}\n(.*?)\n{'-' * 100}", re.DOTALL)

ALLOWED_S = 1.5
"""run.hang_timeout of these jobs."""

LEAVING_S = 25.0
"""From the first sign of trouble until the launcher has ended: page, exits, and a launcher on a busy machine."""


@dataclass(frozen=True)
class Ended:
    """What is left of a job."""

    pages: list[str]
    output: str
    codes: dict[int, int]
    """Exit code of each rank."""

    @property
    def page(self) -> str:
        """The one page."""
        assert len(self.pages) == 1, f"{len(self.pages)} pages:\n{self.output}"
        return self.pages[0]


def torchrun(case: str, processes: int, timeout_s: float = ALLOWED_S) -> Ended:
    """Run a case of ``tests/watch_cases.py`` under torchrun, which keeps the store and ends all when one has ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with Popen([*command, CASES, case, str(timeout_s)], env=ENV, stdout=PIPE, stderr=STDOUT, text=True) as launcher:
        output = _read(launcher, timeout_s)
        launcher.wait(10)
    ranks = [int(rank) for rank in re.findall(r"rank +: (\d+) ", output)]
    codes = [int(code) for code in re.findall(r"exitcode +: (-?\d+) ", output)]
    return Ended(PAGE.findall(output), output, dict(zip(ranks, codes, strict=True)))


def by_hand(case: str, processes: int, timeout_s: float = ALLOWED_S) -> Ended:
    """The same without a launcher: rank 0 keeps the store, and nobody ends a rank but itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    read, write = Pipe(duplex=False)
    command = [CASES, case, str(timeout_s)]
    own = [env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    ranks = [programs.start(command, write, write, each) for each in own]
    write.close()
    with read, os.fdopen(os.dup(read.fileno())) as lines:
        output = _read(lines, timeout_s)
    for process in ranks:
        process.join(10)
    codes = {r: process.exitcode for r, process in enumerate(ranks) if process.exitcode is not None}
    return Ended(PAGE.findall(output), output, codes)


def _read(lines: Any, timeout_s: float) -> str:
    """All that the processes print, until the last of them has ended."""
    read, began = [], time.monotonic()
    for line in getattr(lines, "stdout", lines):
        if line.startswith("rank 0 begins"):
            began = time.monotonic()
        read.append(line)
    took = time.monotonic() - began
    assert took < min(timeout_s, 10) + LEAVING_S, f"{took:.0f} s\n{''.join(read)}"
    return "".join(read)


def line_of(code: str) -> str:
    """The place of a line of ``watch_cases.py`` as the page names it."""
    lines = (ROOT / "tests" / "watch_cases.py").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.strip() == code]
    return f"tests/watch_cases.py:{number}"


def test_a_rank_that_never_comes_is_shown_where_it_is() -> None:
    ended = torchrun("sleeper", 4)
    assert f"run.hang_timeout={ALLOWED_S:g}" in ended.page.splitlines()[0]
    first = ended.page.split("Look here first\n")[1].split("\n\n")[0]
    assert first.startswith(f"  rank 3: in no collective, but at {line_of('time.sleep(999)')} in sleeper"), ended.page
    assert "before that: all_reduce no. 2 of all (ranks 0-3)" in first
    waiting = ended.page.split("Waiting\n")[1]
    assert waiting.startswith("  all (ranks 0-3), its collective no. 3: all_reduce\n    ranks 0-2 waited for "), waiting
    assert "float32 [3], 12 bytes" in waiting and "in sleeper" in waiting
    assert "rank 3 did not come" in waiting
    assert ended.codes == dict.fromkeys(range(4), EXIT_LOST)


def test_a_killed_rank_is_told_at_once() -> None:
    ended = torchrun("killed", 3, timeout_s=300.0)
    assert ended.page.startswith("rank 1 is gone.\n"), ended.output
    assert re.search(r"rank 1: gone: its process \d+ on \S+ ended without a word", ended.page)
    assert "all (ranks 0-2), its collective no. 3: all_reduce" in ended.page
    assert "float32 [1000], 4,000 bytes" in ended.page and "in killed" in ended.page
    assert ended.codes == {0: EXIT_LOST, 1: -9, 2: EXIT_LOST}


def test_the_first_rank_may_be_the_one_killed_while_nobody_waits() -> None:
    ended = torchrun("killed_first", 3, timeout_s=300.0)
    assert ended.page.startswith("rank 0 is gone.\n"), ended.output
    assert f"ranks 1-2: in no collective, but at {line_of('time.sleep(1000)  # nobody waits')}" in ended.page
    assert ended.codes == {0: -9, 1: EXIT_LOST, 2: EXIT_LOST}


def test_survivors_speak_for_themselves_when_the_store_is_gone_with_rank_0() -> None:
    ended = by_hand("killed_host", 3, timeout_s=300.0)
    assert ended.codes == {0: -9, 1: EXIT_LOST, 2: EXIT_LOST}, ended.output
    for page in ended.pages:
        assert "could not be asked: the store on 127.0.0.1:" in page
        assert "all (ranks 0-2), its collective no. 3: all_reduce" in page
        assert re.search(r"  rank 0: gone: its process \d+ on ", page) and page.count(": gone") == 2, page
    assert len(ended.pages) == 2
    assert re.search(r"until its connection said: .*Connection (closed|reset) by peer", ended.output), "at least one"


def test_a_stopped_process_is_told_and_ended() -> None:
    ended = by_hand("stopped", 2)
    assert re.search(r"rank 1: no answer from its process \d+ on \S+, which is stopped \(SIGSTOP\)", ended.page)
    assert ended.codes == {0: EXIT_LOST, 1: -9}


def test_ranks_in_different_collectives_are_seen_as_such() -> None:
    ended = by_hand("different", 4)
    assert "Every rank waits" in ended.page, ended.output
    assert "tp (ranks 0-1), its collective no. 1: all_reduce" in ended.page
    assert "dp (ranks 1, 3), its collective no. 1: all_gather" in ended.page
    there = "rank 1 did not come: has called 0 of this group, and waits in all_gather no. 1 of dp"
    assert there in ended.page
    assert set(ended.codes.values()) == {EXIT_LOST}


def test_another_collective_of_the_same_group_is_not_the_same() -> None:
    ended = by_hand("kinds", 2)
    assert "its collective no. 3: NOT THE SAME ON ALL RANKS" in ended.page, ended.output
    assert re.search(r"rank 0 waited for [\d.]+ s in all_reduce float32 \[5\], 20 bytes", ended.page)
    assert re.search(r"rank 1 waited for [\d.]+ s in broadcast float32 \[5\], 20 bytes", ended.page)


@pytest.mark.parametrize("case", ["message", "receive"])
def test_a_message_that_never_comes(case: str) -> None:
    ended = by_hand(case, 2)
    assert re.search(r"rank 1 waited in recv from rank 0,? float32 \[4, 8\]", ended.page), ended.output
    assert "rank 0: in no collective, but at tests/watch_cases.py" in ended.page
    assert ended.codes == {0: EXIT_LOST, 1: EXIT_LOST}


def test_a_collective_started_before_is_told_with_the_place_that_waits() -> None:
    ended = by_hand("overlapped", 2)
    assert "all (ranks 0-1), its collective no. 3: all_reduce" in ended.page, ended.output
    assert "rank 0 waited for " in ended.page and "float32 [11], 44 bytes" in ended.page
    assert f"while it is at {line_of('work.wait()  # for the one started before')} in overlapped" in ended.page


def test_a_rank_that_says_why_it_fails_is_left_the_word() -> None:
    ended = torchrun("fails", 3, timeout_s=300.0)
    assert ended.pages == []
    own, others = "rank 1: the disk of this rank is gone\n", "stopped, because rank 1 failed: ValueError: the disk"
    assert 0 <= ended.output.index(own) < ended.output.index(others), ended.output
    assert ended.output.count(others) == 1
    assert ended.codes[1] == 2 and EXIT_LOST not in ended.codes.values()


@pytest.mark.parametrize("case", ["busy", "slow_but_alive"])
def test_a_slow_job_is_left_alone(case: str) -> None:
    ended = by_hand(case, 2, timeout_s=1.0)
    assert ended.output.count(" is done\n") == 2, ended.output
    assert ended.pages == [] and ended.codes == {0: 0, 1: 0}
