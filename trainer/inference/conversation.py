"""A conversation with a model: who said what, under which settings, and the next answer as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Generator as Pieces
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from data.chat import Render
from data.formats import RowError
from data.pictures.rows import MARK, VIDEO_MARK
from models.generation import Request, SamplingConfig, Sight, sampling_config
from models.generation.config import Finish
from models.generation.dialogue import Dialogue
from models.generation.search_config import search_kind
from trainer.inference.eyes import BLIND, Eyes
from trainer.inference.settings import settings_of

SHOWN = ("max_new_tokens", "temperature", "seed")
Message = dict[str, Any]
UNUSED = ("samples", "log_probs")
"""Settings without effect on a conversation."""


class TooLong(ValueError):
    """A conversation has no room in the context."""


@dataclass(frozen=True)
class Answer:
    """What became of the last answer."""

    prompt_tokens: int
    tokens: int
    finish: Finish | None
    """None = it was stopped before its end."""
    first_s: float
    """Seconds until the first token."""
    seconds: float


@dataclass
class Conversation:
    """What was said so far, by turns, and how the model answers.

    Raises:
        ValueError: a setting that cannot be, or a system prompt that the chat template does not take.
    """

    dialogue: Dialogue
    render: Render
    given: dict[str, Any] = field(default_factory=dict)
    """Settings as for `sampling_config`."""
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    last: Answer | None = None
    asked: int = 0
    """Answers begun; each draws with another seed."""
    eyes: Eyes = BLIND
    images: list[str] = field(default_factory=list)
    """Paths of the pictures that the next question shows."""
    videos: list[str] = field(default_factory=list)
    """Of its videos: animations, and folders of frames."""

    def __post_init__(self) -> None:
        self.sampling = _sampling(self.given)
        self.set_system(self.system)

    @property
    def context(self) -> int:
        """Most tokens of a conversation."""
        return self.dialogue.model.cfg.max_seq_len

    def set(self, words: Sequence[str]) -> None:
        """Change settings, all or none of `temperature=0.7 top_p=0.9`.

        Raises:
            ValueError: no such setting, or an impossible value.
        """
        given = self.given | settings_of(words)
        self.sampling, self.given = _sampling(given), given

    def set_system(self, text: str | None) -> None:
        """Another system prompt from now on; None = what the chat template writes of its own.

        Raises:
            ValueError: the chat template does not take it.
        """
        if text is not None:
            tried = [{"role": "system", "content": text}, {"role": "user", "content": "question"}]
            if text.strip() not in self._written(tried, True):
                raise ValueError("the chat template has no place for a system prompt; say it in the first message")
        self.system = text

    def show(self, path: str, video: bool = False) -> None:
        """Show a picture, or a video, with the next question; `<image>` and `<video>` say where in it, else they come
        first.

        Raises:
            ValueError: it cannot be used, or the model sees none.
        """
        mark, field, shown = (VIDEO_MARK, "videos", self.videos) if video else (MARK, "images", self.images)
        try:
            self.eyes.look({"prompt": mark, field: [path]}, ".")
        except RowError as error:
            raise ValueError(f"{error}".replace("the row has pictures, but ", "")) from error
        shown.append(path)

    def tokens(self) -> int:
        """Tokens of all that was said and shown."""
        messages = self._messages()
        return len(self._tokens(messages, False)[0]) if messages else 0

    def answer(self, question: str) -> Pieces[str, None, None]:
        """The answer in pieces, as they come. However it ends (it may be closed), what came of it is kept.

        Raises:
            TooLong: the conversation has no room in the context.
            ValueError: the chat template refuses it.
        """
        asked: Message = {"role": "user", "content": question}
        kinds = (("images", MARK, self.images), ("videos", VIDEO_MARK, self.videos))
        first = "".join(mark * len(paths) for _, mark, paths in kinds if mark not in question)
        asked["content"] = f"{first}\n{question}" if first else question
        asked |= {name: [*paths] for name, _, paths in kinds if paths}
        prompt, sight = self._tokens([*self._messages(), asked], True)
        if len(prompt) >= self.context:
            raise TooLong(
                f"the conversation has {len(prompt):,} tokens with this question, and the model's context is "
                f"{self.context:,}; {'forget some of it' if self.turns else 'shorten it'}"
            )
        return self._answer(asked, prompt, sight)

    def _answer(self, asked: Message, prompt: list[int], sight: Sight | None) -> Pieces[str, None, None]:
        request = Request(prompt, self.sampling, self.sampling.seed + self.asked, sight)
        self.asked += 1
        text, tokens, finish, began = "", 0, None, time.perf_counter()
        first = began
        try:
            for step in self.dialogue.stream(request):
                if step.token is None:
                    raise ValueError(step.error)
                if not tokens:
                    first = time.perf_counter()
                text, tokens, finish = text + step.text, tokens + 1, step.finish
                yield step.text
        finally:
            if text or finish is not None:
                self.turns += [asked, {"role": "assistant", "content": text}]
                self.images.clear()
                self.videos.clear()
            self.last = Answer(len(prompt), tokens, finish, first - began, time.perf_counter() - began)

    def undo(self) -> str:
        """Take back the last question and its answer; gives the question, whose pictures will be shown with the next.

        Raises:
            ValueError: there is none.
        """
        if not self.turns:
            raise ValueError("nothing was said yet")
        question, asked = self.turns[-2]["content"], self.turns[-2]
        self.images, self.videos = ([*asked.get(name, ())] for name in ("images", "videos"))
        del self.turns[-2:]
        return question

    def reset(self) -> None:
        """Forget what was said; settings and system prompt stay."""
        self.turns.clear()
        self.images.clear()
        self.videos.clear()

    def _messages(self) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *self.turns]

    def _written(self, messages: list[Message], ask: bool) -> str:
        try:
            return self.render(messages, None, ask)
        except RowError as error:
            raise ValueError(str(error)) from error

    def _tokens(self, messages: list[Message], ask: bool) -> tuple[list[int], Sight | None]:
        tokenizer: Any = self.dialogue.generator.tokenizer
        shown = {name: [path for each in messages for path in each.get(name, ())] for name in ("images", "videos")}
        said = [{key: value for key, value in message.items() if key not in shown} for message in messages]
        try:
            row, seen = self.eyes.look({"messages": said, **shown}, ".")
            text = self._written(row["messages"], ask)
            return self.eyes.shown(tokenizer.encode(text, add_special_tokens=False), seen)
        except RowError as error:
            raise ValueError(str(error)) from error


def settings_shown(sampling: SamplingConfig) -> str:
    """The settings that matter most and those that are not the usual ones, as they are typed."""
    usual = asdict(SamplingConfig())
    return " ".join(
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in asdict(sampling).items()
        if key in SHOWN or value != usual[key]
    )


def _sampling(given: dict[str, Any]) -> SamplingConfig:
    for key in UNUSED:
        if key in given:
            raise ValueError(f"{key}: has no effect on a conversation; leave it out")
    if search_kind(given):
        raise ValueError("a search for a whole text cannot be shown as it comes; use temperature, top_k, top_p, min_p")
    made = sampling_config(given)
    assert isinstance(made, SamplingConfig)
    return made
