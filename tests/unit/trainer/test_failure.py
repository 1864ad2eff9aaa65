"""How a run ends: exit codes, one message, and who speaks first."""

from __future__ import annotations

import pytest

from trainer import failure


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(failure.time, "sleep", seconds.append)
    return seconds


def ends(error: BaseException, rank: int = 0) -> object:
    """The exit code a run ends with that raises ``error``."""
    with pytest.raises(SystemExit) as end, failure.told_clearly(rank):
        raise error
    return end.value.code


def test_nothing_is_said_when_nothing_is_wrong(slept, capfd: pytest.CaptureFixture[str]) -> None:
    with failure.told_clearly(1):
        pass
    assert capfd.readouterr() == ("", "") and slept == []


def test_a_users_mistake_is_its_message_and_code_2(slept, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends(ValueError("optim.lr=-1: a rate is above 0. Set optim.lr=1e-4")) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "\noptim.lr=-1: a rate is above 0. Set optim.lr=1e-4\n\n")
    assert slept == [], "the main rank speaks at once"


def test_other_ranks_wait_for_the_main_one_to_say_it(slept, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends(ValueError("the disk of this rank is gone"), rank=3) == 2
    assert slept == [failure.MAIN_FIRST_S]
    assert capfd.readouterr().err == "\nrank 3: the disk of this rank is gone\n\n"


def test_our_mistake_shows_its_traceback_and_code_1(slept, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends(AssertionError("an invariant")) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err and "AssertionError: an invariant" in err and "test_failure.py" in err
    assert slept == []


GONE = [
    "[/gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:1234",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting 600000ms for recv operation to complete",
    "NCCL communicator was aborted on rank 1. remote process exited",
]


@pytest.mark.parametrize("message", GONE)
def test_a_rank_left_alone_lets_the_cause_speak_first(slept, capfd, message: str) -> None:
    assert ends(RuntimeError(f"{message}\nand a second line"), rank=1) == 1
    err = capfd.readouterr().err
    assert err == f"\nrank 1: stopped, because another rank left or did not answer ({message})\n\n"
    assert slept == [failure.CAUSE_FIRST_S]


@pytest.mark.parametrize("message", ["CUDA out of memory", "shape mismatch", ""])
def test_other_runtime_errors_are_not_taken_for_a_lost_peer(slept, capfd, message: str) -> None:
    assert ends(RuntimeError(message)) == 1
    assert "Traceback" in capfd.readouterr().err and slept == []


def test_ctrl_c_is_130_without_a_word(slept, capfd: pytest.CaptureFixture[str]) -> None:
    assert ends(KeyboardInterrupt()) == 130
    assert capfd.readouterr() == ("", "")


def test_an_exit_goes_through(slept) -> None:
    """Hydra's own exits (--help) keep their code."""
    assert ends(SystemExit(0)) == 0
