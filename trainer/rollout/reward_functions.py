"""Reward functions that have names. Each is called like a user's own: f(text, prompt, **arguments) -> a number.

    text      what the policy wrote (`of: last` or `all`), without its stop token
    prompt    the prompt with its row's `fields`; `answer` is the field that most of them compare with

To add one: write it here and add it to FUNCTIONS; to SLOW too, if it can hang or crash.
"""

from __future__ import annotations

import functools
import json
import logging
from collections import deque
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import regex

from data.prompt import Prompt
from trainer.evaluation.judging import RULES, Rule, extract, normalised, number

_BOXED = "\\boxed{"
_NUMBER = regex.compile(r"[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}|/\d+)?")


def exact_match(
    text: str, prompt: Prompt, field: str = "answer", pattern: str = "", rules: str = "case,whitespace,punctuation"
) -> float:
    """1 where the answer in the text is one of those in the row's field, else 0.

    Args:
        field: the row's field with the answer, or a list of them.
        pattern: a regular expression whose first group is the answer; "" = as `answer_in` finds it.
        rules: what is made alike before comparing: of case, whitespace, punctuation, numbers.
    """
    alike: list[Rule] = [rule for rule in RULES if rule in rules.split(",")]
    found = normalised(_answer(text, pattern), alike)
    return float(any(normalised(each, alike) == found for each in _wanted(prompt, field)))


def numeric_match(text: str, prompt: Prompt, field: str = "answer", pattern: str = "", tolerance: float = 0.0) -> float:
    """1 where the last number of the answer in the text equals the last one in the row's field, else 0.

    1,200.50 = 1200.5 and 0.5 = 1/2.

    Args:
        tolerance: how far they may lie apart, as a share of the wanted number.
    """
    found = last_number(_answer(text, pattern))
    wanted = [last_number(each) for each in _wanted(prompt, field)]
    if all(each is None for each in wanted):
        raise ValueError(f"the prompt's field {field} holds no number")
    if found is None:
        return 0.0
    share = Fraction(tolerance)
    return float(any(each is not None and abs(found - each) <= share * abs(each) for each in wanted))


def math_verify(text: str, prompt: Prompt, field: str = "answer") -> float:
    """1 where the text's mathematical answer is worth the same as that of the row's field (`math-verify`), else 0.

    Understands LaTeX, fractions, sets, intervals, units; looks into <answer>...</answer> and \\boxed{} first.
    """
    from math_verify import parse, verify

    # 0 = without its own time limits, which are signals; ours end the process. It would warn of that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    wanted = [parse(_latex(each), parsing_timeout=0) for each in _wanted(prompt, field)]
    if not any(wanted):
        raise ValueError(f"math-verify finds no mathematics in the prompt's field {field}")
    inside = answer_in(text) if "<answer>" in text else text
    found = parse(inside, parsing_timeout=0)
    if not found and inside is not text:  # formulas without their $ are none to it
        found = parse(_latex(inside), parsing_timeout=0)
    return float(any(verify(each, found, timeout_seconds=0) for each in wanted if each))


def regex_match(text: str, prompt: Prompt, pattern: str, whole: bool = False) -> float:
    """1 where the regular expression matches somewhere (`whole`: the whole text), else 0. `.` matches line breaks."""
    compiled = regex.compile(pattern, regex.DOTALL)
    return float((compiled.fullmatch if whole else compiled.search)(text, timeout=1.0) is not None)


def format(text: str, prompt: Prompt, tags: str = "think,answer", partial: bool = False) -> float:
    """1 where the text is exactly <think>...</think> <answer>...</answer>, each with something in it, else 0.

    Args:
        tags: the names, in their order.
        partial: give the share of tags that stand there once, opened and closed, whatever lies around them.
    """
    names = [name.strip() for name in tags.split(",")]
    if partial:
        return sum(text.count(f"<{name}>") == text.count(f"</{name}>") == 1 for name in names) / len(names)
    rest = text
    for name in names:
        opened, _, rest = rest.partition(f"<{name}>")
        inside, closed, rest = rest.partition(f"</{name}>")
        if opened.strip() or not inside.strip() or not closed or any(f"<{each}>" in inside for each in names):
            return 0.0
    return float(not rest.strip())


def length(
    text: str,
    prompt: Prompt,
    least: int = 0,
    most: int = 1_000_000,
    window: int = 1,
    unit: Literal["words", "characters"] = "words",
) -> float:
    """0 from `least` to `most` words or characters; outside it falls evenly and is -1 from `window` of them away on."""
    count = len(text.split()) if unit == "words" else len(text)
    outside = max(least - count, count - most, 0)
    return -min(outside / max(window, 1), 1.0)


def language(text: str, prompt: Prompt, script: str = "Latin") -> float:
    """The share of the text's letters that belong to a script of Unicode (Latin, Han, Cyrillic, Arabic, ...); 0
    without letters."""
    letters = sum(map(str.isalpha, text))
    return sum(map(len, _letters(script).findall(text))) / letters if letters else 0.0


def json_valid(text: str, prompt: Prompt, keys: str = "", fenced: bool = True) -> float:
    """1 where the text is JSON, else 0.

    Args:
        keys: names that an object must have, such as "name,age"; "" = any JSON.
        fenced: a single ```json block may stand around it.
    """
    text = text.strip()
    if fenced and (found := regex.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, regex.DOTALL)):
        text = found[1]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    wanted = {name.strip() for name in keys.split(",")} if keys else set()
    return float(not wanted or (isinstance(value, dict) and wanted <= value.keys()))


def contains(text: str, prompt: Prompt, words: str = "", field: str = "", case: bool = True) -> float:
    """The share of words that stand in the text.

    Args:
        words: with commas between them.
        field: the row's field that holds them, instead.
        case: upper and lower case count.
    """
    wanted = list(_wanted(prompt, field)) if field else [word.strip() for word in words.split(",")]
    if not case:
        text, wanted = text.casefold(), [word.casefold() for word in wanted]
    return sum(word in text for word in wanted) / len(wanted)


def reasoning_gym(text: str, prompt: Prompt, pattern: str = "", field: str = "reasoning_gym") -> float:
    """What the task's own verifier of `reasoning-gym` gives for the answer in the text, 0 to 1.

    Args:
        pattern: a regular expression whose first group is the answer; "" = as `answer_in` finds it.
        field: the row's field with the task's entry {question, answer, metadata}, as prepare_tasks.py writes it.
    """
    entry = prompt.fields.get(field)
    if not isinstance(entry, dict) or "source_dataset" not in entry.get("metadata", {}):
        raise ValueError(f"the prompt's field {field} is no entry of reasoning-gym with its metadata.source_dataset")
    return float(_verifier(entry["metadata"]["source_dataset"])(_answer(text, pattern), entry))


@functools.lru_cache(maxsize=64)
def _verifier(name: str) -> Callable[[str, dict[str, Any]], float]:
    """The verifier of a dataset. Finding it makes a dataset of one item; none of its items is looked at."""
    import reasoning_gym as gym

    return gym.create_dataset(name, size=1, seed=0).score_answer


def answer_in(text: str) -> str:
    """The answer in a text: inside the last <answer>...</answer>, else the last \\boxed{...}, else behind the last
    ####, else all of it."""
    opened = text.rfind("<answer>")
    if opened >= 0:
        return text[opened + len("<answer>") :].partition("</answer>")[0].strip()
    boxed = text.rfind(_BOXED)
    if boxed >= 0:
        return _braced(text[boxed + len(_BOXED) :]).strip()
    return text.rpartition("####")[2].strip()


def last_number(text: str) -> Fraction | None:
    """The last number of a text; None without one."""
    found = next(iter(deque(_NUMBER.finditer(text), 1)), None)
    value = None if found is None else number(found[0].rstrip(","))
    return None if value is None else Fraction(value)


def _answer(text: str, pattern: str) -> str:
    if not pattern:
        return answer_in(text)
    return extract(text, pattern, "last") or ""


def _wanted(prompt: Prompt, field: str) -> list[str]:
    if field not in prompt.fields or prompt.fields[field] is None:
        listed = ", ".join(map(str, prompt.fields)) or "none"
        raise ValueError(f"the prompt's row has no field {field} (it has: {listed})")
    value = prompt.fields[field]
    values = value if isinstance(value, list | tuple) else [value]
    if not values:
        raise ValueError(f"the prompt's field {field} is an empty list")
    return [answer_in(each) if isinstance(each, str) else str(each) for each in values]


def _latex(answer: str) -> str:
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"


def _braced(text: str) -> str:
    """A text up to the brace that closes the one before it; all of it where none does."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:at]
    return text


@functools.lru_cache(maxsize=64)
def _letters(script: str) -> regex.Pattern[str]:
    """Runs of letters of a script."""
    return regex.compile(rf"[\p{{L}}&&\p{{Script={script}}}]+", regex.V1)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "math_verify": math_verify,
    "regex": regex_match,
    "format": format,
    "length": length,
    "language": language,
    "json_valid": json_valid,
    "contains": contains,
    "reasoning_gym": reasoning_gym,
}
SLOW = ("math_verify", "reasoning_gym")
"""They run code that may hang or crash, so they run in processes of their own, as the user's functions do."""
PACKAGES = {
    "math_verify": ("math_verify", "pip install 'math-verify[antlr4_9_3]==0.9.0'"),
    "reasoning_gym": ("reasoning_gym", "pip install reasoning-gym==0.1.25 (it needs a C compiler)"),
}
"""What has to be installed for them: (module, how)."""
