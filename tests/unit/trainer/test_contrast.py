"""Losses of pairs by hand and against transformers; exact gradients however a batch is cut; what finds what."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from parallel.features import Shares
from parallel.sharding import ALONE
from trainer import contrast
from trainer.losses.contrastive import Sides, info_nce, sigmoid
from trainer.retrieval import FOUND, Candidates, found
from trainer.stages.clip import Clip, ClipConfig


def features(count: int, width: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, width, generator=draw), dim=1) for _ in range(2))
    return image, text


def sides(image: torch.Tensor, text: torch.Tensor, scale: float, bias: float = 0.0, first: int = 0) -> Sides:
    """The pairs from ``first`` on, beside all."""
    return Sides(image[first:], text[first:], image, text, first, torch.tensor(scale), torch.tensor(bias))


def test_losses_by_hand() -> None:
    """Two pictures along the axes; the first text is the first picture's, the second lies between both."""
    image = torch.eye(2)
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    given = sides(image, text, math.log(2))
    # exp(logits): pictures x texts = [[2, 2^0.6], [1, 2^0.8]]
    a, b = 2**0.6, 2**0.8
    wanted = [-math.log(2 / (2 + a)) / 2 - math.log(2 / 3) / 2, -math.log(b / (1 + b)) / 2 - math.log(b / (a + b)) / 2]
    assert info_nce(given).tolist() == pytest.approx(wanted, abs=1e-6)
    even = [[math.log(2 / (2 + a)), math.log(a / (2 + a))], [math.log(2 / 3), math.log(1 / 3)]]
    smooth = sum(-0.9 * own - 0.05 * (own + other) for own, other in even) / 2
    assert info_nce(given, 0.1)[0].item() == pytest.approx(smooth, abs=1e-6)
    given = sides(image, text, 2.0, -1.0)
    s = [[1.0, 0.2], [-1.0, 0.6]]  # similarities
    right = [math.log1p(math.exp(-s[n][n])) + math.log1p(math.exp(s[n][1 - n])) for n in range(2)]
    assert sigmoid(given).tolist() == pytest.approx(right, abs=1e-6)


def test_losses_are_those_of_transformers() -> None:
    """CLIP's function; of SigLIP the formula of its forward, which stands in no function of its own."""
    image, text = features(7)
    clip = image_text_contrastive_loss(9.0 * text @ image.T)
    assert info_nce(sides(image, text, 9.0)).mean().item() == pytest.approx(clip.item(), rel=1e-6)
    logits_per_text = 9.0 * text @ image.T - 4.0
    m1_diag1 = -torch.ones_like(logits_per_text) + 2 * torch.eye(7)
    siglip = -F.logsigmoid(m1_diag1 * logits_per_text).sum(-1).mean()
    assert sigmoid(sides(image, text, 9.0, -4.0)).mean().item() == pytest.approx(siglip.item(), rel=1e-6)


@pytest.mark.parametrize("loss", [info_nce, sigmoid])
def test_own_pairs_are_told_apart_from_all(loss: Any) -> None:
    """The last three of seven, beside all."""
    image, text = features(7)
    torch.testing.assert_close(loss(sides(image, text, 9.0, -4.0, 4)), loss(sides(image, text, 9.0, -4.0))[4:])


@pytest.mark.parametrize("cfg", [ClipConfig(label_smoothing=0.1), ClipConfig(loss="sigmoid")])
def test_gradients_of_a_batch_in_parts_are_those_of_one(cfg: ClipConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features from weights, in three micro-batches of uneven size: the stand-in's gradient is that of the loss."""
    monkeypatch.setattr(contrast, "ROWS_AT_ONCE", 3)
    draw, sizes = torch.Generator().manual_seed(1), [4, 1, 3]
    x = torch.randn(8, 5, generator=draw)
    weights = [torch.randn(5, 6, generator=draw) for _ in range(2)]
    weights += [torch.tensor(3.0), torch.tensor(-2.0)]
    stage = Clip(cfg, 1)

    def encode(part: torch.Tensor, of: list[torch.Tensor]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
        return (F.normalize(part @ of[0], dim=1), F.normalize((part**2) @ of[1], dim=1)), (of[2] * of[2], of[3])

    once = [w.clone().requires_grad_() for w in weights]
    shares = Shares.of(8, ALONE, x.device)
    loss_N = stage.loss_of(contrast.compared(*encode(x, once), shares))
    (0.7 * loss_N.sum()).backward()
    parts = [w.clone().requires_grad_() for w in weights]
    with torch.no_grad():
        told = [encode(part, parts) for part in x.split(sizes)]
    losses, pulls = contrast.feature_gradients(stage.loss_of, [each[0] for each in told], told[0][1], shares)
    torch.testing.assert_close(torch.cat(losses), loss_N.detach())
    for part, pull in zip(x.split(sizes), pulls, strict=True):
        (0.7 * pull.stand_in(*encode(part, parts))).backward()
    for ours, whole in zip(parts, once, strict=True):
        torch.testing.assert_close(ours.grad, whole.grad, rtol=1e-5, atol=1e-6)


def by_hand(image: torch.Tensor, text: torch.Tensor, keys: list[int]) -> dict[str, list[float]]:
    """The columns of all pairs, counted one by one."""
    out: dict[str, list[float]] = {column.name: [] for column in FOUND}
    captions = {key: text[keys.index(key)] for key in keys}
    for n, key in enumerate(keys):
        mine = float(image[n] @ captions[key])
        before = sum(float(image[n] @ captions[other]) >= mine for other in captions if other != key)
        best = max(float(text[n] @ image[m]) for m in range(len(keys)) if keys[m] == key)
        ahead = sum(float(text[n] @ image[m]) >= best for m in range(len(keys)) if keys[m] != key)
        for name, rank in (("caption", before), ("picture", ahead)):
            for most in (1, 5):
                out[f"{name}@{most}"].append(float(rank < most))
        out["caption_chance"].append(1 / len(captions))
        out["picture_chance"].append(keys.count(key) / len(keys))
    return out


def test_what_finds_what() -> None:
    """Twelve pairs of nine captions, the own ones from the fourth on."""
    keys = [7, 3, 7, 1, 2, 4, 3, 9, 8, 5, 7, 6]
    image, text = features(len(keys), 3, seed=2)
    text = torch.stack([text[keys.index(key)] for key in keys])
    image = F.normalize(image + 0.5 * text, dim=1)
    told = found((image[3:], text[3:]), (image, text), 3, Candidates.of(torch.tensor(keys)))
    wanted = by_hand(image, text, keys)
    for column, values in zip(FOUND, told, strict=True):
        assert values.tolist() == pytest.approx(wanted[column.name][3:]), column.name
    assert 0 < sum(wanted["caption@1"]) < 12 and 0 < sum(wanted["picture@1"]) < 12


def test_vectors_that_are_all_alike_find_nothing() -> None:
    same = torch.ones(4, 2)
    told = found((same, same), (same, same), 0, Candidates.of(torch.tensor([1, 2, 3, 3])))
    shown = {column.name: values.tolist() for column, values in zip(FOUND, told, strict=True)}
    assert not any(shown["caption@1"] + shown["picture@1"])
    assert shown["picture_chance"] == [0.25, 0.25, 0.5, 0.5] and shown["caption_chance"][0] == pytest.approx(1 / 3)


def test_smoothing_is_told_where_it_means_nothing() -> None:
    ((key, value, reason, way),) = ClipConfig(loss="sigmoid", label_smoothing=0.1).problems()
    assert (key, value, way) == ("stage.label_smoothing", 0.1, "stage.label_smoothing=0") and "yes or no" in reason
    assert ClipConfig(label_smoothing=1.0).problems() and not ClipConfig(label_smoothing=0.1).problems()
