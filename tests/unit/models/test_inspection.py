"""What an inspection shows, against transformers (hidden states, eager attention, autograd), on every family."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from models import Decoder, Runtime, build
from models.init import InitSource
from models.inspection import HeadNumbers, Inspection, memory_needed
from models.inspection.attention import head_numbers
from parallel.materialise import materialise
from parallel.sharding import WHOLE
from tests.numerics.test_hf_parity import LLAMA, OPTIONS, QWEN3, ROPES, TINY, load_ours, save_theirs

VARIANTS = {name: OPTIONS[name] for name in TINY} | {
    "llama_tied": OPTIONS["llama_tied"],
    "llama_one_group_dynamic": dataclasses.replace(OPTIONS["llama_one_group"], rope=ROPES["dynamic"], max_seq_len=128),
    "llama_yarn": dataclasses.replace(LLAMA, rope=ROPES["yarn"]),
    "qwen2_all_sliding": OPTIONS["qwen2_all_sliding"],
    "qwen3_sliding_biases": dataclasses.replace(QWEN3, sliding_window=9, qkv_bias=True, attention_out_bias=True),
    "deepseek2_latent_queries": OPTIONS["deepseek2_latent_queries"],
    "deepseek3_plain_queries": OPTIONS["deepseek3_plain_queries"],
}
LENGTHS = (23, 40)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def documents(vocab: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(0, vocab, (length,), generator=draw) for length in LENGTHS]


@dataclasses.dataclass
class Theirs:
    """What transformers says of one document."""

    live: list[torch.Tensor]
    """The streams [1, T, D] as autograd knows them."""
    attention: tuple[torch.Tensor, ...]
    logits: torch.Tensor
    attn_update: list[torch.Tensor]
    mlp_update: list[torch.Tensor]

    @property
    def streams(self) -> list[torch.Tensor]:
        return [stream[0] for stream in self.live]


def run_theirs(model: Any, tokens: torch.Tensor) -> Theirs:
    """The streams come from hooks: the last of `hidden_states` is what the final norm makes of it."""
    kept: dict[str, list[torch.Tensor]] = {"stream": [], "attn": [], "mlp": []}

    def keep(kind: str) -> Any:
        def hook(_: Any, __: Any, out: Any) -> None:
            kept[kind].append(out[0] if isinstance(out, tuple) else out)

        return hook

    handles = []
    for layer in model.model.layers:
        handles += [
            layer.register_forward_hook(keep("stream")),
            layer.self_attn.register_forward_hook(keep("attn")),
            layer.mlp.register_forward_hook(keep("mlp")),
        ]
    out = model(tokens[None], output_hidden_states=True, output_attentions=True)
    for handle in handles:
        handle.remove()
    for ours, given in zip(kept["stream"][:-1], out.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, given)
    attn, mlp = ([out.view(len(tokens), -1) for out in kept[kind]] for kind in ("attn", "mlp"))
    attention = tuple(weights[0] for weights in out.attentions)
    return Theirs([out.hidden_states[0], *kept["stream"]], attention, out.logits[0], attn, mlp)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our inspection of two packed documents, and transformers' models of the same weights; made once for a variant."""
    made: dict[str, tuple[Inspection, Any]] = {}

    def pair(variant: str) -> tuple[Inspection, Any]:
        if variant not in made:
            folder: Path = tmp_path_factory.mktemp(variant)
            theirs = save_theirs(VARIANTS[variant], folder)
            theirs.set_attn_implementation("eager")
            ours = load_ours(folder, VARIANTS[variant], Runtime())
            made[variant] = look(ours), theirs
        return made[variant]

    return pair


def look(model: Decoder, **options: Any) -> Inspection:
    return Inspection.of(model, torch.cat(documents(model.cfg.vocab_size)), (0, LENGTHS[0], sum(LENGTHS)), **options)


def each(inspection: Inspection, theirs: Any) -> list[tuple[slice, Theirs]]:
    """The places of each document in the packed text, and what transformers says of it alone."""
    with torch.no_grad():
        found = [run_theirs(theirs, tokens) for tokens in documents(inspection.model.cfg.vocab_size)]
    return [(slice(0, LENGTHS[0]), found[0]), (slice(LENGTHS[0], sum(LENGTHS)), found[1])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_streams_norms_cosines_and_updates(pairs: Any, variant: str) -> None:
    inspection, theirs = pairs(variant)
    recording = inspection.recording
    for part, want in each(inspection, theirs):
        for layer in range(inspection.layers):
            before, after = want.streams[layer], want.streams[layer + 1]
            close(recording.streams[layer + 1][part], after)
            close(inspection.stream_norms()[layer, part], before.norm(dim=1))
            cosine = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
            close(inspection.show_cos_distance(layer).per_token_T[part].float(), cosine)
            norms = want.attn_update[layer].norm(dim=1), want.mlp_update[layer].norm(dim=1)
            close(recording.attn_update_LT[layer, part], norms[0])
            close(recording.mlp_update_LT[layer, part], norms[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_weights(pairs: Any, variant: str) -> None:
    """Of documents packed one behind the other; nothing looks across the border."""
    inspection, theirs = pairs(variant)
    for part, want in each(inspection, theirs):
        for layer in range(inspection.layers):
            for head, weights in enumerate(inspection.attention(layer)):
                close(weights[part, part], want.attention[layer][head])
                close(weights[part].sum(1), torch.ones(part.stop - part.start))
                assert weights[part].count_nonzero() == weights[part, part].count_nonzero()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logit_lens(pairs: Any, variant: str) -> None:
    """Of the last layer the model's logits; of the first what transformers' norm and head make of its output."""
    inspection, theirs = pairs(variant)
    last = inspection.layers - 1
    for part, want in each(inspection, theirs):
        close(inspection.lens_logits(last)[part], want.logits)
        with torch.no_grad():
            logits = theirs.lm_head(theirs.model.norm(want.streams[1][None]))[0]
        top, found = logits.softmax(1).topk(3, 1), inspection.show_topk_token(0, 3)
        close(found.prob_Tk[part], top.values)
        assert torch.equal(found.ids_Tk[part], top.indices)
        targets = inspection.recording.tokens_T[part][1:]
        loss = F.cross_entropy(logits[:-1], targets, reduction="none")
        close(found.loss_T[part][:-1], loss)
        assert found.loss_T[part][-1] == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_norms(pairs: Any, variant: str) -> None:
    """Against autograd on transformers: the mean loss of both documents' next tokens."""
    inspection, theirs = pairs(variant)
    theirs.zero_grad()
    tokens = documents(inspection.model.cfg.vocab_size)
    runs = [run_theirs(theirs, document) for document in tokens]
    for run in runs:
        for stream in run.live:
            stream.retain_grad()
    losses = [
        F.cross_entropy(run.logits[:-1], document[1:], reduction="sum")
        for run, document in zip(runs, tokens, strict=True)
    ]
    loss = (losses[0] + losses[1]) / (sum(LENGTHS) - 2)
    loss.backward()
    recording = inspection.recording
    assert recording.gradients is not None and recording.loss_T is not None
    torch.testing.assert_close(recording.loss_T.sum() / (sum(LENGTHS) - 2), loss.detach(), rtol=1e-5, atol=0)
    for number, found in enumerate(recording.gradients.stream_LT):
        grads = [run.live[number].grad for run in runs]
        want = torch.cat([grad[0].norm(dim=1) for grad in grads if grad is not None])
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5 * want.max().item())
    for layer in range(inspection.layers):
        found = inspection.weight_gradients(layer)
        parts = {"all": "", "attention": "self_attn.", "mlp": "mlp."}
        squares = dict.fromkeys(parts, 0.0)
        for name, param in theirs.named_parameters():
            for part, begin in parts.items():
                if name.startswith(f"model.layers.{layer}.{begin}") and param.grad is not None:
                    squares[part] += param.grad.double().square().sum().item()
        assert {part: found[part] for part in parts} == pytest.approx(
            {part: square**0.5 for part, square in squares.items()}, rel=1e-5
        )
    embedding = theirs.model.embed_tokens.weight.grad
    assert recording.gradients.weights["embed.weight"] == pytest.approx(embedding.norm().item(), rel=1e-5)


def test_every_expert_choice_is_counted(pairs: Any) -> None:
    inspection, _ = pairs("tiny_deepseek_v3")
    cfg = inspection.model.cfg
    assert cfg.moe is not None and set(inspection.recording.experts) == set(range(cfg.moe.first_dense, cfg.num_layers))
    for layer, counts in inspection.recording.experts.items():
        assert len(counts) == cfg.moe.num_experts and counts.sum() == sum(LENGTHS) * cfg.moe.top_k, layer


def test_a_model_stays_as_it_was(tmp_path: Path) -> None:
    """Its gradients too, whatever is recomputed in the backward; and no hook is left."""
    save_theirs(LLAMA, tmp_path)
    plain = look(load_ours(tmp_path, LLAMA, Runtime()))
    for recompute in ("selective", "full"):
        model = load_ours(tmp_path, LLAMA, Runtime(recompute=recompute))
        for param in model.parameters():
            param.grad = torch.full_like(param, 3.0)
        found = look(model)
        assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters() if p.grad is not None)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        assert found.recording.gradients is not None and plain.recording.gradients is not None
        assert found.recording.gradients.weights == pytest.approx(plain.recording.gradients.weights, rel=1e-5)
        close(found.stream_norms(), plain.stream_norms())


def test_without_gradients(pairs: Any) -> None:
    model = pairs("tiny_llama")[0].model
    inspection = look(model, gradients=False)
    assert torch.equal(inspection.stream_norms(), pairs("tiny_llama")[0].stream_norms())
    with pytest.raises(ValueError, match="gradients=True"):
        inspection.weight_gradients(0)


def test_places_of_a_text(pairs: Any) -> None:
    inspection, _ = pairs("tiny_llama")
    whole = inspection.show_attention(1, 2)
    assert torch.equal(inspection.show_attention(1, 2, [3, 5, 4]), whole[[3, 5, 4]][:, [3, 5, 4]])


def test_head_numbers_by_hand() -> None:
    """Two documents of three and two tokens."""
    weights = torch.zeros(5, 5)
    weights[0, 0] = weights[3, 3] = 1.0
    weights[1, 0], weights[1, 1] = 0.25, 0.75
    weights[2, 0], weights[2, 1], weights[2, 2] = 0.5, 0.3, 0.2
    weights[4, 3], weights[4, 4] = 0.5, 0.5
    entropy = torch.special.entr(weights).sum().item() / 5
    want = HeadNumbers(entropy, 3.25 / 5, 3.45 / 5, (0.25 + 0.3 + 0.5) / 3, (0.25 + 1.3 + 0.5) / 5)
    assert dataclasses.astuple(head_numbers(weights, (0, 3, 5))) == pytest.approx(dataclasses.astuple(want))
    assert head_numbers(torch.ones(1, 1), (0, 1)).previous == 0.0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda i: i.show_cos_distance(2), "layer 2: the model has the layers 0 to 1"),
        (lambda i: i.show_cos_distance(-1), "layer -1"),
        (lambda i: i.show_topk_token(9, 1), "layer 9"),
        (lambda i: i.show_topk_token(0, 0), "k=0: give 1 to"),
        (lambda i: i.show_attention(0, 4), "head 4: the layers have the heads 0 to 3"),
        (lambda i: i.show_attention(7, 0), "layer 7"),
        (lambda i: i.show_attention(0, 0, [63]), "tokens=63: the text has the places 0 to 62"),
        (lambda i: Inspection.of(i.model, torch.tensor([], dtype=torch.int64)), "empty"),
        (lambda i: Inspection.of(i.model, torch.tensor([1, 2]), (0, 0, 2)), "empty"),
        (lambda i: Inspection.of(i.model, torch.tensor([1, 10**6])), "token 1000000 is none"),
        (lambda i: Inspection.of(i.model, torch.tensor([1, -1])), "token -1 is none"),
        (lambda i: Inspection.of(i.model, torch.tensor([1])), "two tokens or more"),
        (lambda i: Inspection.of(i.model, torch.zeros(5000, dtype=torch.int64)), "longer than the model's context"),
    ],
)
def test_what_is_not_there_is_said(pairs: Any, ask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(pairs("tiny_llama")[0])


def test_one_token_has_no_gradient_but_all_else(pairs: Any) -> None:
    inspection = Inspection.of(pairs("tiny_llama")[0].model, torch.tensor([5]), gradients=False)
    assert inspection.show_attention(0, 0).item() == 1.0 and inspection.show_topk_token(1, 1).loss_T.item() == 0.0


def test_a_scalar_head_has_no_lens() -> None:
    cfg = dataclasses.replace(LLAMA, head="scalar")
    model = build(cfg)
    materialise(model, InitSource(cfg, 0), WHOLE, torch.device("cpu"))
    with pytest.raises(ValueError, match="scalar head has none"):
        look(model)
    inspection = look(model, gradients=False)
    assert inspection.recording.loss_T is None and 0 < inspection.show_cos_distance(0).distance < 1
    with pytest.raises(ValueError, match="needs a language-model head"):
        inspection.show_topk_token(0, 1)


def test_memory_grows_with_what_is_kept() -> None:
    weights = 4 * sum(p.numel() for p in build(LLAMA).parameters())
    assert weights < memory_needed(LLAMA, 1, False) < memory_needed(LLAMA, 100, False) < memory_needed(LLAMA, 100, True)
