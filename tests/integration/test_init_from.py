"""Training starts from any checkpoint at any layout as from the Hugging Face folder, and goes back to one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from convert import hf_to_mega, mega_to_hf, reshard
from convert.from_hf import whole_shapes
from convert.to_hf import export
from models.init import InitSource
from scripts.params import load_model
from tests import cases

TP2_PP2 = ["--tp", "2", "--pp", "2"]
FORMATS = {"torch": TP2_PP2, "torch_dist": ["--tp", "2"], "safetensors": TP2_PP2}


@dataclass(frozen=True)
class Starts:
    """A Hugging Face folder with tokenizer, and Megatron checkpoints of it by their format."""

    hf: Path
    mega: dict[str, Path]


@pytest.fixture(scope="module")
def starts(world) -> Starts:
    """Biases, tied embeddings on two stages, a vocabulary that has to be padded."""
    folder = world.folder / "starts"
    cfg = dataclasses.replace(load_model("tiny_qwen2", []), vocab_size=501, tied_embeddings=True, init_std=0.1)
    source = InitSource(cfg, 5)
    weights = ((name, _uneven(source.tensor(name))) for name in whole_shapes(cfg))
    hf = export(folder / "hf", cfg, weights, world.folder / "tokenizer")
    mega = {}
    for form, layout in FORMATS.items():
        mega[form] = folder / form
        hf_to_mega.run(["--hf", str(hf), "--out", str(mega[form]), "--format", form, *layout, "--workers", "1"])
    return Starts(hf, mega)


def _uneven(tensor: torch.Tensor) -> torch.Tensor:
    """Norms that are not all 1 and biases that are not all 0."""
    return tensor + 0.05 * torch.sin(torch.arange(tensor.numel())).view(tensor.shape)


def losses(pool, world, name: str, start: Path, *layout: str, **more: object) -> list[float]:
    """Losses of two steps from a folder, its sizes and its tokenizer taken from it."""
    words = world.overrides(run__name=name, model="hf", init_from=start, data__tokenizer="null", run__steps=2, **more)
    pool.run(cases.run_config, [*words, *layout])
    rows = world.metrics(name)
    return [rows[step]["train/loss"] for step in (1, 2)]


@pytest.mark.parametrize("layout", ["engine=zero2", "parallel=tp2"])
def test_a_megatron_checkpoint_starts_as_the_folder_it_was_made_from(pool, world, starts, layout: str) -> None:
    """Written at tp 2 x pp 2, read whole by two ranks or cut over them: the same losses, bit by bit."""
    kind = layout.partition("=")[2]
    expected = losses(pool(2), world, f"hf_{kind}", starts.hf, layout)
    assert expected[0] != expected[1]
    for form, folder in starts.mega.items():
        assert losses(pool(2), world, f"{form}_{kind}", folder, layout) == expected, form


def test_a_run_goes_on_as_a_checkpoint_of_any_kind(pool, world, starts, tmp_path: Path) -> None:
    """Trained at tp 2 x dp 2 with ZeRO-2; the run, its safetensors at tp 4 and its export start with the same loss."""
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    own = {"data__chat_template": tmp_path / "own.jinja"}
    losses(pool(4), world, "before", starts.hf, "parallel=tp2", "engine=zero2", **own)
    run = world.folder / "runs" / "before"
    as_files, hf = tmp_path / "resharded", tmp_path / "exported"
    layout = ["--tp", "4", "--pp", "3", "--pp-layout", "2,1,1", "--format", "safetensors"]
    reshard.run(["--in", str(run), "--out", str(as_files), *layout, "--verify", "--workers", "1"])
    mega_to_hf.run(["--mega", str(run), "--out", str(hf), "--verify", "--workers", "1"])

    paths = (run, as_files, hf)
    first = {path.name: losses(pool(2), world, f"from_{path.name}", path, "parallel=pp2") for path in paths}
    assert first["before"] == first["resharded"] == first["exported"]
    kept = (world.folder / "runs" / "from_before" / "config.yaml").read_text()
    assert f"chat_template: {tmp_path / 'own.jinja'}" in kept
    assert (hf / "chat_template.jinja").read_text() == (tmp_path / "own.jinja").read_text()

    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(hf)("3+4 is what?", return_tensors="pt")["input_ids"]
    ours_T = cases.checkpoint_logits(str(run), ids[0])
    with torch.no_grad():
        theirs_T = theirs(ids).logits[0]
    assert (ours_T - theirs_T).abs().max() <= 1e-5 * theirs_T.abs().max()
    assert json.loads((hf / "config.json").read_text())["vocab_size"] == 501
