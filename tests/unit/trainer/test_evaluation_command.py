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
    "more", [[], ["--channel", "x"], ["--questions", "q", "--format", "text"], ["--batch-tokens", "0"]]
)
def test_words_that_make_no_sense(folder: Path, more: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        evaluate.main(words(folder, *more))
    assert left.value.code == 2


def test_a_mistake_has_no_traceback(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *words(folder, "--data", folder / "nothing.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "does not exist" in done.stderr and "Traceback" not in done.stderr
