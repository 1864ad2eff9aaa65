"""The DeepSpeed dictionary, key by key: each of these was measured or read in DeepSpeed's source, none is taste."""

from __future__ import annotations

import json
from typing import Any

import pytest

from parallel.config import EngineConfig
from parallel.ds_config import ds_config

COMMON = {
    # Loom accumulates and marks the boundary itself; any other pair here would let DeepSpeed divide the loss.
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    # null turns DeepSpeed's own progress lines off.
    "steps_per_print": None,
    # Else DeepSpeed compiles and insists on its own CPU Adam when the optimizer is offloaded.
    "zero_force_ds_cpu_optimizer": False,
}
SHARDED = {
    # One reduce to the owner: the parameters cross once. The default all-reduces them (twice), and does so silently
    # when gradients are not contiguous.
    "use_multi_rank_bucket_allreduce": False,
    "contiguous_gradients": True,
    "overlap_comm": False,
}
BUCKET = 3 * 2**20 // 4  # elements in 3 MiB of fp32
ZERO: dict[int, dict[str, Any]] = {
    0: {},
    1: SHARDED | {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    2: SHARDED | {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
    3: {
        "reduce_bucket_size": BUCKET,
        "overlap_comm": False,
        # Gathered when a layer runs, released right after: no more than one layer is whole at any time.
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        # 0 = also small tensors are partitioned, so that every element has one owner.
        "stage3_param_persistence_threshold": 0,
        # True replaces torch.nn.functional.linear in the whole process.
        "memory_efficient_linear": False,
    },
}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_snapshot(zero: Any) -> None:
    """The whole dictionary: a new key shows here. ZeRO 0 has no sharded norm, so there DeepSpeed must not clip."""
    found = ds_config(EngineConfig(zero=zero, bucket_mib=3), 0.7, "cpu")
    clip = {"gradient_clipping": 0.7 if zero else 0.0}
    assert found == COMMON | clip | {"zero_optimization": {"stage": zero} | ZERO[zero]}
    assert json.loads(json.dumps(found)) == found  # plain values: DeepSpeed also takes it as a file


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_precision_is_never_deepspeeds(zero: Any, precision: Any) -> None:
    """Its bf16 and fp16 sections hold weights and add gradients up in the low type."""
    found = ds_config(EngineConfig(zero=zero, precision=precision), 1.0, "cpu")
    assert not {"bf16", "fp16", "torch_autocast", "data_types", "amp"} & found.keys()
    assert found == ds_config(EngineConfig(zero=zero), 1.0, "cpu")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_offload_adds_one_entry(zero: Any) -> None:
    plain = ds_config(EngineConfig(zero=zero), 1.0, "cpu")
    offloaded = ds_config(EngineConfig(zero=zero, offload_optimizer=True), 1.0, "cpu")
    assert offloaded["zero_optimization"].pop("offload_optimizer") == {"device": "cpu"}
    assert offloaded == plain


@pytest.mark.parametrize(("device", "mib"), [("cpu", 8), ("cuda", 128)])
def test_buckets_are_in_elements_by_device(device: str, mib: int) -> None:
    found = ds_config(EngineConfig(zero=1), 1.0, device)["zero_optimization"]
    assert found["reduce_bucket_size"] == found["allgather_bucket_size"] == mib * 1024 * 1024 / 4


def test_no_clip_is_deepspeeds_zero() -> None:
    assert ds_config(EngineConfig(zero=2), 0.0, "cpu")["gradient_clipping"] == 0.0
