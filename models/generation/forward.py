"""A decoder's forward with a cache: whole prompts, packed, then one token a row. Without gradients.

The prompts run through the model's own packed attention. A step attends to the cache instead; latent attention then
takes its up-projections into query and output (DeepSeek-AI 2024, section 2.1.2): keys and values are never made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch.nn import functional as F

from models.blocks.attention import Attention, Packing, attention
from models.blocks.mla import LatentAttention, Projected
from models.blocks.moe import MoE
from models.blocks.norm import RMSNorm
from models.blocks.rope import rotate_, turned_pairs
from models.blocks.router import Tokens
from models.blocks.virtual import Given, Prompt, lengthened
from models.decoder import Decoder, Layer
from models.generation.cache import Cache, LayerCache, Plan
from models.generation.shown import Pair, last_picture, read_last, read_prompts
from models.generation.sight import Sight, looked, turned_by
from models.heads import LMHead
from parallel.matmul import compute_dtype

Meet = Callable[[torch.Tensor, tuple[torch.Tensor, ...], float], torch.Tensor]
"""(queries [T, H, K], new keys and values [T, G, K] or their latents alone, scale) -> what the queries find [T, H, V]:
where the new tokens go and whom they see."""


@torch.no_grad()
def prefill(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    cache: Cache,
    gather: bool = True,
    sights: Sequence[Sight | None] | None = None,
) -> torch.Tensor:
    """Run prompts, put them into their slots, and give the logits after each, fp32 [N, V]. No prompt is empty.

    `gather` as in `logits_of`, `sights` as in `prompt_states`.
    """
    hidden, ends_N = prompt_states(model, prompts, slots, cache, sights)
    return logits_of(model, normed_states(model, hidden[ends_N]), gather)


@torch.inference_mode()
def decode(
    model: Decoder, tokens: Sequence[int], lengths: Sequence[int], cache: Cache, gather: bool = True
) -> torch.Tensor:
    """Append one token to each of the first rows, which have `lengths` tokens: the logits after it, fp32 [B, V].

    `gather` as in `logits_of`.
    """
    return logits_of(model, normed_states(model, step_states(model, tokens, lengths, cache)), gather)


@torch.no_grad()
def prompt_states(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    slots: Sequence[int],
    cache: Cache,
    sights: Sequence[Sight | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run prompts and put them into their slots: the last layer's output for all tokens [T, D], and where in it the
    prompts end [N]. `sights`: what each shows; None = nothing."""
    device = cache.layers[0].keys.device
    sights = [None] * len(prompts) if sights is None else sights
    cache.clear(slots)
    cache.shift(slots, [0 if sight is None else sight.shift for sight in sights])
    lengths = [len(prompt) for prompt in prompts]
    borders = (0, *accumulate(lengths))
    ends_N = torch.tensor(borders[1:], device=device) - 1
    tokens_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    given = Given(tokens_T, torch.cat([torch.arange(n, device=device) for n in lengths]), borders)
    virtual = model.virtual if isinstance(model.virtual, Prompt) and model.virtual.on else None
    longer = None if virtual is None else lengthened(given, virtual.count)
    rotary_3T = turned_by(sights, lengths, model.cfg, device)
    own_T = None
    if virtual is not None and longer is not None:
        given, own_T = longer.given, longer.own_T
        if rotary_3T is not None:
            rotary_3T = given.positions_T.repeat(3, 1).index_copy_(1, own_T, rotary_3T + virtual.count)
    packing = model.packing_of(given.tokens_T, given.positions_T, given.cu_seqlens, None, rotary_3T)
    tokens = Tokens.of(given.tokens_T, packing.borders, None, model.place)
    hidden, reading = looked(model, embedded(model, given.tokens_T), sights, borders[:-1], packing.borders, own_T)
    if virtual is not None and longer is not None:
        hidden = virtual(hidden, longer.virtual_L)
    keys: dict[str, Pair] = {}
    for (number, layer), own in zip(model.layers.items(), cache.layers, strict=True):
        assert isinstance(layer, Layer)
        hidden = read_prompts(model, number, hidden, reading, keys)
        normed = rms_norm(layer.attn_norm, hidden)
        if isinstance(layer.attn, LatentAttention):
            hidden = _latent_prompts(layer.attn, normed, hidden, packing, own, slots)
        else:
            hidden = _prompts(layer.attn, normed, hidden, packing, own, slots)
        hidden = feed_forward(layer, hidden, tokens)
    if reading is not None:
        for slot, stop in zip(slots, packing.borders[1:], strict=True):
            cache.show(slot, last_picture(reading, stop, keys))
    return hidden if longer is None else longer.cut(hidden), ends_N


@torch.no_grad()
def step_states(model: Decoder, tokens: Sequence[int], lengths: Sequence[int], cache: Cache) -> torch.Tensor:
    """Append one token to each of the first rows, which have `lengths` tokens: the last layer's output [B, D]."""
    device = cache.layers[0].keys.device
    tokens_B, after = torch.tensor(tokens, device=device), [cache.ahead + n + 1 for n in lengths]
    # Dynamic scaling turns a token by the length at which it came, as transformers does.
    positions = [n - 1 + cache.shifted(slot) for slot, n in enumerate(after)]
    cos, sin = model.rope.tables(torch.tensor(positions, device=device), after, [1] * len(after))
    plans = cache.plans(after, device)
    routed = Tokens.of(tokens_B, range(len(after) + 1), None, model.place)
    hidden = embedded(model, tokens_B)
    turn = Turn.of(cos, sin, hidden)
    shown, ones = cache.shown(len(tokens)), [1] * len(tokens)
    for (number, layer), own in zip(model.layers.items(), cache.layers, strict=True):
        assert isinstance(layer, Layer)
        hidden = read_last(model, number, hidden, shown, ones)
        normed, plan = rms_norm(layer.attn_norm, hidden), plans[own.window]
        found = attended(layer.attn, normed, turn, partial(_meet_cache, own, plan))
        hidden = layer.attn.out(found, hidden)
        hidden = feed_forward(layer, hidden, routed)
    return hidden


@torch.no_grad()
def normed_states(model: Decoder, hidden_ND: torch.Tensor) -> torch.Tensor:
    """The last layer's output after the final norm [N, D]."""
    assert model.norm is not None
    return rms_norm(model.norm, hidden_ND)


@torch.no_grad()
def logits_of(model: Decoder, states_ND: torch.Tensor, gather: bool = True) -> torch.Tensor:
    """What the head makes of normed states, fp32 [N, V], on every tensor-parallel rank.

    Without `gather` each has its own columns only, [N, ceil(V / tp)], padding included.
    """
    assert isinstance(model.head, LMHead)
    logits = model.head(states_ND) if gather else model.head.columns(states_ND)
    assert isinstance(logits, torch.Tensor)
    return logits.float()


def embedded(model: Decoder, tokens_T: torch.Tensor) -> torch.Tensor:
    assert model.embed is not None, "generation needs the whole model"
    return model.embed(tokens_T)


def rms_norm(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """`norm(x)` as one call of torch: in a step of few rows calls are what the small operations cost."""
    weight, dtype = norm.weight, compute_dtype(x)
    if x.dtype is weight.dtype is dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, norm.eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), norm.eps).to(dtype)


def feed_forward(layer: Layer, hidden_TD: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    normed = rms_norm(layer.mlp_norm, hidden_TD)
    if isinstance(layer.mlp, MoE):
        return layer.mlp(normed, hidden_TD, None, tokens)
    return layer.mlp(normed, hidden_TD, None)


def _qkv(attn: Attention, normed_TD: torch.Tensor) -> torch.Tensor:
    """The fused q|k|v rows, normed where the model norms them, before rotation."""
    qkv, heads = attn.qkv(normed_TD), attn.heads
    if attn.q_norm is None or attn.k_norm is None:
        return qkv
    q, k, v = qkv.split(heads.parts, 1)
    parts = ((attn.q_norm, q), (attn.k_norm, k))
    q, k = (rms_norm(norm, x.unflatten(1, (-1, heads.dim))).flatten(1) for norm, x in parts)
    return torch.cat([q, k, v], 1)


def _prompts(
    attn: Attention, normed: torch.Tensor, hidden: torch.Tensor, packing: Packing, own: LayerCache, slots: Sequence[int]
) -> torch.Tensor:
    qkv, heads = _qkv(attn, normed), attn.heads
    k, v = (x.unflatten(1, (-1, heads.dim)) for x in qkv.split(heads.parts, 1)[1:])
    k = k.clone()  # the back ends rotate too, some of them in place
    rotate_(k, packing.cos_TK.to(k.dtype), packing.sin_TK.to(k.dtype))
    for slot, (start, stop) in zip(slots, pairwise(packing.borders), strict=True):
        keys, values = k[start:stop], v[start:stop]
        if packing.prefix and attn.prefix is not None:
            keys, values = (torch.cat(parts) for parts in zip(attn.prefix(k), (keys, values), strict=True))
        own.put(slot, keys, values)
    return attn.out(attention(qkv, packing, heads, attn.back_end, attn.prefix), hidden)


@dataclass(frozen=True)
class Turn:
    """Rotation of new tokens, made ready once for all layers; cos and sin fp32 [T, K / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor
    factors: tuple[torch.Tensor, torch.Tensor]
    """Of both halves, cos [T, 1, 1, K / 2], and of the other one, (-sin, sin) [T, 1, 2, K / 2]; in the heads' dtype."""

    @staticmethod
    def of(cos: torch.Tensor, sin: torch.Tensor, like: torch.Tensor) -> "Turn":
        """For heads that come of hidden states `like` this."""
        dtype = compute_dtype(like)
        both = torch.stack([-sin, sin], 1)[:, None]
        return Turn(cos, sin, (cos[:, None, None].to(dtype), both.to(dtype)))

    def halves_(self, heads_THK: torch.Tensor) -> None:
        """`rotate_` in three operations."""
        halves = heads_THK.unflatten(2, (2, -1))
        other = halves.flip(2)
        halves.mul_(self.factors[0]).addcmul_(other, self.factors[1])


def attended(attn: Attention | LatentAttention, normed: torch.Tensor, turn: "Turn", meet: Meet) -> torch.Tensor:
    """What the heads of new tokens find, [T, H V]."""
    if isinstance(attn, LatentAttention):
        return _latent_step(attn, normed, turn.cos, turn.sin, meet)
    return _step(attn, normed, turn, meet)


def _meet_cache(
    own: LayerCache, plan: Plan, q_BHK: torch.Tensor, new: tuple[torch.Tensor, ...], scale: float
) -> torch.Tensor:
    own.append(plan.place_BG, new[0], new[1] if len(new) > 1 else None)
    return own.attend(q_BHK, plan.pieces, scale)


def _step(attn: Attention, normed: torch.Tensor, turn: Turn, meet: Meet) -> torch.Tensor:
    heads = attn.heads
    qkv_THK = _qkv(attn, normed).unflatten(1, (-1, heads.dim))
    turn.halves_(qkv_THK[:, : heads.queries + heads.groups])
    q, k, v = qkv_THK.split((heads.queries, heads.groups, heads.groups), 1)
    return meet(q, (k, v), heads.dim**-0.5).flatten(1)


def _latents(
    attn: LatentAttention, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, H K] and the shared key [T, R] before rotation, the normed latent [T, rank], and both last joined as
    they are kept, the key rotated [T, 1, rank + R]."""
    if attn.q_down is not None and attn.q_norm is not None:
        q = attn.q_up(attn.q_norm(attn.q_down(normed))[0])
    else:
        q = attn.q_up(normed)
    s = attn.heads.sizes
    latent, rope_key = attn.kv_down(normed).split((s.kv_rank, s.rope_dim), 1)
    latent = attn.kv_norm(latent)[0]
    turned = turned_pairs(rope_key[:, None], cos.to(rope_key.dtype), sin.to(rope_key.dtype))
    return q, rope_key, latent, torch.cat([latent[:, None], turned], -1)


def _latent_prompts(
    attn: LatentAttention,
    normed: torch.Tensor,
    hidden: torch.Tensor,
    packing: Packing,
    own: LayerCache,
    slots: Sequence[int],
) -> torch.Tensor:
    q, rope_key, latent, kept = _latents(attn, normed, packing.cos_TK, packing.sin_TK)
    for slot, (start, stop) in zip(slots, pairwise(packing.borders), strict=True):
        own.put(slot, kept[start:stop], None)
    made = Projected(q, attn.kv_up(latent), rope_key)
    return attn.out(attn.back_end(made, packing, attn.heads), hidden)


def _latent_step(
    attn: LatentAttention, normed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, meet: Meet
) -> torch.Tensor:
    q, _, _, kept = _latents(attn, normed, cos, sin)
    s, heads = attn.heads.sizes, attn.heads.count
    q_nope, q_rope = q.unflatten(1, (heads, -1)).split((s.nope_dim, s.rope_dim), -1)
    up = attn.kv_up.weight.to(q.dtype).unflatten(0, (heads, -1))
    up_key, up_value = up.split((s.nope_dim, s.value_dim), 1)
    q_latent = torch.einsum("bhn,hnr->bhr", q_nope, up_key)
    turned = turned_pairs(q_rope, cos.to(q.dtype), sin.to(q.dtype))
    found = meet(torch.cat([q_latent, turned], -1), (kept,), attn.heads.scale)
    return torch.einsum("bhr,hvr->bhv", found, up_value).flatten(1)
