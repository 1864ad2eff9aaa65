"""Beam search against `transformers.generate`, token for token, weights crossing a saved folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.tokenizer import load_tokenizer
from models import Runtime, config_from_hf_folder
from models.generation import BeamConfig, Generator, GeneratorConfig
from tests.convert_cases import SMOLLM2
from tests.numerics.test_generation import prompts_of
from tests.numerics.test_hf_parity import OPTIONS, load_ours, save_theirs

MODELS = ["tiny_llama", "qwen2_all_sliding", "tiny_mixtral", "tiny_deepseek_v3"]
"""Grouped heads, a window, routed experts, latents."""
SETTINGS = [
    BeamConfig(2, 14, samples=2),
    BeamConfig(2, 14, early_stopping="exact", samples=2),
    BeamConfig(3, 14, length_penalty=-0.7, early_stopping="exact", samples=2),
    BeamConfig(4, 14, length_penalty=2.0, early_stopping="full", samples=3),
]
STOPS = tuple(range(3, 512, 8))
"""So many that texts end at all lengths."""
THEIR_EARLY_STOPPING = {"full": True, "heuristic": False, "exact": "never"}


def theirs_of(theirs: Any, prompt: list[int], cfg: BeamConfig, stops: Sequence[int]) -> list[tuple[list[int], float]]:
    """The texts of one prompt alone in transformers, with their scores."""
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = list(stops), 0
    ids = torch.tensor([prompt])
    with torch.no_grad():
        found = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=cfg.max_new_tokens,
            do_sample=False,
            num_beams=cfg.num_beams,
            num_return_sequences=cfg.samples,
            length_penalty=cfg.length_penalty,
            early_stopping=THEIR_EARLY_STOPPING[cfg.early_stopping],
            return_dict_in_generate=True,
            output_scores=True,
        )
    texts = []
    for row, beams in zip(found.sequences[:, len(prompt) :].tolist(), found.beam_indices.tolist(), strict=True):
        texts.append(row[: sum(beam >= 0 for beam in beams)])
    return list(zip(texts, found.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("option", MODELS)
def test_beams_equal_transformers(tmp_path: Path, option: str) -> None:
    """Prompts shorter and longer than the window, side by side, in three ways to end."""
    cfg = OPTIONS[option]
    theirs = save_theirs(cfg, tmp_path)
    ours = Generator(load_ours(tmp_path, cfg, Runtime()), config=GeneratorConfig(max_rows=10), stop_tokens=STOPS)
    prompts = prompts_of(cfg)[:2]
    lengths = set()
    for settings in SETTINGS:
        found = ours.generate(prompts, settings)
        for index, prompt in enumerate(prompts):
            made = [each for each in found if each.prompt == index]
            want = theirs_of(theirs, prompt, settings, STOPS)
            assert [list(each.tokens) for each in made] == [tokens for tokens, _ in want]
            assert [each.score for each in made] == pytest.approx([score for _, score in want], abs=1e-4)
            for each in made:
                assert each.finish == ("stop" if each.tokens[-1] in STOPS else "length")
                lengths.add(len(each.tokens))
    assert len(lengths) > 3


def test_beams_equal_transformers_on_smollm2() -> None:
    """A real model and its tokenizer, texts in and out."""
    theirs = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(SMOLLM2))
    ours = Generator(load_ours(SMOLLM2, config_from_hf_folder(SMOLLM2), Runtime()), tokenizer)
    asked = [
        "The capital of France is",
        "def fib(n):",
        "Once upon a time there was a ship that sailed to the south and",
    ]
    settings = BeamConfig(4, 6, samples=2)
    found = ours.generate(asked, settings)
    for index, prompt in enumerate(asked):
        want = theirs_of(theirs, tokenizer.encode(prompt), settings, [tokenizer.eos_token_id])
        made = [each for each in found if each.prompt == index]
        assert [list(each.tokens) for each in made] == [tokens for tokens, _ in want]
        assert [each.text for each in made] == [
            tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in want
        ]
        assert [each.score for each in made] == pytest.approx([score for _, score in want], abs=1e-4)
    assert found[0].text is not None and "Paris" in found[0].text
