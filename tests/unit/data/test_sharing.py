"""Pairs whose prompt comes once for both answers: the same documents, in fewer tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from data.batch import MicroBatch
from data.config import DataConfig, SourceConfig
from data.peers import Peers
from data.pipeline import build


def whole_documents(batch: MicroBatch) -> list[tuple[tuple[float, ...], tuple[int, ...], int]]:
    """(pair and side, tokens with those that another one holds, learnt tokens) of each document."""
    own = [batch.tokens_T[a:b].tolist() for a, b in pairwise(batch.cu_seqlens.tolist())]
    branches = batch.branches or [(number, 0) for number in range(len(own))]
    facts = zip(*(batch.doc_facts[name].tolist() for name in ("pair", "side")), strict=True)
    return sorted(
        (which, (*own[holder][:tokens], *rest), learnt)
        for which, rest, (holder, tokens), learnt in zip(facts, own, branches, batch.targets_N.tolist(), strict=True)
    )


def test_every_pair_has_its_prompt_once(write_jsonl, tmp_path: Path, tokenizer_folder: str) -> None:
    """Also what fills up a micro-batch that has nothing left to do, and the facts that were computed before."""
    rows = [
        {"prompt": f"question {i} {'of many words ' * (i % 4)}", "chosen": f" yes {i}" * (i % 3 + 1), "rejected": " no"}
        for i in range(24)
    ]
    cfg = DataConfig(
        sources=(SourceConfig(write_jsonl("p.jsonl", rows)),),
        eval_sources=(SourceConfig(write_jsonl("e.jsonl", rows[:1])),),
        seq_len=128, micro_batch_rows=1, global_batch_rows=4, cache_dir=f"{tmp_path}/cache",
    )  # fmt: skip
    whole = build(
        cfg, tokenizer_folder=tokenizer_folder, loss_on="all", seed=0, peers=Peers.alone(), max_seq_len=4096,
        kind="preference",
    )  # fmt: skip
    shared = whole.sharing_prompts()
    step = whole.global_batch(0, 4)
    saved = 0
    for one, other in zip(whole.micro_batches(step, 0, 1, 1), shared.micro_batches(step, 0, 1, 1), strict=True):
        assert whole_documents(other) == whole_documents(one)
        saved += len(one.tokens_T) - len(other.tokens_T)
        assert sum(tokens for _, tokens in other.branches) == len(one.tokens_T) - len(other.tokens_T)
    assert saved >= 4 * len(step), "a prompt has at least five tokens here, of which the last stays with its answer"
    filler = shared.eval_batches(1, 2, 1)[0]
    assert filler.branches == () and filler.num_targets == 0
