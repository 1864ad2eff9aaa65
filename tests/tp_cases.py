"""What the pools run for tensor and sequence parallel: a whole decoder, single layers, collectives, the vocabulary."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from models import ModelConfig, Runtime, build
from models.init import InitSource
from parallel import collectives, tensor_linear, vocab
from parallel.later import Later
from parallel.layers import ColumnLinear
from parallel.materialise import fill_, materialise
from parallel.sharding import Axis, Place, shard_of

CFG = ModelConfig(
    "llama", 31, 24, 36, 2, 12, 6, 4, 64, qkv_bias=True, attention_out_bias=True, mlp_bias=True, qk_norm=True,
    init_std=0.15,
)  # fmt: skip
BORDERS = {23: [0, 9, 10, 23], 24: [0, 9, 24], 3: [0, 3]}
CPU = torch.device("cpu")


def here(sequence_parallel: bool = False) -> Place:
    """All processes of the pool as tp ranks."""
    return Place(tp=Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD), sequence_parallel=sequence_parallel)


def batch(tokens: int, vocab_size: int) -> dict[str, Any]:
    """Packed documents, a quarter of them without target."""
    draw = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, vocab_size, (2, tokens), generator=draw)
    targets[::4] = -100
    borders = BORDERS[tokens]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(borders)])
    return {"tokens_T": ids, "positions_T": positions, "cu_seqlens": borders, "targets_T": targets}


def model_of(cfg: ModelConfig, place: Place, recompute: Any = "none") -> torch.nn.Module:
    """Weights of every kind are drawn at random here: a bias or norm of zeros or ones would hide a fault."""
    model = build(cfg, place, Runtime(recompute=recompute))
    materialise(model, InitSource(cfg, 3), place.cut, CPU)
    for index, (_, param) in enumerate(model.named_parameters()):
        if param.__dict__["init"] in ("ones", "zeros"):
            whole = shard_of(param).whole_shape(param.shape)
            noise = torch.empty(whole).normal_(0, 0.3, generator=torch.Generator().manual_seed(index))
            param.data += shard_of(param).slice(noise, place.cut)
    return model


def decoder(
    cfg: ModelConfig, place: Place, tokens: int = 23, recompute: Any = "none", bf16: bool = False
) -> dict[str, Any]:
    """Loss, token losses, logits and this rank's gradients."""
    model = model_of(cfg, place, recompute)
    inputs = batch(tokens, cfg.vocab_size)
    targets = inputs.pop("targets_T")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        if cfg.head == "scalar":
            values = model(**inputs, output="head")
            loss, losses = (values * values).sum(), values.detach()
        else:
            loss, losses = model(**inputs, targets_T=targets, loss_weight=0.1)
        loss.backward()
        with torch.no_grad():
            logits = model(**inputs, output="head")
    found = {"loss": loss.detach(), "losses": losses, "logits": logits.float()}
    return found | {"grads": {name: p.grad for name, p in model.named_parameters()}}


def decoder_in_pool(cfg: ModelConfig, sequence_parallel: bool, **more: Any) -> dict[str, Any]:
    return decoder(cfg, here(sequence_parallel), **more)


def kept_bytes(cfg: ModelConfig, sequence_parallel: bool) -> int:
    """Bytes that one forward of 24 tokens keeps for its backward, weights left out."""
    place = here(sequence_parallel)
    model = model_of(cfg, place)
    weights = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**batch(24, cfg.vocab_size))
    return sum(kept.values())


def sent(sequence_parallel: bool, recompute: str) -> dict[str, int]:
    """Elements of the whole tensors that each kind of collective works on in one forward and backward of 24 tokens."""
    place = here(sequence_parallel)
    model = model_of(CFG, place, recompute)
    names = ("all_reduce", "all_gather_single", "all_to_all_single")
    functions = {name: getattr(dist, name) for name in names}
    elements: dict[str, int] = dict.fromkeys(names, 0)

    def counted(name: str, *args: Any, **more: Any) -> Any:
        elements[name] += args[0].numel()
        return functions[name](*args, **more)

    try:
        for name in names:
            setattr(dist, name, functools.partial(counted, name))
        model(**batch(24, CFG.vocab_size))[0].backward()
    finally:
        for name, function in functions.items():
            setattr(dist, name, function)
    return elements


def overlapped(sequence_parallel: bool) -> list[str]:
    """The order of events in a column layer's backward."""
    place = here(sequence_parallel)
    layer = ColumnLinear(8, (12,), False, "normal", place)
    fill_(layer.weight, torch.ones(layer.weight.shape), CPU)
    events: list[str] = []
    starts = {name: getattr(tensor_linear, name) for name in ("start_all_reduce", "start_scatter_rows")}
    product = tensor_linear.weight_gradient

    def start(name: str, *args: Any) -> Any:
        events.append(name)
        pending = starts[name](*args)
        return collectives.Pending(None, lambda: (events.append("wait"), pending.wait())[1])

    def gradient(*args: Any) -> torch.Tensor:
        events.append("weight_gradient")
        return product(*args)

    try:
        tensor_linear.start_all_reduce = lambda *args: start("start_all_reduce", *args)
        tensor_linear.start_scatter_rows = lambda *args: start("start_scatter_rows", *args)
        tensor_linear.weight_gradient = gradient
        layer(torch.ones(4, 8, requires_grad=True)).sum().backward()
    finally:
        for name, function in starts.items():
            setattr(tensor_linear, name, function)
        tensor_linear.weight_gradient = product
    return events


def put_off(sequence_parallel: bool) -> list[tuple[bool, bool, bool]]:
    """Gradients now and later, for each recompute: (inputs' are equal, none before `take`, weights' are equal)."""
    found = []
    for recompute in ("none", "selective"):
        grads = []
        for defer in (False, True):
            model = model_of(CFG, here(sequence_parallel), recompute)
            later = Later(model.parameters())
            loss, _ = model(**batch(23, CFG.vocab_size))
            with later.deferring(defer):
                loss.backward()
            columns = [p for n, p in model.named_parameters() if "qkv.weight" in n or "gate_up.weight" in n]
            missing = all(p.grad is None for p in columns)
            later.take()()
            grads.append({name: p.grad for name, p in model.named_parameters()})
        same = {name: torch.equal(grads[0][name], grads[1][name]) for name in grads[0]}
        found.append((same["embed.weight"], missing, all(same.values())))
    return found


def each_collective(name: str, rows: int) -> dict[str, torch.Tensor]:
    """Forward and backward of one pair; what goes in is a function of the rank alone."""
    place = here()
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(place.tp.rank)).requires_grad_()
    out = getattr(collectives, name)(x * 1.0, place.tp)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(100 + place.tp.rank))
    out.backward(seed)
    assert x.grad is not None
    return {"x": x.detach(), "out": out.detach(), "seed": seed, "grad": x.grad}


def reduce_what_is_kept() -> str:
    """What the backward says when `reduce_from` got a tensor that its producer keeps."""
    x = torch.ones(3, requires_grad=True).exp()  # exp keeps its result
    try:
        collectives.reduce_from(x, here().tp).sum().backward()
    except RuntimeError as err:
        return str(err)
    return ""


def distribution(
    vocab_size: int,
    chunk: int,
    sequence_parallel: bool,
    from_logits: bool,
    dtype: torch.dtype = torch.float32,
    keep: int = 0,
) -> dict[str, Any]:
    """Log-probabilities, entropies, their gradients and the best three, from this rank's part."""
    place = here(sequence_parallel)
    hidden_TD, weight_VD, tokens_T, seeds = distribution_inputs(vocab_size, dtype)
    tp, rows = place.tp, -(-vocab_size // place.tp.size)
    padded = collectives.pad_rows(weight_VD, tp.size)
    weight = padded[tp.rank * rows : (tp.rank + 1) * rows].clone()
    weight[max(0, vocab_size - tp.rank * rows) :] = 1e3  # whatever lies in padding, it must not count
    weight.requires_grad_()
    whole = collectives.pad_rows(hidden_TD, tp.size) if sequence_parallel else hidden_TD
    hidden = (whole.chunk(tp.size)[tp.rank] if sequence_parallel else whole).clone().requires_grad_()
    if from_logits:
        logits = collectives.copy_to(hidden, tp) @ weight.T
        log_p, entropy = vocab.token_log_probs_of_logits(logits, tokens_T, tp, vocab_size)
        values, ids = vocab.top_k_of_logits(logits, 3, tp, vocab_size)
    else:
        log_p, entropy = vocab.token_log_probs(hidden, weight, tokens_T, place, vocab_size, chunk, keep)
        values, ids = vocab.top_k(hidden, weight, 3, place, vocab_size, chunk)
    (log_p * seeds[0] + entropy * seeds[1]).sum().backward()
    return {
        "log_p": log_p.detach(), "entropy": entropy.detach(), "values": values, "ids": ids,
        "grad_h": hidden.grad, "grad_w": weight.grad,
    }  # fmt: skip


def distribution_inputs(vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """hidden [14, 6], head [V, 6], tokens (some -100), and what flows back into log-probability and entropy."""
    draw = torch.Generator().manual_seed(9)
    hidden_TD, weight_VD = torch.randn(14, 6, generator=draw), torch.randn(vocab_size, 6, generator=draw) * 2
    tokens_T = torch.randint(0, vocab_size, (14,), generator=draw)
    tokens_T[::5] = -100
    return hidden_TD.to(dtype), weight_VD.to(dtype), tokens_T, torch.randn(2, 14, generator=draw)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def largest_tensor(tokens: int, dim: int, vocab_size: int, chunk: int) -> dict[str, int]:
    """The largest tensor each way of asking makes on one rank."""
    place = here()
    hidden = torch.randn(tokens, dim).requires_grad_()
    weight = torch.randn(vocab_size // place.tp.size, dim).requires_grad_()
    asked = torch.randint(0, vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    found = {}
    with Largest() as seen:
        torch.stack(vocab.token_log_probs(hidden, weight, asked, place, chunk=chunk)).sum().backward()
    found["token_log_probs"] = seen.numel
    with Largest() as seen:
        vocab.top_k(hidden, weight, 4, place, chunk=chunk)
    found["top_k"] = seen.numel
    return found
