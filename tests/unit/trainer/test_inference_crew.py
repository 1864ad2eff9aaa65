"""What is told of worker processes that end, without any: theirs are stand-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tqdm import tqdm

from trainer.inference.claims import Claims
from trainer.inference.crew import Crew, Member
from trainer.inference.index import Index
from trainer.inference.joining import InferenceConfig, ModelFiles
from trainer.inference.sessions import Owner, Session
from trainer.inference.worker import Count, Failed, Finished, Ready, Task
from trainer.inference.workplace import Workplace


class Process:
    """A process that has ended, or not yet."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode

    def is_alive(self) -> bool:
        return self.exitcode is None

    def terminate(self) -> None:
        self.exitcode = -15

    def join(self, timeout: float | None = None) -> None:
        return


class Pipe:
    """What a process has said, and then its end."""

    def __init__(self, *said: object) -> None:
        self.said = list(said)

    def poll(self) -> bool:
        return True

    def recv(self) -> object:
        if not self.said:
            raise EOFError
        return self.said.pop(0)

    def close(self) -> None:
        return


@pytest.fixture
def crew(tmp_path: Path) -> Crew:
    """Of two workers with two tp ranks each, none started."""
    place = Workplace(tmp_path / "out.jsonl")
    number = np.arange(4)
    place.make({}, Index(number, number, number, ""), [], 1)
    cfg = InferenceConfig(ModelFiles("model"), tmp_path / "in.jsonl", place.out, workers=2, tp=2)
    session = Session.begin()
    tasks = [Task(cfg, session.name, worker, rank, 1, 4) for worker in range(2) for rank in range(2)]
    crew = Crew(tasks, session, place, 4, print)
    crew.sessions.beat(session)
    crew.members = [Member(task, Process(None), Pipe()) for task in tasks]  # pyright: ignore[reportArgumentType]
    return crew


def end(crew: Crew, number: int, code: int, *said: object) -> None:
    """Let a process say something and end."""
    member: Any = crew.members[number]
    member.pipe, member.process.exitcode = Pipe(*said), code
    with tqdm(disable=True) as bar:
        crew._ended(member, bar)


def test_counts_are_added_up(crew: Crew) -> None:
    for member, said in zip(crew.members, (Ready(), Ready(), Count(3, 1, 70), Count(2, 0, 50)), strict=True):
        crew._take(member, said)
    assert (crew.session.rows, crew.session.tokens) == (5, 120) and crew.session.seconds >= 0


def test_a_worker_dies_with_all_its_ranks_and_the_others_are_told(
    crew: Crew, capsys: pytest.CaptureFixture[str]
) -> None:
    end(crew, 1, -9, Ready())
    assert [member.gone for member in crew.members] == [True, True, False, False]
    assert not crew.members[0].process.is_alive() and crew.members[2].process.is_alive()
    assert not crew.sessions.alive(Owner(crew.session.name, 0)) and crew.sessions.alive(Owner(crew.session.name, 1))
    told = capsys.readouterr().err
    assert (
        "worker 0 was ended by SIGKILL (too little memory? fewer workers need less); its rows go to the others" in told
    )


def test_when_all_have_died_what_is_kept_is_told(crew: Crew) -> None:
    end(crew, 0, -11)
    with pytest.raises(ValueError) as caught:
        end(crew, 2, 1, Ready(), Failed("no space left on device", mistake=False))
    told = str(caught.value)
    assert told.startswith("all workers have died, the last of them: worker 1 failed: no space left on device.")
    assert f"kept in {crew.place.folder}" in told and "the same command goes on" in told


def test_a_worker_that_dies_after_the_last_row_is_no_error(crew: Crew) -> None:
    for number in range(2):
        end(crew, number, 0, Finished())
    claims = Claims(crew.place.folder / "claims", 4, crew.sessions, Owner(crew.session.name, 0))
    for claim in iter(claims.claim, None):
        claims.finish(claim)
    end(crew, 2, -9)
    assert all(member.gone for member in crew.members)


def test_a_model_that_cannot_be_loaded_ends_all(crew: Crew) -> None:
    with pytest.raises(ValueError, match="the weights are not there"):
        crew._take(crew.members[0], Failed("the weights are not there", mistake=True))
    crew.members[0].ready = True
    crew._take(crew.members[0], Failed("an odd row", mistake=True))  # then it is this worker's own affair
