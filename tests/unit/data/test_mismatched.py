"""Prompts with the answers to other prompts."""

from __future__ import annotations

import numpy as np

from data.batch import Document
from data.mismatched import mismatched


def document(prompt: list[int], answer: list[int], channel: int = 0) -> Document:
    learn_L = np.array([False] * len(prompt) + [True] * len(answer))
    return Document(np.array(prompt + answer), learn_L, channel, {"label": 1.0})


def test_each_prompt_gets_the_next_answer_in_a_circle() -> None:
    docs = [document([1, 2], [3]), document([4], [5, 6, 7], channel=1), document([8], [9])]
    found = mismatched(docs, 10)
    assert [doc.tokens_L.tolist() for doc in found] == [[1, 2, 5, 6, 7], [4, 9], [8, 3]]
    assert [doc.learn_L.tolist() for doc in found] == [[False, False, True, True, True], [False, True], [False, True]]
    assert [doc.channel for doc in found] == [0, 1, 0]
    assert all(doc.facts == {} for doc in found)


def test_an_answer_keeps_what_is_not_learnt_in_it() -> None:
    """A tool's result between two turns of the assistant."""
    turns = Document(np.array([1, 2, 3, 4]), np.array([False, True, False, True]), 0)
    found = mismatched([document([7, 8], [9]), turns], 10)
    assert found[0].tokens_L.tolist() == [7, 8, 2, 3, 4]
    assert found[0].learn_L.tolist() == [False, False, True, False, True]


def test_no_document_is_longer_than_a_row() -> None:
    docs = [document([1, 2, 3], [4]), document([5], [6, 7, 8])]
    assert [doc.tokens_L.tolist() for doc in mismatched(docs, 4)] == [[1, 2, 3, 6], [5, 4]]
    assert [doc.tokens_L.tolist() for doc in mismatched(docs, 3)] == [[5, 4]]
