"""scripts/evaluate.py as it is called: tables, JSON, and mistakes told in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from tests.convert_cases import ROOT, tiny
from tests.unit.data.conftest import make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    tiny("tiny_llama", folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "quiz.jsonl").write_text(
        '{"question": "2+2=", "choices": ["3", "4"], "answer": "4"}\n'
        '{"question": "2+3=", "choices": ["5", "4"], "answer": "A", "channel": "maths"}\n'
        '{"question": "2+3=", "choices": ["5", "4"]}\n'
    )
    (folder / "tasks.jsonl").write_text(
        '{"prompt": "2+2=", "regex": "(?s).", "channel": "any"}\n'
        '{"messages": [{"role": "user", "content": "2+3="}], "answer": "never", "regex": "n[a-z]{20}"}\n'
        '{"prompt": "2+3=", "answer": 5}\n'
        '{"prompt": "2+3="}\n'
    )
    (folder / "book.txt").write_text("A text of some length. " * 20)
    (folder / "notes").write_text("Another one. " * 20)
    (folder / "rows.jsonl").write_bytes(b'{"text": "good"}\n{"text": ""}\n\xff\n')
    return folder


def words(folder: Path, *more: object) -> list[str]:
    start = ["--model", folder / "model", "--device", "cpu", "--cache-dir", folder / "cache"]
    return [str(word) for word in (*start, *more)]


def test_all_at_once_as_tables_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, details = folder / "out.json", folder / "details.jsonl"
    files = ["--data", folder / "book.txt", "--channel", "prose", "--questions", folder / "quiz.jsonl"]
    files += ["--data", folder / "notes", "--format", "text", "--data", folder / "rows.jsonl"]
    evaluate.main(words(folder, *files, "--out", out, "--details", details, "--seq-len", 64))
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert [each["channel"] for each in found["perplexity"]] == ["notes", "prose", "rows", "all"]
    assert [each["channel"] for each in found["choices"]] == ["maths", "quiz", "all"]
    prose = found["perplexity"][1]
    assert prose["tokens"] == 461 - prose["documents"] and prose["documents"] == 8
    assert f"{prose['perplexity']:.3f} ± {prose['perplexity_error']:.3f}" in shown
    assert found["bad_rows"]["count"] == 3
    assert [Path(row["file"]).name + f":{row['line']}" for row in found["bad_rows"]["first"]] == [
        "quiz.jsonl:3",
        "rows.jsonl:2",
        "rows.jsonl:3",
    ]
    assert "passed over 3 bad row(s)" in shown and "quiz.jsonl:3: there is no answer" in shown
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    assert [row["line"] for row in rows] == [1, 2]
    right = sum(row["right"]["per_byte"] for row in rows) / 2
    assert found["choices"][-1]["accuracy"]["per_byte"] == right


def test_tasks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, details = folder / "tasks.json", folder / "texts.jsonl"
    more = [
        "--tasks",
        folder / "tasks.jsonl",
        "--out",
        out,
        "--details",
        details,
        "--set",
        "max_new_tokens=5",
        "seed=2",
    ]
    evaluate.main(words(folder, *more))
    found, shown = json.loads(out.read_text()), capsys.readouterr().out
    rows = [json.loads(line) for line in details.read_text().splitlines()]
    assert [(row["line"], row["right"]) for row in rows] == [(1, True), (2, False), (3, False)]
    assert rows[1]["extracted"] is None and rows[0]["extracted"] == rows[0]["completion"][0]
    assert [(each["channel"], each["tasks"], each["accuracy"]) for each in found["tasks"]] == [
        ("any", 1, 1.0),
        ("tasks", 2, 0.0),
        ("all", 3, pytest.approx(1 / 3)),
    ]
    assert found["sampling"]["max_new_tokens"] == 5
    assert found["judging"] == {"rules": ["whitespace"], "take": "first"}
    assert "tasks.jsonl:4: there is neither answer nor regex" in shown and "0.0615 to 0.7923" in shown
    (folder / "again.jsonl").write_text(json.dumps({"prompt": "2+3=", "answer": rows[2]["completion"].swapcase()}))
    more[1] = folder / "again.jsonl"
    evaluate.main(words(folder, *more, "--normalise", "case,whitespace"))
    assert json.loads(out.read_text())["tasks"][0]["accuracy"] == 1.0


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data", "{}/nothing.txt"], "--data .*nothing.txt does not exist"),
        (["--data", "{}/notes"], "notes is of an unknown kind .* set --format text"),
        (["--data", "{}/quiz.jsonl"], "quiz.jsonl holds questions with choices: name it with --questions"),
        (["--data", "{}/book.txt", "--seq-len", "513"], "--seq-len 513 is longer than the model's context of 512"),
        (["--data", "{}/book.txt", "--tokenizer", "{}"], "--tokenizer=.* holds no tokenizer"),
        (["--data", "{}/book.txt", "--loss-on", "assistant"], "channel book .* has no supervised token"),
        (["--questions", "{}/nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["--questions", "{}/book.txt"], "must be .jsonl, .json or .parquet"),
        (["--questions", "{}/rows.jsonl"], "no question that can be used. passed over 3 bad row"),
        (["--questions", "{}/quiz.jsonl", "--out", "{}/no/folder.json"], "--out .*: there is no folder"),
        (["--questions", "{}/quiz.jsonl", "--details", "{}"], "--details .* is a folder"),
        (["--questions", "{}/quiz.jsonl", "--device", "abacus"], "--device abacus cannot be used"),
        (["--tasks", "{}/nothing.jsonl"], "--tasks .*nothing.jsonl: there is no such file"),
        (["--tasks", "{}/quiz.jsonl"], "no task that can be used. passed over 3 bad row"),
        (["--tasks", "{}/tasks.jsonl", "--set", "heat=1"], "--set: .*\n.*heat: there is no such setting"),
        (["--tasks", "{}/tasks.jsonl", "--set", "heat"], "--set: 'heat' is no setting"),
        (["--run", "{}"], "no run's folder: it has no config.yaml"),
    ],
)
def test_mistakes_are_told(folder: Path, more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.main(words(folder, *(word.replace("{}", str(folder)) for word in more)))


def test_a_full_disk_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer.evaluation.report.os.replace", full)
    out = folder / "full.json"
    with pytest.raises(ValueError, match=r"cannot read or write: .* No space left"):
        evaluate.main(words(folder, "--questions", folder / "quiz.jsonl", "--out", out))
    assert not list(folder.glob("*full.json*"))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--channel", "x"],
        ["--questions", "q", "--format", "text"],
        ["--batch-tokens", "0"],
        ["--questions", "q", "--set", "seed=1"],
        ["--questions", "q", "--take", "last"],
        ["--tasks", "t", "--normalise", "case,size"],
    ],
)
def test_words_that_make_no_sense(folder: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        evaluate.main(words(folder, *more))
    assert left.value.code == 2


def test_a_mistake_has_no_traceback(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *words(folder, "--data", folder / "nothing.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr
