"""The page of rollouts, read back by a parser, and the table."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from data.prompt import Prompt
from scripts import show_rollouts
from trainer.rollout.records import Records
from trainer.rollout.types import Rollout, Turn

EVIL = '</pre><script>alert("x")</script> & <b>"quoted"</b>\u2028\n'


class Bytes:
    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode(errors="replace")


def rollout(
    number: int, sample: int, text: str, reward: float, channel: str = "maths", finish: str = "stop"
) -> Rollout:
    tokens = text.encode()
    prompt = Prompt(number, 0, channel, (65,), "A", ({"role": "user", "content": f"what? {EVIL}"},), {"answer": EVIL})
    learn = (False, *[True] * len(tokens), False)
    turns = (Turn("assistant", text, 1, 1 + len(tokens)), Turn("tool", EVIL, 1 + len(tokens), 2 + len(tokens)))
    parts = (65, *tokens, 66), learn, tuple(-1.0 * each for each in learn)
    errors = {"own": "ValueError: <oh>"} if reward < 0 else {}
    return Rollout(prompt, sample, *parts, text, finish, turns, {"own": reward}, 2 * reward, errors)  # type: ignore[arg-type]


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    children: list[Node] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str, kind: str = "") -> list[Node]:
        """Nodes of a tag and class below this one."""
        own = [
            each
            for each in self.children
            if each.tag == tag and kind in [*(each.attributes.get("class") or "").split(" "), ""]
        ]
        return own + [found for each in self.children for found in each.all(tag, kind)]

    def whole(self) -> str:
        return self.text + "".join(each.whole() for each in self.children)


class Reader(HTMLParser):
    """The page as a tree; every tag is closed in its place."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in ("meta", "input"):
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].text += data


def read(path: Path) -> Node:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert len(reader.open) == 1, "a tag is not closed"
    return reader.open[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = Records(tmp_path / "a<run>", Bytes(), pieces=True)
    for step in (1, 2, 30):
        mixed = [rollout(4, 0, "right", 1.0), rollout(4, 1, f"wrong {EVIL}", -1.0, finish="length")]
        same = [rollout(9, sample, "same", 0.5, channel='co"de') for sample in range(2)]
        made.write(step, mixed + same, {(4, 0): 0.7})
    made.write(30, [rollout(5, 0, "held", 0.25)], evaluation=True)
    return tmp_path / "a<run>"


Shown = Callable[..., tuple[int, str, str]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shown:
    """The command: exit code, what it prints, what it complains of."""

    def command(run: Path, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["show_rollouts.py", str(run), *words])
        code = show_rollouts.main()
        printed, complaint = capsys.readouterr()
        return code, printed, complaint

    return command


def test_the_table_and_the_page(run: Path, shown: Shown, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    code, printed, _ = shown(run, "--out", str(out))
    lines = printed.splitlines()
    assert code == 0
    assert lines[0].split() == [
        "step",
        "samples",
        "reward",
        "std",
        "own",
        "no",
        "signal",
        "tokens",
        "cut",
        "off",
        "errors",
    ]
    # rewards 2, -2, 1, 1: mean 0.5, variance (2.25 + 6.25 + 0.25 + 0.25) / 4 = 2.25
    tokens = (len("right") + len(f"wrong {EVIL}".encode()) + 2 * len("same")) / 4
    assert lines[1].split() == ["1", "4", "0.500", "1.500", "0.250", "50", "%", f"{tokens:.0f}", "25", "%", "1"]
    assert lines[4].split()[:5] == ["30", "held", "out", "1", "0.500"] and " - " in lines[4]
    assert lines[5] == "3 x own: ValueError: <oh>"

    root = read(out)
    assert len(root.all("script")) == 1 and not root.all("b"), "a text came through as HTML"
    assert not root.all("link") and not root.all("img") and "http" not in out.read_text()
    groups = root.all("section", "group")
    assert [(g.attributes["data-step"], g.attributes["data-channel"], g.attributes["data-flat"]) for g in groups] == [
        *[
            (str(step), channel, flat)
            for step in (1, 2, 30)
            for channel, flat in (("maths", "false"), ('co"de', "true"))
        ],
        ("30", "maths", "true"),
    ]
    assert [group.attributes["data-kind"] for group in groups][-2:] == ["training", "held out"]
    assert groups[0].all("div", "asked")[0].all("pre")[0].whole() == f"\nwhat? {EVIL}"
    right, wrong = groups[0].all("article", "sample")
    assert (right.attributes["data-reward"], wrong.attributes["data-reward"]) == ("2.0", "-2.0")
    assert "good" in str(right.attributes["class"]) and "poor" in str(wrong.attributes["class"])
    assert "advantage +0.7" in right.whole() and "advantage" not in wrong.whole()
    assert "ended: length" in wrong.whole() and "own: ValueError: <oh>" in wrong.whole()
    written, answered = wrong.all("div", "turn")
    assert written.all("pre")[0].whole() == f"\nwrong {EVIL}" and "learnt" in str(written.attributes["class"])
    assert answered.all("pre")[0].whole() == f"\n{EVIL}" and "not learnt from" in answered.whole()
    tokens_of = right.all("span", "t")
    assert [each.text for each in tokens_of] == list("right") and tokens_of[0].attributes["style"] == "--p:0.368"


def test_what_goes_on_the_page_can_be_chosen(run: Path, shown: Shown, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    assert shown(run, "--out", str(out), "--steps", "2,30", "--groups", "1", "--channel", 'co"de')[0] == 0
    assert [each.attributes["data-step"] for each in read(out).all("section", "group")] == ["2", "30"]
    assert shown(run / "rollouts" / "step_000002.jsonl", "--out", str(out))[0] == 0
    assert len(read(out).all("section", "group")) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "3"], "there are no rollouts of step 3; there are 1 to 30"),
        (["--steps", "a"], "give numbers with commas"),
        (["--channel", "chat"], "--channel chat: no such channel"),
        (["--out", "/nowhere/page.html"], "No such file or directory"),
    ],
)
def test_mistakes_are_one_line(run: Path, shown: Shown, tmp_path: Path, words: list[str], said: str) -> None:
    words = words if "--out" in words else [*words, "--out", str(tmp_path / "page.html")]
    code, _, complaint = shown(run, *words)
    assert code == 1 and len(complaint.splitlines()) == 1 and said in complaint


def test_a_run_without_rollouts_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rollout\.save=true"):
        show_rollouts.all_files(tmp_path)


def test_of_many_steps_the_first_and_the_last_are_shown() -> None:
    assert show_rollouts.evenly(range(100), 3) == [0, 50, 99] and show_rollouts.evenly(range(3), 12) == [0, 1, 2]
