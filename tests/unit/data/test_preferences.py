"""Pairs and judged answers from files to micro-batches."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.batch import MicroBatch
from data.config import DataConfig, SourceConfig
from data.gate import GateError
from data.peers import Peers
from data.pipeline import TrainingData, build


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def pair(number: int, **more: Any) -> dict[str, Any]:
    chosen, rejected = [said(f"yes {number}" * (number % 3 + 1))], [said(f"no {number}")]
    return {"prompt": [user(f"question {number}?")], "chosen": chosen, "rejected": rejected, **more}


SIDES = ("chosen", "rejected")
PAIRS = [pair(number) for number in range(40)]


@pytest.fixture
def make(tmp_path: Path, tokenizer_folder: str):
    def make_data(
        *sources: SourceConfig,
        kind: Any = "preference",
        loss_on: str = "all",
        seed: int = 0,
        peers: Any = None,
        **changes: Any,
    ) -> TrainingData:
        section = {"seq_len": 192, "micro_batch_rows": 1, "global_batch_rows": 4, "cache_dir": f"{tmp_path}/cache"}
        cfg = DataConfig(sources=sources, **{**section, **changes})
        run: dict[str, Any] = {"tokenizer_folder": tokenizer_folder, "seed": seed, "max_seq_len": 4096}
        return build(cfg, loss_on=loss_on, peers=peers or Peers.alone(), kind=kind, **run)

    return make_data


Doc = tuple[tuple[int, ...], tuple[int, ...], dict[str, float]]


def documents(batch: MicroBatch) -> list[Doc]:
    """(tokens, learnt tokens, facts) of every document."""
    found = []
    borders = batch.cu_seqlens.tolist()
    for n, (start, stop) in enumerate(itertools.pairwise(borders)):
        targets = [int(t) for t in batch.targets_T[start:stop] if t != -100]
        facts = {name: float(values[n]) for name, values in batch.doc_facts.items()}
        found.append((tuple(batch.tokens_T[start:stop].tolist()), tuple(targets), facts))
    return found


def pairs_of(batch: MicroBatch) -> list[tuple[Doc, Doc]]:
    """(chosen, rejected) of every pair of a micro-batch."""
    found: dict[int, dict[int, Doc]] = {}
    for doc in documents(batch):
        found.setdefault(int(doc[2]["pair"]), {})[int(doc[2]["side"])] = doc
    assert all(set(sides) == {0, 1} for sides in found.values())
    assert sorted(found) == list(range(len(found)))
    return [(sides[0], sides[1]) for sides in found.values()]


def everything(data: TrainingData, world: int = 1, micro: int = 1) -> list[MicroBatch]:
    rows = data.global_batch(0, -(-data.rows_per_epoch // (world * micro)) * world * micro)
    return [batch for rank in range(world) for batch in data.micro_batches(rows, rank, world, micro)]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_tokens_and_what_is_scored_are_trls(write_jsonl, make, tokenizer, packing: str) -> None:
    """TRL's DPOTrainer also scores what the template writes behind the stop token (here a line break); we do not."""
    data = make(SourceConfig(write_jsonl("p.jsonl", PAIRS)), packing=packing)
    found = [both for batch in everything(data) for both in pairs_of(batch)][: len(PAIRS)]
    wanted = []
    for row in PAIRS:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True)["input_ids"]
        both = []
        for side in ("chosen", "rejected"):
            ids = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=True)["input_ids"]
            assert ids[: len(prompt)] == prompt and tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
            both.append((tuple(ids), tuple(ids[len(prompt) : -1])))
        wanted.append(tuple(both))
    assert sorted((chosen[:2], rejected[:2]) for chosen, rejected in found) == sorted(wanted)


def test_plain_texts_are_tokenised_as_trl_does(write_jsonl, make, tokenizer) -> None:
    rows = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(10)]
    data = make(SourceConfig(write_jsonl("p.jsonl", rows)))
    found = {both for batch in everything(data) for both in [(c[:2], r[:2]) for c, r in pairs_of(batch)]}
    wanted = set()
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [tokenizer(row["prompt"] + row[side] + "<|im_end|>")["input_ids"] for side in ("chosen", "rejected")]
        wanted.add(tuple((tuple(each), tuple(each[len(prompt) :])) for each in ids))
    assert found == wanted


def test_a_document_of_a_pair_is_what_sft_makes_of_the_same_conversation(write_jsonl, make) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [
        {
            "prompt": [{"role": "system", "content": "s"}, user("q"), said("first"), user(f"r{n}")],
            "chosen": [said(f" {n}\n"), user("and?"), said("more")],
            "rejected": [said("worse")],
            "tools": tools,
        }
        for n in range(3)
    ]
    chats = [
        {"prompt": row["prompt"], "completion": row[side], "tools": tools}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    pairs = make(SourceConfig(write_jsonl("p.jsonl", rows)), seq_len=512)
    sft = make(SourceConfig(write_jsonl("c.jsonl", chats)), kind="text", loss_on="assistant", seq_len=512)
    ours = sorted(doc[:2] for batch in everything(pairs) for doc in documents(batch))
    assert ours == sorted(doc[:2] for batch in everything(sft) for doc in documents(batch))
    assert len(ours) == 6


def test_layouts_keep_pairs_together_and_see_the_same_batch(write_jsonl, make) -> None:
    data = make(SourceConfig(write_jsonl("p.jsonl", PAIRS), weight=1.5))
    rows = data.global_batch(3, 24)
    whole = sorted((c[:2], r[:2]) for batch in data.micro_batches(rows, 0, 1, 24) for c, r in pairs_of(batch))
    for world, micro in ((1, 1), (2, 3), (3, 8), (4, 2), (24, 1)):
        parts = [batch for rank in range(world) for batch in data.micro_batches(rows, rank, world, micro)]
        assert sorted((c[:2], r[:2]) for batch in parts for c, r in pairs_of(batch)) == whole


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seq_len=st.integers(80, 200),
    packing=st.sampled_from(["best_fit", "none"]),
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    fraction=st.sampled_from([0.0, 0.3]),
)
def test_any_row_length_and_layout_keeps_what_fits_once_and_whole(
    write_jsonl, make, seq_len: int, packing: str, world: int, micro: int, fraction: float
) -> None:
    data = make(
        SourceConfig(write_jsonl("p.jsonl", PAIRS)),
        seq_len=seq_len,
        packing=packing,
        eval_fraction=fraction,
        seed=seq_len,
    )
    lengths = [
        sum(21 + len(row["prompt"][0]["content"]) + len(row[side][0]["content"]) for side in SIDES) for row in PAIRS
    ]
    fitting = sorted(length for length in lengths if length <= seq_len)
    rows = data.global_batch(0, data.rows_per_epoch)
    assert all(row.num_tokens <= seq_len for row in rows)
    rows += data.global_batch(0, -len(rows) % (world * micro))
    train = [b for rank in range(world) for b in data.micro_batches(rows, rank, world, micro)]
    held = [b for rank in range(world) for b in data.eval_batches(rank, world, micro)]
    found = {(c[0], r[0]) for batch in (*train, *held) if batch.doc_facts["side"][0] >= 0 for c, r in pairs_of(batch)}
    assert sorted(len(chosen) + len(rejected) for chosen, rejected in found) == fitting
    assert data.report.channels[0].too_long_pairs == len(PAIRS) - len(fitting)


@pytest.mark.parametrize("name", ["notes.npy", "tokens", "learn", "samples.npy"])
def test_a_damaged_cache_is_built_again(write_jsonl, make, name: str) -> None:
    source = SourceConfig(write_jsonl("p.jsonl", PAIRS))
    data = make(source)
    whole = sorted(doc[:2] for batch in everything(data) for doc in documents(batch))
    file = Path(data.caches[0].folder, f"0000.{name}")
    file.write_bytes(file.read_bytes()[:-9])
    again = make(source)
    assert sorted(doc[:2] for batch in everything(again) for doc in documents(batch)) == whole


def test_ranks_build_the_same_pairs(write_jsonl, make, on_ranks) -> None:
    source = SourceConfig(
        write_jsonl(
            "p.jsonl", [*PAIRS, pair(1, chosen=[], id=3), b"{", pair(3, chosen="no 3"), pair(4, chosen=[said("no 4")])]
        )
    )
    results = on_ranks(3, lambda peers: make(source, peers=peers, max_bad_fraction=0.1, seq_len=140))
    assert all(isinstance(result, TrainingData) for result in results), results
    alone = make(source, max_bad_fraction=0.1, seq_len=140)
    for result in results:
        assert result.global_batch(7, 20) == alone.global_batch(7, 20)
        assert str(result.report) == str(alone.report)
        assert list(result.report.bad_rows()) == list(alone.report.bad_rows())


def test_every_sample_knows_its_line_whatever_the_blocks(write_jsonl, make, on_ranks, monkeypatch) -> None:
    monkeypatch.setattr("data.readers.BLOCK_BYTES", 500)
    monkeypatch.setattr("data.notes.BLOCK", 3)
    rows = [row for pair in PAIRS for row in (b"", pair)]
    source = SourceConfig(write_jsonl("p.jsonl", rows))
    for data in on_ranks(3, lambda peers: make(source, peers=peers)):
        cache = data.caches[0]
        assert len(cache.shards) == 3 and min(shard.samples for shard in cache.shards) > 3
        assert cache.notes["line"].tolist() == list(range(2, 81, 2))
        assert cache.notes["split"].tolist() == [
            21 + len(pair["prompt"][0]["content"]) + len(pair["chosen"][0]["content"]) for pair in PAIRS
        ]


def test_margins_and_what_fills_up(write_jsonl, make) -> None:
    rows = [pair(0, margin=0.5), pair(1, margin=-2), pair(2)]
    data = make(SourceConfig(write_jsonl("p.jsonl", rows)), eval_fraction=0.0)
    found = {c[1]: (c[2]["margin"], r[2]["margin"]) for batch in everything(data) for c, r in pairs_of(batch)}
    assert sorted(found.values()) == [(-2.0, -2.0), (0.0, 0.0), (0.5, 0.5)]
    held = SourceConfig(write_jsonl("e.jsonl", rows[:1]))
    plain = make(SourceConfig(write_jsonl("q.jsonl", PAIRS[:3])), eval_sources=(held,))
    assert plain.micro_batches(plain.global_batch(0, 1), 0, 1, 1)[0].doc_facts.keys() == {"side", "pair", "margin"}
    (real,), (filler,) = plain.eval_batches(0, 2, 1), plain.eval_batches(1, 2, 1)
    assert [doc[2]["margin"] for doc in documents(real)] == [0.5, 0.5]
    assert documents(filler) == [((0,), (), {"side": -1.0, "pair": -1.0, "margin": -1.0})]
    without = make(SourceConfig(write_jsonl("r.jsonl", PAIRS[:3])))
    assert without.micro_batches(without.global_batch(0, 1), 0, 1, 1)[0].doc_facts.keys() == {"side", "pair"}


def test_useless_pairs_are_dropped_counted_and_named(write_jsonl, make, tmp_path: Path) -> None:
    path = write_jsonl(
        "p.jsonl",
        [
            pair(0),
            pair(1, rejected=[said("yes 1yes 1")]),
            pair(2, chosen=[said("  ")]),
            pair(3, rejected=[said("x" * 200)]),
            {"prompt": "q", "chosen": "", "rejected": "b"},
            {"prompt": "q" * 300, "chosen": "a", "rejected": "b"},
            pair(6),
        ],
    )
    data = make(SourceConfig(path))
    report = data.report.channels[0]
    assert (report.samples, report.equal_pairs, report.empty_answers, report.too_long_pairs) == (7, 1, 2, 2)
    assert len([both for batch in everything(data)[: data.rows_per_epoch] for both in pairs_of(batch)]) == 2
    assert data.report.bad_row_count == 0
    table = str(data.report).splitlines()
    assert " ".join(table[0].split()[3:8]) == "supervised equal empty too long"
    longest = 2 * (300 + 1 + 1)
    dropped = (
        f"2 longer than data.seq_len=192 (data.seq_len={longest} keeps all), 1 with equal answers, 2 with an empty"
    )
    assert f"0 bad rows; dropped pairs: {dropped} answer" in table[-1]
    data.report.write_bad_rows(f"{tmp_path}/bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted((row["line"], row["reason"].split(":")[0]) for row in rows) == [
        (2, "chosen and rejected are the same"),
        (3, "an answer is empty"),
        (4, "the two documents together have 269 tokens, more than data.seq_len=192"),
        (5, "an answer is empty"),
        (6, f"the two documents together have {longest} tokens, more than data.seq_len=192"),
    ]
    assert {row["file"] for row in rows} == {path}
    kept = make(SourceConfig(path), seq_len=longest).report
    assert kept.channels[0].too_long_pairs == 0 and kept.rows_per_epoch == 2


def test_the_gate_refuses_a_channel_of_which_nothing_is_left(write_jsonl, make) -> None:
    long = [pair(n, rejected=[said("x" * 300)]) for n in range(2)]
    with pytest.raises(GateError, match=r"channel long .*2 are longer than data.seq_len=192; set data.seq_len=3\d\d;"):
        make(SourceConfig(write_jsonl("long.jsonl", long)))
    with pytest.raises(GateError, match=r"channel same .*1 have equal answers"):
        make(SourceConfig(write_jsonl("same.jsonl", [pair(1, rejected=[said("yes 1yes 1")])])))


def test_all_pairs_of_a_prompt_are_held_out_together(write_jsonl, make, tokenizer) -> None:
    rows = [pair(n, rejected=[said(f"no {n} {again}")]) for n in range(30) for again in range(3)]
    data = make(SourceConfig(write_jsonl("p.jsonl", rows)), eval_fraction=0.3)
    held = [tokenizer.decode(c[0]).split("?")[0] for batch in data.eval_batches(0, 1, 1) for c, _ in pairs_of(batch)]
    train = {tokenizer.decode(c[0]).split("?")[0] for batch in everything(data) for c, _ in pairs_of(batch)}
    assert held and len(held) == 3 * len(set(held)) and not set(held) & train
    assert len(set(held)) + len(train) == 30
    assert data.report.channels[0].eval_samples == len(held)


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 2), (16, 4)])
def test_evaluation_holds_every_pair_once_in_step(write_jsonl, make, world: int, micro: int) -> None:
    held = SourceConfig(write_jsonl("held.jsonl", PAIRS[20:]))
    data = make(SourceConfig(write_jsonl("p.jsonl", PAIRS[:20])), eval_sources=(held,))
    parts = [data.eval_batches(rank, world, micro) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for batch in part if (batch.doc_facts["side"] >= 0).any()]
    found = [both for batch in batches for both in pairs_of(batch)]
    assert len(found) == 20 and len({chosen[0] for chosen, _ in found}) == 20


def test_judged_answers(write_jsonl, make, tokenizer) -> None:
    rows = [
        {"prompt": [user(f"q{n}")], "completion": [said(f"answer {n}")], "label": n % 3 == 0, "id": n} for n in range(9)
    ]
    rows.append({"prompt": [user("q")], "completion": [said("")], "label": True, "id": 9})
    data = make(SourceConfig(write_jsonl("p.jsonl", rows)), kind="unpaired")
    found = {doc[1]: doc[2] for batch in everything(data) for doc in documents(batch)}
    labels = {tokenizer.decode(learnt): facts for learnt, facts in found.items()}
    assert labels == {f"answer {n}<|im_end|>": {"label": float(n % 3 == 0)} for n in range(9)}
    report = data.report.channels[0]
    assert (report.samples, report.desirable, report.empty_answers) == (10, 4, 1)
    assert "good" in str(data.report).splitlines()[0] and "judged answers: 1 with an empty" in str(data.report)


def test_a_pair_is_two_judged_answers_where_those_are_wanted(write_jsonl, make, tokenizer) -> None:
    rows = [{"prompt": [user("q")], "completion": [said("fine")], "label": True}]
    sources = SourceConfig(write_jsonl("p.jsonl", PAIRS[:4])), SourceConfig(write_jsonl("u.jsonl", rows))
    data = make(*sources, kind="unpaired")
    found = [doc for batch in everything(data) for doc in documents(batch)]
    wanted = [(row[side][0]["content"], good) for row in PAIRS[:4] for side, good in (("chosen", 1), ("rejected", 0))]
    told = [(tokenizer.decode(learnt).removesuffix("<|im_end|>"), facts["label"]) for _, learnt, facts in found]
    assert sorted(told) == sorted([*wanted, ("fine", 1)])
    assert [channel.desirable for channel in data.report.channels] == [4, 1]


def test_strings_as_chat_are_the_messages_they_stand_for(write_jsonl, make) -> None:
    strings = [{"prompt": f"q{n}", "chosen": f"a{n}", "rejected": "b", "system": "s"} for n in range(3)]
    messages = [
        {
            "prompt": [{"role": "system", "content": "s"}, user(row["prompt"])],
            **{side: [said(row[side])] for side in ("chosen", "rejected")},
        }
        for row in strings
    ]
    chat = make(SourceConfig(write_jsonl("s.jsonl", strings), as_chat=True))
    same = make(SourceConfig(write_jsonl("m.jsonl", messages), as_chat=True))
    text = make(
        SourceConfig(write_jsonl("t.jsonl", [{k: v for k, v in row.items() if k != "system"} for row in strings]))
    )
    ours, theirs, plain = (
        sorted(d for b in everything(data) for d in map(str, documents(b))) for data in (chat, same, text)
    )
    assert ours == theirs != plain
    sft = [{"prompt": "q", "completion": "a"}]
    asked = make(SourceConfig(write_jsonl("c.jsonl", sft), as_chat=True), kind="text", loss_on="assistant")
    plain = make(SourceConfig(write_jsonl("c.jsonl", sft)), kind="text", loss_on="assistant")
    assert (asked.report.channels[0].tokens, plain.report.channels[0].tokens) == (
        23,
        3,
    )  # 1 + 5 + 1 + 1 + 1 and 1 + 10 + 1 + 1 + 1


def test_kinds_are_not_mixed(write_jsonl, make) -> None:
    chats = SourceConfig(write_jsonl("c.jsonl", [{"messages": [user("q"), said("a")]}]))
    pairs = SourceConfig(write_jsonl("p.jsonl", PAIRS))
    with pytest.raises(ValueError, match=r"data.sources\[1\].path=.*c.jsonl holds texts and .*preference p"):
        make(pairs, chats)
    with pytest.raises(ValueError, match=r"data.sources\[1\].path=.*p.jsonl holds preference pairs .*from texts"):
        make(chats, pairs, kind="text")
    with pytest.raises(ValueError, match=r"data.sources\[0\].format=messages gives texts and .*take stage=sft"):
        make(SourceConfig(chats.path, format="messages"))


def test_the_first_token_of_a_document_is_nobodys_target(write_jsonl, make) -> None:
    data = make(SourceConfig(write_jsonl("p.jsonl", [{"prompt": "", "chosen": "abc", "rejected": "xy"}])))
    batch = everything(data)[0]
    assert batch.targets_N.tolist() == [3, 2]
    assert torch.equal(batch.targets_T[batch.cu_seqlens[1:].long() - 1], torch.full((2,), -100))
