"""A real model with drafts made of itself: greedy texts are those without a draft."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch

from data.tokenizer import load_tokenizer
from models import Decoder, Runtime, config_from_hf_folder
from models.generation import Generator, SamplingConfig
from tests import draft_cases
from tests.convert_cases import SMOLLM2
from tests.generation_cases import TINY
from tests.numerics.test_hf_parity import load_ours
from tests.pool import Pool

ASKED = [
    "The capital of France is",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
]


def first_layers(model: Decoder, count: int) -> Decoder:
    """The model without its last layers."""
    made = copy.deepcopy(model)
    for name in list(made.layers)[count:]:
        del made.layers[name]
    made.cfg = dataclasses.replace(model.cfg, num_layers=count)
    return made


def shaken(model: Decoder, by: float) -> Decoder:
    """The model with noise on its weights."""
    made, draw = copy.deepcopy(model), torch.Generator().manual_seed(6)
    with torch.no_grad():
        for param in made.parameters():
            param *= 1 + by * torch.randn(param.shape, generator=draw)
    return made


def test_greedy_texts_of_smollm2_are_those_without_a_draft() -> None:
    tokenizer = load_tokenizer(str(SMOLLM2))
    model = load_ours(SMOLLM2, config_from_hf_folder(SMOLLM2), Runtime())
    cfg = SamplingConfig(max_new_tokens=8)
    want = Generator(model, tokenizer).generate(ASKED, cfg)
    rates = []
    for draft in (first_layers(model, 10), shaken(model, 0.05)):
        own = Generator(model, tokenizer, draft=draft)
        made = own.generate(ASKED, cfg)
        assert [(each.tokens, each.text, each.finish) for each in made] == [
            (each.tokens, each.text, each.finish) for each in want
        ]
        rates.append(own.draft_stats.acceptance_rate)
    assert rates[0] < 0.3 < rates[1]


def test_texts_over_tensor_parallel_ranks_are_those_of_one_process(pool: Callable[[int], Pool]) -> None:
    """Greedy and drawn rows, guided ones and searches beside each other; what the draft was worth is the same too."""
    want, stats = draft_cases.texts(TINY, False, True)
    assert 0 < stats.accepted < stats.proposed
    for whole_draft in (True, False):
        for made, found in pool(2).run(draft_cases.texts, TINY, True, whole_draft):
            assert [each.tokens for each in made] == [each.tokens for each in want]
            assert found == stats
            for one, other in zip(made, want, strict=True):
                for mine, theirs in zip(
                    (one.log_probs, one.model_log_probs), (other.log_probs, other.model_log_probs), strict=True
                ):
                    assert mine == (None if theirs is None else pytest.approx(theirs, abs=1e-5))
