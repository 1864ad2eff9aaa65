"""A Q-Former's first stage: what sees what, transformers' numbers, and gradients that hang on no layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

import models
from convert.from_hf import weight_rules
from data.batch import IGNORED, MicroBatch, collate
from models.dual.qformer import Matches
from parallel.config import ParallelConfig
from parallel.materialise import materialise
from parallel.sharding import SINGLE
from tests.cases import distance
from tests.pool import Pool
from tests.qformer_cases import STAGE, TINY, documents, micro_batches, model, train
from trainer.losses.matching import comparing, similarities

SMOOTH = 0.1


def read(batch: MicroBatch, matches: bool = True, **more: Any) -> Any:
    """What the model says; each picture is matched with its own text."""
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    own = Matches(torch.arange(len(lengths)), batch.tokens_T, tuple(lengths)) if matches else None
    return model()(**batch.inputs, targets_T=batch.targets_T, smoothing=SMOOTH, matches=own, **more)


def reference(batch: MicroBatch) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor, Any]:
    """transformers' model with our weights, its inputs padded, and its head over words."""
    state = dict(model().named_parameters())
    folder_tensors = {}
    for name, rule in weight_rules(TINY)[0].items():
        folder_tensors |= rule.to_hf(state[name].detach())
    config = models.family_of(TINY).to_hf_config(TINY)
    theirs = hf.Blip2ForImageTextRetrieval(hf.Blip2Config(**{k: v for k, v in config.items() if k != "architectures"}))
    head = BertOnlyMLMHead(hf.BertConfig(vocab_size=61, hidden_size=16, layer_norm_eps=1e-6))
    told = theirs.load_state_dict(folder_tensors, strict=False)
    assert not told.missing_keys and all(key.startswith(("cls.", "logit_scale")) for key in told.unexpected_keys)
    inner = {key.removeprefix("cls."): value for key, value in folder_tensors.items() if key.startswith("cls.")}
    inner["predictions.decoder.weight"] = state["text.words.weight"].detach()
    inner["predictions.decoder.bias"] = inner["predictions.bias"]
    head.load_state_dict(inner)
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).tolist()
    texts = batch.tokens_T.split(lengths)
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    assert batch.pictures is not None
    side = 3
    pixels = (
        batch.pictures.patches_PX.view(len(texts), side, side, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 12, 12)
    )
    return theirs.eval(), {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}, mask.bool(), head.eval()


def test_comparing_and_matching_equal_transformers() -> None:
    batch = collate(documents(0))
    theirs, inputs, _, _ = reference(batch)
    with torch.no_grad():
        ours = read(batch)
        compared = theirs(**inputs, use_image_text_matching_head=False)
        matched = theirs(**inputs, use_image_text_matching_head=True)
    torch.testing.assert_close(similarities(ours.image_NQP, ours.text_NP), compared.logits_per_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.matched_M2, matched.logits_per_image, atol=1e-5, rtol=1e-5)


def test_writing_equals_transformers_layers_under_a_mask_of_queries_and_past() -> None:
    """Their Q-Former has no such pass, but its layers take any mask."""
    batch = collate(documents(0))
    theirs, inputs, real, head = reference(batch)
    count, longest, each = *real.shape, 3
    sees = torch.zeros(count, 1, each + longest, each + longest, dtype=torch.bool)
    sees[..., :each] = True
    sees[..., each:, each:] = torch.ones(longest, longest).tril().bool() & real[:, None, None]
    with torch.no_grad():
        features = theirs.vision_model(pixel_values=inputs["pixel_values"])[0]
        queries = theirs.query_tokens.expand(count, -1, -1)
        x = theirs.qformer.layernorm(theirs.embeddings(input_ids=inputs["input_ids"], query_embeds=queries))
        for layer in theirs.qformer.encoder.layer:
            x = layer(x, torch.where(sees, 0.0, -torch.inf), features, query_length=each)
        logits = head(x[:, each:])[:, :-1]
        targets = inputs["input_ids"][:, 1:].masked_fill(~real[:, 1:], IGNORED)
        wanted = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=SMOOTH)
        ours = read(batch, matches=False).written_T
    torch.testing.assert_close(ours[batch.targets_T != IGNORED], wanted[real[:, 1:]], atol=1e-5, rtol=1e-5)
    assert bool((ours[batch.targets_T == IGNORED] == 0).all())


def test_what_a_token_cannot_reach() -> None:
    """A later word changes no earlier one's loss and nothing of any picture; another picture changes no text that is
    compared, but every word that is written, and both change what is matched."""
    batch = collate(documents(0)[:1])
    last = int(batch.cu_seqlens[1]) - 1
    tokens, targets = batch.tokens_T.clone(), batch.targets_T
    tokens[last] = (tokens[last] + 1) % TINY.vocab_size
    assert batch.pictures is not None
    other = dataclasses.replace(batch.pictures, patches_PX=batch.pictures.patches_PX + 1)
    with torch.no_grad():
        before = read(batch)
        word = read(dataclasses.replace(batch, tokens_T=tokens, targets_T=targets))
        picture = read(dataclasses.replace(batch, pictures=other))
    same = {"image": lambda r: r.image_NQP, "written": lambda r: r.written_T[:last], "text": lambda r: r.text_NP}
    assert torch.equal(same["image"](before), same["image"](word))
    assert torch.equal(same["written"](before), same["written"](word))
    assert not torch.equal(same["text"](before), same["text"](word))
    assert torch.equal(same["text"](before), same["text"](picture))
    assert not torch.isclose(before.written_T[:last], picture.written_T[:last]).any()
    assert not torch.allclose(before.matched_M2, word.matched_M2) and not torch.allclose(
        before.matched_M2, picture.matched_M2
    )


def test_the_first_word_is_put_in_where_texts_are_written_only() -> None:
    batch = collate(documents(0))
    first = batch.cu_seqlens[:-1].long()
    changed = dataclasses.replace(batch, tokens_T=batch.tokens_T.index_fill(0, first, 7))
    with torch.no_grad():
        given, put = read(batch, first_word=7), read(changed)
    assert torch.equal(given.written_T, put.written_T)
    assert torch.equal(given.text_NP, read(batch).text_NP) and not torch.allclose(given.text_NP, put.text_NP)


def direct() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradient and loss of the first step, as one graph of the whole batch with what was matched there."""
    batch = micro_batches(0, 0, 1, 8)[0]
    matched = train(steps=1)["matched"][0]
    ours: Any = models.build(TINY)
    from models.init import InitSource

    materialise(ours, InitSource(TINY, 3), SINGLE.cut, torch.device("cpu"))
    assert batch.pictures is not None
    sums = [round(float(x), 4) for x in batch.pictures.patches_PX.unflatten(0, (-1, 9)).sum((1, 2))]
    places = torch.tensor([sums.index(picture) for picture, _, _ in matched])
    texts = [torch.tensor(text) for _, text, _ in matched]
    matches = Matches(places, torch.cat(texts), tuple(len(text) for text in texts))
    found = ours(**batch.inputs, targets_T=batch.targets_T, smoothing=STAGE.label_smoothing, matches=matches)
    labels = torch.tensor([label for _, _, label in matched])
    parts = {
        "compare": comparing(found.scale * similarities(found.image_NQP, found.text_NP), STAGE.label_smoothing).mean(),
        "match": F.cross_entropy(found.matched_M2, labels),
        "write": found.written_T.sum() / batch.num_targets,
    }
    sum(parts.values(), torch.zeros(())).backward()
    grads = {name: param.grad.flatten() for name, param in ours.named_parameters() if param.grad is not None}
    return dict(sorted(grads.items())), {name: float(part.detach()) for name, part in parts.items()}


def test_one_process_gives_the_gradient_of_the_whole_batch_as_one_graph(
    pool: Callable[[int], Pool], alone: dict[str, Any]
) -> None:
    """The same pictures twice, captions twice; every pair has a negative of each kind."""
    grads, losses = pool(1).run(direct)[0]
    found = alone
    assert distance(grads, found["grads"]) < 1e-5
    for name, value in losses.items():
        assert found["metrics"][0][f"train/{name}"] == pytest.approx(value, rel=1e-5)
    assert found["metrics"][0]["train/loss"] == pytest.approx(sum(losses.values()), rel=1e-5)
    labels = [label for _, _, label in found["matched"][0]]
    assert (labels.count(1), labels.count(0)) == (8, 16)


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "accumulation": (1, {"rows": 2}),
    "recompute": (1, {"rows": 4, "recompute": "full"}),
    "dp2, ZeRO-1, accumulation": (2, {"rows": 2, "zero": 1}),
    "dp2, ZeRO-3": (2, {"rows": 4, "zero": 3}),
    "tp2": (2, {"rows": 4, "layout": ParallelConfig(tp=2)}),
}


@pytest.fixture(scope="module")
def alone(pool: Callable[[int], Pool]) -> dict[str, Any]:
    """What one process gives."""
    return pool(1).run(train)[0]


@pytest.mark.parametrize("case", CASES)
def test_every_layout_gives_what_one_process_gives(
    case: str, pool: Callable[[int], Pool], alone: dict[str, Any]
) -> None:
    world, words = CASES[case]
    found = pool(world).run(train, **words)[0]
    assert found["matched"] == alone["matched"]
    assert distance(alone["grads"], found["grads"]) < 1e-5
    noise = [name for name in alone["weights"] if name.endswith("kv.bias")]  # biases of keys have no gradient
    ours, theirs = ({n: w for n, w in x["weights"].items() if n not in noise} for x in (alone, found))
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-5
    for name in ("metrics", "eval"):
        ours, theirs = (x[name] if isinstance(x[name], list) else [x[name]] for x in (alone, found))
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_frozen_tower_looks_once_and_changes_nothing_else(
    zero: int, pool: Callable[[int], Pool], alone: dict[str, Any]
) -> None:
    frozen = pool(2).run(train, zero, 4, 1, frozen=True)[0]
    rest = {name: grad for name, grad in alone["grads"].items() if not name.startswith("vision.")}
    assert frozen["grads"].keys() == rest.keys()
    assert distance(rest, frozen["grads"]) < 1e-5
