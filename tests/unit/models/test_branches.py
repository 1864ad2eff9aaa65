"""Documents that share their beginning against the same documents each by itself: what is said of every token, and all
gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.blocks.branches import branch_context
from models.config import RopeConfig
from tests import sight_cases
from tests.branch_cases import LENGTHS, answer, answer_in_pool, seeing
from tests.mla_cases import LATENT
from tests.tp_cases import CFG

MODELS = {
    "groups": CFG,
    "window": replace(CFG, family="qwen2", sliding_window=4, full_attention_layers=1),
    "window_longer_than_prompts": replace(CFG, family="qwen2", sliding_window=13, full_attention_layers=0),
    "yarn": replace(CFG, rope=RopeConfig(scaling="yarn", factor=2.0, original_max_seq_len=8)),
    "latent": LATENT,
    "scalar": replace(CFG, head="scalar"),
}
WHOLE = sum(asked * len(answers) + sum(answers) for asked, answers in LENGTHS)
ONCE = sum(asked + sum(answers) + len(answers) - 1 for asked, answers in LENGTHS)
"""The last token of the prompt predicts the first of each answer and stays with it."""


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """fp32: what is said to 1e-5, gradients to 1e-5 of the largest of each."""
    assert got["told"].keys() == want["told"].keys()
    for document, told in want["told"].items():
        torch.testing.assert_close(got["told"][document], told, rtol=0, atol=1e-5)
    for name, grad in want["grads"].items():
        bound = 1e-5 * max(grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(got["grads"][name], grad, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_equals_whole_documents(name: str) -> None:
    shared, whole = (answer(MODELS[name], share) for share in (True, False))
    assert (shared["tokens"], whole["tokens"]) == (ONCE, WHOLE)
    same(shared, whole)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_pictures_of_a_beginning_are_looked_at_once(name: str) -> None:
    """But for the one that a prompt ends with: its last token predicts, so every answer has it again."""
    cfg = sight_cases.MODELS[name]
    shared, whole = (answer(cfg, share) for share in (True, False))
    same(shared, whole)
    own = [len(s.pictures.patches_PX) for s in seeing(cfg) if s.pictures is not None]
    assert whole["patches"] == sum(own) and shared["patches"] == own[0] + own[3] + sum(own[6:])


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(recompute: str) -> None:
    same(answer(CFG, True, recompute=recompute), answer(CFG, False))


def test_tensor_parallel(pool) -> None:
    """Each rank against the same rank with whole documents."""
    shared, whole = (pool(2).run(answer_in_pool, CFG, share, False) for share in (True, False))
    for got, want in zip(shared, whole, strict=True):
        same(got, want)


def test_sequence_parallel(pool) -> None:
    """Ranks have other rows now, and of norms the gradient of their rows: sums over the ranks are compared."""
    shared, whole = (_summed(pool(2).run(answer_in_pool, CFG, share, True)) for share in (True, False))
    same(shared, whole)


def _summed(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return ranks[0] | {"grads": {name: sum(rank["grads"][name] for rank in ranks) for name in ranks[0]["grads"]}}


def test_refuses_keys_that_turn_by_the_length_of_their_document() -> None:
    rope = RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=8)
    with pytest.raises(AssertionError, match="cannot be shared"):
        answer(replace(CFG, rope=rope), True)


def test_neighbours_meet_their_beginning_in_one_call() -> None:
    """Four documents: the second and third begin as the first does, the last by itself."""
    context = branch_context((0, 9, 12, 16, 20), ((0, 0), (0, 5), (0, 5), (3, 0)), {None}, torch.device("cpu"))
    meetings = context.rings[None].own
    assert [(m.q_start, m.q_stop, m.k_start, m.k_stop, m.causal, m.docs) for m in meetings] == [
        (0, 9, 0, 9, True, 1), (9, 12, 9, 12, True, 1), (12, 20, 12, 20, True, 2), (9, 16, 0, 5, False, 1),
    ]  # fmt: skip
    assert context.rows == (20,)


@pytest.mark.parametrize(
    ("branches", "reason"),
    [
        (((0, 0), (0, 2), (1, 2)), "document 1 holds nothing"),
        (((0, 0), (0, 10), (2, 0)), "document 0 has no 10 tokens"),
        (((0, 0), (0, 2)), "2 beginnings of 3 documents"),
    ],
)
def test_refuses_what_cannot_be(branches: tuple[tuple[int, int], ...], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        branch_context((0, 9, 12, 16), branches, {None}, torch.device("cpu"))
