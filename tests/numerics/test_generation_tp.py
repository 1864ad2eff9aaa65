"""Texts over tensor-parallel ranks equal those of one process, token for token, whatever the weights were saved as."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from convert import hf_to_mega
from convert.from_hf import whole_shapes
from convert.to_hf import export
from models import ModelConfig, build
from models.generation import Completion, Generator
from models.init import InitSource
from parallel.config import ParallelConfig
from parallel.materialise import TensorSource, materialise
from parallel.sharding import SINGLE, WHOLE
from tests import cases, generation_cases
from tests.generation_cases import LENGTHS, NEW, SHARED, SMALL, TINY, requests_of
from tests.numerics.test_hf_parity import OPTIONS
from tests.numerics.test_hf_parity import TINY as FAMILIES
from tests.pool import Pool
from tests.unit.convert.test_loom_files import write_run

Pools = Callable[[int], Pool]
MODELS = {
    name: dataclasses.replace(OPTIONS[name], init_std=0.15)
    for name in (*FAMILIES, "llama_one_group", "qwen2_all_sliding", "deepseek2_latent_queries")
} | {
    "padded_tied_biases": dataclasses.replace(
        OPTIONS["qwen3_biases"], tied_embeddings=True, vocab_size=61, init_std=0.15
    ),
}  # fmt: skip
"""Every family; one key/value head for all heads; windows on every layer; a vocabulary that ranks do not divide."""

ON_FOUR = ("llama_one_group", "padded_tied_biases", "tiny_deepseek_v3")


@functools.cache
def alone(name: str) -> list[Completion]:
    """The texts of one process, which other tests hold against transformers."""
    return generation_cases.texts(MODELS[name], pooled=False)


def assert_same(found: Sequence[Completion], want: Sequence[Completion]) -> None:
    """Equal, log-probabilities within 1e-5 nats."""
    for one, other in zip(found, want, strict=True):
        blank = {"log_probs": None, "model_log_probs": None, "score": None}
        assert dataclasses.replace(one, **blank) == dataclasses.replace(other, **blank)
        for field in blank:
            mine, theirs = getattr(one, field), getattr(other, field)
            assert mine == (None if theirs is None else pytest.approx(theirs, rel=0, abs=1e-5))


@pytest.mark.parametrize(
    ("name", "size"), [*((name, 2) for name in MODELS if name != "llama_one_group"), *((name, 4) for name in ON_FOUR)]
)
def test_texts_are_those_of_one_process(pool: Pools, name: str, size: int) -> None:
    """Greedy and drawn rows beside each other, rows that come and go; on all ranks the same bits."""
    first, *others = pool(size).run(generation_cases.texts, MODELS[name])
    assert all(other == first for other in others)
    assert_same(first, alone(name))
    assert len({made.tokens for made in first}) == len(first) == len(LENGTHS) + 1 + SHARED
    assert all(len(made.tokens) == NEW for made in first)


def test_stops_and_bad_prompts(pool: Pools) -> None:
    want, steps = generation_cases.texts_with_stops(TINY, pooled=False)
    assert {made.finish for made in want} == {"stop", "length", "error"}
    assert any(made.text is not None and made.finish == "stop" and len(made.text) < len(made.tokens) for made in want)
    for found, streamed in pool(2).run(generation_cases.texts_with_stops, TINY):
        assert_same(found, want)
        assert streamed == steps


@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_deepseek_v3"])
def test_bf16(pool: Pools, name: str) -> None:
    """The same on all ranks; log-probabilities within 0.1 nats, on average, of one fp32 forward of one process."""
    cfg = dataclasses.replace(OPTIONS[name], init_std=0.05)
    first, *others = pool(2).run(generation_cases.bf16_texts, cfg)
    assert all(other == first for other in others)
    model, differences = generation_cases.decoder(cfg, SINGLE), []
    for made in first:
        tokens = torch.tensor([*made.prompt_tokens, *made.tokens])
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(tokens)), [0, len(tokens)], output="head")
        scores = logits[len(made.prompt_tokens) - 1 : -1].log_softmax(-1)
        want = scores.gather(1, torch.tensor(made.tokens)[:, None]).squeeze(1)
        assert made.model_log_probs is not None
        differences.append((torch.tensor(made.model_log_probs) - want).abs().mean().item())
    assert max(differences) < 0.1


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("vocab", [5, 64, 61])
def test_what_is_chosen(pool: Pools, vocab: int, size: int) -> None:
    """Five tokens on four ranks: the last one has none. Equal logits: the first token, as argmax takes it."""
    logits = -torch.rand(7, vocab, generator=torch.Generator().manual_seed(1))
    logits[3] = -1.0
    logits[4, [1, vocab - 1]] = 0.0
    best, least = logits.argmax(1).tolist(), logits.argmin(1).tolist()
    asked = [(token, (0.1 * i, 0.0) if i % 2 else None) for i, token in enumerate(least)]
    mixed = [(best[i], None) if i % 3 == 0 else asked[i] for i in range(7)]
    for found in pool(size).run(generation_cases.choices, vocab, logits):
        assert found == [[(token, None) for token in best], asked, mixed]


def test_mistakes_are_told_on_every_rank_and_leave_nobody_waiting(pool: Pools) -> None:
    answers = pool(2).run(generation_cases.mistakes, TINY)
    want = generation_cases.texts(TINY, pooled=False)
    for rank, (told, texts) in enumerate(answers):
        for line in (told[0], told[2], told[3]):
            assert "ValueError: the 2 tensor-parallel ranks of a generator were asked for different" in line
        assert "top_k=3" in told[1]
        assert ("FirstRankFailed: rank 0" if rank else "KeyError: 'out of luck'") in told[4]
        assert_same(texts, want)


@pytest.mark.parametrize("steps", [1, 3, 17, 1 + (1 + SHARED + len(LENGTHS)) * NEW])
def test_a_stream_that_rank_0_leaves_ends_on_all(pool: Pools, steps: int) -> None:
    """In the prompt that cannot be run, among first tokens, among the searches, behind the last one."""
    (taken, texts), *others = pool(2).run(generation_cases.left_early, TINY, steps)
    want = generation_cases.texts(TINY, pooled=False)
    assert_same(texts, want)
    for seen, their_texts in others:
        assert seen[: len(taken)] == taken and len(seen) <= len(taken) + SMALL.max_rows
        assert their_texts == texts


@pytest.mark.parametrize("size", [1, 2])
def test_one_rank_asks_and_the_others_follow(pool: Pools, size: int) -> None:
    ((first, seen, again, rest), stumbled), *others = (
        pool(size).run(generation_cases.led, TINY, size) if size > 1 else [generation_cases.led(TINY, 1)]
    )
    assert stumbled and others == [(None, False)] * (size - 1)
    assert_same(first, generation_cases.texts(TINY, pooled=False))
    assert again == first and (rest == []) == (size > 1)
    steps, mistake = seen[:-1], seen[-1]
    assert len(steps) == 10 and "temperature=-1" in mistake
    for step in steps:
        (whole,) = (made for made in first if (made.prompt, made.sample) == (step.prompt, step.sample))
        assert step.token in whole.tokens


def texts_of(cfg: ModelConfig, source: TensorSource) -> list[Completion]:
    model = build(cfg)
    materialise(model, source, WHOLE, torch.device("cpu"))
    return Generator(model, config=SMALL).generate(requests_of(cfg))


def check_folder(pool: Pools, folder: Path, want: list[Completion]) -> None:
    """At tp 1 and 2."""
    assert_same(generation_cases.texts_of_files(str(folder), None), want)
    for found in pool(2).run(generation_cases.texts_of_files, str(folder), ParallelConfig(tp=2)):
        assert_same(found, want)


def test_a_run_trained_over_tp_and_pp(pool: Pools, tmp_path: Path) -> None:
    """Opened by one process, two, and the very ranks that trained it: there each stage has a copy."""
    cfg = dataclasses.replace(TINY, tied_embeddings=True)
    layout = ParallelConfig(tp=2, pp=2, sequence_parallel=True)
    made = pool(4).run(cases.train, 1, 2, 1, layout=layout, model=cfg, save_to=str(tmp_path / "checkpoints"))
    state = Path(made[0]["saved"]) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"model": dataclasses.asdict(cfg)}))
    weights = made[0]["weights"]

    class Trained(TensorSource):
        def tensor(self, name: str) -> torch.Tensor:
            return weights[name].view(InitSource(cfg, 0).tensor(name).shape)

    want = texts_of(cfg, Trained())
    assert [each.tokens for each in want] != [each.tokens for each in texts_of(cfg, InitSource(cfg, 3))]
    check_folder(pool, tmp_path, want)
    for found in pool(4).run(generation_cases.texts_of_files, str(tmp_path), layout):
        assert_same(found, want)


def test_a_run_over_tp_and_ep(pool: Pools, tmp_path: Path) -> None:
    cfg = dataclasses.replace(OPTIONS["tiny_deepseek_v3"], vocab_size=61, init_std=0.15)
    write_run(tmp_path / "run", cfg, tp=2, ep=2, step=5)
    check_folder(pool, tmp_path / "run", texts_of(cfg, InitSource(cfg, 5)))


def test_megatrons_files(pool: Pools, tmp_path: Path) -> None:
    """Written at tp 2 x pp 2 x ep 2, the vocabulary padded."""
    cfg = dataclasses.replace(OPTIONS["tiny_mixtral"], vocab_size=61, init_std=0.15)
    source, words = InitSource(cfg, 0), "--tp 2 --pp 2 --ep 2 --workers 1"
    export(tmp_path / "hf", cfg, ((name, source.tensor(name)) for name in whole_shapes(cfg)))
    hf_to_mega.run(["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "mega"), *words.split()])
    check_folder(pool, tmp_path / "mega", texts_of(cfg, source))
