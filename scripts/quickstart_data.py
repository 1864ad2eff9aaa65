"""Builds the quickstart's four channels of real text, as conversations, from what ordinary Python packages ship.

Every builder is deterministic: the same Python release and package versions give the same bytes. Samples are kept
short (a few hundred characters), so that a laptop sees many of them in a few minutes.
"""

import ast
import hashlib
import importlib.util
import itertools
import json
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

Conversation = list[dict[str, str]]

MAX_CHARS = 520
"""Longest text of one turn, in characters; about 130 to 170 tokens of English or code."""
MAX_CONVERSATION_CHARS = 640
"""Longest conversation, in characters; with the template's own words it fits the quickstart's rows of 256 tokens."""

MATHS_TASKS = (
    "gsm_symbolic",
    "chain_sum",
    "basic_arithmetic",
    "simple_equations",
    "gcd",
    "lcm",
    "leg_counting",
    "time_intervals",
)
DIALOGUE_TOPICS = (
    "ai",
    "coding",
    "computers",
    "conversations",
    "emotion",
    "food",
    "greetings",
    "history",
    "literature",
    "money",
    "movies",
    "psychology",
    "science",
    "tech_support",
    "trivia",
)
ANSWER_FORM = re.compile(r"\s*(Give|Return) [^.]*final answer\.( Do not include units\.)?\s*$")
"""reasoning-gym's closing instruction asks for a bare number; these samples answer in a sentence, so it goes."""


def turns(user: str, assistant: str) -> Conversation:
    """One question and its answer as a list of messages."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def pick(samples: Iterable[Conversation], count: int) -> list[Conversation]:
    """`count` short samples without repeats, in an order given by their content alone (a shuffle without a seed)."""
    short = (sample for sample in samples if sum(len(turn["content"]) for turn in sample) <= MAX_CONVERSATION_CHARS)
    unique = {json.dumps(sample, ensure_ascii=False): sample for sample in short}
    ordered = sorted(unique, key=lambda text: hashlib.sha256(text.encode()).digest())
    return [unique[text] for text in ordered[:count]]


def functions_with_docstring(source: str) -> Iterator[tuple[str, str, str]]:
    """(name, docstring, code without the docstring) of every documented, short, public function of a module."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or not 20 <= len(docstring) <= MAX_CHARS:
            continue
        first = node.body[0]
        if first.lineno == node.lineno:  # "def f(): 'doc'; return 1" has no line to take out
            continue
        kept = lines[node.lineno - 1 : first.lineno - 1] + lines[first.end_lineno : node.end_lineno]
        code = "\n".join(line for line in textwrap.dedent("\n".join(kept)).splitlines() if line.strip())
        if 60 <= len(code) <= MAX_CHARS:
            yield node.name, docstring, code


def code_channel() -> Iterator[Conversation]:
    """Docstring to function, from the Python standard library (PSF licence)."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
    for path in sorted(stdlib.rglob("*.py")):
        if skipped & set(path.relative_to(stdlib).parts):
            continue
        for name, docstring, code in functions_with_docstring(path.read_text(encoding="utf-8", errors="replace")):
            yield turns(f"Write the Python function `{name}`.\n\n{docstring}", f"```python\n{code}\n```")


def maths_channel(per_task: int = 60, seed: int = 42) -> Iterator[Conversation]:
    """Questions with checked answers from reasoning-gym's generators (Apache-2.0)."""
    import reasoning_gym  # a second to import, and only this channel needs it

    for task in MATHS_TASKS:
        for item in reasoning_gym.create_dataset(task, size=per_task, seed=seed):
            question = ANSWER_FORM.sub("", item["question"]).strip()
            if len(question) <= MAX_CHARS:
                yield turns(question, f"The answer is {item['answer']}.")


def conversation_of(lines: list[str]) -> Conversation:
    """Lines spoken in turn, cut to whole exchanges: a last question without an answer is left out."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": " ".join(str(line).split())} for i, line in enumerate(lines)]
    return spoken[: len(spoken) // 2 * 2]


def dialogue_channel() -> Iterator[Conversation]:
    """Small talk and trivia in English, several turns where the corpus has them, from chatterbot-corpus (BSD)."""
    import yaml

    for topic in DIALOGUE_TOPICS:
        path = package_folder("chatterbot_corpus") / "data" / "english" / f"{topic}.yml"
        for lines in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            conversation = conversation_of(lines)
            texts = [turn["content"] for turn in conversation]
            if texts and all(texts) and sum(map(len, texts)) <= MAX_CHARS:
                yield conversation


def reference_channel() -> Iterator[Conversation]:
    """A paragraph of the Python language reference and the one after it (PSF licence)."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        title, _, body = topics[name].partition("\n")
        paragraphs = [textwrap.dedent(part).strip() for part in re.split(r"\n\s*\n", body)]
        prose = [" ".join(part.split()) if 60 <= len(part) <= MAX_CHARS else "" for part in paragraphs]
        for before, after in itertools.pairwise(prose):
            if before and after and before[0].isupper() and after[0].isupper():
                yield turns(f'Continue this passage of the Python reference, "{title.strip()}":\n\n{before}', after)


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        ValueError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"The Python package {package!r} is not installed in this environment. "
            "Run `bash scripts/quickstart.sh`, which installs it."
        )
    return Path(spec.submodule_search_locations[0])
