"""What a model that sees has besides its decoder: the section `model.vision`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.vision.checks import tower_problems, vision_problems

Problem = tuple[str, object, str, str]


@dataclass(frozen=True)
class TowerConfig:
    """The vision transformer: patches of a tile in, one feature a patch out.

    Sources: Dosovitskiy et al. 2021 (ViT); Radford et al. 2021 (CLIP); Zhai et al. 2023 (SigLIP); Chen et al. 2024
    (InternViT); Li et al. 2023 (BLIP-2); Wang et al. 2024 (Qwen2-VL); Bai et al. 2025 (Qwen2.5-VL).
    """

    kind: Literal["clip", "siglip", "intern", "blip2", "qwen2_vl", "qwen2_5_vl"]
    """Which transformer it is."""
    hidden_size: int
    """D of the tower."""
    intermediate_size: int
    """Its feed-forward size."""
    num_layers: int
    num_heads: int
    """Of size hidden_size / num_heads."""
    patch_size: int
    """Pixels of a patch's side."""
    image_size: int | None = None
    """Pixels of a tile's side, whose places have learnt positions; null for the Qwen towers, which turn queries and
    keys by row and column instead."""
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu"
    feature_layer: int = -1
    """Whose output is taken: -1 the last layer's, -2 the one before, and so on; layers behind it are kept for the
    checkpoint's sake but not run."""
    final_norm: bool = False
    """The last layer's output goes through the tower's last norm too, as BLIP-2 and PaliGemma read it (LLaVA does not).
    A norm that is not run is kept for the checkpoint's sake; intern: there is one only where this is said."""
    keep_class: bool = False
    """The class token (clip, intern, blip2) is a feature as well."""
    frames: int = 1
    """Pictures of one patch (Qwen-VL: 2, of a video two frames, of a picture the same twice)."""
    qkv_bias: bool = True
    """intern, blip2: biases of q, k and v; the others always have them."""
    qk_norm: bool = False
    """intern: RMSNorm of queries and keys."""
    rms_norm: bool = False
    """intern: RMSNorm in place of LayerNorm."""
    window_size: int | None = None
    """qwen2_5_vl: pixels of a window's side; patches see those of their window only."""
    full_layers: tuple[int, ...] = ()
    """qwen2_5_vl: layers whose patches see the whole picture."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def grid(self) -> int:
        """Patches of a tile's side, where tiles have one size."""
        assert self.image_size is not None
        return self.image_size // self.patch_size

    @property
    def runs(self) -> int:
        """How many layers are run."""
        return self.num_layers + 1 + self.feature_layer

    @property
    def native(self) -> bool:
        """Whether tiles have sizes of their own."""
        return self.kind in ("qwen2_vl", "qwen2_5_vl")

    @property
    def has_class(self) -> bool:
        """Whether a token of its own stands before the patches of a tile."""
        return self.kind in ("clip", "intern", "blip2")

    @property
    def has_norm(self) -> bool:
        """Whether its checkpoints have a norm behind the last layer (that of the Qwen towers is the connector's)."""
        return self.final_norm if self.kind == "intern" else not self.native

    @property
    def norms_features(self) -> bool:
        """Whether that norm is run."""
        return self.final_norm and self.feature_layer == -1

    def problems(self, block: int) -> list[Problem]:
        """Every value that cannot work, as (key, value, reason, way out).

        Args:
            block: side of the blocks of patches that become one feature.
        """
        return tower_problems(self, block)

    @property
    def shared(self) -> list[tuple[str, int]]:
        """Sizes of which every tp rank takes an equal share."""
        return [("tower.num_heads", self.num_heads), ("tower.intermediate_size", self.intermediate_size)]


@dataclass(frozen=True)
class ProjectorConfig:
    """Each feature by itself: one linear layer, or two with a GELU between (Liu et al. 2023, LLaVA-1.5)."""

    name: Literal["linear", "mlp"] = "mlp"
    bias: bool = True

    @property
    def block(self) -> int:
        return 1


@dataclass(frozen=True)
class ShuffleConfig:
    """Blocks of patches become one feature, then a norm and two layers (Chen et al. 2024, InternVL-1.5)."""

    name: Literal["pixel_shuffle"] = "pixel_shuffle"
    block: int = 2
    """Patches of a block's side."""


@dataclass(frozen=True)
class MergerConfig:
    """A norm, then blocks of patches become one feature through two layers (Wang et al. 2024, Qwen2-VL)."""

    name: Literal["patch_merger"] = "patch_merger"
    block: int = 2
    """Patches of a block's side."""
    rms_norm: bool = False
    """RMSNorm in place of LayerNorm (Qwen2.5-VL)."""


@dataclass(frozen=True)
class QFormerConfig:
    """Learnt queries that read the features of a tile (Li et al. 2023, BLIP-2); a BERT with cross-attention."""

    name: Literal["qformer"] = "qformer"
    queries: int = 32
    """Features of a tile, whatever its size."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    cross_every: int = 2
    """Every so many layers, from the first, read the tower's features."""
    norm_eps: float = 1e-12
    width: int = 256
    """Of the space where pictures and texts are compared, in its own first stage (stage=qformer)."""

    @property
    def block(self) -> int:
        return 1


@dataclass(frozen=True)
class PerceiverConfig:
    """Learnt latents that read the features of a tile and themselves in each layer (Alayrac et al. 2022, Flamingo)."""

    name: Literal["perceiver"] = "perceiver"
    queries: int = 64
    num_layers: int = 6
    num_heads: int = 16
    head_dim: int = 96
    ffn_ratio: int = 4
    norm_eps: float = 1e-5

    @property
    def block(self) -> int:
        return 1


@dataclass(frozen=True)
class ResamplerConfig:
    """One cross-attention of a square of learnt queries, with 2-D sine positions (Bai et al. 2023, Qwen-VL)."""

    name: Literal["resampler"] = "resampler"
    side: int = 16
    """Queries of a side: side x side features of a tile."""
    num_heads: int = 32
    norm_eps: float = 1e-6

    @property
    def queries(self) -> int:
        return self.side * self.side

    @property
    def block(self) -> int:
        return 1


@dataclass(frozen=True)
class PooledConfig:
    """One vector of a picture, for models that compare pictures and texts (`ModelConfig.compares`): the class token and
    a linear layer (Radford et al. 2021, CLIP), or a learnt query that reads all features (Zhai et al. 2023, SigLIP)."""

    name: Literal["pooled"] = "pooled"
    width: int = 512
    """Of the space where pictures and texts are compared; siglip: the tower's hidden_size."""
    pad_id: int = 1
    """siglip: the token that texts are filled up with to model.max_seq_len, and that is seen like any other."""

    @property
    def block(self) -> int:
        return 1


ConnectorConfig = (
    ProjectorConfig | ShuffleConfig | MergerConfig | QFormerConfig | PerceiverConfig | ResamplerConfig | PooledConfig
)


@dataclass(frozen=True)
class ImageConfig:
    """How a picture becomes tiles, and what stands for it in the text."""

    mode: Literal["fixed", "anyres", "tiles", "native"] = "fixed"
    """fixed: one tile. anyres: the best of `grids` and a small whole (LLaVA-NeXT). tiles: as many as the picture's
    aspect ratio asks for (InternVL). native: the picture's own size, rounded (Qwen2-VL)."""
    fit: Literal["crop", "squash", "pad"] = "crop"
    """fixed: the middle square, all of it out of proportion, or all of it with borders in the mean colour."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """Of each colour, taken off values from 0 to 1."""
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    """What is divided by then."""
    resample: Literal["bilinear", "bicubic", "lanczos", "nearest"] = "bicubic"
    grids: tuple[tuple[int, int], ...] = ()
    """anyres: heights and widths in pixels a picture may be fitted to."""
    newline: bool = False
    """anyres: a learnt feature ends each row of the whole picture."""
    min_tiles: int = 1
    max_tiles: int = 12
    """tiles: so many at least and at most."""
    thumbnail: bool = True
    """tiles: where there are several, a small whole follows them."""
    min_pixels: int = 3136
    max_pixels: int = 1003520
    """native: a picture is scaled to lie between."""
    token: str = "<image>"
    """Text of the token that is repeated, once for each feature; added to the tokenizer where it is not there."""
    token_id: int | None = None
    """Its id, where a checkpoint says it; null takes the tokenizer's."""
    begin: str = ""
    end: str = ""
    """Texts before and behind the features of a picture."""
    video_token: str = ""
    """native: text of the token that is repeated for each feature of a video; empty = `token`. In other modes a video
    is its frames, as pictures of one tile."""
    video_token_id: int | None = None
    """Its id, where a checkpoint says it."""
    video_min_pixels: int = 100352
    video_max_pixels: int = 602112
    """native: each frame of a video is scaled to lie between."""
    tokens_per_second: int | None = None
    """native: positions that a second of a video takes (Qwen2.5-VL); null = each step in time takes one."""


@dataclass(frozen=True)
class CrossConfig:
    """Features do not stand among the tokens: layers before the decoder's own read them, each token those of the last
    picture before it; what they add begins at nothing (Alayrac et al. 2022, Flamingo, section 2.2)."""

    intermediate_size: int
    """Of their feed-forward (Flamingo: 4 x model.hidden_size)."""
    every: int = 1
    """Every so many layers of the decoder, from the first, have one before them."""
    num_heads: int = 8
    head_dim: int = 64
    norm_eps: float = 1e-5

    def before(self, layers: int) -> range:
        """The layers of a decoder of so many that have one before them."""
        return range(0, layers, self.every)


@dataclass(frozen=True)
class VisionConfig:
    """Everything a model has besides its decoder to see pictures."""

    format: Literal[
        "llava", "llava_next", "internvl", "blip2", "qwen2_vl", "qwen2_5_vl", "clip", "siglip", "blip2_itm", "loom"
    ]
    """Whose names and config.json its checkpoints have; loom: our own, for parts that were never put together so."""
    tower: TowerConfig
    connector: ConnectorConfig
    images: ImageConfig
    cross: CrossConfig | None = None
    """Layers that read the features, one token a picture; null puts features in the places of tokens."""

    def problems(self, width: int) -> list[Problem]:
        """Every value that cannot work with a decoder of hidden size `width`, as (key, value, reason, way out)."""
        return vision_problems(self, width)

    @property
    def shared(self) -> list[tuple[str, int]]:
        """Sizes of which every tp rank takes an equal share."""
        cut = [key for key in ("num_heads", "intermediate_size") if hasattr(self.connector, key)]
        found = self.tower.shared + [(f"connector.{key}", getattr(self.connector, key)) for key in cut]
        if self.cross is None:
            return found
        return found + [(f"cross.{key}", getattr(self.cross, key)) for key in ("num_heads", "intermediate_size")]

    @property
    def features_per_tile(self) -> int | None:
        """Features of a tile, where that does not depend on its size."""
        return getattr(self.connector, "queries", None)
