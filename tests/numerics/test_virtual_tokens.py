"""Virtual tokens against `peft`: losses, gradients, what is learnt after steps; and the formats both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.peft_files import read_peft, write_peft
from convert.virtual import flat
from models import ModelConfig
from models.adapters.virtual_config import PrefixConfig, PromptConfig, VirtualConfig
from parallel.groups import ALL_DATA, Groups
from parallel.sharding import Axis
from tests import adapter_cases, peft_reference
from tests.cases import TINY, my_parts
from tests.pool import Pool

TOLERANCE = 1e-5
ONE = Groups(0, 1, torch.device("cpu"), Axis())
"""For the batches: in this process no group is joined, other tests count on that."""
QWEN = dataclasses.replace(TINY, family="qwen2", qkv_bias=True, tied_embeddings=True)
WINDOW = dataclasses.replace(QWEN, sliding_window=9, full_attention_layers=1)
NORMED = dataclasses.replace(TINY, family="qwen3", qk_norm=True, head_dim=16)
PROMPT, PREFIX = PromptConfig(tokens=5), PrefixConfig(tokens=5)


def theirs(cfg: VirtualConfig) -> Any:
    """The same adapter in peft."""
    from peft import PrefixTuningConfig, PromptTuningConfig

    kind: Any = PromptTuningConfig if isinstance(cfg, PromptConfig) else PrefixTuningConfig
    return kind(num_virtual_tokens=cfg.tokens, task_type="CAUSAL_LM")


ROWS = [
    ("prompt, biases, tied", QWEN, PROMPT),
    ("prefix", TINY, PREFIX),
    ("prefix, windows", WINDOW, PREFIX),
    ("prefix, normed keys", NORMED, PREFIX),
]


@pytest.mark.parametrize(("cfg", "adapter"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_trains_as_peft_does(
    cfg: ModelConfig, adapter: VirtualConfig, tmp_path: Path, pool: Callable[[int], Pool]
) -> None:
    """From virtual tokens that peft saved; then peft loads those that were trained here."""
    base = peft_reference.base_folder(cfg, tmp_path / "base")
    model = peft_reference.random_adapter(base, tmp_path / "start", theirs(adapter))
    steps = [my_parts(step, ONE, ALL_DATA, 8) for step in range(3)]
    plain = peft_reference.hf_model(base)
    with torch.no_grad():
        without = float(torch.stack([peft_reference.losses_of(plain, batch) for batch in steps[0]]).sum())
    expected = peft_reference.train(model, steps, adapter_cases.LR, adapter_cases.EPS)
    found = pool(1).run(adapter_cases.train, cfg, adapter, start=str(tmp_path / "start"), zero=0)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=TOLERANCE)
    assert found["off"][0] == pytest.approx(without / sum(batch.num_targets for batch in steps[0]), rel=1e-6)
    assert abs(found["off"][0] / found["losses"][0] - 1) > 1e-5
    for kind in ("grads", "weights"):
        (wanted,) = expected[kind].values()
        ours = flat(cfg, adapter, adapter_cases.gathered(found[kind], cfg, adapter).tensors)
        assert float((ours - wanted).abs().max() / wanted.abs().max()) < TOLERANCE, kind
    trained = adapter_cases.gathered(found["weights"], cfg, adapter)
    write_peft(tmp_path / "trained", cfg, trained, str(base))
    both = [model, peft_reference.adapted(base, tmp_path / "trained")]
    with torch.no_grad():
        asked = steps[0][0].tokens_T[None, :20]
        logits = [each(input_ids=asked).logits for each in both]
    assert float((logits[0] - logits[1]).abs().max()) < TOLERANCE
    back = read_peft(tmp_path / "trained", cfg)
    assert back.cfg == adapter
    assert all(torch.equal(back.tensors[key], tensor) for key, tensor in trained.tensors.items())
    assert found["frozen_gradients"] == 0
