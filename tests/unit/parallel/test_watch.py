"""What counts as a wait, what the page says, and how a process is told from another; the jobs are in test_hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from parallel import board, hang_page, stacks, watch
from parallel.board import Process
from parallel.doing import Call, Doing, rank_words
from parallel.groups import Groups


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
    return now


def look(pulse: watch.Pulse, seen: tuple, calls: int = 0, at: str = "here", really: bool = True) -> float:
    return pulse.waited(seen, (calls,), at, lambda: really)


def test_a_collective_that_does_not_end_is_a_wait(clock: list[float]) -> None:
    pulse = watch.Pulse(10.0)
    assert look(pulse, (("tp", 5, 4),)) == 0
    clock[0] += 10
    assert look(pulse, (("tp", 5, 4),)) == 0, "as long as allowed"
    clock[0] += 1
    assert look(pulse, (("tp", 6, 4),)) == 11, "more were called after it, none has ended"


def test_collectives_that_end_are_no_wait(clock: list[float]) -> None:
    pulse = watch.Pulse(10.0)
    for ended in range(5):
        clock[0] += 9
        assert look(pulse, (("tp", ended + 1, ended),)) == 0
    clock[0] += 9
    assert look(pulse, (("tp", 5, 5),)) == 0
    clock[0] += 9
    assert look(pulse, (("tp", 6, 5),)) == 0, "the wait begins now, not when the last one ended"


def test_groups_wait_each_for_itself(clock: list[float]) -> None:
    pulse = watch.Pulse(10.0)
    look(pulse, (("dp", 1, 0), ("tp", 0, 0)))
    clock[0] += 11
    assert look(pulse, (("dp", 1, 0), ("tp", 50, 50))) == 11


@pytest.mark.parametrize("seen", [(), (("tp", 5, 4),)])
def test_what_only_looks_like_a_wait_is_none_and_is_not_looked_at_all_the_time(clock: list[float], seen: tuple) -> None:
    """A thread that stands still may wait for a message or work; and the recorder may be wrong about its last entry."""
    pulse, asked = watch.Pulse(10.0), []
    for _ in range(45):
        assert pulse.waited(seen, (0,), "here", lambda: bool(asked.append(1))) == 0
        clock[0] += 1
    assert 3 <= len(asked) <= 4
    clock[0] += 11
    assert look(pulse, seen) > 10, "when it is one after all"


@pytest.mark.parametrize("moved", [{"calls": 1}, {"at": "there"}])
def test_whatever_moves_is_no_wait(clock: list[float], moved: dict) -> None:
    pulse = watch.Pulse(10.0)
    look(pulse, ())
    clock[0] += 11
    assert look(pulse, (), **moved) == 0


CALL = Call("all_reduce", "tp", [0, 1], 7, "float32 [4], 16 bytes", 3.0, ["a.py:1 in f"])


def said(rank: int, *calls: Call, **more: object) -> Doing:
    return replace(Doing(rank, "host", 1, list(calls), ["a.py:1 in f"]), **more)


def test_many_ranks_still_give_one_page() -> None:
    """256 pairs: equal answers are told together, the rest is counted."""
    answers = {r: said(r, replace(CALL, ranks=[r // 2 * 2, r // 2 * 2 + 1])) for r in range(511)}
    text = hang_page.page("why.", answers, {511: "gone: its process 9 on host ended without a word"})
    lines = text.splitlines()
    assert len(lines) < 80
    assert lines[3:5] == ["Look here first", "  rank 511: gone: its process 9 on host ended without a word"]
    assert lines[7] == "  tp (ranks 510-511), its collective no. 7: all_reduce", "what lacks a rank comes first"
    assert lines[-2] == f"  and {256 - hang_page.SHOWN} collectives more"


def test_the_rank_that_is_behind_says_how_far_it_came() -> None:
    other = replace(CALL, group="dp", ranks=[1, 3], number=2, kind="all_gather")
    answers = {0: said(0, CALL), 1: said(1, other, called={"tp (ranks 0-1)": 6})}
    text = hang_page.page("why.", answers, {})
    behind = "rank 1 did not come: has called 6 of this group, and waits in all_gather no. 2 of dp (ranks 1, 3)"
    assert behind in text and "Every rank waits" in text


def test_a_rank_elsewhere_shows_its_lines_once_for_all_that_share_them() -> None:
    idle = {r: said(r, stack=["data/cache.py:9 in read", "trainer/loop.py:3 in run"]) for r in (1, 2, 3, 8)}
    text = hang_page.page("why.", {0: said(0, CALL), **idle}, {})
    assert (
        "  ranks 1-3, 8: in no collective, but at data/cache.py:9 in read\n      called from trainer/loop.py:3" in text
    )


def test_ranks_in_words() -> None:
    assert rank_words([3]) == "3"
    assert rank_words([7, 0, 1, 2, 5, 8]) == "0-2, 5, 7-8"


def test_lines_of_the_program_come_after_the_innermost_line_of_a_library() -> None:
    library = os.path.join(os.path.dirname(os.__file__), "json", "decoder.py")
    torch_line = (stacks.ROOT + "x/" + stacks.C10D, 5, "all_reduce")
    ours = (stacks.ROOT + "trainer/loop.py", 88, "_step")
    assert stacks.program_lines([torch_line, ours]) == ["trainer/loop.py:88 in _step"]
    found = stacks.program_lines([(library, 3, "decode"), ours, (stacks.ROOT + "train.py", 9, "<module>")])
    assert found == [os.path.join("json", "decoder.py") + ":3 in decode", "trainer/loop.py:88 in _step"]


def test_a_process_is_known_to_live_to_be_stopped_and_to_have_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _, born = board._kernel_says(child.pid)
    this = Process.this()
    process = Process(this.host, child.pid, born, this.space)
    assert process.state(this) not in ("", None, "T")
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert process.state(this) == "T"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.state(this) == "", "nobody has asked for its exit code yet"
    child.wait()
    assert process.state(this) == ""
    assert replace(this, born="0").state(this) == "", "another process has its number"
    assert replace(this, space="another machine").state(this) is None


GONE = ["[/gloo/pair.cc:5] Connection closed by peer [127.0.0.1]:1", "Timed out waiting 600000ms for recv operation"]


@pytest.mark.parametrize("message", GONE)
def test_a_broken_collective_is_told_from_a_broken_download(message: str) -> None:
    assert watch.peer_gone(RuntimeError(message))
    assert not watch.peer_gone(ConnectionResetError(message))
    assert not watch.peer_gone(ValueError(message))


def test_one_process_alone_has_no_thread_and_keeps_its_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from parallel.sharding import Axis

    monkeypatch.setattr(watch, "Watch", lambda *_: pytest.fail("a watch was started"))
    with watch.watching(Groups(0, 1, torch.device("cpu"), Axis()), 1.0):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_watch_leaves_nothing_behind_and_children_die_of_sigterm(pool) -> None:
    from tests.watch_cases import entered_and_left

    for before, inside, after, child in pool(2).run(entered_and_left):
        assert before == after and inside == {*before, "watch"}
        assert child == -signal.SIGTERM
