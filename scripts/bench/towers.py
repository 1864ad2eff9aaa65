"""What a vision tower costs beside transformers' own: ``python scripts/bench/towers.py [--quick]``.

Forward and backward of the same weights on the same pictures, one thread, taken in turns; CPU-seconds, so that a busy
machine counts for neither. A tower of CLIP's kind looks at 64 tiles, one of Qwen2.5-VL's at pictures of eight sizes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn
from transformers.models.clip import CLIPVisionConfig, CLIPVisionModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from models.rules import Unused
from models.vision.config import TowerConfig
from models.vision.rules import tower_rules
from models.vision.tower import build_tower
from parallel.host_memory import keep_freed_memory
from parallel.materialise import fill_
from parallel.sharding import SINGLE

Look = Callable[[], torch.Tensor]
WIDTH, LAYERS, HEADS = 256, 6, 4
SIZES = ((16, 24), (30, 18), (24, 24), (12, 12), (20, 26), (8, 40), (14, 14), (24, 16))


def clip(tiles: int) -> tuple[nn.Module, Look, nn.Module, Look]:
    """Our tower and theirs, and how each looks at tiles of 8 x 8 patches."""
    cfg = TowerConfig("clip", WIDTH, 4 * WIDTH, LAYERS, HEADS, 8, 64, 1e-5, "quick_gelu", -1, keep_class=True)
    keys: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "attn_implementation": "sdpa"}
    theirs = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=WIDTH, intermediate_size=4 * WIDTH, patch_size=8, image_size=64, **keys)
    )
    pixels = torch.randn(tiles, 3, 64, 64)
    patches_PX = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 192)
    ours = with_weights(cfg, 1, theirs)
    return ours, lambda: ours(patches_PX, ((8, 8),) * tiles), theirs, lambda: theirs(pixels).last_hidden_state


def qwen(pictures: int) -> tuple[nn.Module, Look, nn.Module, Look]:
    """The same of a tower with windows of 8 x 8 patches, on pictures of several sizes."""
    full, inner = (2, 5), 684
    cfg = TowerConfig(
        "qwen2_5_vl", WIDTH, inner, LAYERS, HEADS, 7, None, 1e-6, "silu", frames=2, window_size=56, full_layers=full
    )
    keys: dict[str, Any] = {"depth": LAYERS, "num_heads": HEADS, "attn_implementation": "sdpa"}
    theirs = Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            **keys,
            hidden_size=WIDTH,
            intermediate_size=inner,
            patch_size=7,
            window_size=56,
            fullatt_block_indexes=list(full),
            out_hidden_size=WIDTH,
        )
    )
    grids = SIZES[:pictures]
    patches_PX = torch.randn(sum(a * b for a, b in grids), 294)
    thw = torch.tensor([(1, *grid) for grid in grids])
    ours = with_weights(cfg, 2, theirs)
    return (
        ours,
        lambda: ours(patches_PX, grids),
        theirs,
        lambda: theirs(patches_PX, grid_thw=thw).last_hidden_state,
    )


def with_weights(cfg: TowerConfig, block: int, theirs: nn.Module) -> nn.Module:
    """Our tower with the weights of theirs."""
    with torch.device("meta"):
        tower = build_tower(cfg, block, SINGLE)
    weights = theirs.state_dict()
    named = {rule.ours: rule.to_ours(weights) for rule in tower_rules(cfg, "", "") if not isinstance(rule, Unused)}
    for name, param in tower.named_parameters():
        fill_(param, named[name], torch.device("cpu"))
    return tower


def step(model: nn.Module, look: Look) -> float:
    """CPU-seconds of one forward and backward."""
    start = time.process_time()
    look().sum().backward()
    taken = time.process_time() - start
    model.zero_grad(set_to_none=True)
    return taken


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two tiles, two pictures, one round")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rounds = 1 if args.quick else 10
    for name, made in (("clip", clip(2 if args.quick else 64)), ("qwen2_5_vl", qwen(2 if args.quick else 8))):
        ours, look, theirs, their_look = made
        step(ours, look)
        step(theirs, their_look)
        taken = [(step(ours, look), step(theirs, their_look)) for _ in range(rounds)]
        own, other = (median(column) for column in zip(*taken, strict=True))
        ratio = median(b / a for a, b in taken)
        print(f"{name}: loom {own:.3f} s, transformers {other:.3f} s (CPU, forward and backward), {ratio:.2f} times")


if __name__ == "__main__":
    main()
