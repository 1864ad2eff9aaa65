"""Preferences about pictures, from files to the loss, against transformers' LLaVA: its image processor, one document
at a time, and the formulas of DPO (Rafailov et al. 2023) and KTO (Ethayarajh et al. 2024) written down here."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from torch.nn.functional import logsigmoid
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import models
from convert.from_hf import open_hf
from convert.source import Source
from data import pipeline
from data.batch import MicroBatch
from data.config import DataConfig, SourceConfig
from data.kinds import KindName
from data.mismatched import mismatched_batches
from data.peers import Peers
from models import Decoder
from parallel.materialise import materialise
from parallel.sharding import ALONE, SINGLE
from tests.unit.data.conftest import make_tokenizer
from trainer.pictures import picture_config
from trainer.preparation import Preparation
from trainer.stages import DpoConfig, build_stage

SIDE, BETA = 28, 0.3
POLICY = 1
"""Which of the two models is the policy whose baseline is above 0."""
ALONE_GROUPS: Any = SimpleNamespace(cp=ALONE, sum=lambda values: values)
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": 7}
TEXT: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
ROWS: list[dict[str, Any]] = [
    {"images": ["0.png"], "prompt": "<image>Which?", "chosen": " the left", "rejected": " none"},
    {"images": ["1.png", "2.png"], "prompt": "One <image> or <image>?", "chosen": " one", "rejected": " two of them"},
    {"prompt": "Nothing to see.", "chosen": " no", "rejected": " yes"},
    {"image": "3.png", "prompt": "And now?", "chosen": " later", "rejected": " now"},
]
"""The picture of the last one comes first."""
SHOWN = ((0,), (1, 2), (), (3,))


def theirs(seed: int, token: int) -> Any:
    torch.manual_seed(seed)
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
    cfg = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
    model = hf.LlavaForConditionalGeneration(cfg)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.1)
    return model.eval()


class World:
    """Two models with other weights in both libraries, and rows about four pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder, draw = folder, np.random.default_rng(5)
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(folder / "tokenizer")
        self.token: Any = tokenizer.convert_tokens_to_ids("<image>")
        self.images = [Image.fromarray(draw.integers(0, 256, (30 + 5 * n, 40, 3), dtype=np.uint8)) for n in range(4)]
        for n, image in enumerate(self.images):
            image.save(folder / f"{n}.png")
        self.theirs = [theirs(seed, self.token) for seed in (1, 2)]
        self.ours = [self._opened(model, folder / f"model{n}") for n, model in enumerate(self.theirs)]
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)

    def _opened(self, model: Any, folder: Path) -> Decoder:
        model.save_pretrained(folder)
        found = open_hf(folder)
        made = models.build(found.cfg)
        materialise(made, Source(found, found.cfg), SINGLE.cut, torch.device("cpu"))
        return made

    def data(self, rows: list[dict[str, Any]], kind: KindName) -> pipeline.TrainingData:
        file = self.folder / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = DataConfig(
            sources=(SourceConfig(str(file)),), cache_dir=f"{self.folder}/cache", tokenizer=f"{self.folder}/tokenizer",
            seq_len=256, micro_batch_rows=1, global_batch_rows=1,
        )  # fmt: skip
        common: dict[str, Any] = {"tokenizer_folder": None, "seed": 0, "peers": Peers.alone(), "max_seq_len": 256}
        return pipeline.build(cfg, loss_on="assistant", kind=kind, pictures=picture_config(self.ours[0].cfg), **common)

    def said(self, model: Any, tokens: list[int], learnt: int, shown: tuple[int, ...]) -> torch.Tensor:
        """transformers' log-probability of the last `learnt` tokens."""
        given = {}
        if shown:
            given = self.processor([self.images[n] for n in shown], return_tensors="pt")
        logits = model(input_ids=torch.tensor([tokens]), **given).logits[0, :-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(tokens[1:])[:, None])[-learnt:].sum()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def batch_of(data: pipeline.TrainingData) -> MicroBatch:
    rows = [row for position in range(data.rows_per_epoch) for row in data.global_batch(position, 1)]
    return data.micro_batch_of(data.order.pieces, rows)


def documents(batch: MicroBatch) -> list[list[int]]:
    borders = batch.cu_seqlens.tolist()
    return [batch.tokens_T[a:b].tolist() for a, b in pairwise(borders)]


def row_of(tokens: list[int], known: dict[tuple[int, ...], int]) -> int:
    """The row that a document belongs to, by the tokens it begins with."""
    return next(row for start, row in known.items() if tuple(tokens[: len(start)]) == start)


def beginnings(world: World) -> dict[tuple[int, ...], int]:
    """The row of each prompt, by the prompt's tokens: 16 for a picture."""
    tokenizer = hf.AutoTokenizer.from_pretrained(world.folder / "tokenizer")
    found = {}
    for n, row in enumerate(ROWS):
        text = row["prompt"] if "<image>" in row["prompt"] or not SHOWN[n] else f"<image>\n{row['prompt']}"
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        found[tuple(t for token in tokens for t in [token] * (16 if token == world.token else 1))] = n
    return found


@pytest.mark.parametrize("share", [False, True])
def test_dpo(world: World, share: bool) -> None:
    """Loss and gradients; with the prompt once for both answers too."""
    data = world.data(ROWS, "preference")
    plain = batch_of(data)
    known = beginnings(world)
    policy, reference = world.theirs
    told: dict[tuple[int, int], torch.Tensor] = {}
    for tokens, learnt, side in zip(
        documents(plain), plain.targets_N.tolist(), plain.doc_facts["side"].tolist(), strict=True
    ):
        row = row_of(tokens, known)
        with torch.no_grad():
            base = world.said(reference, tokens, learnt, SHOWN[row])
        told[row, int(side)] = BETA * (world.said(policy, tokens, learnt, SHOWN[row]) - base)
    expected = torch.stack([-logsigmoid(told[row, 0] - told[row, 1]) for row in range(len(ROWS))]).mean()

    stage: Any = build_stage(DpoConfig(beta=BETA), 1)
    asked = SimpleNamespace(score=partial(scored, world.ours[1]))
    prepare = Preparation(stage, ALONE_GROUPS, asked, asked, lambda rows: [])  # pyright: ignore
    (batch,) = prepare([batch_of(data.sharing_prompts()) if share else plain], None)
    assert bool(batch.branches) == share
    loss = stage.forward(world.ours[0], batch, 1 / stage.count([batch]))[0]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours, hfs = world.ours[0], policy
    names = {
        "embed.weight": hfs.get_input_embeddings().weight,
        "connector.body.second.weight": hfs.model.multi_modal_projector.linear_2.weight,
    }
    mine = torch.autograd.grad(loss, [ours.get_parameter(name) for name in names])
    for a, b in zip(mine, torch.autograd.grad(expected, list(names.values())), strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()) + 1e-8


@torch.no_grad()
def scored(model: Decoder, batches: Any, forward: Callable[..., Any]) -> list[Any]:
    return [forward(model, batch, 1.0)[1] for batch in batches]


def test_kto_compares_with_answers_to_the_same_pictures(world: World) -> None:
    """Its baseline: each prompt, with its pictures, and the next one's answer."""
    rows = [
        {name: value for name, value in row.items() if name not in ("chosen", "rejected")}
        | {"completion": row["chosen"], "label": True}
        for row in ROWS
    ]
    data = world.data(rows, "unpaired")
    steps = [row for position in range(data.rows_per_epoch) for row in data.global_batch(position, 1)]
    found = mismatched_batches(data, steps, 0, 1, 1)
    known = beginnings(world)
    prompts = {row: list(start) for start, row in known.items()}
    texts = _in_order(data)
    order = [row_of(tokens, known) for tokens in texts]
    answers = [tokens[len(prompts[row]) :] for tokens, row in zip(texts, order, strict=True)]
    ratio = 0.0
    for place, row in enumerate(order):
        answer = answers[(place + 1) % len(order)]
        tokens = [*prompts[row], *answer]
        with torch.no_grad():
            said = [world.said(model, tokens, len(answer), SHOWN[row]).item() for model in world.theirs]
        ratio += said[POLICY] - said[1 - POLICY]

    stage: Any = build_stage(DpoConfig(loss="kto", beta=BETA), 1)
    policy, reference = (SimpleNamespace(score=partial(scored, world.ours[which])) for which in (POLICY, 1 - POLICY))
    prepare = Preparation(stage, ALONE_GROUPS, policy, reference, lambda _: found)  # pyright: ignore
    (batch,) = prepare([batch_of(data)], None)
    assert ratio > 0 and batch.doc_facts["baseline"][0].item() == pytest.approx(ratio / len(order), abs=1e-4)
    assert sum(len(each.pictures.grids) for each in found if each.pictures is not None) == 4


def _in_order(data: pipeline.TrainingData) -> list[list[int]]:
    """The documents in the order of a step's pieces."""
    pieces = data.order.pieces
    chosen = [piece for n in range(data.rows_per_epoch) for row in data.global_batch(n, 1) for piece in row.pieces]
    return [
        data.caches[pieces.source_P[p]].tokens(int(pieces.sample_P[p]), 0, int(pieces.length_P[p])).tolist()
        for p in chosen
    ]
