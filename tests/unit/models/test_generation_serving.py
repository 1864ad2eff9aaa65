"""Requests that come while others are worked on: the texts of `generate`, as they end, in places as they come free."""

import dataclasses
from collections.abc import Callable

import pytest

from models import Decoder
from models.generation import Completion, Generator, GeneratorConfig, Request, SamplingConfig
from models.generation.serving import serve
from tests.unit.models.test_generation import PLAIN, SAMPLED, Letters, model_of, prompts

LENGTHS = (5, 1, 12, 7, 20, 3, 9, 2)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return model_of(PLAIN)


def requests(samples: int = 1) -> list[Request]:
    """Of all lengths, with their own ends."""
    return [
        Request(prompt, dataclasses.replace(SAMPLED, max_new_tokens=3 + 2 * i, samples=samples), seed=i)
        for i, prompt in enumerate(prompts(LENGTHS))
    ]


def giving(asked: list[Request], rooms: list[int] | None = None) -> Callable[[int, bool], list[Request] | None]:
    """Gives the requests in portions of what there is room for, with pauses in between."""
    left, pause = list(asked), [False]

    def take(room: int, idle: bool) -> list[Request] | None:
        if rooms is not None:
            rooms.append(room)
        pause[0] = not pause[0]
        if not left:
            return None
        if pause[0]:
            return []
        given = left[:room]
        del left[: len(given)]
        return given

    return take


def by_row(made: list[Completion]) -> list[Completion]:
    return sorted(made, key=lambda each: (each.prompt, each.sample))


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_texts_are_those_of_generate(plain: Decoder, rows: int, samples: int) -> None:
    generator = Generator(plain, Letters(), GeneratorConfig(max_rows=rows))
    made = by_row(list(serve(generator, giving(requests(samples)))))
    want = Generator(plain, Letters()).generate(requests(samples))
    assert [dataclasses.replace(each, log_probs=None, model_log_probs=None) for each in made] == [
        dataclasses.replace(each, log_probs=None, model_log_probs=None) for each in want
    ]
    for ours, theirs in zip(made, want, strict=True):
        assert ours.log_probs == pytest.approx(theirs.log_probs, abs=1e-4)


def test_texts_come_as_they_end_and_room_is_what_is_free(plain: Decoder) -> None:
    rooms: list[int] = []
    generator = Generator(plain, config=GeneratorConfig(max_rows=3))
    asked = [Request([7], SamplingConfig(max_new_tokens=n)) for n in (9, 2, 4, 3, 3)]
    made = list(serve(generator, giving(asked, rooms)))
    assert [each.prompt for each in made] == [1, 2, 3, 4, 0]  # the second ends first; the others take its place in turn
    assert rooms[:2] == [3, 3] and all(1 <= room <= 3 for room in rooms)


def test_what_cannot_be_run_has_the_reason(plain: Decoder) -> None:
    asked = [
        Request([7] * 64),
        Request([7, 9], SamplingConfig(max_new_tokens=4)),
        Request([]),
        Request([7], SamplingConfig(temperature=-1.0)),
        Request("text"),
    ]
    made = by_row(list(serve(Generator(plain), giving(asked))))
    assert [each.finish for each in made] == ["error", "length", "error", "error", "error"]
    assert "context is 64" in made[0].error and "empty" in made[2].error
    assert "temperature=-1.0: must not be below 0" in made[3].error and "no tokenizer" in made[4].error


def test_nothing_is_asked_once_no_more_comes(plain: Decoder) -> None:
    times: list[int] = []
    assert list(serve(Generator(plain), giving([], times))) == [] and times == [64]
