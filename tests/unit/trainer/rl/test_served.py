"""A vLLM server as the author of a run: each rollout is of the weights as they are, in every layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from convert.to_hf import export
from models import build
from models.adapters.config import LoraConfig
from models.config import ModelConfig
from models.init import InitSource
from parallel.config import ParallelConfig
from tests import served_cases
from tests.cases import TINY
from tests.pool import Pool
from tests.rl_cases import rl_config
from tests.vllm_stand_in import Server, serving
from trainer.rl.served import check, server_of
from trainer.rollout.vllm_server import VllmServer
from trainer.stages.grpo import GrpoConfig

ALONE, TP = ParallelConfig(), ParallelConfig(tp=2)
FULL = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --port {port} --dtype float32 --logprobs-mode processed_logprobs"
LORA = LoraConfig(rank=2, alpha=8.0)


def folder_of(folder: Path, model: ModelConfig = TINY, seed: int = 9) -> Path:
    """A model in a Hugging Face folder."""
    source = InitSource(model, seed)
    return export(folder, model, ((name, source.tensor(name)) for name, _ in build(model).named_parameters()))


def mismatch(found: dict[str, Any]) -> list[float]:
    """KL(generator || trainer) of each step."""
    return [step["train/mismatch_kl"] for step in found["metrics"]]


@pytest.mark.parametrize(("size", "layout", "zero"), [(1, ALONE, 1), (2, TP, 1), (2, ALONE, 3)])
def test_every_rollout_is_of_the_weights_as_they_are(
    size: int, layout: ParallelConfig, zero: Any, pool: Callable[[int], Pool], tmp_path: Path
) -> None:
    """The server begins with other weights than the run."""
    with serving(folder_of(tmp_path / "base")) as server:
        words = (server.url, None, str(tmp_path / "shared"), layout, zero)
        found = pool(size).run(served_cases.served_steps, *words)[0]
        assert max(mismatch(found)) < 1e-9 and found["said"] == [], mismatch(found)
        norm = found["weights"]["norm.weight"]
        assert torch.equal(server.model.model.norm.weight, norm) and (norm - 1).abs().max() > 0.02
    loads = [path for path, _ in server.asked if path in ("/collective_rpc", "/reset_prefix_cache")]
    assert loads == ["/collective_rpc", "/reset_prefix_cache"] * 4
    assert found["left"][:2] == ["run", "run/weights_000004"] and len(found["left"]) == 5


def test_a_server_that_keeps_its_weights_is_told_of(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """What the test above finds 0 is not 0 by itself."""
    with serving(folder_of(tmp_path / "base", seed=3), deaf=True) as server:
        words = (server.url, None, str(tmp_path / "shared"), ALONE)
        (found,) = pool(1).run(served_cases.served_steps, *words)
    before, *after = mismatch(found)
    assert before < 1e-9 and min(after) > 0.03, mismatch(found)
    (said,) = found["said"]
    assert "does nobody else load weights into it? VLLM_SERVER_DEV_MODE=1" in said


def test_an_adapter_goes_by_itself(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    """Of a rank of a run in two parts; the server puts it on the base it was started from."""
    base = folder_of(tmp_path / "base")
    with serving(base, dev_mode=False) as server:
        words = (server.url, str(base), str(tmp_path / "shared"), TP, 1, LORA)
        found = pool(2).run(served_cases.served_steps, *words)[0]
        assert max(mismatch(found)) < 1e-9 and found["said"] == [], mismatch(found)
        (name,) = server.adapters
    assert re.fullmatch(r"loom-[0-9a-f]{8}-4", name)
    asked = [(path, body) for path, body in server.asked if "lora" in path]
    assert [path for path, _ in asked[:3]] == ["/v1/load_lora_adapter"] * 2 + ["/v1/unload_lora_adapter"]
    assert len({body["model"] for path, body in server.asked if path == "/v1/completions"}) == 3
    files = ["adapter_config.json", "adapter_model.safetensors"]
    assert found["left"] == ["run", "run/weights_000004", *(f"run/weights_000004/{each}" for each in files)]


def test_bf16_weights_are_those_of_autocast(pool: Callable[[int], Pool], tmp_path: Path) -> None:
    with serving(folder_of(tmp_path / "base")) as server:
        words = (server.url, None, str(tmp_path / "shared"), ALONE, 1, None, "bf16")
        (found,) = pool(1).run(served_cases.served_steps, *words)
        wanted = found["weights"]["norm.weight"].bfloat16().float()
        assert torch.equal(server.model.model.norm.weight, wanted) and max(mismatch(found)) < 1e-2


def _refused(server: Server, model: ModelConfig = TINY, **rollout: Any) -> str:
    cfg = rl_config(GrpoConfig(), model, ALONE, 1, 1, backend="vllm", url=server.url, **rollout)
    with pytest.raises(ValueError) as error:
        check(cfg, server_of(cfg))
    assert error.value.args[0].startswith(f"rollout.url={server.url}: ")
    return error.value.args[0]


def test_a_server_that_cannot_write_for_the_run_is_refused(tmp_path: Path) -> None:
    with serving(folder_of(tmp_path / "base"), dev_mode=False, max_model_len=29) as server:
        long = _refused(server)
        assert "reads 29 tokens, and a sample may have 30" in long and "--max-model-len" in long
        other = _refused(server, dataclasses.replace(TINY, vocab_size=99, num_layers=3), max_new_tokens=4)
        assert f"serves {server.folder}, which is another model" in other
        assert "they differ in model.num_layers, model.vocab_size. Start it so: " in other
        assert FULL.format(port=server.server_port) in other
        client = VllmServer(server.url, "START")
        with pytest.raises(ValueError, match=r"gone \(404 to /collective_rpc.*\(rollout.weights_dir=FOLDER names"):
            client.load(tmp_path / "gone")
        server.dev_mode = True
        with pytest.raises(ValueError, match=r"gone \(500 to /collective_rpc: .*Cannot find any model weights"):
            client.load(tmp_path / "gone")
        wide = folder_of(tmp_path / "wide", dataclasses.replace(TINY, vocab_size=99))
        with pytest.raises(ValueError, match=r"wide \(500 to /collective_rpc: .*size mismatch.* the model that is"):
            client.load(wide)
        with pytest.raises(ValueError, match=r"gone \(404 to /v1/load_lora_adapter: .*No adapter found"):
            client.load_adapter(tmp_path / "gone", "a")
        url = server.url
    with pytest.raises(ValueError, match=rf"rollout\.url={url}: no vLLM server answers there .* Start one: START"):
        client.serves()


def test_the_command_that_starts_a_server(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base")
    cfg = rl_config(GrpoConfig(), TINY, ALONE, 1, 1, backend="vllm", url="http://gpu7")
    lora = dataclasses.replace(cfg, adapter=dataclasses.replace(LORA, rank=12, init="pissa"), init_from=str(base))
    assert server_of(lora).start == (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {base} --port 8000 --dtype float32 --logprobs-mode "
        "processed_logprobs --generation-config vllm --enable-lora --max-lora-rank 32"
    )
    run = server_of(dataclasses.replace(cfg, init_from="runs/sft")).start
    assert run.startswith(FULL.format(port=8000))
    assert run.endswith("(FOLDER is the model as a Hugging Face folder: python scripts/export_hf.py runs/sft FOLDER)")
