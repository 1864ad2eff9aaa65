"""How weights are drawn: each parameter whole, from its global name and the seed alone.

| rule              | values                                        | parameters                                      |
|-------------------|-----------------------------------------------|-------------------------------------------------|
| `normal`          | normal, std = `init_std`                      | embed, attn.qkv, mlp.gate_up, head              |
| `normal_residual` | normal, std = `init_std / sqrt(2 num_layers)` | attn.out, mlp.down (they write to the residual) |
| `ones`            | 1                                             | all norms                                       |
| `zeros`           | 0                                             | all biases, all buffers                         |
| `clip_scale`      | ln(1 / 0.07)                                  | temperature.scale of CLIP (Radford et al. 2021) |
| `siglip_scale`    | ln 10                                         | temperature.scale of SigLIP (Zhai et al. 2023)  |
| `siglip_bias`     | -10                                           | temperature.bias of SigLIP                      |

A draw depends on nothing else: not on the layout, not on which parameters came before. Source of the residual rule:
Radford et al. 2019 (GPT-2), section 2.3.
"""

import hashlib
import math

import torch

from models.building import build
from models.config import ModelConfig
from parallel.materialise import TensorSource
from parallel.sharding import init_of, shard_of

CONSTANTS = {
    "ones": 1.0,
    "zeros": 0.0,
    "clip_scale": math.log(1 / 0.07),
    "siglip_scale": math.log(10.0),
    "siglip_bias": -10.0,
}
"""Rules that draw nothing."""


def init_tensor(name: str, shape: tuple[int, ...], rule: str, seed: int, cfg: ModelConfig) -> torch.Tensor:
    """The whole fp32 tensor of parameter `name`, on the CPU."""
    if rule in CONSTANTS:
        return torch.full(shape, CONSTANTS[rule], device="cpu")
    std = {"normal": cfg.init_std, "normal_residual": cfg.init_std / math.sqrt(2 * cfg.num_layers)}[rule]
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape, device="cpu").normal_(0.0, std, generator=generator)


class InitSource(TensorSource):
    """Fresh weights, parameter by parameter."""

    def __init__(self, cfg: ModelConfig, seed: int) -> None:
        self.cfg, self.seed = cfg, seed
        model = build(cfg)
        self._params, self._buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor of parameter or buffer `name`, fp32 on the CPU; the same at every call."""
        if name in self._buffers:
            return torch.zeros(self._buffers[name].shape, device="cpu")
        param = self._params[name]
        whole = shard_of(param).whole_shape(param.shape)
        return init_tensor(name, whole, init_of(param), self.seed, self.cfg)
