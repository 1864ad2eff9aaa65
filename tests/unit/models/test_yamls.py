"""Every conf/model YAML has the parameter count of the model it names, by transformers and by the published number."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Blip2ForImageTextRetrieval,
)

from models import family_of
from scripts.params import SIGHT, count_by_part, load_model, main, table

CONF = Path(__file__).resolve().parents[3] / "conf" / "model"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "hf")
PUBLISHED = {
    "llama7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "qwen3_32b": 32_762_123_264,
    "smollm2_135m": 134_515_008,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_moe_a2_7b": 14_315_784_192,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_404_352,
    "llava1_5_7b": 7_063_427_072,
    "llava_next_7b": 7_063_431_168,
    "qwen2_vl_2b": 2_208_985_600,
    "clip_vit_b_32": 151_277_313,
    "clip_vit_l_14": 427_616_513,
    "siglip_base_patch16_224": 203_155_970,
    "qwen2_5_vl_7b": 8_292_166_656,
}


@pytest.mark.parametrize("name", NAMES)
def test_count_equals_transformers(name: str) -> None:
    cfg = load_model(name, [])
    if cfg.family == "bert" and cfg.vision is not None:  # transformers knows it before one kind of tower only
        tower = replace(cfg.vision.tower, kind="blip2", activation="gelu")
        cfg = replace(cfg, vision=replace(cfg.vision, format="blip2_itm", tower=tower))
    counts = count_by_part(cfg)
    if cfg.vision is not None and cfg.vision.format == "loom":  # transformers knows its decoder only
        counts = {part: count for part, count in counts.items() if part not in SIGHT}
        cfg = replace(cfg, vision=None)
    keys = family_of(cfg).to_hf_config(cfg)
    del keys["architectures"]
    auto = AutoModelForImageTextToText if cfg.vision else AutoModelForCausalLM
    auto = AutoModel if cfg.compares else auto
    if cfg.family == "bert":  # its folders have neither a head over words nor a temperature
        counts["head"] -= cfg.hidden_size * (cfg.hidden_size + 3) + cfg.vocab_size + 1
    make: Any = Blip2ForImageTextRetrieval if cfg.family == "bert" else auto.from_config
    with torch.device("meta"):
        theirs = make(AutoConfig.for_model(keys.pop("model_type"), **keys))
    total = sum(counts.values())
    assert total == theirs.num_parameters()
    assert total == PUBLISHED.get(name, total)


def test_all_promised_models_are_there() -> None:
    assert set(PUBLISHED) | {"tiny_llama", "tiny_qwen2", "tiny_qwen3"} <= set(NAMES)


def test_table_of_llama7b(capsys: pytest.CaptureFixture[str]) -> None:
    main(["model=llama7b"])
    lines = capsys.readouterr().out.splitlines()
    parts = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in lines[2:]}
    # Embedding and head 32000 x 4096; 32 layers of 4 x 4096^2, 3 x 4096 x 11008, 2 x 4096; a last norm.
    assert parts == {
        "embedding": 131_072_000,
        "attention": 2_147_483_648,
        "mlp": 4_328_521_728,
        "norms": 266_240,
        "head": 131_072_000,
        "total": 6_738_415_616,
    }


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "python scripts/params.py model=llama7b" in capsys.readouterr().out


def test_tied_head_counts_once() -> None:
    cfg = load_model("smollm2_135m", [])
    assert count_by_part(cfg)["head"] == 0
    assert "tied to the embedding" in table(cfg, "smollm2")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["model=lama7b"], "did you mean llama7b"),
        (["model=llama7b", "model.layers=3"], "there is no such setting"),
        (["model=llama7b", "model.num_kv_heads=3"], "model.num_kv_heads=2"),
        (["llama7b"], "is not key=value"),
        ([], "say which model"),
        (["model=hf"], "init_from=HF_FOLDER"),
        (["model=llama7b", "engine.zero=3"], "only model=NAME"),
    ],
)
def test_slips_are_answered(argv: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("(", r"\(")):
        main(argv)
