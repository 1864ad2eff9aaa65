"""Documents that begin alike, and what a model says of them with and without sharing their beginnings."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from data.batch import Document, MicroBatch, collate
from models.config import ModelConfig
from parallel.sharding import SINGLE, Place
from tests.sight_cases import SIZES, shown
from tests.tp_cases import here, model_of
from trainer.pictures import picture_config

GROUP = "group"
LENGTHS = ((11, (7, 3, 9, 3)), (5, (4, 4)), (1, (6, 5)), (8, (2,)))
"""Tokens of each prompt and of the answers to it."""


def documents(vocab: int = 31, groups: tuple[tuple[int, tuple[int, ...]], ...] = LENGTHS) -> list[Document]:
    """Answers to the same prompts; the prompt is not learnt. Every document says which one it is."""
    draw = np.random.default_rng(1)
    found = []
    for group, (asked, answers) in enumerate(groups):
        prompt = draw.integers(0, vocab, asked)
        for length in answers:
            tokens = np.concatenate([prompt, draw.integers(0, vocab, length)])
            learn = np.arange(len(tokens)) >= asked
            facts = {GROUP: float(group), "number": float(len(found))}
            found.append(Document(tokens, learn, 0, facts, {"weight": draw.normal(size=len(tokens))}))
    return found


def seeing(cfg: ModelConfig) -> list[Document]:
    """Answers to prompts with no, one or two pictures, of which one ends with a picture."""
    draw, made = np.random.default_rng(1), picture_config(cfg)
    assert made is not None
    found = []
    for group, sizes in enumerate(SIZES[:4]):
        asked, sight = shown(made, sizes, group)
        if group == 3:
            assert sight is not None
            asked = asked[: int(sight.pictures.slots_F[-1]) + 1]
        for length in (5, 3, 5):
            tokens = np.array([*asked, *draw.integers(0, cfg.vocab_size, length)])
            rotary = None
            if sight is not None and sight.rotary_3L is not None:
                new = sight.rotary_3L[:, : len(asked)].max() + 1 + torch.arange(length)
                rotary = torch.cat([sight.rotary_3L[:, : len(asked)], new.expand(3, -1)], 1).numpy()
            learn, facts = np.arange(len(tokens)) >= len(asked), {GROUP: float(group), "number": float(len(found))}
            pictures: Any = None if sight is None else sight.pictures
            features = 0 if sight is None else sight.features
            weights = {"weight": draw.normal(size=len(tokens))}
            found.append(Document(tokens, learn, 0, facts, weights, pictures, features, rotary))
    return found


def answer(cfg: ModelConfig, share: bool, place: Place = SINGLE, recompute: Any = "none") -> dict[str, Any]:
    """Log-probabilities of each document's learnt tokens or, with a scalar head, its last value; this rank's gradients
    of a weighted sum."""
    model = model_of(cfg, place, recompute)
    batch = collate(seeing(cfg) if cfg.vision else documents(), GROUP if share else None)
    if cfg.head == "scalar":
        values_T = model(**batch.inputs, output="head")
        ends = batch.cu_seqlens[1:].long() - 1
        told, weights = values_T[ends], torch.cos(batch.doc_facts["number"]).float()
    else:
        told, _ = model(**batch.inputs, targets_T=batch.targets_T, output="log_probs")
        weights = batch.token_facts["weight"]
    (told * weights).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    looked = 0 if batch.pictures is None else len(batch.pictures.patches_PX)
    return {
        "told": _by_document(batch, told.detach()),
        "grads": grads,
        "tokens": len(batch.tokens_T),
        "patches": looked,
    }


def answer_in_pool(cfg: ModelConfig, share: bool, sequence_parallel: bool) -> dict[str, Any]:
    return answer(cfg, share, here(sequence_parallel))


def _by_document(batch: MicroBatch, told: torch.Tensor) -> dict[int, torch.Tensor]:
    found = {}
    for number, document in enumerate(batch.doc_facts["number"].long().tolist()):
        own = (batch.doc_T == number) & (batch.targets_T >= 0)
        found[document] = told[number] if len(told) != len(batch.targets_T) else told[own]
    return found
