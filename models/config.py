"""Sizes of a model and how it is run. The sizes live in conf/model; a Hugging Face folder gives the same record."""

from dataclasses import dataclass, field
from typing import Literal

from models.vision.config import VisionConfig

Problem = tuple[str, object, str, str]
"""key, value, reason, way out"""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base `theta`, and how it is stretched past the length the model was trained on.

    `original_max_seq_len` is that length; None means the model's `max_seq_len`. The other fields belong to one scaling.
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_max_seq_len: int | None = None
    beta_fast: float = 32.0
    """yarn: dimensions that turn more often than this over the original length keep their frequency."""
    beta_slow: float = 1.0
    """yarn: dimensions that turn less often than this are interpolated."""
    attention_factor: float | None = None
    """yarn: what cos and sin are multiplied with; None derives it from factor, mscale and mscale_all_dim."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    """yarn: round the borders of the ramp to whole dimensions."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are interpolated."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this are kept."""
    sections: tuple[int, ...] = ()
    """Pairs of dimensions that turn by a token's time, by its row and by its column (M-RoPE; Wang et al. 2024,
    Qwen2-VL); empty: all turn by its position."""


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts in place of the feed-forward: which experts there are, how a token chooses, how it is trained.

    Sources: Shazeer et al. 2017; Jiang et al. 2024 (Mixtral); DeepSeek-AI 2024 (V2: groups, shared experts; V3: sigmoid
    scores and a bias instead of a balancing loss, Wang et al. 2024).
    """

    num_experts: int
    top_k: int
    """Experts a token goes to."""
    expert_size: int
    """Feed-forward size of one expert."""
    shared_size: int = 0
    """Feed-forward size of the expert every token goes to (several shared experts are one of their summed size)."""
    shared_gate: bool = False
    """The shared expert's output is multiplied with the sigmoid of a learnt projection (Qwen2-MoE)."""
    first_dense: int = 0
    """The first so many layers keep a dense feed-forward of `intermediate_size`."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    """Weights of the chosen experts are made to sum to 1."""
    scale: float = 1.0
    """Factor on the weights of the chosen experts."""
    groups: int = 1
    """Experts are in so many groups, and a token goes to experts of `groups_kept` of them only."""
    groups_kept: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    """What a group counts: its best expert (V2) or the sum of its two best (V3)."""
    correction_bias: bool = False
    """A bias of each expert is added to the scores for choosing, not for weighing."""
    bias_rate: float = 0.0
    """How far the correction bias moves after each step towards an even load (Wang et al. 2024)."""
    balance_loss: float = 0.0
    """Factor of the load-balancing loss (Fedus et al. 2021)."""
    balance_over: Literal["global", "sequence"] = "global"
    """Loads and probabilities of the balancing loss: of all tokens of the global batch, or of each document alone."""
    z_loss: float = 0.0
    """Factor of the router's z-loss (Zoph et al. 2022)."""
    capacity: float | None = None
    """An expert takes at most so many times its even share of a document's tokens; null drops none."""

    def problems(self) -> list[Problem]:
        """Every value that cannot work in any family, as (key, value, reason, way out)."""
        keys = ("num_experts", "top_k", "expert_size", "groups", "groups_kept")
        found: list[Problem] = [
            (f"moe.{key}", getattr(self, key), "must be at least 1", f"model.moe.{key}=1 or more")
            for key in keys
            if getattr(self, key) < 1
        ]
        found += [
            (f"moe.{key}", getattr(self, key), "must not be below 0", f"model.moe.{key}=0")
            for key in ("shared_size", "first_dense", "bias_rate", "balance_loss", "z_loss")
            if getattr(self, key) < 0
        ]
        if found:
            return found
        if self.scale <= 0:
            found.append(("moe.scale", self.scale, "must be above 0", "model.moe.scale=1"))
        if self.capacity is not None and self.capacity <= 0:
            reason = "leaves every expert without a token"
            found.append(("moe.capacity", self.capacity, reason, "model.moe.capacity=null to drop none"))
        if self.shared_gate and not self.shared_size:
            way = "model.moe.shared_gate=false, or model.moe.shared_size above 0"
            found.append(("moe.shared_gate", True, "there is no shared expert (shared_size=0)", way))
        if self.bias_rate and not self.correction_bias:
            way = "model.moe.correction_bias=true, or model.moe.bias_rate=0"
            found.append(("moe.bias_rate", self.bias_rate, "there is no bias to move (correction_bias=false)", way))
        return found + self._group_problems()

    def _group_problems(self) -> list[Problem]:
        if self.num_experts % self.groups:
            near = max(n for n in range(1, self.groups + 1) if self.num_experts % n == 0)
            reason = f"the {self.num_experts} experts (num_experts) cannot be put evenly into {self.groups} groups"
            return [("moe.groups", self.groups, reason, f"model.moe.groups={near}")]
        if self.groups_kept > self.groups:
            reason = f"there are {self.groups} groups"
            return [("moe.groups_kept", self.groups_kept, reason, f"model.moe.groups_kept={self.groups}")]
        inside = self.num_experts // self.groups
        if self.group_score == "top2_sum" and self.groups > 1 and inside < 2:
            way = f"model.moe.groups={max(1, self.num_experts // 2)} or fewer"
            return [("moe.groups", self.groups, "a group counts its two best experts but has one", way)]
        choice = inside * self.groups_kept
        if self.top_k > choice:
            of = f" in {self.groups_kept} of {self.groups} groups" if self.groups > 1 else ""
            reason = f"a token can choose among {choice} experts only{of}"
            return [("moe.top_k", self.top_k, reason, f"model.moe.top_k={choice}")]
        return []


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-AI 2024, V2): keys and values come from one small latent vector a token.

    The model's `head_dim` is that of a query and key head: nope_dim + rope_dim.
    """

    kv_rank: int
    """Size of the latent keys and values are made from."""
    nope_dim: int
    """Size of the part of each query and key head without rotation."""
    rope_dim: int
    """Size of the rotated part; that of the key is shared by all heads."""
    value_dim: int
    q_rank: int | None = None
    """Size of the latent queries are made from; null makes them from the hidden state."""


COMPARING = ("clip", "siglip", "bert")
"""Families whose text side is an encoder."""


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides a model's parameters and what it computes."""

    family: Literal[
        "llama",
        "qwen2",
        "qwen3",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "deepseek_v2",
        "deepseek_v3",
        "clip",
        "siglip",
        "bert",
    ]
    """Of the decoder; clip, siglip: no decoder but a text encoder beside the tower, and both are compared."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int
    norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tied_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    """Tokens a query sees, itself included; None is full attention."""
    full_attention_layers: int = 0
    """The first so many layers ignore `sliding_window` (Qwen's max_window_layers)."""
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    vision: VisionConfig | None = None
    init_std: float = 0.02
    head: Literal["lm", "scalar"] = "lm"

    @property
    def compares(self) -> bool:
        """Whether it is no decoder but a pair of encoders, of pictures and of texts, that are compared."""
        return self.family in COMPARING

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None for full attention."""
        return None if layer < self.full_attention_layers else self.sliding_window

    def is_moe(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts."""
        return self.moe is not None and layer >= self.moe.first_dense

    @property
    def qkv_parts(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused projection."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    def size_problems(self) -> list[Problem]:
        """Every size that cannot work in any family, as (key, value, reason, way out)."""
        found = self._size_problems() + self._rope_problems() + (self.moe.problems() if self.moe else [])
        if self.moe is not None and self.moe.first_dense >= self.num_layers >= 1:
            reason = f"leaves no layer of num_layers={self.num_layers} to the experts"
            found.append(("moe.first_dense", self.moe.first_dense, reason, "model.moe.first_dense=0"))
        if self.moe is not None and self.mlp_bias:
            found.append(("mlp_bias", True, "experts have no biases", "model.mlp_bias=false"))
        return found + (self.vision.problems(self.hidden_size) if self.vision else [])

    def _size_problems(self) -> list[Problem]:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        found: list[Problem] = [
            (key, getattr(self, key), "must be at least 1", f"model.{key}=1 or more")
            for key in (*sizes, "max_seq_len")
            if getattr(self, key) < 1
        ]
        if found:
            return found
        heads, groups = self.num_heads, self.num_kv_heads
        if heads % groups:
            near = max(n for n in range(1, min(heads, groups) + 1) if heads % n == 0)
            reason = f"the {heads} query heads (num_heads) cannot be shared out evenly over {groups} key/value heads"
            found.append(("num_kv_heads", groups, reason, f"model.num_kv_heads={near}"))
        found += self._latent_problems(self.mla) if self.mla else []
        if self.mla is None and self.head_dim % 2 and not self.compares:
            reason = "rotary embedding turns pairs of dimensions, so the head size must be even"
            found.append(("head_dim", self.head_dim, reason, f"model.head_dim={self.head_dim + 1}"))
        if self.norm_eps <= 0:
            found.append(("norm_eps", self.norm_eps, "must be above 0", "model.norm_eps=1e-5"))
        if self.init_std < 0:
            found.append(("init_std", self.init_std, "is a standard deviation", "model.init_std=0.02"))
        if self.sliding_window is not None and self.sliding_window < 1:
            reason = "a query must at least see itself"
            found.append(
                ("sliding_window", self.sliding_window, reason, "model.sliding_window=null for full attention")
            )
        if self.full_attention_layers < 0:
            reason = "counts layers from the first"
            found.append(("full_attention_layers", self.full_attention_layers, reason, "model.full_attention_layers=0"))
        return found

    def _latent_problems(self, mla: MLAConfig) -> list[Problem]:
        found: list[Problem] = [
            (f"mla.{key}", value, "must be at least 1", f"model.mla.{key}=1 or more")
            for key, value in vars(mla).items()
            if value is not None and value < 1
        ]
        if mla.rope_dim % 2:
            reason = "rotary embedding turns pairs of dimensions"
            found.append(("mla.rope_dim", mla.rope_dim, reason, f"model.mla.rope_dim={mla.rope_dim + 1}"))
        if self.head_dim != mla.nope_dim + mla.rope_dim:
            reason = f"a query head is mla.nope_dim={mla.nope_dim} and mla.rope_dim={mla.rope_dim} together"
            found.append(("head_dim", self.head_dim, reason, f"model.head_dim={mla.nope_dim + mla.rope_dim}"))
        if self.num_kv_heads != self.num_heads:
            reason = "latent attention makes a key and a value for every query head"
            found.append(("num_kv_heads", self.num_kv_heads, reason, f"model.num_kv_heads={self.num_heads}"))
        if self.qk_norm:
            found.append(("qk_norm", True, "latent attention norms its latents instead", "model.qk_norm=false"))
        if self.sliding_window is not None:
            reason = "latent attention has no sliding window"
            found.append(("sliding_window", self.sliding_window, reason, "model.sliding_window=null"))
        return found

    def _rope_problems(self) -> list[Problem]:
        rope, found = self.rope, []
        if rope.theta <= 1:
            found.append(("rope.theta", rope.theta, "must be above 1", "model.rope.theta=10000"))
        if rope.scaling == "none" and rope.factor != 1.0:
            reason = "has no effect without a scaling"
            found.append(("rope.factor", rope.factor, reason, "model.rope.scaling=yarn, or model.rope.factor=1"))
        if rope.scaling != "none" and rope.factor < 1.0:
            found.append(("rope.factor", rope.factor, "must be at least 1", "model.rope.factor=1"))
        if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
            reason = f"must be above model.rope.low_freq_factor={rope.low_freq_factor}"
            found.append(("rope.high_freq_factor", rope.high_freq_factor, reason, "model.rope.high_freq_factor=4"))
        if rope.original_max_seq_len is not None and rope.original_max_seq_len < 1:
            way = "model.rope.original_max_seq_len=null for model.max_seq_len"
            found.append(("rope.original_max_seq_len", rope.original_max_seq_len, "must be at least 1", way))
        return found + (self._section_problems() if rope.sections else [])

    def _section_problems(self) -> list[Problem]:
        given = self.rope.sections
        pairs = (self.mla.rope_dim if self.mla else self.head_dim) // 2
        if len(given) != 3 or min(given) < 1 or sum(given) != pairs:
            reason = f"are the {pairs} pairs of a head for time, row and column: three numbers, together {pairs}"
            row = max((pairs - pairs // 4) // 2, 1)
            way = f"model.rope.sections=[{pairs - 2 * row},{row},{row}]"
            return [("rope.sections", list(given), reason, way)]
        if self.rope.scaling == "dynamic":
            reason = "measures a document by its tokens, and those of pictures do not count one by one"
            return [("rope.scaling", "dynamic", reason, "model.rope.scaling=yarn, or model.rope.sections=[]")]
        return []


@dataclass(frozen=True)
class Runtime:
    """How a model is computed; changes speed and memory, never the result."""

    attention: Literal["sdpa", "flash_attn", "eager"] = "sdpa"
    recompute: Literal["none", "selective", "full"] = "none"
    """selective makes norm outputs and the SwiGLU product again in the backward; full makes whole layers again."""
    loss_chunk: int = 1024
    """Tokens whose logits exist at once."""
    loss_keep: int = 0
    """Log-probabilities: tokens whose probabilities are kept for the backward; the logits of others are made twice."""
