"""The DeepSpeed dictionary, derived from Loom's typed sections; nothing in it is set twice or by the user."""

from __future__ import annotations

from typing import Any

from parallel.config import EngineConfig

FP32_BYTES = 4
BUCKET_MIB = {"cpu": 8, "cuda": 128}
"""On a CPU small buckets cost no speed and 60 to 80 MiB less at the peak; a GPU's network wants long messages."""


def ds_config(engine: EngineConfig, clip: float, device_type: str) -> dict[str, Any]:
    """DeepSpeed's configuration for one engine.

    Weights stay fp32 at every precision (autocast lowers the products), so DeepSpeed's own bf16 and fp16 sections,
    which accumulate gradients in the low type, are never used. Accumulation is ours too: the step marks its last
    micro-batch as the boundary, so the batch sizes below only satisfy DeepSpeed's bookkeeping.

    Args:
        engine: the engine section.
        clip: largest global gradient norm, 0 for none. ZeRO 0 has no sharded norm, so Loom clips there itself.
        device_type: cpu or cuda.
    """
    bucket = (engine.bucket_mib or BUCKET_MIB[device_type]) * 2**20 // FP32_BYTES
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip if engine.zero else 0.0,
        "steps_per_print": None,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": engine.zero},
    }
    zero = config["zero_optimization"]
    if engine.zero in (1, 2):
        # One reduce to the owner of each slice moves the parameters once; DeepSpeed's default all-reduce moves them
        # twice, and without contiguous gradients it falls back to that default without a word.
        zero |= {"use_multi_rank_bucket_allreduce": False, "contiguous_gradients": True, "overlap_comm": False}
        zero |= {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    elif engine.zero == 3:
        zero |= {"reduce_bucket_size": bucket, "overlap_comm": False}
        # A layer is gathered whole when it runs and released after, forward and backward: three times the parameters
        # on the wire and one layer in memory. Any prefetch or reuse would keep gathered layers until the backward.
        zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
        zero |= {"stage3_param_persistence_threshold": 0}
        # The default replaces torch.nn.functional.linear for the whole process.
        zero |= {"memory_efficient_linear": False}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return config
