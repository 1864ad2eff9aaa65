"""The whole way from files to micro-batches."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from data.gate import GateError
from data.peers import Peers
from data.pipeline import TrainingData, build


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


CHATS = [chat(f"question {n} " + "?" * (n % 17), f"answer {n}" * (n % 3 + 1)) for n in range(60)]


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: str):
    def make_data(
        *sources: SourceConfig, loss_on: str = "assistant", seed: int = 0, peers: Peers | None = None, **changes: Any
    ) -> TrainingData:
        settings = {"seq_len": 128, "micro_batch_rows": 1, "global_batch_rows": 4, "cache_dir": f"{tmp_path}/cache"}
        cfg = DataConfig(sources=sources, **{**settings, **changes})
        return build(
            cfg,
            tokenizer_folder=tokenizer_folder,
            loss_on=loss_on,
            seed=seed,
            peers=peers or Peers.alone(),
            max_seq_len=4096,
        )

    return make_data


def documents(batches: list[Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """(tokens, targets, channel) of every document."""
    found = []
    for batch in batches:
        borders = batch.cu_seqlens.tolist()
        for start, stop, channel in zip(borders, borders[1:], batch.doc_channel_N.tolist(), strict=False):
            found.append(
                (tuple(batch.tokens_T[start:stop].tolist()), tuple(batch.targets_T[start:stop].tolist()), channel)
            )
    return found


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_an_epoch_holds_every_conversation_once_with_exactly_the_answers(write_jsonl, make, tokenizer, packing) -> None:
    data = make(SourceConfig(write_jsonl("a.jsonl", CHATS)), packing=packing)
    rows = data.global_batch(0, data.rows_per_epoch)
    assert max(row.num_tokens for row in rows) <= 128
    found = documents(data.micro_batches(rows, 0, 1, 1))
    texts = [tokenizer.decode(tokens) for tokens, _, _ in found]
    assert sorted(texts) == sorted(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in CHATS)
    answers = [tokenizer.decode([t for t in targets if t != -100]) for _, targets, _ in found]
    assert sorted(answers) == sorted(row["messages"][1]["content"] + "<|im_end|>" for row in CHATS)


def test_layouts_see_the_same_global_batch(write_jsonl, make) -> None:
    data = make(SourceConfig(write_jsonl("a.jsonl", CHATS), weight=1.5))
    rows = data.global_batch(data.rows_per_epoch - 5, 24)
    whole = Counter(documents(data.micro_batches(rows, 0, 1, 24)))
    for world, micro in ((1, 1), (2, 3), (3, 8), (4, 2), (24, 1)):
        parts = [batch for rank in range(world) for batch in data.micro_batches(rows, rank, world, micro)]
        assert Counter(documents(parts)) == whole
        assert sum(batch.num_targets for batch in parts) == sum(t != -100 for doc in whole.elements() for t in doc[1])


def test_documents_lose_nothing_and_conversations_their_end(write_jsonl, make, tokenizer) -> None:
    text = "".join(chr(33 + n % 90) for n in range(1000))
    long = chat("q", "x" * 500)
    lost = chat("q" * 500, "never reached")
    paths = [write_jsonl("a.jsonl", [{"text": text}]), write_jsonl("b.jsonl", [long, lost, *CHATS[:3]])]
    data = make(*(SourceConfig(path) for path in paths), loss_on="all")
    document = documents(data.micro_batches(data.global_batch(0, data.rows_per_epoch), 0, 1, 1))
    pieces = [doc for doc in document if doc[2] == 0]
    assert sorted(len(tokens) for tokens, _, _ in pieces) == [1001 - 7 * 128] + [128] * 7
    assert sorted("".join(tokenizer.decode(tokens) for tokens, _, _ in pieces)) == sorted(text + "<|im_end|>")
    data = make(SourceConfig(paths[1]))
    report = data.report.channels[0]
    assert (report.samples, report.truncated_rows, report.fully_masked_rows) == (5, 2, 1)
    assert report.stop_supervised == "partly"
    whole = [
        len(tokenizer.apply_chat_template(row["messages"], tokenize=False, tools=None).encode()) for row in CHATS[:3]
    ]
    # the two marks of each turn are one token each, not 12 and 10 bytes: 2 turns x (11 + 9) bytes less
    assert report.tokens == 128 + sum(whole) - 3 * 2 * (len("<|im_start|>") - 1 + len("<|im_end|>") - 1)


def test_held_out_samples_are_never_trained_on_and_survive_reordering(write_jsonl, make) -> None:
    path = write_jsonl("a.jsonl", CHATS)
    data = make(SourceConfig(path), eval_fraction=0.3)
    train = {doc[0] for doc in documents(data.micro_batches(data.global_batch(0, data.rows_per_epoch), 0, 1, 1))}
    held = [doc[0] for doc in documents(data.eval_batches(0, 1, 2))]
    assert 8 <= len(held) <= 28 and len(held) + len(train) == 60 and not train & set(held)
    assert data.report.channels[0].eval_samples == len(held)
    other = make(
        SourceConfig(write_jsonl("b.jsonl", CHATS[::-1] + [chat("new", "row")] * 5)), eval_fraction=0.3, seed=9
    )
    assert set(held) <= {doc[0] for doc in documents(other.eval_batches(0, 1, 2))}
    (Path(path).parent / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    shorter = make(SourceConfig(path), eval_fraction=0.3, chat_template=f"{Path(path).parent}/t.jinja")
    assert shorter.held_out.sample_P.tolist() == data.held_out.sample_P.tolist()


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 2), (3, 1), (16, 4)])
def test_eval_batches_hold_every_sample_once_in_step(write_jsonl, make, world: int, micro: int) -> None:
    held = SourceConfig(write_jsonl("held.jsonl", CHATS[40:]), channel="other")
    data = make(SourceConfig(write_jsonl("a.jsonl", CHATS[:40])), eval_sources=(held,))
    assert data.channels == ("a", "other")
    parts = [data.eval_batches(rank, world, micro) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    found = [doc for part in parts for doc in documents(part) if len(doc[0]) > 1]
    assert len(found) == 20 and len(set(found)) == 20 and {doc[2] for doc in found} == {1}
    assert make(SourceConfig(f"{Path(held.path).parent}/a.jsonl")).eval_batches(0, world, micro) == []


def test_random_channels_cover_all_samples_and_follow_the_seed(write_jsonl, make) -> None:
    source = SourceConfig(write_jsonl("a.jsonl", CHATS))
    data = make(source, random_channels=3)
    assert data.channels == ("random_0", "random_1", "random_2")
    counts = [channel.samples for channel in data.report.channels]
    assert sum(counts) == 60 and min(counts) > 8
    assert [channel.samples for channel in make(source, random_channels=3).report.channels] == counts
    assert [channel.samples for channel in make(source, random_channels=3, seed=5).report.channels] != counts


def test_report_by_hand(write_jsonl, make) -> None:
    """Byte-level tokens: text of n characters has n + 1 tokens (EOS), n targets."""
    sources = [
        SourceConfig(write_jsonl("a.jsonl", [{"text": "x" * 63}] * 2), weight=2),
        SourceConfig(write_jsonl("b.jsonl", [{"text": "y" * 99}, {"text": "z" * 27}])),
    ]
    report = make(*sources, loss_on="all").report
    first, second = report.channels
    assert (first.samples, first.tokens, first.supervised_tokens, first.stop_supervised) == (2, 128, 126, "yes")
    assert (second.samples, second.tokens, second.supervised_tokens) == (2, 128, 126)
    # rows of 128: z and y fill one (28 + 100), the four x two more (64 + 64)
    assert (report.rows_per_epoch, report.packing_efficiency) == (3, 1.0)
    assert (first.weight_share, second.weight_share) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert json.loads(json.dumps(report.to_dict()))["channels"][0]["tokens"] == 128
    table = str(report).splitlines()
    assert table[0].split()[:3] == ["channel", "samples", "tokens"]
    assert len({len(line) for line in table[:-1]}) == 1
    assert "3 rows an epoch, 100.0% full; 0 bad rows" in table[-1]


def test_bad_rows_stop_the_run_only_past_the_limit(write_jsonl, make, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", [*CHATS[:8], b"{not json", {"messages": []}])
    with pytest.raises(GateError) as caught:
        make(SourceConfig(path), max_bad_fraction=0.1)
    message = str(caught.value)
    for part in (
        f"data.sources[0].path={path}: 2 of 10 rows are malformed: 20.00% is more than data.max_bad_fraction=0.1",
        "data.max_bad_fraction=0.2",
        f"{path}:9: not JSON",
        f"{path}:10: there are no messages",
    ):
        assert part in message
    assert caught.value.report.bad_row_count == 2
    data = make(SourceConfig(path), max_bad_fraction=0.2)
    data.report.write_bad_rows(f"{tmp_path}/bad_rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [(path, 9), (path, 10)]


def test_gate_stops_at_every_source_that_brings_nothing(write_jsonl, make, tmp_path: Path) -> None:
    only_questions = [{"messages": [{"role": "user", "content": "is anyone there"}]}] * 3
    sources = [
        SourceConfig(write_jsonl("good.jsonl", CHATS[:5])),
        SourceConfig(write_jsonl("asking.jsonl", only_questions)),
        SourceConfig(write_jsonl("empty.jsonl", [])),
        SourceConfig(write_jsonl("words.jsonl", [{"text": "some words"}])),
        SourceConfig(write_jsonl("broken.jsonl", [b"{", b"["])),
        SourceConfig(write_jsonl("cut.jsonl", [chat("q" * 300, "a")])),
    ]
    with pytest.raises(GateError) as caught:
        make(*sources)
    told = [line for line in str(caught.value).splitlines() if line.startswith("- ")]
    assert len(told) == 5
    assert "empty.jsonl is empty: it has no rows" in told[0]
    assert "2 of 2 rows are malformed: all are malformed" in told[1]
    assert told[2].startswith("- channel asking") and "no assistant turn" in told[2] and "is anyone there" in told[2]
    assert told[3].startswith("- channel words") and "stage.loss_on=all" in told[3]
    assert told[4].startswith("- channel cut") and "raise data.seq_len" in told[4]


def test_refusals_before_any_work(write_jsonl, make, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", CHATS)
    with pytest.raises(ValueError, match=r"data\.seq_len=5000 .* set data\.seq_len=4096"):
        make(SourceConfig(path), seq_len=5000)
    cfg = DataConfig(sources=(SourceConfig(path),), seq_len=8, micro_batch_rows=1, global_batch_rows=1)
    with pytest.raises(ValueError, match=r"data\.tokenizer=FOLDER"):
        build(cfg, tokenizer_folder=None, loss_on="all", seed=0, peers=Peers.alone(), max_seq_len=8)
    with pytest.raises(ValueError, match="no sample is left to train on"):
        make(SourceConfig(path, weight=0.0))


def test_tokenizer_without_chat_template(write_jsonl, tokenizer_folder: str, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tokenizer_folder, bare, ignore=shutil.ignore_patterns("chat_template*"))
    settings: dict[str, Any] = {
        "seq_len": 64,
        "micro_batch_rows": 1,
        "global_batch_rows": 1,
        "cache_dir": f"{tmp_path}/c",
    }
    cfg = DataConfig(sources=(SourceConfig(write_jsonl("a.jsonl", CHATS)),), **settings)
    run: dict[str, Any] = {"tokenizer_folder": str(bare), "seed": 0, "peers": Peers.alone(), "max_seq_len": 64}
    with pytest.raises(ValueError, match=r"no chat template.*data\.chat_template="):
        build(cfg, loss_on="assistant", **run)
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    cfg = dataclasses.replace(cfg, chat_template=f"{tmp_path}/t.jinja")
    assert build(cfg, loss_on="assistant", **run).report.channels[0].stop_supervised == "yes"
    texts = DataConfig(sources=(SourceConfig(write_jsonl("b.jsonl", [{"text": "words"}])),), **settings)
    assert build(texts, loss_on="all", **run).report.channels[0].samples == 1


def test_ranks_agree_and_share_an_error(write_jsonl, make, on_ranks) -> None:
    sources = [SourceConfig(write_jsonl("a.jsonl", CHATS)), SourceConfig(write_jsonl("b.jsonl", CHATS[:9]), weight=0.5)]
    results = on_ranks(3, lambda peers: make(*sources, peers=peers))
    assert all(isinstance(result, TrainingData) for result in results), results
    alone = make(*sources)
    for result in results:
        assert result.global_batch(7, 20) == alone.global_batch(7, 20)
        assert (result.fingerprint, str(result.report)) == (alone.fingerprint, str(alone.report))
    broken = SourceConfig(write_jsonl("c.jsonl", [b"{"]))
    errors = on_ranks(2, lambda peers: make(broken, peers=peers))
    assert [type(error) for error in errors] == [GateError, GateError]


def test_fingerprint_changes_with_what_decides_the_rows(write_jsonl, make) -> None:
    source = SourceConfig(write_jsonl("a.jsonl", CHATS))
    seen = {
        make(source).fingerprint,
        make(source, seed=1).fingerprint,
        make(source, seq_len=100).fingerprint,
        make(source, packing="none").fingerprint,
        make(dataclasses.replace(source, weight=2.0)).fingerprint,
        make(SourceConfig(write_jsonl("b.jsonl", CHATS[1:]))).fingerprint,
    }
    assert len(seen) == 6
    assert make(source, micro_batch_rows=2).fingerprint in seen
