"""Whole preference stages against TRL's trainers: our decoder on packed documents, theirs on padded rows.

The same weights cross a saved folder; loss and the embedding's gradient are compared in fp32.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForSequenceClassification

from convert.from_hf import open_hf
from convert.source import Source
from data.batch import Document, MicroBatch, collate
from data.mismatched import mismatched
from models import Decoder, build
from parallel.materialise import materialise
from parallel.sharding import ALONE, WHOLE
from tests.trl_reference import PAIRS, TakesMargin, bare, dpo_trainer, kto_trainer, padded_pairs, scoring_models, seeded
from trainer.preparation import Preparation
from trainer.stages import DpoConfig, RewardConfig, build_stage

TOLERANCE = 1e-6
ALL = SimpleNamespace(cp=ALONE, sum=lambda values: values)
"""The groups of one process."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model that scores micro-batches, as an engine or a frozen model does."""

    model: Decoder

    @torch.no_grad()
    def score(self, micro_batches: Any, forward: Any) -> list[Any]:
        return [forward(self.model, batch, 1.0)[1] for batch in micro_batches]


@pytest.fixture(scope="module")
def padded() -> dict[str, torch.Tensor]:
    return padded_pairs()


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, Any]:
    return scoring_models()


@pytest.fixture(scope="module")
def ours(theirs: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Decoder]:
    policy, reference = (opened(model, tmp_path_factory.mktemp("model")) for model in theirs)
    return policy, reference


def opened(model: Any, folder: Path) -> Decoder:
    """A model of transformers as ours."""
    forward = model.__dict__.pop("forward", None)  # TRL's, which cannot be saved
    model.save_pretrained(folder)
    if forward is not None:
        model.forward = forward
    checkpoint = open_hf(folder)
    made = build(checkpoint.cfg)
    materialise(made, Source(checkpoint, checkpoint.cfg), WHOLE, torch.device("cpu"))
    return made


def documents(padded: dict[str, torch.Tensor], facts: Any) -> list[Document]:
    """The rows of the padded batch without their padding; ``facts`` gives those of row n."""
    lengths = padded["attention_mask"].sum(1).tolist()
    return [
        Document(
            padded["input_ids"][n, :length].numpy(), padded["completion_mask"][n, :length].bool().numpy(), 0, facts(n)
        )
        for n, length in enumerate(lengths)
    ]


def in_pairs(n: int) -> dict[str, float]:
    return {"pair": float(n % PAIRS), "side": float(n // PAIRS)}


def loss_of(stage: Any, model: Decoder, batch: MicroBatch) -> torch.Tensor:
    """The stage's loss of one micro-batch that is the whole global batch."""
    return stage.forward(model, batch, 1 / stage.count([batch]))[0]


def same(ours: torch.Tensor, model: Decoder, theirs: torch.Tensor, reference: Any) -> None:
    """The same loss and gradient of the embedding."""
    assert ours.item() == pytest.approx(theirs.item(), rel=TOLERANCE)
    (a,) = torch.autograd.grad(ours, [model.get_parameter("embed.weight")])
    (b,) = torch.autograd.grad(theirs, [reference.get_input_embeddings().weight])
    assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(("loss", "words"), [("sigmoid", ["sigmoid", "sft"]), ("ipo", ["ipo", "sft"])])
def test_dpo(padded: dict[str, torch.Tensor], theirs: Any, ours: Any, loss: Any, words: list[str]) -> None:
    expected = dpo_trainer(theirs, words, [1.0, 0.4], 0.3, 0.0)._compute_loss(theirs[0], dict(padded), False)
    cfg = DpoConfig(loss=loss, beta=0.3, sft_weight=0.4)
    stage: Any = build_stage(cfg, 1)
    prepare = Preparation(stage, ALL, Asked(ours[0]), Asked(ours[1]), lambda rows: [])  # pyright: ignore
    (batch,) = prepare([collate(documents(padded, in_pairs))], None)
    same(loss_of(stage, ours[0], batch), ours[0], expected, theirs[0])


@pytest.mark.parametrize("apart", [1, -1])
def test_kto(padded: dict[str, torch.Tensor], theirs: Any, ours: Any, apart: int) -> None:
    """Their mismatched rows are made of our mismatched documents."""
    labels = [1, 0, 0, 1, 1, 0, 1, 0, 1, 1]
    docs = documents(padded, lambda n: {"label": float(labels[n])})
    others = mismatched(docs, 64)
    width = max(len(doc.tokens_L) for doc in others)
    strange = {name: torch.zeros(len(others), width, dtype=torch.int64) for name in padded}
    for n, doc in enumerate(others):
        length = len(doc.tokens_L)
        strange["input_ids"][n, :length] = torch.from_numpy(doc.tokens_L)
        strange["attention_mask"][n, :length] = 1
        strange["completion_mask"][n, :length] = torch.from_numpy(doc.learn_L).long()
    (policy, reference), (our_policy, our_reference) = theirs[::apart], ours[::apart]
    inputs = {**padded, **{f"KL_{name}": x for name, x in strange.items()}, "label": torch.tensor(labels)}
    trainer = kto_trainer(policy, reference, 0.2, 1.3, 0.8)
    expected = trainer._compute_loss(policy, inputs, False)
    stage: Any = build_stage(DpoConfig(loss="kto", beta=0.2, desirable_weight=1.3, undesirable_weight=0.8), 1)
    halves = [collate(others[:4]), collate(others[4:])]
    prepare = Preparation(stage, ALL, Asked(our_policy), Asked(our_reference), lambda rows: halves)  # pyright: ignore
    (batch,) = prepare([collate(docs)], None)
    assert batch.doc_facts["baseline"][0].item() == pytest.approx(trainer._metrics["eval"]["kl"][0], abs=1e-5)
    same(loss_of(stage, our_policy, batch), our_policy, expected, policy)


def test_reward(padded: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With a margin of each pair, and the score at the last real token."""
    from trl.trainer.reward_trainer import RewardTrainer

    model = seeded(LlamaForSequenceClassification, 3, num_labels=1)
    margin = torch.tensor([0.0, 1.5, 0.5, 3.0, 0.25])
    trainer = bare(RewardTrainer, model=model, args=SimpleNamespace(center_rewards_coefficient=0.02))
    inputs = {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "margin": margin}
    expected = trainer.compute_loss(TakesMargin(model), inputs)
    stage = build_stage(RewardConfig(centring=0.02), 1)
    batch = collate(documents(padded, lambda n: {**in_pairs(n), "margin": float(margin[n % PAIRS])}))
    decoder = opened(model, tmp_path)
    same(loss_of(stage, decoder, batch), decoder, expected, model)


def test_the_reference_scores_what_is_held_out_once(padded: dict[str, torch.Tensor], ours: Any) -> None:
    asked: list[int] = []

    def score(batches: Any, forward: Any) -> list[Any]:
        asked.append(len(batches))
        return Asked(ours[1]).score(batches, forward)

    reference: Any = SimpleNamespace(score=score)
    stage: Any = build_stage(DpoConfig(), 1)
    prepare = Preparation(stage, ALL, Asked(ours[0]), reference, lambda rows: [])  # pyright: ignore
    batches = [collate(documents(padded, in_pairs))]
    first, again = prepare(batches, None), prepare(batches, None)
    assert asked == [1]
    assert torch.equal(first[0].doc_facts["reference"], again[0].doc_facts["reference"])
    prepare(batches, [])
    assert asked == [1, 1], "of a step anew"
