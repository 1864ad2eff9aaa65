"""Other families as LLaMAs: the same logits in transformers, or a reason why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from convert import rewriting
from convert.boxes import put
from convert.cli import told
from convert.from_llama import main as from_llama
from convert.reshaped import Reshaped
from convert.to_llama import main as to_llama

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
}
YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 2.0, "original_max_position_embeddings": 32}
TOKENS = torch.arange(40).reshape(2, 20) * 7 % 97


def random(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight random, norms and biases too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            scale, mean = (0.3, 1.0) if "norm" in name else (0.2, 0.0)
            param.copy_(torch.randn(param.shape, generator=generator) * scale + mean)
    return model.eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def converted(folder: Path, *more: str) -> tuple[Path, PreTrainedModel]:
    out = folder.parent / "out"
    to_llama(["--hf", str(folder), "--out", str(out), *more])
    return out, AutoModelForCausalLM.from_pretrained(out)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    """What is said when the conversion is refused; nothing may have appeared."""
    out = folder.parent / "refused"
    capsys.readouterr()
    assert told(to_llama, ["--hf", str(folder), "--out", str(out), *more]) == 2
    assert not out.exists() and not list(folder.parent.glob(".refused*"))
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 1e6}, YARN])
def test_qwen2_keeps_its_biases(tmp_path: Path, tied: bool, rope: dict[str, Any]) -> None:
    before = random(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied, rope_parameters=rope)))
    out, after = converted(save(before, tmp_path / "qwen2"), "--verify")
    assert isinstance(after, LlamaForCausalLM) and after.config.attention_bias and not after.config.mlp_bias
    assert close(logits(after), logits(before))
    stored, theirs = load_file(out / "model.safetensors"), load_file(tmp_path / "qwen2" / "model.safetensors")
    assert all(torch.equal(stored[name], theirs[name]) for name in theirs)
    added = {name for name in stored if name not in theirs}
    assert added == {f"model.layers.{i}.self_attn.o_proj.bias" for i in range(3)}
    assert not any(stored[name].any() for name in added)
    config = AutoConfig.from_pretrained(out)
    for key, value in SIZES.items():
        assert getattr(config, key) == value
    assert config.rope_parameters == after.config.rope_parameters
    assert config.rope_parameters["rope_theta"] == rope["rope_theta"]


def test_a_classifier_stays_one(tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | {"num_labels": 3}
    before = random(Qwen2ForSequenceClassification(Qwen2Config(**sizes)))
    save(before, tmp_path / "qwen2")
    to_llama(["--hf", str(tmp_path / "qwen2"), "--out", str(tmp_path / "out")])
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert close(logits(after), logits(before)) and logits(after).shape == (2, 3)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("head_dim", [None, 12])
def test_mistral_is_a_llama_bit_by_bit(tmp_path: Path, window: int | None, head_dim: int | None) -> None:
    before = random(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, head_dim=head_dim)))
    _, after = converted(save(before, tmp_path / "mistral"))
    assert isinstance(after, LlamaForCausalLM) and after.config.head_dim == (head_dim or 8)
    if window is None:
        assert torch.equal(logits(after), logits(before))
    assert close(logits(after), logits(before))


def test_dtype_and_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = random(Qwen2ForCausalLM(Qwen2Config(**SIZES)))
    folder = save(before, tmp_path / "qwen2")
    content = json.loads((folder / "config.json").read_text()) | {"colour": "red", "use_mrope": False}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "LICENSE").write_text("terms")
    out, _ = converted(folder, "--dtype", "bf16", "--verify")
    said = capsys.readouterr().out
    assert (
        "left out of config.json: colour, use_mrope" in said
        and "checksums (SHA-256): 42 of 42 tensors equal" in said
        and "logits of source and result, 64 tokens" in said
    )
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    stored, theirs = load_file(out / "model.safetensors"), before.state_dict()
    assert all(tensor.dtype is torch.bfloat16 for tensor in stored.values())
    assert all(torch.equal(stored[name], theirs[name].to(torch.bfloat16)) for name in stored if name in theirs)
    assert (out / "LICENSE").read_text() == "terms" and (out / "generation_config.json").is_file()


@pytest.mark.parametrize("kind", ["qwen2", "mistral"])
def test_a_window_that_matters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    if kind == "qwen2":
        window = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
        folder = save(Qwen2ForCausalLM(window), tmp_path / kind)
    else:
        folder = save(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)), tmp_path / kind)
    said = refused(capsys, folder)
    assert "last 16 tokens only (sliding_window)" in said and "(it is 64)" in said


def test_a_window_without_effect_is_no_obstacle(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=3)
    before = random(Qwen2ForCausalLM(config))
    _, after = converted(save(before, tmp_path / "qwen2"))
    assert close(logits(after), logits(before))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3"}, "normalises queries and keys"),
        ({"model_type": "mixtral"}, "mixture of experts"),
        ({"model_type": "qwen2_moe"}, "mixture of experts"),
        ({"model_type": "deepseek_v3"}, "latent attention"),
        ({"model_type": "llama"}, "is a LLaMA already"),
        ({"model_type": "falcon"}, "known are baichuan, mistral, qwen2, yi"),
        ({"model_type": None}, "model_type None"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised (gptq)"),
        ({"hidden_size": "48"}, "hidden_size='48'"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"num_attention_heads": 7}, "multiple of the heads"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str) -> None:
    folder = save(Qwen2ForCausalLM(Qwen2Config(**SIZES)), tmp_path / "qwen2")
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(content))
    assert words in refused(capsys, folder)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(Qwen2ForCausalLM(Qwen2Config(**SIZES)), tmp_path / "qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(5)
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    said = refused(capsys, folder)
    assert "1 tensors are missing:\n  model.layers.1.self_attn.q_proj.bias" in said
    assert "model.norm.weight: [5] in the file, [48] by config.json" in said
    assert "1 tensors have no place in this model:\n  model.layers.0.extra.weight" in said


def test_the_target_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(Qwen2ForCausalLM(Qwen2Config(**SIZES)), tmp_path / "qwen2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert told(to_llama, ["--hf", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_missing_and_broken_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no config.json" in refused(capsys, tmp_path / "nowhere")
    folder = save(Qwen2ForCausalLM(Qwen2Config(**SIZES)), tmp_path / "qwen2")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    assert "truncated" in refused(capsys, folder)
    (folder / "config.json").write_text("{")
    assert "not JSON" in refused(capsys, folder)


def test_verify_sees_one_wrong_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None))), tmp_path / "mistral")
    copy = rewriting.copy

    def spoiling(source: Any, sink: Any, *rest: Any) -> None:
        copy(source, sink, *rest)
        name = "model.layers.2.mlp.up_proj.weight"
        row = sink.rows(name, 7, 8)
        row[0, 3] = torch.nextafter(row[0, 3], torch.tensor(1e9))
        put(sink, name, 7, row)

    monkeypatch.setattr(rewriting, "copy", spoiling)
    assert "1 of 30 tensors are not what the source has: model.layers.2.mlp.up_proj.weight" in refused(
        capsys, folder, "--verify"
    )


def test_a_stopped_conversion_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = random(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)))
    folder, out = save(before, tmp_path / "mistral"), tmp_path / "out"
    copy, read = rewriting.copy, Reshaped.rows
    asked: list[str] = []

    def stopping(source: Any, sink: Any, workers: int, done: Any, finished: Any, moved: Any) -> None:
        def stop(name: str) -> None:
            finished(name)
            if name == "model.layers.1.mlp.up_proj.weight":
                raise KeyboardInterrupt

        copy(source, sink, 1, done, stop, moved)

    def counting(self: Reshaped, hf: str, *rest: Any) -> torch.Tensor:
        asked.append(hf)
        return read(self, hf, *rest)

    command = ["--hf", str(folder), "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(rewriting, "copy", stopping)
        assert told(to_llama, command) == 130
    assert not out.exists() and "goes on where it stopped" in capsys.readouterr().err
    assert told(to_llama, [*command, "--dtype", "bf16"]) == 2
    assert "--dtype was None, now it is bf16" in capsys.readouterr().err
    monkeypatch.setattr(Reshaped, "rows", counting)
    assert told(to_llama, command) == 0
    assert "model.embed_tokens.weight" not in asked and "model.layers.2.mlp.up_proj.weight" in asked
    stored = load_file(out / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.state_dict().items())
    assert not list(tmp_path.glob(".out*"))


def test_there_and_back_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = save(random(Qwen2ForCausalLM(Qwen2Config(**SIZES, rope_parameters=YARN))), tmp_path / "qwen2")
    converted(folder)
    from_llama(["--hf", str(tmp_path / "out"), "--out", str(tmp_path / "back"), "--to", "qwen2"])
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("qwen2", "back"))
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    there, back = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("qwen2", "back"))
    differing = {key for key, value in there.items() if back.get(key) != value}
    assert differing == {"_name_or_path", "max_window_layers"}  # of a window that is not used


# Baichuan and Yi: their own code is not in transformers, so the reference is written here from its facts.


def foreign_weights(packed: bool, vocab: int = 97) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    weights = {"model.embed_tokens.weight": draw(vocab, 48), "model.norm.weight": 1 + draw(48)}
    weights["lm_head.weight"] = draw(vocab, 48) * (1 + torch.arange(vocab)[:, None] / 30)
    for i in range(2):
        layer = f"model.layers.{i}."
        if packed:
            weights[f"{layer}self_attn.W_pack.weight"] = draw(144, 48)
        else:
            weights |= {f"{layer}self_attn.{x}_proj.weight": draw(48 if x == "q" else 16, 48) for x in "qkv"}
        weights |= {
            f"{layer}self_attn.o_proj.weight": draw(48, 48),
            f"{layer}mlp.gate_proj.weight": draw(80, 48),
            f"{layer}mlp.up_proj.weight": draw(80, 48),
            f"{layer}mlp.down_proj.weight": draw(48, 80),
            f"{layer}{'input_layernorm' if packed else 'ln1'}.weight": 1 + draw(48),
            f"{layer}{'post_attention_layernorm' if packed else 'ln2'}.weight": 1 + draw(48),
        }
    return weights


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def turn(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding on the two halves of a head: [batch, heads, time, head]."""
    time, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(time).float()[:, None] * theta ** (-torch.arange(half).float() / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1)


def reference(w: dict[str, torch.Tensor], tokens: torch.Tensor, theta: float, norm_head: bool) -> torch.Tensor:
    """The forward of Baichuan 7B (where W_pack is there) and of Yi."""
    x = w["model.embed_tokens.weight"][tokens]
    batch, time = tokens.shape
    for i in range(2):
        layer = f"model.layers.{i}."
        packed = f"{layer}self_attn.W_pack.weight" in w
        first, second = ("input_layernorm", "post_attention_layernorm") if packed else ("ln1", "ln2")
        h = norm(x, w[f"{layer}{first}.weight"])
        if packed:
            q, k, v = (h @ w[f"{layer}self_attn.W_pack.weight"].T).unflatten(-1, (3, 48)).unbind(-2)
        else:
            q, k, v = (h @ w[f"{layer}self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = (y.view(batch, time, -1, 8).transpose(1, 2) for y in (q, k, v))
        q, k = turn(q, theta), turn(k, theta)
        k, v = (y.repeat_interleave(6 // y.shape[1], 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, 48)
        x = x + y @ w[f"{layer}self_attn.o_proj.weight"].T
        h = norm(x, w[f"{layer}{second}.weight"])
        gate, up = (h @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"{layer}mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    return norm(x, w["model.norm.weight"]) @ (F.normalize(head) if norm_head else head).T


BAICHUAN: dict[str, Any] = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM"},
    "model_type": "baichuan",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "z_loss_weight": 0,
    "model_max_length": 64,
}


def foreign(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor], torch_files: int = 0) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if not torch_files:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(weights)
    placed = {name: f"pytorch_model-{i % torch_files}.bin" for i, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({name: weights[name] for name in names if placed[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder


@pytest.mark.parametrize("torch_files", [0, 3])
@pytest.mark.parametrize("second", [False, True])
def test_baichuan(tmp_path: Path, second: bool, torch_files: int) -> None:
    weights = foreign_weights(packed=True)
    config = BAICHUAN if second else {k: v for k, v in BAICHUAN.items() if k != "z_loss_weight"}
    if not second:
        config |= {"architectures": ["BaiChuanForCausalLM"]}
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = foreign(tmp_path / "baichuan", config, weights, torch_files)
    out, after = converted(folder, "--verify")
    wanted = reference(weights, TOKENS, 10000.0, norm_head=second)
    assert close(logits(after), wanted)
    assert not close(logits(after), reference(weights, TOKENS, 10000.0, norm_head=not second))
    stored = load_file(out / "model.safetensors")
    pack = weights["model.layers.1.self_attn.W_pack.weight"]
    assert torch.equal(stored["model.layers.1.self_attn.k_proj.weight"], pack[48:96])


def test_a_bf16_head_is_normalised_in_fp32(tmp_path: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in foreign_weights(packed=True).items()}
    out, _ = converted(foreign(tmp_path / "baichuan", BAICHUAN, weights))
    head = load_file(out / "model.safetensors")["lm_head.weight"]
    exact = weights["lm_head.weight"].double()
    exact = exact / exact.norm(dim=1, keepdim=True)
    assert head.dtype is torch.bfloat16 and (head.double() / exact - 1).abs().max() <= 2.0**-8


@pytest.mark.parametrize(
    ("change", "code", "more", "words"),
    [
        ({"max_position_embeddings": None}, "", [], "tell positions by ALiBi"),
        ({}, "def _gen_alibi_mask(): ...", [], "tell positions by ALiBi"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "", [], "Baichuan's own code does not read"),
        ({"num_key_value_heads": 2}, "", [], "no Baichuan model has them"),
        ({"z_loss_weight": None}, "", [], "Add --norm-head yes for Baichuan2"),
    ],
)
def test_baichuan_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], code: str, more: list[str], words: str
) -> None:
    config = {key: value for key, value in (BAICHUAN | change).items() if value is not None}
    folder = foreign(tmp_path / "baichuan", config, foreign_weights(packed=True))
    (folder / "modeling_baichuan.py").write_text(code)
    assert words in refused(capsys, folder, *more)


@pytest.mark.parametrize(("code", "more"), [("class NormHead(nn.Module): ...", []), ("", ["--norm-head", "yes"])])
def test_baichuan2_known_by_its_code_or_told(tmp_path: Path, code: str, more: list[str]) -> None:
    weights = foreign_weights(packed=True)
    folder = foreign(tmp_path / "b", {k: v for k, v in BAICHUAN.items() if k != "z_loss_weight"}, weights)
    # Would fail if it were ever run.
    (folder / "modeling_baichuan.py").write_text(f"class RotaryEmbedding: ...\nraise SystemExit(9)\n{code}")
    _, after = converted(folder, *more)
    assert close(logits(after), reference(weights, TOKENS, 10000.0, norm_head=True))


def test_yi(tmp_path: Path) -> None:
    weights = foreign_weights(packed=False)
    config = {key: value for key, value in BAICHUAN.items() if key not in ("z_loss_weight", "model_max_length")}
    config |= {"model_type": "Yi", "architectures": ["YiForCausalLM"], "num_key_value_heads": 2, "rope_theta": 5e6}
    _, after = converted(foreign(tmp_path / "yi", config, weights))
    assert close(logits(after), reference(weights, TOKENS, 5e6, norm_head=False))


def test_a_torch_file_with_code_inside_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "b", BAICHUAN, foreign_weights(packed=True), torch_files=1)
    file = folder / "pytorch_model-0.bin"
    torch.save({"model.norm.weight": shutil.disk_usage}, file)
    assert "could run code when read" in refused(capsys, folder)
    file.write_bytes(b"PK")
    assert "cannot be read" in refused(capsys, folder)
    file.unlink()
    assert "lacks 1 of 1 weight files: pytorch_model-0.bin" in refused(capsys, folder)


def sentencepiece(dummy_prefix: bool) -> bytes:
    """A model file without pieces: field 3 (normalizer_spec) with its field 3 (add_dummy_prefix)."""
    return bytes([0x1A, 2, 0x18, int(dummy_prefix)])


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_a_tokenizer_of_its_own_code_becomes_llamas(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dummy_prefix: bool
) -> None:
    folder = foreign(tmp_path / "b", BAICHUAN, foreign_weights(packed=True))
    settings = {
        "tokenizer_class": "BaichuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "add_bos_token": False,
        "bos_token": "<s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no tokenizer.model" in refused(capsys, folder)
    (folder / "tokenizer.model").write_bytes(b"\xff\xff")
    assert "not a sentencepiece model" in refused(capsys, folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece(dummy_prefix))
    out, _ = converted(folder)
    said = capsys.readouterr().out
    assert "was a BaichuanTokenizer (code of its own) and is a LlamaTokenizer now" in said
    assert ("begins with spaces loses one" in said) is dummy_prefix
    assert (out / "tokenizer.model").read_bytes() == sentencepiece(dummy_prefix)
    assert json.loads((out / "tokenizer_config.json").read_text()) == {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<s>",
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_prefix_space": dummy_prefix,
    }


def test_a_tokenizer_of_unknown_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "b", BAICHUAN, foreign_weights(packed=True))
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "own code (Mine), which is never run" in refused(capsys, folder)


def test_llama_sizes_are_those_of_transformers(tmp_path: Path) -> None:
    """The names and shapes written are the ones a LLaMA of transformers has."""
    folder = save(Qwen2ForCausalLM(Qwen2Config(**SIZES)), tmp_path / "qwen2")
    out, _ = converted(folder)
    ours = {name: tuple(tensor.shape) for name, tensor in load_file(out / "model.safetensors").items()}
    theirs = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).state_dict()
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
