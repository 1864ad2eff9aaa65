"""Layers that read features: a plain loop over tokens gives the same, gates of 0 the text decoder."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.pictures.geometry import plan
from data.pictures.types import Pictures
from models import Decoder, ModelConfig, Runtime, build
from models.init import InitSource
from models.parts import LayeredPartConfig, PartsConfig, freeze
from models.vision.gated import Reading, Runs
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from scripts.params import load_model
from trainer.pictures import picture_config

BORDERS = (0, 6, 17, 18, 27, 31)
PICTURES = ((9, 3), (12, 2), (18, 4), (21, 3), (22, 1))
"""Of documents 1 and 3 of five: the token that stands for each, and its features."""
CFG = load_model("tiny_flamingo", ["init_std=0.12", "vision.images.token_id=500"])


def model_of(cfg: ModelConfig, gates: bool = True, recompute: Any = "none") -> Decoder:
    """Fresh weights; with `gates` every parameter is away from where it begins."""
    model = build(cfg, SINGLE, Runtime(recompute=recompute))
    materialise(model, InitSource(cfg, 3), SINGLE.cut, torch.device("cpu"))
    draw = torch.Generator().manual_seed(1)
    for param in model.parameters() if gates else ():
        param.data += torch.empty(param.shape).normal_(0, 0.1, generator=draw)
    assert isinstance(model, Decoder)
    return model


def shown() -> Pictures:
    """Four tiles of four features, in pictures of other sizes and another order than they have."""
    draw = torch.Generator().manual_seed(2)
    slots = torch.tensor([slot for slot, count in PICTURES for _ in range(count)])
    order = torch.randint(0, 16, (len(slots),), generator=draw)
    return Pictures(torch.randn(64, 147, generator=draw), ((4, 4),) * 4, slots, order)


def documents() -> dict[str, Any]:
    tokens = torch.randint(0, 500, (BORDERS[-1],), generator=torch.Generator().manual_seed(4))
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(BORDERS)])
    return {"tokens_T": tokens, "positions_T": positions, "cu_seqlens": BORDERS}


class Slow(nn.Module):
    """A gated layer, token by token and head by head, as the paper's page says it."""

    def __init__(self, own: Any, pictures: Pictures, seen: list[torch.Tensor]) -> None:
        super().__init__()
        self.own, self.pictures, self.seen = own, pictures, seen

    def forward(self, hidden: torch.Tensor, reading: Reading) -> torch.Tensor:
        own, features = self.own, self.seen[-1]
        rows = [self.read(t, hidden[t], features) for t in range(hidden.shape[0])]
        hidden = hidden + torch.tanh(own.attn_gate) * torch.stack(rows)
        inner = F.gelu(norm(hidden, own.mlp_norm.weight) @ own.up.weight.T)
        return hidden + torch.tanh(own.mlp_gate) * (inner @ own.down.weight.T)

    def read(self, t: int, row: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        own, begin = self.own, max(b for b in BORDERS if b <= t)
        before = [slot for slot in self.pictures.slots_F.tolist() if begin <= slot <= t]
        if not before:
            return torch.zeros_like(row)
        theirs = features[self.pictures.order_F[self.pictures.slots_F == max(before)]]
        k, v = (norm(theirs, own.features_norm.weight) @ own.kv.weight.T).chunk(2, 1)
        q, size, out = own.q.weight @ norm(row, own.attn_norm.weight), own.q.weight.shape[0] // own.heads, []
        for h in range(own.heads):
            part = slice(h * size, (h + 1) * size)
            out.append(torch.softmax(k[:, part] @ q[part] / size**0.5, 0) @ v[:, part])
        return own.out.weight @ torch.cat(out)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def learnt(model: Decoder, pictures: Pictures | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of every parameter that has one."""
    model.zero_grad()
    logits = model(**documents(), output="head", pictures=pictures)
    logits.square().mean().backward()
    return logits.detach(), {n.replace(".own.", "."): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_loop_over_tokens_gives_the_same(recompute: str) -> None:
    model, pictures, seen = model_of(CFG, recompute=recompute), shown(), []
    logits, grads = learnt(model, pictures)
    assert grads.keys() == {name for name, param in model.named_parameters() if param.requires_grad}
    assert model.connector is not None and list(model.connector.gated) == ["0", "2"]
    model.connector.register_forward_hook(lambda module, given, out: seen.append(out))
    for number, layer in model.connector.gated.items():
        model.connector.gated[number] = Slow(layer, pictures, seen)
    want, slow = learnt(model, pictures)
    assert (logits - want).abs().max() < 1e-5 * want.abs().max()
    for name, grad in slow.items():
        # A gate's is one number, of thousands that cancel.
        scale = max(float(grad.abs().max()), float(name.endswith("_gate")))
        assert (grads[name] - grad).abs().max() <= 1e-5 * scale, name


def test_gates_of_0_are_the_decoder_alone_and_the_gates_learn() -> None:
    model, text = model_of(CFG, gates=False), model_of(replace(CFG, vision=None), gates=False)
    logits, grads = learnt(model, shown())
    assert torch.equal(logits, learnt(text, None)[0])
    for name, grad in grads.items():
        if "gated" in name:
            assert bool(grad.abs().sum() > 0) == name.endswith("gate"), name


def test_without_pictures_there_are_gradients_of_0() -> None:
    model = model_of(CFG)
    logits, grads = learnt(model, None)
    assert grads.keys() == {name for name, param in model.named_parameters() if param.requires_grad}
    blind = [n for n in grads if n.split(".")[0] in ("vision", "connector") and ".mlp_" not in n]
    blind = [n for n in blind if n.split(".")[-2] not in ("up", "down")]
    assert len(blind) > 40 and not any(grads[name].abs().sum() for name in blind)
    assert logits.isfinite().all() and grads["connector.gated.0.up.weight"].abs().sum() > 0


def test_parts() -> None:
    """Frozen tower and decoder, as in the paper: resampler and gated layers learn, and are asked for their inputs."""
    model, off = build(CFG), LayeredPartConfig(train=False)
    freeze(model, PartsConfig(vision=off, decoder=off), whole_inputs=True)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith("connector.")}
    assert model.connector is not None
    asking = [module for module in model.modules() if module._forward_pre_hooks]
    assert asking == [model.connector, model.connector.gated["0"]]


def test_one_token_stands_for_a_picture() -> None:
    cfg = picture_config(load_model("tiny_llava_next", ["vision.format=loom"]))
    assert cfg is not None
    many, one = (plan(90, 30, replace(cfg, one_token=asked)) for asked in (False, True))
    assert one.tokens == 1 and one.shape == (1, 1, 1) and not one.slots_F.any()
    assert one.grids == many.grids and one.order_F.tolist() == many.order_F.tolist() and many.tokens > 16


def test_runs() -> None:
    runs = Runs.of(shown().slots_F.tolist(), BORDERS)
    assert runs.tokens == (9, 3, 5, 1, 3, 1, 5, 4) and runs.features == (0, 3, 2, 0, 4, 3, 1, 0)
    assert [runs.read_by(t) for t in (0, 8, 9, 11, 12, 16, 17, 18, 22, 26, 27, 30)] == [
        (0, 0), (0, 0), (0, 3), (0, 3), (3, 5), (3, 5), (5, 5), (5, 9), (12, 13), (12, 13), (13, 13), (13, 13)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("vision.cross.every=0", "vision.cross.every"),
        ("vision.cross.head_dim=-1", "vision.cross.head_dim"),
        ("vision.cross.norm_eps=0", "vision.cross.norm_eps"),
        ("vision.format=llava", "vision.cross"),
    ],
)
def test_what_cannot_work(change: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"model.{told} = "):
        load_model("tiny_flamingo", [change])
