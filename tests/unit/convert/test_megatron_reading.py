"""A Megatron checkpoint opens to the tensors it was made from, or says what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from convert.megatron.args import OWN, to_args
from convert.megatron.copies import check_copies
from convert.megatron.layout import Layout
from convert.megatron.rank_files import Strided
from convert.megatron.reading import open_megatron
from convert.megatron.writing import begin_safetensors, begin_torch
from convert.opened import Opened
from models import FAMILIES, ModelConfig
from scripts.params import load_model
from tests.megatron_saved import CASES, Rank, case, fill, folder_name, save, weights
from tests.megatron_shards import Memory, put_together

BEGIN = {"torch": begin_torch, "safetensors": begin_safetensors}
TINY = load_model("tiny_llama", [])


def holds(opened: Opened, hf: dict[str, torch.Tensor]) -> bool:
    assert list(opened.tensors.metas) == list(hf)
    found = put_together(opened.tensors)
    return all(found[name].dtype == hf[name].dtype and torch.equal(found[name], hf[name]) for name in hf)


def write(root: Path, cfg: ModelConfig, layout: Layout, form: str = "torch") -> dict[str, torch.Tensor]:
    """A checkpoint by our own writer."""
    hf = weights(cfg)
    fill(BEGIN[form](root, cfg, layout, Memory(hf).metas, to_args(cfg, layout, torch.bfloat16)), hf, 1000)
    return hf


def rewrite(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a rank's torch file holds."""
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def refused(root: Path, *parts: str) -> str:
    with pytest.raises(ValueError) as told:
        open_megatron(root)
    for part in parts:
        assert part in str(told.value), str(told.value)
    return str(told.value)


@pytest.mark.parametrize("form", BEGIN)
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_opens_again(tmp_path: Path, name: str, form: str) -> None:
    cfg, layout = case(name)
    hf = write(tmp_path, cfg, layout, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_megatron(tmp_path)
    assert (opened.path, opened.format, opened.cfg, opened.layout) == (tmp_path, form, cfg, layout)
    assert opened.files is None and holds(opened, hf)
    check_copies(opened)


@pytest.mark.parametrize("name", CASES)
def test_what_megatron_saves_opens(tmp_path: Path, name: str) -> None:
    """Plain torch.save of the plain reference's tensors, with all that Megatron has in its files besides."""
    cfg, layout = case(name)

    def as_trained(rank: Rank, content: dict[str, Any]) -> None:
        content["args"].rank = rank[0]  # what differs from rank to rank
        content |= {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "opt_param_scheduler": {"max_lr": 1e-3}}
        for state in [value for key, value in content.items() if key.startswith("model")]:
            for i, weight in enumerate(list(state)):
                if "linear" in weight and weight.endswith(".weight"):
                    state[weight.replace(".weight", "._extra_state")] = [None, torch.zeros(0, dtype=torch.uint8)][i % 2]
            shared = torch.cat([tensor.reshape(-1) for tensor in state.values() if is_bf16(tensor)]) if state else None
            at = 0
            for i, (key, tensor) in enumerate(state.items()):
                if is_bf16(tensor) and shared is not None:
                    # A flat buffer of all parameters, as distributed optimizers keep; some weights lie otherwise.
                    state[key] = shared[at : at + tensor.numel()].view(tensor.shape)
                    at += tensor.numel()
                    if i % 3 == 0:
                        state[key] = torch.nn.Parameter(tensor.t().contiguous().t() if tensor.dim() == 2 else tensor)

    hf = save(tmp_path, cfg, layout, as_trained)
    (tmp_path / "iter_0000007" / folder_name(layout, (0, 0, 0)) / "distrib_optim.pt").write_bytes(b"not read")
    opened = open_megatron(tmp_path)
    assert (opened.cfg, opened.layout) == (cfg, layout) and holds(opened, hf)
    check_copies(opened)


def is_bf16(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


@pytest.mark.parametrize("kept", [{"qkv_bias": True, "attention_out_bias": True}, {"mlp_bias": True}])
def test_biases_the_model_lacks_are_zeros_for_megatron_and_must_be(tmp_path: Path, kept: dict[str, bool]) -> None:
    cfg, root = dataclasses.replace(TINY, **kept), tmp_path / "root"
    hf = write(root, cfg, Layout(tp=2))
    file = root / "release" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)["model"]
    linear = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    biases = {name: content[f"decoder.layers.1.{name}.bias"] for name in linear}
    lacking = set(linear[:2] if "mlp_bias" in kept else linear[2:])
    assert {name for name, bias in biases.items() if not bias.any()} == lacking
    opened = open_megatron(root)
    assert opened.cfg == cfg and holds(opened, hf)
    name = f"decoder.layers.1.{min(lacking)}.bias"
    rewrite(file, lambda content: content["model"][name][-1].fill_(0.5))
    refused(root, "mp_rank_01", name, "is not zero")


def test_a_folder_is_found_by_root_or_by_step(tmp_path: Path) -> None:
    hf = save(tmp_path / "run", TINY, Layout(tp=2))
    step, tracker = tmp_path / "run" / "iter_0000007", tmp_path / "run" / "latest_checkpointed_iteration.txt"
    assert holds(open_megatron(tmp_path / "run"), hf) and holds(open_megatron(step), hf)
    tracker.write_text(" 7 \n\n")
    assert holds(open_megatron(tmp_path / "run"), hf)
    tracker.unlink()
    assert holds(open_megatron(tmp_path / "run"), hf)
    shutil.copytree(step, tmp_path / "run" / "iter_0000008")
    refused(tmp_path / "run", "latest_checkpointed_iteration.txt", "iter_0000007, iter_0000008")
    tracker.write_text("9")
    refused(tmp_path / "run", "iter_0000009", str(tracker))
    tracker.write_text("\x00\xff")
    refused(tmp_path / "run", "neither a number nor 'release'")
    shutil.copytree(step, tmp_path / "any name")
    assert holds(open_megatron(tmp_path / "any name"), hf)


def test_other_folders_are_told(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "is not a folder")
    refused(tmp_path, "no iter_* or release folder")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "Hugging Face")
    release = tmp_path / "release"
    release.mkdir()
    refused(tmp_path, "no mp_rank_* folder")
    (release / ".metadata").touch()
    refused(release, "torch_dist")
    (release / ".metadata").unlink()
    (release / "mp_rank_00").mkdir()
    refused(tmp_path, "neither model_optim_rng.pt and model_optim_rng.safetensors", "mp_rank_00 holds nothing")
    for name in ("model_optim_rng.pt", "model_optim_rng.safetensors"):
        (release / "mp_rank_00" / name).touch()
    refused(tmp_path, "both", "remove one")


@pytest.mark.parametrize("form", BEGIN)
def test_ranks_that_are_missing_or_too_many_are_told(tmp_path: Path, form: str) -> None:
    cfg, layout = case("mixtral")
    write(tmp_path, cfg, layout, form)
    shutil.copytree(tmp_path / "release" / "mp_rank_01_001_001", tmp_path / "release" / "mp_rank_02_001_001")
    refused(tmp_path, "1 folders are of no rank of tp=2, pp=2, ep=2", "mp_rank_02_001_001")
    shutil.rmtree(tmp_path / "release" / "mp_rank_02_001_001")
    shutil.rmtree(tmp_path / "release" / "mp_rank_01_001_000")
    (tmp_path / "release" / "mp_rank_00_000_001" / f"model_optim_rng.{form.replace('torch', 'pt')}").unlink()
    refused(tmp_path, "2 of 8 files are missing for tp=2, pp=2, ep=2", "mp_rank_01_001_000/", "mp_rank_00_000_001/")


@pytest.mark.parametrize("form", BEGIN)
def test_a_cut_file_is_told(tmp_path: Path, form: str) -> None:
    write(tmp_path, TINY, Layout(tp=2), form)
    (file,) = tmp_path.glob("release/mp_rank_01/*")
    file.write_bytes(file.read_bytes()[:-100])
    refused(tmp_path, str(file), "truncated", "fetch it again")


def test_every_tensor_is_missed_or_known(tmp_path: Path) -> None:
    cfg, layout = case("llama_tp_pp_local")
    write(tmp_path, cfg, layout)
    file = tmp_path / "release" / "mp_rank_01_001" / "model_optim_rng.pt"

    def change(content: dict[str, Any]) -> None:
        state = content["model"]
        fc2 = "decoder.layers.0.mlp.linear_fc2."
        state[fc2 + "wieght"] = state.pop(fc2 + "weight")
        state["output_layer.weight"] = state["output_layer.weight"].t()
        state["decoder.layers.0.input_layernorm.weight"] = torch.ones(65)

    rewrite(file, change)
    told = refused(
        tmp_path,
        "1 tensors are missing:\n  mp_rank_01_001: decoder.layers.0.mlp.linear_fc2.weight",
        "2 tensors have another shape:",
        "mp_rank_01_001: output_layer.weight: [64, 256] in the file, [256, 64] by the args",
        "mp_rank_01_001: decoder.layers.0.input_layernorm.weight: [65] in the file, [64] by the args",
        "1 tensors have no place in the model:\n  mp_rank_01_001: decoder.layers.0.mlp.linear_fc2.wieght",
    )
    assert told.count("mp_rank_01_001") == 4 and "mp_rank_00" not in told


def test_missing_tensors_of_safetensors_are_told(tmp_path: Path) -> None:
    cfg, layout = case("qwen3_moe_vpp")
    write(tmp_path, cfg, layout, "safetensors")
    file = tmp_path / "release" / "mp_rank_00_001_003" / "model_optim_rng.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    for expert in range(4):
        del tensors[f"model0/decoder.layers.0.mlp.experts.linear_fc1.weight{expert}"]
        del tensors[f"model1/decoder.layers.0.mlp.experts.linear_fc1.weight{expert}"]
    save_file(tensors, file, metadata=metadata)
    refused(tmp_path, "8 tensors are missing", "mp_rank_00_001_003: model0 decoder.layers.0", "... and 3 more")


def test_rotary_frequencies_are_left_out_with_a_word(tmp_path: Path) -> None:
    hf = save(
        tmp_path, TINY, Layout(), lambda _, content: content["model"].update({"rotary_pos_emb.inv_freq": torch.ones(8)})
    )
    with pytest.warns(UserWarning, match=r"(?s)1 tensors are left out:.*rotary_pos_emb\.inv_freq"):
        assert holds(open_megatron(tmp_path), hf)


def test_old_orders_of_rows_are_refused(tmp_path: Path) -> None:
    for version in (0, 2.0):
        save(
            tmp_path / str(version), TINY, Layout(), lambda _, content, v=version: content.update(checkpoint_version=v)
        )
        refused(tmp_path / str(version), "before 3.0 Megatron ordered the rows", "2.0" if version else "missing")
    save(tmp_path / "none", TINY, Layout(), lambda _, content: content.pop("checkpoint_version"))
    refused(tmp_path / "none", "checkpoint_version is missing")


def test_files_of_different_checkpoints_are_told(tmp_path: Path) -> None:
    def one_later(rank: Rank, content: dict[str, Any]) -> None:
        content["iteration"] += rank[0]

    save(tmp_path / "a", TINY, Layout(tp=2), one_later)
    refused(tmp_path / "a", "are not of one checkpoint", "mp_rank_00", "mp_rank_01")

    def other_dtype(rank: Rank, content: dict[str, Any]) -> None:
        if rank[0]:
            content["model"] = {name: tensor.float() for name, tensor in content["model"].items()}

    save(tmp_path / "b", TINY, Layout(tp=2), other_dtype)
    refused(tmp_path / "b", "torch.bfloat16 in", "torch.float32 in")


def test_chunks_must_be_those_of_the_args(tmp_path: Path) -> None:
    cfg, layout = case("qwen2_tied_vpp")
    save(tmp_path, cfg, layout, lambda _, content: content.update(model=content.pop("model0") | content.pop("model1")))
    refused(tmp_path, "holds 1 chunks of the model", "into 2")


def test_args_that_cannot_be_understood_name_the_file(tmp_path: Path) -> None:
    save(tmp_path, TINY, Layout(), normalization="LayerNorm")
    refused(tmp_path, "mp_rank_00/model_optim_rng.pt: ", "normalization='LayerNorm'")


def test_an_unsafe_file_is_refused(tmp_path: Path) -> None:
    save(tmp_path, TINY, Layout(), lambda _, content: content["args"].__setattr__("made", Layout()))
    refused(tmp_path, "convert.megatron.layout.Layout", "mp_rank_00")


def test_any_padding_is_accepted(tmp_path: Path) -> None:
    cfg = dataclasses.replace(TINY, vocab_size=500)
    hf = save(tmp_path / "a", cfg, Layout(tp=2, vocab_multiple=300), make_vocab_size_divisible_by=128)
    opened = open_megatron(tmp_path / "a")
    assert opened.cfg == cfg and opened.layout and opened.layout.padded_vocab(500) == 600 and holds(opened, hf)

    save(tmp_path / "b", cfg, Layout(tp=2), vocab_size=None)
    with pytest.warns(UserWarning, match=r"does not say how many of its 512 rows .*\. Put the model's config\.json"):
        opened = open_megatron(tmp_path / "b")
    assert opened.cfg.vocab_size == 512
    rows = opened.tensors.rows("lm_head.weight", 0, 512)
    assert torch.equal(rows[:500], hf["lm_head.weight"]) and not rows[500:].any()

    keep_config(tmp_path / "b", cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_megatron(tmp_path / "b")
    assert opened.cfg == cfg and holds(opened, hf)

    save(tmp_path / "c", cfg, Layout(tp=2, vocab_multiple=384), vocab_size=None, make_vocab_size_divisible_by=128)
    keep_config(tmp_path / "c", cfg)
    opened = open_megatron(tmp_path / "c")
    assert opened.cfg == cfg and opened.layout and opened.layout.padded_vocab(500) == 768 and holds(opened, hf)


def keep_config(root: Path, cfg: ModelConfig) -> None:
    (root / "huggingface").mkdir(exist_ok=True)
    (root / "huggingface" / "config.json").write_text(json.dumps(FAMILIES[cfg.family].to_hf_config(cfg)))


@pytest.mark.parametrize("name", ["qwen2_tied_pp", "mixtral", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_the_kept_config_is_the_truth_and_must_agree(tmp_path: Path, name: str) -> None:
    cfg, layout = case(name)
    hf = save(tmp_path, cfg, layout, lambda _, content: content["args"].__dict__.pop(OWN, None))
    keep_config(tmp_path, cfg)
    opened = open_megatron(tmp_path)
    kept = FAMILIES[cfg.family].from_hf_config(FAMILIES[cfg.family].to_hf_config(cfg))
    assert opened.cfg == kept and holds(opened, hf)
    assert opened.files == tmp_path / "huggingface"
    assert open_megatron(tmp_path / "iter_0000007").files == tmp_path / "huggingface"
    keep_config(tmp_path, dataclasses.replace(cfg, norm_eps=1e-3, rope=dataclasses.replace(cfg.rope, theta=5e5)))
    refused(tmp_path, "norm_eps: ", "rope.theta: 10000.0 in args, 500000.0 in config.json", "leave")
    keep_config(tmp_path, dataclasses.replace(cfg, vocab_size=cfg.vocab_size - 1))
    refused(tmp_path, f"vocab_size: {cfg.vocab_size} in args, {cfg.vocab_size - 1} in config.json")


def test_what_megatron_cannot_say_is_still_compared(tmp_path: Path) -> None:
    """Our own args say everything, so a config that differs in anything is of another model."""
    cfg = load_model("tiny_llama", ["rope.scaling=dynamic", "rope.factor=2"])
    save(tmp_path, cfg, Layout())
    keep_config(tmp_path, cfg)
    assert open_megatron(tmp_path).cfg.rope.scaling == "dynamic"
    keep_config(tmp_path, dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, factor=4.0)))
    refused(tmp_path, "rope.factor: 2.0 in args, 4.0 in config.json")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_vpp"])
def test_stacked_experts_of_former_times_are_read(tmp_path: Path, name: str) -> None:
    """GroupedMLP: one flat memory of transposed experts, with a shape that joins them the other way."""
    cfg, layout = case(name)
    assert cfg.moe
    each = cfg.moe.num_experts // layout.ep

    def stack(rank: Rank, content: dict[str, Any]) -> None:
        for state in [value for key, value in content.items() if key.startswith("model")]:
            for layer in range(2):
                prefix = f"decoder.layers.{layer}.mlp.experts."
                if f"{prefix}linear_fc1.weight0" in state:
                    fc1, fc2 = (
                        torch.stack([state.pop(f"{prefix}linear_fc{n}.weight{i}").t() for i in range(each)])
                        for n in (1, 2)
                    )
                    state[prefix + "weight1"] = fc1.contiguous().view(cfg.hidden_size, -1)
                    state[prefix + "weight2"] = fc2.contiguous().view(-1, cfg.hidden_size)

    hf = save(tmp_path, cfg, layout, stack)
    opened = open_megatron(tmp_path)
    assert holds(opened, hf)
    pieces: Any = opened.tensors
    expert = next(name for name in hf if ".experts." in name)
    assert all(isinstance(tensor, Strided) for _, tensor in pieces.of(expert))


@pytest.mark.parametrize(("name", "ranks", "key", "hf"), [
    ("llama_tp_pp_local", ("mp_rank_00_001", "mp_rank_01_001"), "decoder.final_layernorm.weight", "model.norm.weight"),
    ("mixtral", ("mp_rank_01_000_000", "mp_rank_01_000_001"), "decoder.layers.0.self_attention.linear_proj.weight",
     "model.layers.0.self_attn.o_proj.weight"),
    ("qwen2_tied_pp", ("mp_rank_01_000", "mp_rank_01_001"), "output_layer.weight", "model.embed_tokens.weight"),
])  # fmt: skip
def test_copies_that_differ_are_told(tmp_path: Path, name: str, ranks: tuple[str, str], key: str, hf: str) -> None:
    cfg, layout = case(name)
    write(tmp_path, cfg, layout)
    first, second = (str(tmp_path / "release" / rank / "model_optim_rng.pt") for rank in ranks)

    def one_bit(content: dict[str, Any]) -> None:
        content["model"][key].view(-1).view(torch.uint8)[-1 if "output" not in key else 5] ^= 1

    rewrite(Path(second), one_bit)
    opened = open_megatron(tmp_path)
    with pytest.raises(ValueError) as told:
        check_copies(opened)
    assert "1 copies of weights differ" in str(told.value)
    assert f" of {hf}: {first} and {second}" in str(told.value)


def test_copies_are_compared_to_their_last_row_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert.megatron.copies.BLOCK_BYTES", 300)
    cfg, layout = case("qwen2_tied_vpp")
    write(tmp_path, cfg, layout, "safetensors")
    opened = open_megatron(tmp_path)
    read: list[int] = []
    check_copies(opened, read.append)
    assert sum(read) == 2 * cfg.vocab_size * cfg.hidden_size * 2 and max(read) == 2 * cfg.hidden_size * 2
    pieces: Any = opened.tensors
    (_, _), (box, copy) = pieces.of("model.embed_tokens.weight")
    copy.put(box.at + cfg.vocab_size - 1, torch.full((1, cfg.hidden_size), torch.nan))
    with pytest.raises(ValueError, match=r"rows 0 to 512 of model\.embed_tokens\.weight"):
        check_copies(opened)
    (box, first), _ = pieces.of("model.embed_tokens.weight")
    first.put(box.at + cfg.vocab_size - 1, torch.full((1, cfg.hidden_size), torch.nan))
    check_copies(opened)  # equal bytes, though no number equals itself


def test_no_namespace_is_needed(tmp_path: Path) -> None:
    """Some programs keep args as a plain dictionary."""
    hf = save(tmp_path, TINY, Layout(), lambda _, content: content.update(args=vars(content["args"])))
    assert not isinstance(vars(Namespace()), Namespace) and holds(open_megatron(tmp_path), hf)
