"""A file of prompts from end to end, workers one after another in this process: results, ends, restarts, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import infer
import pytest
import torch

from data.chat import template_renderer
from models.generation import Request, SamplingConfig
from parallel.groups import LauncherRanks
from tests.convert_cases import tiny
from tests.unit.data.conftest import make_tokenizer
from trainer.inference import batch, worker, workplace
from trainer.inference.batch import BatchInference, Summary
from trainer.inference.joining import InferenceConfig, ModelFiles
from trainer.inference.loading import load_generator
from trainer.inference.results import Part
from trainer.inference.sessions import Session
from trainer.inference.worker import Count, Task
from trainer.inference.workplace import Workplace

SAMPLING = {"max_new_tokens": 6, "temperature": 1.0, "seed": 50}
ROWS: list[Any] = [
    {"id": "a", "prompt": "one"},
    {"id": "b", "messages": [{"role": "user", "content": "two"}], "text": "mine"},
    b"{nope",
    {"id": "c", "prompt": "three three three", "sampling": {"samples": 2, "log_probs": True}},
    b"",
    {"id": "d", "prompt": "x" * 600},
    {"id": "e", "prompt": "four", "sampling": {"temperature": 0}},
    {"id": "f", "prompt": "five", "sampling": {"seed": 7, "max_new_tokens": 9}},
]
BAD = [3, 6]


class Inline:
    """Stands in for the crew."""

    def __init__(
        self, tasks: Sequence[Task], session: Session, place: Workplace, rows: int, say: Callable[[str], None]
    ) -> None:
        self.tasks, self.session = tasks, session

    def run(self, done: int) -> None:
        for task in self.tasks:
            worker._work(task, self)  # pyright: ignore[reportArgumentType]

    def send(self, said: object) -> None:
        if isinstance(said, Count):
            self.session.rows += said.rows
            self.session.tokens += said.tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inferred") / "model"
    tiny("tiny_llama", folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def cfg(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InferenceConfig:
    """The rows above, two workers."""
    monkeypatch.setattr(batch, "Crew", Inline)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in ROWS]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    files = ModelFiles(str(model))
    return InferenceConfig(files, tmp_path / "in.jsonl", tmp_path / "out.jsonl", workers=2, sampling=dict(SAMPLING))


def run(cfg: InferenceConfig, **other: Any) -> tuple[Summary | None, str]:
    said: list[str] = []
    summary = BatchInference(dataclasses.replace(cfg, **other), say=said.append).run()
    return summary, "\n".join(said)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_results_are_those_of_the_generator_in_the_order_of_the_rows(cfg: InferenceConfig, model: Path) -> None:
    summary, said = run(cfg)
    assert summary is not None and (summary.rows, summary.bad, summary.new_rows) == (5, 2, 6)
    out = rows_of(cfg.out)
    assert [row["id"] for row in out] == ["a", "b", "c", "e", "f"]
    generator = load_generator(model, device=torch.device("cpu"))
    tokenizer = make_tokenizer()
    render = template_renderer(tokenizer, None, "")
    made = SamplingConfig(**SAMPLING)  # type: ignore[arg-type]
    asked = [
        Request("one", made, 50),
        Request(render(ROWS[1]["messages"], None, True), made, 51),
        Request("three three three", dataclasses.replace(made, samples=2, log_probs=True), 53),
        Request("four", dataclasses.replace(made, temperature=0.0), 56),
        Request("five", dataclasses.replace(made, seed=7, max_new_tokens=9), 7),
    ]
    one, two, three, again, four, five = generator.generate(asked)
    for row, want in zip([out[0], out[1], out[3], out[4]], [one, two, four, five], strict=True):
        found = (row["text"], row["finish"], row["tokens"], row["prompt_tokens"])
        assert found == (want.text, want.finish, len(want.tokens), len(want.prompt_tokens))
    assert out[1]["input_text"] == "mine" and out[1]["messages"] == ROWS[1]["messages"]
    assert [each["text"] for each in out[2]["samples"]] == [three.text, again.text]
    assert three.log_probs is not None
    assert out[2]["samples"][0]["log_probs"] == pytest.approx(three.log_probs, abs=1e-4)
    assert summary.tokens == sum(len(each.tokens) for each in (one, two, three, again, four, five))
    bad = rows_of(cfg.out.with_name("out.bad.jsonl"))
    assert [each["line"] for each in bad] == BAD
    assert "not JSON" in bad[0]["reason"] and "600 tokens and the model's context is 512" in bad[1]["reason"]
    assert "1 bad row(s)" in said and "passed over 2 bad row(s)" in str(summary) and "line 3: not JSON" in str(summary)
    assert sorted(path.name for path in cfg.out.parent.iterdir()) == [
        "in.jsonl",
        "out.bad.jsonl",
        "out.jsonl",
        "out.run.json",
    ]


def test_what_was_done_before_an_end_is_kept_and_not_done_again(
    cfg: InferenceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cfg)
    want = cfg.out.read_bytes()
    cfg = dataclasses.replace(cfg, out=cfg.out.with_name("again.jsonl"))
    written: list[int] = []
    real = Part.write
    stop_after = [2]

    def write(part: Part, number: int, result: Any) -> None:
        real(part, number, result)
        written.append(number)
        if len(written) == stop_after[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Part, "write", write)
    for last in (2, 3):
        stop_after[0] = last
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
        assert not cfg.out.exists() and cfg.out.with_name("again.jsonl.parts").is_dir()
    stop_after[0] = 0
    _, said = run(cfg)
    assert "going on with" in said and "3 of 6 rows are done" in said
    assert sorted(written) == [0, 1, 2, 3, 4, 5]
    assert cfg.out.read_bytes() == want


def test_other_settings_are_refused_and_restart_begins_anew(
    cfg: InferenceConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Inline, "run", lambda self, done: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    cfg.data.write_bytes(cfg.data.read_bytes() + b'{"prompt": "more"}\n')
    with pytest.raises(ValueError) as caught:
        run(cfg, sampling=SAMPLING | {"top_k": 3}, chat=True)
    told = str(caught.value)
    assert "was begun with other settings" in told and "--restart" in told
    lines = [line.strip() for line in told.splitlines()[1:]]
    assert lines == [
        "data: its content is another",
        "sampling.top_k: was 0, now 3",
        "chat: was False, now True",
    ]
    monkeypatch.undo()
    monkeypatch.setattr(batch, "Crew", Inline)
    assert run(cfg, restart=True)[0] is not None
    assert len(rows_of(cfg.out)) == 6
    summary, said = run(cfg, workers=1)  # how it is dealt out is no part of the settings
    assert summary is None and "is complete already" in said
    with pytest.raises(ValueError, match="is there already; --restart makes it anew"):
        run(cfg, sampling=SAMPLING | {"top_k": 3})
    assert run(cfg, sampling=SAMPLING | {"top_k": 3}, restart=True)[0] is not None


def test_another_session_that_finishes_it_all(cfg: InferenceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins while the first one loads, and with --restart, which throws nothing away that is being worked on."""
    real, others = Inline.run, []

    def run_another(self: Inline, done: int) -> None:
        monkeypatch.setattr(Inline, "run", real)
        assert not others
        others.append(run(cfg, restart=True)[0])
        real(self, done)

    monkeypatch.setattr(Inline, "run", run_another)
    summary, _ = run(cfg)
    assert summary is not None and others[0] is not None
    assert (summary.rows, summary.bad, summary.new_rows) == (5, 2, 0)
    assert (others[0].rows, others[0].bad, others[0].new_rows) == (5, 2, 6)
    assert [row["id"] for row in rows_of(cfg.out)] == ["a", "b", "c", "e", "f"]


def test_another_model_is_refused(cfg: InferenceConfig, model: Path, tmp_path: Path) -> None:
    run(cfg)
    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    assert run(cfg, model=ModelFiles(str(copied)))[0] is None  # the same model in another place
    shutil.rmtree(copied)
    tiny("tiny_qwen3", copied)
    make_tokenizer().save_pretrained(copied)
    with pytest.raises(ValueError, match="is there already"):
        run(cfg, model=ModelFiles(str(copied)))


def test_a_row_whose_result_was_lost_is_made_again(cfg: InferenceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine lost power: the chunk is marked as done, its result is not on the disk."""
    monkeypatch.setattr(Workplace, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(cfg)
    monkeypatch.undo()
    monkeypatch.setattr(batch, "Crew", Inline)
    for part in Workplace(cfg.out).parts():
        part.write_bytes(b"".join(part.read_bytes().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"1 row\(s\) were lost"):
        run(cfg)
    assert run(cfg)[0] is not None
    assert [row["id"] for row in rows_of(cfg.out)] == ["a", "b", "c", "e", "f"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--data", "{}/none.jsonl"], "--data .*none.jsonl: there is no such file"),
        (["--data", "{}"], "is a folder; name a file"),
        (["--data", "{}/rows.parquet"], "the rows must be JSON lines"),
        (["--data", "{}/bad.jsonl"], "no row can be used: line 1: not JSON.*line 2: there is no prompt"),
        (["--data", "{}/empty.jsonl"], "no row can be used: the file is empty"),
        (["--out", "{}"], "is a folder; name a file in it"),
        (["--out", "{}/no/out.jsonl"], "there is no folder"),
        (["--out", "/proc/out.jsonl"], "--out /proc/out.jsonl cannot be written"),
        (["--model", "{}/none"], "none is not there"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--tp", "3"], "cannot be shared by 3 ranks"),
        (["--workers", "100000"], "copies of the model need .* GB .* ask for fewer workers"),
        (["--max-rows", "0"], "max_rows=0: must be at least 1"),
        (["--sampling", "temprature=1"], "temprature: there is no such setting"),
        (["--sampling", "hot"], "'hot' is no setting"),
        (["--sampling", '{"temperature": }'], "not JSON"),
        (["--chat-template", "{}/none.jinja"], "none.jinja cannot be read"),
        (["--draft", "{}/none"], "none is not there"),
        (["--backend", "vllm"], "vLLM is not installed here"),
        (["--device", "cuda"], "there is no GPU that torch can use here"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(
    cfg: InferenceConfig, tmp_path: Path, more: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text("{nope\n{}\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--model", cfg.model.path, "--data", cfg.data, "--out", cfg.out]
    with pytest.raises(ValueError, match=message):
        infer.main([str(word) for word in (*words, *(word.replace("{}", str(tmp_path)) for word in more))])
    assert not cfg.out.exists()


def test_a_full_disk_is_told_before_anything_is_loaded(cfg: InferenceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ValueError, match="about 17 MB are needed there and 1 MB are free"):
        run(cfg)


def test_one_process_a_machine(cfg: InferenceConfig) -> None:
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 1"):
        BatchInference(cfg, LauncherRanks(rank=1, world=2, local_rank=1)).run()


def test_settings_are_words_or_json() -> None:
    want = {"temperature": 0.7, "stop": ["\n\n"]}
    assert infer.sampling_of(["temperature=0.7", 'stop=["\\n\\n"]']) == want
    assert infer.sampling_of([json.dumps(want)]) == want and infer.sampling_of([]) == {}
