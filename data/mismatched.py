"""Answers to other prompts: what a policy's distance to its reference is estimated on when answers come unpaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data.batch import Document


def mismatched(documents: Sequence[Document], seq_len: int) -> list[Document]:
    """Each document's prompt with the answer of the next one, in a circle; without facts, its own channel.

    A prompt ends where the first learnt token stands. What would be longer than ``seq_len`` loses the answer's end, and
    one whose prompt fills the row is left out.
    """
    starts = [int(np.argmax(doc.learn_L)) for doc in documents]
    found = []
    for number, (doc, start) in enumerate(zip(documents, starts, strict=True)):
        other = (number + 1) % len(documents)
        answer, learn = documents[other].tokens_L[starts[other] :], documents[other].learn_L[starts[other] :]
        if start >= seq_len:
            continue
        tokens_L = np.concatenate([doc.tokens_L[:start], answer])[:seq_len]
        learn_L = np.concatenate([doc.learn_L[:start], learn])[:seq_len]
        found.append(replace(doc, tokens_L=tokens_L, learn_L=learn_L, facts={}, token_facts={}))
    return found
