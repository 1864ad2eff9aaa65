"""The exported folder: loaded by transformers with equal logits, byte-equal after a round trip, all or nothing."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from convert.from_hf import open_hf, whole_shapes
from convert.hf_files import INDEX, SINGLE, read_folder
from convert.source import Source
from convert.to_hf import export
from models import ModelConfig, build, config_from_hf_folder
from models.config import MLAConfig, MoEConfig
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE

SIZES = (40, 16, 24, 2, 4, 2, 4, 64)
CFG = ModelConfig("llama", *SIZES, init_std=0.2)


def weights(cfg: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    source = InitSource(cfg, 0)
    return ((name, source.tensor(name)) for name in whole_shapes(cfg))


def tokenizer_folder(folder: Path) -> Path:
    """A tokenizer of 40 words with a chat template and a generation config."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(38)} | {"<s>": 38, "</s>": 39}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 39, "temperature": 0.5}))
    return folder


@pytest.mark.parametrize("shard_bytes", [10**9, 2000])
def test_transformers_loads_it_with_equal_logits(tmp_path: Path, shard_bytes: int) -> None:
    """fp32, 1e-5."""
    folder = export(tmp_path / "hf", CFG, weights(CFG), shard_bytes=shard_bytes)
    assert (folder / INDEX).is_file() == (shard_bytes == 2000)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    theirs, info = loaded
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = build(CFG)
    materialise(ours, Source(open_hf(folder), CFG), WHOLE, torch.device("cpu"))
    tokens = torch.randint(0, 40, (20,))
    with torch.no_grad():
        expected, got = theirs(tokens[None]).logits[0], ours(tokens, torch.arange(20), [0, 20], output="head")
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_round_trip_is_byte_equal(tmp_path: Path) -> None:
    for shard_bytes, dtype in ((10**9, torch.float32), (1500, torch.bfloat16)):
        first = export(tmp_path / f"a{shard_bytes}", CFG, weights(CFG), dtype=dtype, shard_bytes=shard_bytes)
        again = Source(open_hf(first), config_from_hf_folder(first)).weights()
        second = export(tmp_path / f"b{shard_bytes}", CFG, again, dtype=dtype, shard_bytes=shard_bytes)
        names = sorted(path.name for path in first.iterdir())
        assert names == sorted(path.name for path in second.iterdir())
        assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_a_correction_bias_stays_fp32(tmp_path: Path) -> None:
    """bf16 would round a bias of 1.001 to 1; transformers reads the folder, and its file of experts one by one."""
    moe = MoEConfig(4, 2, 8, shared_size=8, score="sigmoid", group_score="top2_sum", correction_bias=True)
    cfg = dataclasses.replace(
        CFG, family="deepseek_v3", num_kv_heads=4, head_dim=6, mla=MLAConfig(8, 4, 2, 4, 8), moe=moe
    )
    tensors = dict(weights(cfg))
    tensors["layers.1.mlp.router.bias"] = torch.tensor([1.001, -0.3, 0.0, 2.003])
    folder = export(tmp_path / "hf", cfg, tensors.items(), dtype=torch.bfloat16, shard_bytes=1500)
    read = dict(Source(open_hf(folder), cfg).weights())
    assert torch.equal(read["layers.1.mlp.router.bias"], tensors["layers.1.mlp.router.bias"])
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    bias = theirs.model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, tensors["layers.1.mlp.router.bias"])
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert sum(sizes) > json.loads((folder / INDEX).read_text())["metadata"]["total_size"]


def test_what_transformers_saved_comes_back_byte_for_byte(tmp_path: Path) -> None:
    export(tmp_path / "first", CFG, weights(CFG))
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "theirs")
    export(tmp_path / "ours", CFG, Source(open_hf(tmp_path / "theirs"), CFG).weights())
    theirs, ours = read_folder(tmp_path / "theirs"), read_folder(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert theirs[name].read().numpy().tobytes() == ours[name].read().numpy().tobytes(), name


def test_tokenizer_and_generation_config_travel(tmp_path: Path) -> None:
    source = tokenizer_folder(tmp_path / "tok")
    folder = export(tmp_path / "hf", CFG, weights(CFG), tokenizer_folder=source)
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(folder)
    assert after("w1 w2 w3")["input_ids"] == before("w1 w2 w3")["input_ids"] == [1, 2, 3]
    assert after.chat_template == before.chat_template
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.eos_token_id == 39 and model.config.bos_token_id == 38
    assert model.generation_config.temperature == 0.5
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] >= 4


def test_scalar_head_becomes_a_classifier(tmp_path: Path) -> None:
    cfg = ModelConfig("llama", *SIZES, head="scalar", init_std=0.2)
    folder = export(tmp_path / "hf", cfg, weights(cfg))
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    theirs.config.pad_token_id = 0
    ours = build(cfg)
    materialise(ours, Source(open_hf(folder), cfg), WHOLE, torch.device("cpu"))
    tokens = torch.randint(1, 40, (9,))
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0, 0]
        got = ours(tokens, torch.arange(9), [0, 9], output="head")[-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield next(weights(CFG))
        raise RuntimeError("lost a rank")

    with pytest.raises(RuntimeError, match="lost a rank"):
        export(tmp_path / "hf", CFG, broken())
    assert not list(tmp_path.iterdir())


def test_a_used_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    folder = export(tmp_path / "hf", CFG, weights(CFG))
    stamp = (folder / SINGLE).stat().st_ino
    with pytest.raises(ValueError, match="already holds something"):
        export(folder, CFG, weights(CFG))
    assert (folder / SINGLE).stat().st_ino == stamp
    export(folder, CFG, weights(CFG), overwrite=True)
    assert (folder / SINGLE).stat().st_ino != stamp and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not an earlier export"):
        export(tmp_path / "thesis", CFG, weights(CFG), overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        export(tmp_path / "file", CFG, weights(CFG), overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "years of work"


def test_a_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no tokenizer"):
        export(tmp_path / "hf", CFG, weights(CFG), tokenizer_folder=tmp_path / "empty")
    assert not (tmp_path / "hf").exists()
