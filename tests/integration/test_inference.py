"""scripts/infer.py with two worker processes, killed and started again, one worker killed in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import infer
import psutil
import pytest

from tests.convert_cases import ROOT, tiny
from tests.unit.data.conftest import make_tokenizer
from trainer.inference.crew import Crew, Member
from trainer.inference.results import pieces
from trainer.inference.worker import Count
from trainer.inference.workplace import Workplace

ROWS, PATIENCE_S = 160, 120.0


def lines_of(place: Workplace) -> dict[int, bytes]:
    """The results so far, by row; no row is there twice."""
    found: dict[int, bytes] = {}
    for path in place.parts():
        content = path.read_bytes()
        for piece in pieces(path):
            assert piece.number not in found
            found[piece.number] = content[piece.start : piece.stop]
    return found


def test_killed_and_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny("tiny_llama", tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"id": i, "prompt": "a b" * (i % 13 + 1), "sampling": {"max_new_tokens": 40 + i % 60}} for i in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    place = Workplace(out)
    words = ["--model", tmp_path / "model", "--data", tmp_path / "in.jsonl", "--out", out, "--device", "cpu"]
    words = [str(word) for word in (*words, "--workers", 2, "--max-rows", 8, "--sampling", "temperature=1")]

    first = subprocess.Popen([sys.executable, str(ROOT / "scripts" / "infer.py"), *words], stderr=subprocess.DEVNULL)
    until = time.monotonic() + PATIENCE_S
    while len(lines_of(place)) < 8 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    workers = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    assert psutil.wait_procs(workers, timeout=PATIENCE_S)[1] == []  # they end with their parent
    kept = lines_of(place)
    assert 8 <= len(kept) < ROWS and not out.exists()

    killed: list[int] = []
    take = Crew._take

    def take_and_kill(self: Crew, member: Member, said: object) -> None:
        take(self, member, said)
        if isinstance(said, Count) and said.rows and not killed:
            assert member.process.pid is not None
            killed.append(member.task.worker)
            os.kill(member.process.pid, signal.SIGKILL)

    last: dict[int, bytes] = {}
    remove = Workplace.remove

    def look_and_remove(self: Workplace) -> None:
        last.update(lines_of(self))
        remove(self)

    monkeypatch.setattr(Crew, "_take", take_and_kill)
    monkeypatch.setattr(Workplace, "remove", look_and_remove)
    infer.main(words)
    told = capfd.readouterr()
    assert f"going on with {place.folder}: {len(kept)} of {ROWS} rows are done" in told.out
    assert f"wrote {out}: {ROWS} rows" in told.out
    assert f"worker {killed[0]} was ended by SIGKILL" in told.err and "its rows go to the others" in told.err
    found = out.read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in found] == list(range(ROWS))
    asked = [row["sampling"]["max_new_tokens"] for row in rows]
    assert all(1 <= json.loads(line)["tokens"] <= most for line, most in zip(found, asked, strict=True))
    assert {number: found[number] for number in kept} == kept
    assert len(last) == ROWS and not place.folder.exists()
