"""A dialogue gives what a generator gives for each whole prompt alone, and runs only what is new of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from models import Decoder, ModelConfig, RopeConfig, build
from models.config import MLAConfig, MoEConfig
from models.generation import Generator, GeneratorConfig, Request, SamplingConfig, dialogue
from models.generation.config import BeamConfig
from models.generation.dialogue import Dialogue
from models.init import InitSource
from parallel.materialise import materialise
from parallel.sharding import WHOLE

PLAIN = ModelConfig("llama", 96, 32, 48, 2, 4, 2, 8, 128, init_std=0.3)
SLIDING = dataclasses.replace(PLAIN, family="qwen2", sliding_window=6, full_attention_layers=1)
DYNAMIC = dataclasses.replace(PLAIN, rope=RopeConfig(scaling="dynamic", factor=2.0, original_max_seq_len=24))
EXPERTS = MoEConfig(num_experts=4, top_k=2, expert_size=16)
CASES = {
    "full": PLAIN,
    "sliding": SLIDING,
    "latent": dataclasses.replace(
        PLAIN, family="deepseek_v2", num_kv_heads=4, head_dim=12,
        mla=MLAConfig(kv_rank=12, nope_dim=8, rope_dim=4, value_dim=6),
    ),
    "experts": dataclasses.replace(PLAIN, family="mixtral", moe=EXPERTS),
    "capacity": dataclasses.replace(PLAIN, family="mixtral", moe=dataclasses.replace(EXPERTS, capacity=0.5)),
    "dynamic": DYNAMIC,
}  # fmt: skip
SAMPLED = SamplingConfig(max_new_tokens=5, temperature=1.0, repetition_penalty=1.1, log_probs=True)


def model_of(cfg: ModelConfig) -> Decoder:
    model = build(cfg)
    materialise(model, InitSource(cfg, 1), WHOLE, torch.device("cpu"))
    return model


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each prompt's forwards ran."""
    counts: list[int] = []
    monkeypatch.setattr(dialogue, "TIMES", 0)  # whatever can be kept is
    prefill, extend = dialogue.prefill, dialogue.extend

    def whole(model: Decoder, prompts: Sequence[Sequence[int]], *rest: Any) -> torch.Tensor:
        counts.append(len(prompts[0]))
        return prefill(model, prompts, *rest)

    def some(model: Decoder, tokens: Sequence[Sequence[int]], *rest: Any) -> Any:
        counts.append(len(tokens[0]))
        return extend(model, tokens, *rest)

    monkeypatch.setattr(dialogue, "prefill", whole)
    monkeypatch.setattr(dialogue, "extend", some)
    return counts


def said(made: Any) -> tuple[list[int], list[float]]:
    steps = list(made)
    return [step.token for step in steps], [step.model_log_prob for step in steps]


def check(talk: Dialogue, prompt: list[int], seed: int = 0) -> list[int]:
    """The dialogue's text is the generator's."""
    tokens, log_probs = said(talk.stream(Request(prompt, SAMPLED, seed)))
    whole = Generator(talk.model).generate([Request(prompt, SAMPLED, seed)])[0]
    assert tokens == list(whole.tokens)
    assert log_probs == pytest.approx(whole.model_log_probs, abs=1e-4)
    return tokens


def numbers(count: int, seed: int) -> list[int]:
    return torch.randint(4, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("block", [128, 3])
@pytest.mark.parametrize("name", CASES)
def test_turns_of_a_conversation(name: str, block: int, ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogue, "BLOCK", block)
    talk = Dialogue(Generator(model_of(CASES[name])))
    first, second, third = numbers(9, 1), numbers(7, 2), numbers(4, 3)
    one = [*first, *check(talk, first), *second]
    two = [*one, *check(talk, one, 1), *third]
    check(talk, two, 2)
    check(talk, one, 3)  # the last turn is taken back and tried again
    check(talk, [*one[:-2], 5, 6, 7, 8], 4)  # an answer is written in other tokens
    check(talk, third, 5)  # forgotten
    talk.close()
    new = {  # of each prompt; the last token of a text was never run, and there must be one to run
        "full": [9, 8, 5, 1, 4, 4],
        "sliding": [9, 8, 5, 21, 23, 4],
        "dynamic": [9, 8, 30, 21, 23, 4],
        "capacity": [9, 21, 30, 21, 23, 4],
    }
    want = new.get(name, new["full"])
    if block == 128:
        assert ran == want
    assert sum(ran) == sum(want)


def test_left_in_the_middle(ran: list[int]) -> None:
    talk = Dialogue(Generator(model_of(SLIDING)))
    prompt = numbers(9, 1)
    steps = talk.stream(Request(prompt, SAMPLED))
    begun = [next(steps).token for _ in range(3)]
    del steps
    check(talk, [*prompt, *[token for token in begun if token is not None], *numbers(3, 2)])
    assert ran == [9, 4]


def test_a_prompt_that_is_mostly_new_is_run_whole(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogue, "TIMES", 3)
    talk = Dialogue(Generator(model_of(PLAIN)))
    prompt = numbers(20, 1)
    answer = check(talk, prompt)
    check(talk, [*prompt, *answer[:-1], *numbers(12, 2)])  # 12 of 36
    check(talk, [*prompt, *answer[:-1], *numbers(13, 3)])  # 13 of 37
    assert ran == [20, 12, 37]


def test_interrupted_while_a_prompt_is_run(ran: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Dialogue(Generator(model_of(SLIDING)))
    prompt = numbers(9, 1)
    longer = [*prompt, *check(talk, prompt), *numbers(30, 2)]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(dialogue, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.stream(Request(longer, SAMPLED)))
    check(talk, longer)
    assert ran == [9, 31, 44]


def test_texts_stops_and_errors_are_the_generators() -> None:
    model = model_of(PLAIN)
    prompt = numbers(9, 1)
    whole = Generator(model).generate([prompt], SamplingConfig(max_new_tokens=8))[0].tokens
    talk = Dialogue(Generator(model, config=GeneratorConfig(max_cached_tokens=128), stop_tokens=[whole[3]]))
    steps = list(talk.stream(Request(prompt, SamplingConfig(max_new_tokens=8))))
    assert [step.token for step in steps] == list(whole[:4]) and steps[-1].finish == "stop"
    (error,) = talk.stream(Request(numbers(128, 1)))
    assert error.token is None and error.finish == "error" and "context is 128" in error.error
    for settings in (BeamConfig(), SamplingConfig(samples=2, temperature=1.0)):
        with pytest.raises(ValueError, match="one text a turn"):
            talk.stream(Request(prompt, settings))
    assert [step.token for step in talk.stream(Request(prompt, SamplingConfig(max_new_tokens=8)))] == list(whole[:4])
