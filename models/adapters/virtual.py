"""Virtual tokens on a decoder: where they lie in it, their names, and what they begin with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch

from models.adapters.source import Saved
from models.adapters.virtual_config import PrefixConfig, PromptConfig, VirtualConfig
from models.blocks.attention import Attention
from models.blocks.virtual import LayerPrefix, Prefix, Prompt
from models.config import ModelConfig
from models.decoder import Decoder, Layer, build
from parallel.materialise import TensorSource
from parallel.sharding import Cut, Shard, shard_of

EMBEDDINGS, IDLE = "virtual.embeddings", "virtual.idle"


def attach_virtual(model: Decoder, cfg: VirtualConfig) -> None:
    """Give a frozen decoder on the meta device, or a chunk of one, its virtual tokens."""
    with torch.device("meta"):
        if isinstance(cfg, PromptConfig):
            model.virtual = Prompt(cfg.tokens, model.cfg.hidden_size, model.place, model.chunk.embeds)
            return
        model.virtual = Prefix(cfg.tokens)
        for layer in model.layers.values():
            assert isinstance(layer, Layer) and isinstance(layer.attn, Attention), "latent attention takes no prefix"
            layer.attn.prefix = LayerPrefix(cfg.tokens, model.cfg.num_kv_heads, model.cfg.head_dim, model.place)


def virtual_shapes(model: ModelConfig, cfg: VirtualConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of virtual tokens by our names, whole."""
    decoder = build(model)
    names = set(dict(decoder.named_parameters()))
    attach_virtual(decoder, cfg)
    fresh = {name: param for name, param in decoder.named_parameters() if name not in names}
    return {name: shard_of(param).whole_shape(param.shape) for name, param in fresh.items()}


class VirtualSource(TensorSource):
    """Weights of a model with virtual tokens by our names: they are made whole, then cut, so no layout changes them.

    Args:
        base: the weights that stay as they are.
        saved: what an earlier run trained.
        start: virtual tokens to start from.
        seed: what fresh ones are drawn by, each tensor by its name.
        words: the tokens of `init_text`, at least one.
    """

    def __init__(
        self,
        base: TensorSource,
        model: ModelConfig,
        cfg: VirtualConfig,
        seed: int,
        saved: Saved | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
        words: Sequence[int] = (),
    ) -> None:
        self.base, self.cfg, self.seed, self.saved, self.start, self.words = base, cfg, seed, saved, start, words
        self.vocab, self._own = model.vocab_size, virtual_shapes(model, cfg)

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of a parameter or buffer."""
        if self.saved is not None and name in self.saved.tensors:
            return self.saved.tensor(name)
        if name == IDLE:
            return torch.zeros(1, 1)
        return self._fresh(name) if name in self._own else self.base.tensor(name)

    def part(self, name: str, shard: Shard, cut: Cut) -> torch.Tensor:
        """What `cut` gives of it."""
        if self.saved is not None and name in self.saved.tensors:
            return self.saved.part(name, shard, cut)
        if name in self._own or name == IDLE:
            return shard.slice(self.tensor(name), cut).clone()
        return self.base.part(name, shard, cut)

    def _fresh(self, name: str) -> torch.Tensor:
        if self.start is not None:
            return self.start[name].float()
        shape, digest = self._own[name], hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        if isinstance(self.cfg, PrefixConfig):
            return torch.zeros(shape) if self.cfg.tokens_init == "zero" else torch.randn(shape, generator=generator)
        if self.cfg.tokens_init == "random":
            return torch.randn(shape, generator=generator)
        if self.cfg.tokens_init == "vocab":
            tokens = torch.randint(self.vocab, shape[:1], generator=generator)
        else:
            assert self.words, "a text without tokens"
            tokens = torch.tensor(self.words).repeat(-(-shape[0] // len(self.words)))[: shape[0]]
        return self.base.tensor("embed.weight")[tokens].float()
