"""LLaMAs as Qwen2 and Mistral: the same logits in transformers, or a reason why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM

from convert.cli import told
from convert.from_llama import main as from_llama

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 97
CLASSES = {"qwen2": Qwen2ForCausalLM, "mistral": MistralForCausalLM}


def llama(folder: Path, **changes: Any) -> tuple[Path, LlamaForCausalLM]:
    """A LLaMA with random weights, but for biases of o_proj and the feed-forward layer, which are zero."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3 + ("norm" in name))
            if name.endswith("bias") and ("o_proj" in name or "mlp" in name):
                param.zero_()
    model.save_pretrained(folder)
    return folder, model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def refused(capsys: pytest.CaptureFixture[str], folder: Path, to: str) -> str:
    capsys.readouterr()
    assert told(from_llama, ["--hf", str(folder), "--out", str(folder.parent / "out"), "--to", to]) == 2
    assert not (folder.parent / "out").exists() and not list(folder.parent.glob(".out*"))
    return capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("to", "changes"),
    [
        ("qwen2", {}),
        ("qwen2", {"attention_bias": True}),
        ("qwen2", {"mlp_bias": True, "rope_parameters": LLAMA3}),
        ("mistral", {"rope_parameters": LLAMA3}),
        ("mistral", {"head_dim": 16, "mlp_bias": True}),
    ],
)
def test_the_same_logits(tmp_path: Path, to: str, changes: dict[str, Any], tied: bool) -> None:
    folder, before = llama(tmp_path / "llama", **changes, tie_word_embeddings=tied)
    out = tmp_path / "out"
    assert told(from_llama, ["--hf", str(folder), "--out", str(out), "--to", to, "--verify"]) == 0
    after = AutoModelForCausalLM.from_pretrained(out)
    assert type(after) is CLASSES[to]
    wanted = logits(before)
    assert (logits(after) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    stored, theirs = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], theirs[name]) for name in stored if name in theirs)
    added = {name for name in stored if name not in theirs}
    zeros_wanted = to == "qwen2" and not changes.get("attention_bias")
    assert added == {
        f"model.layers.{i}.self_attn.{x}_proj.bias" for i in range(2) for x in "qkv" if zeros_wanted
    }  # fmt: skip
    assert not any(stored[name].any() for name in added)
    for key, value in SIZES.items():
        assert getattr(after.config, key) == value
    assert after.config.rope_parameters == before.config.rope_parameters
    assert after.config.sliding_window is None and after.config.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("to", "changes", "spoil", "words"),
    [
        ("qwen2", {"attention_bias": True}, "self_attn.o_proj.bias", "o_proj.bias is not zero, and qwen2 has no such"),
        ("qwen2", {"mlp_bias": True}, "mlp.down_proj.bias", "mlp.down_proj.bias is not zero"),
        ("mistral", {"attention_bias": True}, None, "q_proj.bias is not zero, and mistral has no such"),
        ("qwen2", {"head_dim": 16}, None, "its heads are 16 wide"),
    ],
)
def test_refusals(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    to: str,
    changes: dict[str, Any],
    spoil: str | None,
    words: str,
) -> None:
    folder, _ = llama(tmp_path / "llama", **changes)
    if spoil is not None:
        tensors = load_file(folder / "model.safetensors")
        tensors[f"model.layers.1.{spoil}"][-1] = 1e-30
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert words in refused(capsys, folder, to)


def test_another_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = llama(tmp_path / "llama")
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "qwen2"}
    (folder / "config.json").write_text(json.dumps(content))
    assert "of model_type 'qwen2', not a LLaMA; convert/to_llama.py makes one" in refused(capsys, folder, "qwen2")


def test_several_files_and_tokenizer_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = llama(tmp_path / "llama")
    before.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    from_llama(["--hf", str(folder), "--out", str(out), "--to", "mistral"])
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}" and (out / "tokenizer.json").is_file()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(before))
