"""Rows to prompts: what is asked, what is kept, in which order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.config import DataConfig, SourceConfig
from data.gate import GateError
from data.peers import Peers
from data.prompts import PromptData, read, rows_file


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SUMS = [{"prompt": [user(f"What is {n} + 1?")], "answer": n + 1, "hint": {"text": "count"}} for n in range(20)]


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: str):
    def make_data(*sources: SourceConfig, seed: int = 0, peers: Peers | None = None, **changes: Any) -> PromptData:
        limit = changes.pop("max_prompt_tokens", 100)
        settings = {"seq_len": 9, "micro_batch_rows": 1, "global_batch_rows": 1, "cache_dir": f"{tmp_path}/cache"}
        cfg = DataConfig(sources=sources, **{**settings, **changes})
        peers = peers or Peers.alone()
        return read(cfg, tokenizer_folder=tokenizer_folder, max_prompt_tokens=limit, seed=seed, peers=peers)

    return make_data


def test_every_row_is_asked_with_all_it_says(write_jsonl, make, tokenizer) -> None:
    data = make(SourceConfig(write_jsonl("sums.jsonl", SUMS)))
    prompts = data.prompts(0, 20)
    assert data.prompts_per_epoch == 20 and data.channels == ("sums",)
    for prompt in prompts:
        row = SUMS[prompt.row]
        assert prompt.messages == tuple(row["prompt"]) and prompt.fields == {
            "answer": row["answer"],
            "hint": row["hint"],
        }
        wanted = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        assert prompt.text == wanted and prompt.text.endswith("<|im_start|>assistant\n")
        assert list(prompt.tokens) == tokenizer(wanted)["input_ids"]
        assert (prompt.channel, prompt.channel_name) == (0, "sums")
    assert sorted(prompt.row for prompt in prompts) == list(range(20))


def test_sft_rows_texts_and_pairs_ask_too(write_jsonl, make, tokenizer) -> None:
    chats = [{"messages": [user("q"), said("a"), user("r"), said("b")], "level": 3}]
    texts = [{"prompt": "Once", "completion": " upon"}]
    pairs = [{"chosen": [user("p"), said("a")], "rejected": [user("p"), said("b")]}]
    paths = [write_jsonl(name, rows) for name, rows in (("c.jsonl", chats), ("t.jsonl", texts), ("p.jsonl", pairs))]
    found = {prompt.channel_name: prompt for prompt in make(*map(SourceConfig, paths)).prompts(0, 3)}
    assert found["c"].messages == (user("q"), said("a"), user("r"))
    assert found["c"].fields == {"level": 3, "completion": "b"}
    assert (found["t"].messages, found["t"].fields) == (None, {"completion": " upon"})
    assert tokenizer.decode(found["t"].tokens) == "Once" == found["t"].text
    assert found["p"].messages == (user("p"),) and found["p"].fields["chosen"] == pairs[0]["chosen"]


def test_a_string_as_chat_is_asked_as_a_users_message(write_jsonl, make) -> None:
    rows = [{"prompt": "2+2?", "completion": "4"}]
    (prompt,) = make(SourceConfig(write_jsonl("c.jsonl", rows), as_chat=True)).prompts(0, 1)
    assert (prompt.messages, prompt.fields) == ((user("2+2?"),), {"completion": "4"})


def test_order_is_seeded_and_weighted_without_gaps(write_jsonl, make) -> None:
    one, two = write_jsonl("a.jsonl", SUMS[:6]), write_jsonl("b.jsonl", SUMS[6:10])
    data = make(SourceConfig(one), SourceConfig(two, weight=2.0))
    epoch = data.prompts(0, 14)
    assert data.prompts_per_epoch == 14
    assert Counter(prompt.row for prompt in epoch) == {**dict.fromkeys(range(6), 1), **dict.fromkeys(range(6, 10), 2)}
    assert [prompt.number for prompt in data.prompts(5, 20)] == list(range(5, 25))
    assert data.prompts(5, 20)[:9] == epoch[5:]
    second = [prompt.row for prompt in data.prompts(14, 14)]
    assert Counter(second) == Counter(prompt.row for prompt in epoch) and second != [prompt.row for prompt in epoch]
    other = make(SourceConfig(one), SourceConfig(two, weight=2.0), seed=1)
    assert [prompt.row for prompt in other.prompts(0, 14)] != [prompt.row for prompt in epoch]
    assert other.fingerprint != data.fingerprint == make(SourceConfig(one), SourceConfig(two, weight=2.0)).fingerprint
    assert make(SourceConfig(one), SourceConfig(two, weight=2.0), max_prompt_tokens=99).fingerprint != data.fingerprint


def test_held_out_prompts_are_never_asked_in_training(write_jsonl, make) -> None:
    path, more = write_jsonl("a.jsonl", SUMS), write_jsonl("e.jsonl", [{"question": "Why?", "answer": "so"}])
    data = make(SourceConfig(path), eval_fraction=0.3, eval_sources=(SourceConfig(more, channel="why"),))
    held = data.held_out
    train = {prompt.text for prompt in data.prompts(0, data.prompts_per_epoch)}
    assert 3 <= len(held) <= 12 and len(held) - 1 + len(train) == 20
    assert not {prompt.text for prompt in held} & train
    assert held[-1].channel_name == "why" and held[-1].fields == {"question": "Why?", "answer": "so"}
    assert [prompt.number for prompt in held] == list(range(len(held)))
    again = make(SourceConfig(write_jsonl("b.jsonl", SUMS[::-1])), eval_fraction=0.3, seed=5)
    assert {prompt.text for prompt in again.held_out} == {prompt.text for prompt in held[:-1]}
    assert [channel.eval_samples for channel in data.report.channels] == [len(held) - 1, 1]


def test_the_same_prompts_are_held_out_of_pairs(write_jsonl, make, tmp_path: Path, tokenizer_folder: str) -> None:
    from data.pipeline import build

    pairs = [{**row, "chosen": [said("a")], "rejected": [said("b")]} for row in SUMS]
    cfg = DataConfig(
        sources=(SourceConfig(write_jsonl("p.jsonl", pairs)),),
        eval_fraction=0.3,
        seq_len=128,
        micro_batch_rows=1,
        global_batch_rows=1,
        cache_dir=f"{tmp_path}/cache",
    )
    run: dict[str, Any] = {"loss_on": "all", "seed": 0, "peers": Peers.alone(), "max_seq_len": 128}
    held = build(cfg, tokenizer_folder=tokenizer_folder, kind="preference", **run).held_out
    asked = make(SourceConfig(write_jsonl("a.jsonl", SUMS)), eval_fraction=0.3).held_out
    assert held.sample_P.tolist() == [prompt.row for prompt in asked]


def test_bad_rows_and_long_prompts_are_counted_and_named(write_jsonl, make, tmp_path: Path) -> None:
    path = write_jsonl("a.jsonl", [*SUMS[:5], b"{", {"prompt": "x" * 150}, {"prompt": ""}])
    with pytest.raises(GateError, match="2 of 8 rows are malformed"):
        make(SourceConfig(path))
    data = make(SourceConfig(path), max_bad_fraction=0.5)
    table = str(data.report).splitlines()
    assert table[0].split() == ["channel", "samples", "tokens", "too", "long", "share", "eval"]
    assert table[-1] == (
        "5 prompts an epoch; 2 bad rows; dropped prompts: 1 longer than rollout.max_prompt_tokens=100 "
        "(rollout.max_prompt_tokens=150 keeps all)"
    )
    data.report.write_bad_rows(f"{tmp_path}/bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"].split(":")[0]) for row in rows] == [
        (6, "not JSON"),
        (8, "the prompt is empty"),
        (7, "the prompt has 150 tokens, more than rollout.max_prompt_tokens=100"),
    ]
    with pytest.raises(
        GateError, match=r"no prompt left in 1 samples: all are longer .*set rollout.max_prompt_tokens=150"
    ):
        make(SourceConfig(write_jsonl("b.jsonl", [{"prompt": "x" * 150}])))
    with pytest.raises(ValueError, match=r"holds texts and conversations .* learns from prompts"):
        make(SourceConfig(write_jsonl("c.jsonl", [{"text": "words"}])))


def test_ranks_see_the_same_prompts(write_jsonl, make, on_ranks, tmp_path: Path) -> None:
    generated = [{"question": f"{n}?", "answer": n, "entry": {"seed": [n]}} for n in range(30)]

    def work(peers: Peers) -> PromptData:
        path = rows_file(generated if peers.rank == 0 else [], "tasks", f"{tmp_path}/cache", peers)
        return make(SourceConfig(path, channel="tasks"), peers=peers)

    results = on_ranks(3, work)
    assert all(isinstance(result, PromptData) for result in results), results
    for data in results:
        assert data.prompts(3, 40) == results[0].prompts(3, 40)
    (prompt,) = results[0].prompts(0, 1)
    assert prompt.fields == generated[prompt.row] and prompt.channel_name == "tasks"
    assert len(list((tmp_path / "cache").glob("tasks-*.jsonl"))) == 1
    assert work(Peers.alone()).fingerprint == results[0].fingerprint
