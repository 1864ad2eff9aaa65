"""What the pools run for generation over tensor-parallel ranks: texts of tiny models, ranks that ask, fail or leave."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from convert.opening import open_weights
from models import Decoder, ModelConfig
from models.generation import (
    BeamConfig,
    Completion,
    ContrastiveConfig,
    Generator,
    GeneratorConfig,
    Request,
    SamplingConfig,
    Step,
)
from models.generation.config import Settings
from models.generation.leading import lead
from models.generation.team import Chosen, FirstRankFailed, Team
from parallel.config import ParallelConfig
from parallel.sharding import SINGLE, Axis, Place
from tests import tp_cases
from tests.cases import here as groups_of
from trainer.inference.loading import TextModel, generator_of

NEW = 6
LENGTHS = (3, 60, 1, 17, 90, 25, 8)
SMALL = GeneratorConfig(max_rows=3, prefill_tokens=64)
"""Rows come and go: there are three places."""
GREEDY = SamplingConfig(max_new_tokens=NEW)
SHARED = 4
"""Samples of the prompt that the cache holds once for them."""
SETTINGS: tuple[Settings, ...] = (
    GREEDY,
    dataclasses.replace(GREEDY, log_probs=True),
    SamplingConfig(max_new_tokens=NEW, temperature=1.0, samples=2, log_probs=True),
    SamplingConfig(
        max_new_tokens=NEW, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
        frequency_penalty=0.3, log_probs=True,
    ),
    BeamConfig(num_beams=3, max_new_tokens=NEW, log_probs=True),
    ContrastiveConfig(top_k=3, max_new_tokens=NEW),
    dataclasses.replace(GREEDY, allowed_tokens=(3, 5, 7)),
)  # fmt: skip
TINY = ModelConfig("llama", 61, 32, 48, 2, 4, 2, 8, 128, init_std=0.3)
"""Neither two nor four ranks divide its vocabulary."""


class Letters:
    """A tokenizer of one character a token."""

    eos_token_id = 0

    def encode(self, text: str, /) -> list[int]:
        return [ord(letter) - 64 for letter in text]

    def decode(self, token_ids: Any, /, *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(i + 64) for i in token_ids)


def prompts_of(cfg: ModelConfig, lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(1, cfg.vocab_size, (n,), generator=draw).tolist() for n in lengths]


def requests_of(cfg: ModelConfig) -> list[Request]:
    """Every prompt with one of the settings, and a seed of its own; then samples that share a long one."""
    prompts = prompts_of(cfg)
    shared = SamplingConfig(max_new_tokens=NEW, temperature=1.0, samples=SHARED, log_probs=True)
    return [Request(prompt, SETTINGS[i], 7 + i) for i, prompt in enumerate(prompts)] + [Request(prompts[4], shared, 21)]


def decoder(cfg: ModelConfig, place: Place) -> Decoder:
    """No bias is zero and no norm is one."""
    model = tp_cases.model_of(cfg, place)
    assert isinstance(model, Decoder)
    return model


def texts(cfg: ModelConfig, pooled: bool = True) -> list[Completion]:
    """Rows of all settings, over the ranks of the pool or in one piece."""
    place = tp_cases.here() if pooled else SINGLE
    return Generator(decoder(cfg, place), config=SMALL).generate(requests_of(cfg))


def bf16_texts(cfg: ModelConfig) -> list[Completion]:
    """Weights and cache are bf16, and what the ranks send each other is too."""
    model = decoder(cfg, tp_cases.here())
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    settings = SamplingConfig(max_new_tokens=NEW, temperature=1.0, log_probs=True)
    return Generator(model, config=SMALL).generate(prompts_of(cfg), settings)


def texts_with_stops(cfg: ModelConfig, pooled: bool = True) -> tuple[list[Completion], list[Step]]:
    """Rows that end by strings, tokens and lengths, and prompts that cannot be run; at once and as a stream."""
    generator = Generator(decoder(cfg, tp_cases.here() if pooled else SINGLE), Letters(), SMALL)
    settings = SamplingConfig(max_new_tokens=10, temperature=1.2, stop=("AB", "C", "xyz"), stop_tokens=(5, 6))
    asked = [*prompts_of(cfg, (3, 30, 8, 17)), [], [cfg.vocab_size], "HELLO"]
    return generator.generate(asked, settings), list(generator.stream_generate(asked, settings))


def texts_of_files(path: str, layout: ParallelConfig | None) -> list[Completion]:
    """Texts with the weights that lie in a folder, over the tp ranks of a layout of this pool or in one piece."""
    groups = None if layout is None else groups_of(layout)
    opened = open_weights(path)
    found = TextModel(opened, None, "", None, ())
    generator = generator_of(found, device=torch.device("cpu"), config=SMALL, groups=groups)
    return generator.generate(requests_of(opened.cfg))


def choices(vocab: int, logits_NV: torch.Tensor) -> list[list[Chosen]]:
    """What is chosen from the whole logits [N, V], of which each rank has its columns; greedy rows, and all by
    `decide`: rank 0 alone is asked, and takes each row's least probable token."""
    axis = tp_cases.here().tp
    width = -(-vocab // axis.size)
    padded = torch.full((len(logits_NV), width * axis.size), 1e6)  # whatever lies in padding, it must not count
    padded[:, :vocab] = logits_NV
    own = padded[:, axis.rank * width : (axis.rank + 1) * width]
    team = Team(axis, vocab, torch.device("cpu"))

    def least(logits_MV: torch.Tensor, which: Sequence[int]) -> list[Chosen]:
        assert axis.rank == 0
        tokens = logits_MV.argmin(1).tolist()
        return [(token, (0.1 * i, 0.0) if i % 2 else None) for i, token in zip(which, tokens, strict=True)]

    count = len(logits_NV)
    mixed = [i % 3 == 0 for i in range(count)]
    return [team.choose(own, greedy, least) for greedy in ([True] * count, [False] * count, mixed)]


def mistakes(cfg: ModelConfig) -> tuple[list[str], list[Completion]]:
    """Errors of all kinds, and that the ranks stand together after each of them: the texts made last."""
    axis = tp_cases.here().tp
    generator = Generator(decoder(cfg, Place(tp=axis)), config=SMALL)
    told: list[str] = []

    def expect(kind: type[Exception], act: Callable[[], Any]) -> None:
        try:
            act()
        except kind as error:
            told.append(f"{kind.__name__}: {error}")
        else:
            told.append("nothing")

    expect(ValueError, lambda: generator.generate([[1 + axis.rank]], GREEDY))
    expect(ValueError, lambda: generator.generate([[1]], dataclasses.replace(GREEDY, top_k=3)))
    expect(ValueError, lambda: generator.generate([[1]], dataclasses.replace(GREEDY, max_new_tokens=3 + axis.rank)))
    other = Generator(generator.model, config=GeneratorConfig(max_rows=1 + axis.rank))
    expect(ValueError, lambda: other.stream_generate([[1]], GREEDY))

    def fails(*_: Any) -> list[Chosen]:
        raise KeyError("out of luck")

    team, logits = generator.team, torch.zeros(2, -(-cfg.vocab_size // axis.size))
    kind = FirstRankFailed if axis.rank else KeyError
    expect(kind, lambda: team.choose(logits, [True, False], fails))
    return told, generator.generate(requests_of(cfg))


def left_early(cfg: ModelConfig, steps: int) -> tuple[list[Step], list[Completion]]:
    """Rank 0 takes some steps of a stream and no more; the others take what comes. Then whole texts."""
    generator = Generator(decoder(cfg, tp_cases.here()), config=SMALL)
    stream = generator.stream_generate([*requests_of(cfg), Request([])])
    if dist.get_rank():
        taken = list(stream)
    else:
        taken = [next(stream) for _ in range(steps)]
        del stream
    return taken, generator.generate(requests_of(cfg))


def led(cfg: ModelConfig, size: int) -> tuple[Any, bool]:
    """Rank 0 alone asks: texts, a stream that it leaves, one that it forgets, impossible settings, texts again. And
    whether an error there ends it on all ranks."""
    axis = tp_cases.here().tp if size > 1 else Axis()
    generator = Generator(decoder(cfg, Place(tp=axis)), config=SMALL)
    asked = requests_of(cfg)

    def work(asking: Generator) -> Any:
        first = asking.generate(asked)
        seen = []
        for step in asking.stream_generate(asked):
            seen.append(step)
            if len(seen) == 9:
                break
        forgotten = asking.stream_generate(asked)
        seen.append(next(iter(forgotten)))
        asking.stream_generate(asked)  # nobody begins it
        try:
            asking.generate([[1]], SamplingConfig(temperature=-1.0))
        except ValueError as error:
            seen.append(str(error))
        return first, seen, asking.generate(asked), list(forgotten)

    found = lead(generator, work)
    try:
        lead(generator, _stumble)
    except ZeroDivisionError:
        return found, True
    return found, False


def _stumble(asking: Generator) -> float:
    return 1 / len(asking.generate([]))
