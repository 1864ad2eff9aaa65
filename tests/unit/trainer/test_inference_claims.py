"""Chunks dealt out by files: each to one worker, those of the dead to others; who lives; results that are whole."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import pytest

from models.generation import Completion
from trainer.inference import sessions as sessions_module
from trainer.inference.claims import Claim, Claims
from trainer.inference.index import BadLine
from trainer.inference.results import Made, Part, pieces, result_of
from trainer.inference.sessions import SILENT_S, Owner, Session, Sessions

Begin = Callable[..., Session]


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """A session with its file, perhaps on another machine or of another process."""
    (tmp_path / "sessions").mkdir()
    (tmp_path / "claims").mkdir()

    def begun(**other: object) -> Session:
        session = dataclasses.replace(Session.begin(), **other)
        Sessions(tmp_path / "sessions", session.name).beat(session)
        return session

    return begun


def claims_of(folder: Path, session: Session, worker: int, count: int = 12) -> Claims:
    owner = Owner(session.name, worker)
    return Claims(folder / "claims", count, Sessions(folder / "sessions", session.name), owner)


def test_every_chunk_is_one_workers(tmp_path: Path, begin: Begin) -> None:
    session = begin()

    def work(worker: int) -> list[int]:
        claims = claims_of(tmp_path, session, worker, 60)
        found = []
        while (claim := claims.claim()) is not None:
            found.append(claim.chunk)
            time.sleep(0.001)
            claims.finish(claim)
        return found

    with ThreadPoolExecutor(6) as pool:
        every = list(pool.map(work, range(6)))
    assert Counter(chunk for found in every for chunk in found) == Counter(range(60))
    assert claims_of(tmp_path, session, 9, 60).open() == {}


def test_a_dead_workers_chunks_go_to_others_once(tmp_path: Path, begin: Begin) -> None:
    session = begin()
    first, second, third = (claims_of(tmp_path, session, worker, 3) for worker in range(3))
    lost, kept = first.claim(), second.claim()
    assert lost is not None and kept is not None
    assert second.claim() == Claim(2, 0) and second.claim() is None  # the first lives
    Sessions(tmp_path / "sessions", session.name).beat(dataclasses.replace(session, dead=[0]))
    assert third.claim() == Claim(0, 1, (Owner(session.name, 0),))
    assert second.claim() is None
    Sessions(tmp_path / "sessions", session.name).beat(dataclasses.replace(session, dead=[0, 2]))
    assert second.claim() == Claim(0, 2, (Owner(session.name, 0), Owner(session.name, 2)))
    second.finish(kept)
    assert sorted(second.open()) == [0, 2]


def test_a_later_session_begins_with_what_was_left(tmp_path: Path, begin: Begin) -> None:
    before = begin(started=1.0)  # no process of that number and age
    old = claims_of(tmp_path, before, 0, 6)
    done, *_ = old.claim(), old.claim(), old.claim()
    assert done is not None
    old.finish(done)
    now = begin()
    new = claims_of(tmp_path, now, 0, 6)
    assert [claim.chunk for claim in iter(new.claim, None)] == [1, 2, 3, 4, 5]


def test_a_claim_without_a_name_is_free_after_a_while(tmp_path: Path, begin: Begin) -> None:
    """Its worker was killed between making the file and writing into it."""
    session = begin()
    (tmp_path / "claims" / "0.0").touch()
    claims = claims_of(tmp_path, session, 0, 1)
    assert claims.claim() is None
    then = time.time() - 60
    os.utime(tmp_path / "claims" / "0.0", (then, then))
    assert claims.claim() == Claim(0, 1)


def test_who_lives(tmp_path: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    own = begin()
    sessions = Sessions(tmp_path / "sessions", own.name)
    with subprocess.Popen(["sleep", "60"]) as process:
        started = sessions_module._started(process.pid)
        beside = begin(pid=process.pid, started=started)
        younger = begin(pid=process.pid, started=started - 1)  # the number was another process's before
        assert sessions.alive(Owner(beside.name)) and not sessions.alive(Owner(younger.name))
        process.kill()
        process.wait()
        assert not sessions.alive(Owner(beside.name))
    remote = begin(host="elsewhere", pid=1, started=1.0, dead=[2])
    assert sessions.alive(Owner(remote.name, 1)) and not sessions.alive(Owner(remote.name, 2))
    assert [each.name for each in sessions.others()] == [remote.name]
    file = tmp_path / "sessions" / f"{remote.name}.json"
    then = time.time() - SILENT_S - 5
    os.utime(file, (then, then))
    assert not sessions.alive(Owner(remote.name, 1)) and list(sessions.others()) == []
    Sessions(tmp_path / "sessions", own.name).leave()
    assert not sessions.alive(Owner(own.name)) and Owner.of(Owner("a-1.b", 3).name) == Owner("a-1.b", 3)


def made(text: str, **more: object) -> Completion:
    return dataclasses.replace(Completion(0, 0, (1, 2), (3, 4, 5), text, "stop"), **more)


def test_a_result_keeps_the_row() -> None:
    row = {"id": 7, "prompt": "a", "text": "mine"}
    assert result_of(row, [made("b")]) == {
        "id": 7,
        "prompt": "a",
        "input_text": "mine",
        "text": "b",
        "finish": "stop",
        "tokens": 3,
        "prompt_tokens": 2,
    }
    two = result_of({"id": 7}, [made("b"), made("c", log_probs=(-0.1234567,), model_log_probs=(-1.0,), score=-0.5)])
    assert two == {
        "id": 7,
        "samples": [
            {"text": "b", "finish": "stop", "tokens": 3},
            {
                "text": "c",
                "finish": "stop",
                "tokens": 3,
                "score": -0.5,
                "log_probs": [-0.12346],
                "model_log_probs": [-1.0],
            },
        ],
        "prompt_tokens": 2,
    }


def test_half_a_line_is_none_and_the_first_of_two_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, number, result in (
        (first, 2, {"id": "zwei", "odd": "\ud800"}),
        (first, 0, BadLine(1, "no prompt")),
        (second, 2, {"id": "again"}),
        (second, 1, {"id": "ä\u2028\n"}),
    ):
        part = Part(path)
        part.write(number, result)
        part.close()
    with first.open("ab") as stream:
        stream.write(b'3\t{"id": "half')
    with second.open("ab") as stream:
        stream.write(b"17")
    assert [piece.number for piece in pieces(first)] == [2, 0]
    found = Made.read([first, second], 4)
    assert found.missing().tolist() == [3]
    bad: list[BadLine] = []
    out = BytesIO()
    assert Made.read([first, second], 3).copy(out, bad) == 2
    assert bad == [BadLine(1, "no prompt")]
    assert out.getvalue().decode() == '{"id": "ä\u2028\\n"}\n{"id": "zwei", "odd": "\\ud800"}\n'
