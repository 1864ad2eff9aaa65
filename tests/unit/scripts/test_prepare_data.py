"""The quickstart's channels: what a sample is made of, and that the same machine makes the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart_data

ROOT = Path(__file__).resolve().parents[3]

SOURCE = '''
class Counter:
    def total(self, values):
        """Return the sum of all the values given."""

        result = 0
        for value in values:
            result += value
        return result

    def _private(self):
        """A docstring long enough, but the name is private."""
        return "some body that is long enough to be kept otherwise"

def undocumented(a, b):
    return [a + b for _ in range(10) if a is not None and b is not None]

def one_line(): """Documented on the line of its own name."""; return 1 + 2 + 3 + 4 + 5 + 6 + 7
'''


def test_a_function_is_kept_without_its_docstring_and_blank_lines():
    expected_code = (
        "def total(self, values):\n    result = 0\n    for value in values:\n        result += value\n    return result"
    )
    found = list(quickstart_data.functions_with_docstring(SOURCE))
    assert found == [("total", "Return the sum of all the values given.", expected_code)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["hi", "hello"], [("user", "hi"), ("assistant", "hello")]),
        (["hi", "hello", "and you?"], [("user", "hi"), ("assistant", "hello")]),
        (["alone"], []),
        ([12, "two\n  lines"], [("user", "12"), ("assistant", "two lines")]),
    ],
)
def test_conversations_end_with_an_answer(lines, expected):
    assert [(turn["role"], turn["content"]) for turn in quickstart_data.conversation_of(lines)] == expected


def test_pick_drops_repeats_and_long_ones_and_ignores_the_order_given():
    samples = [quickstart_data.turns(f"q{i % 5}", "a") for i in range(10)]
    long = quickstart_data.turns("q" * 400, "a" * 400)
    picked = quickstart_data.pick([*samples, long], 100)
    assert len(picked) == 5 and long not in picked
    assert quickstart_data.pick(reversed(samples), 100) == picked
    assert quickstart_data.pick(samples, 2) == picked[:2]


def test_answer_form_takes_out_the_closing_instruction_only():
    question = "Find the GCD of 26 and 760. Give only the GCD as your final answer."
    assert quickstart_data.ANSWER_FORM.sub("", question) == "Find the GCD of 26 and 760."
    kept = "Give the number of legs of a cat."
    assert quickstart_data.ANSWER_FORM.sub("", kept) == kept


def test_a_missing_package_is_named_with_the_way_to_get_it():
    with pytest.raises(ValueError, match=r"no_such_package.*quickstart\.sh"):
        quickstart_data.package_folder("no_such_package")


CHANNELS = ("code_channel", "maths_channel", "dialogue_channel", "reference_channel")


def channels_under_hash_seed(seed: int) -> dict[str, list]:
    """The picked samples of every channel, made by a fresh interpreter with its own string hashing."""
    program = (
        "import json, sys; sys.path.insert(0, 'scripts'); import quickstart_data as q;"
        f"print(json.dumps({{n: q.pick(getattr(q, n)(), 400) for n in {CHANNELS!r}}}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(seed)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_every_channel_is_full_well_formed_and_the_same_in_every_process():
    first, second = channels_under_hash_seed(1), channels_under_hash_seed(2)
    assert first == second
    for name in CHANNELS:
        samples = first[name]
        assert len(samples) >= 300, name
        for sample in samples:
            assert [turn["role"] for turn in sample] == ["user", "assistant"] * (len(sample) // 2)
            assert all(turn["content"].strip() for turn in sample)
            assert 0 < sum(len(turn["content"]) for turn in sample) <= quickstart_data.MAX_CONVERSATION_CHARS
