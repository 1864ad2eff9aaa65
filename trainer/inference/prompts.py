"""What a row asks for: {"messages": [...]} or {"prompt": "..."}, perhaps with its own "sampling" and "tools"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.chat import Render
from data.formats import Row, RowError, check_messages
from data.pictures.notes import Seen
from models.generation import Request, SamplingConfig, sampling_config
from models.generation.config import Settings
from trainer.inference.eyes import BLIND, Eyes
from trainer.inference.loading import TextModel

CHARACTERS_PER_TOKEN = 4
"""Of most text, about; for the order of the work only."""


@dataclass(frozen=True)
class Asked:
    """A row that can be asked."""

    messages: list[Row] | None
    """None: a text that goes on."""
    prompt: str
    tools: list[Any] | None
    sampling: Settings
    seed: int | None
    """Of its first sample; None for searches, which draw nothing."""
    seen: tuple[Seen, ...] = ()
    """Its pictures."""

    @property
    def work(self) -> int:
        """About how many tokens it may come to."""
        characters = len(self.prompt) + sum(len(turn["content"]) for turn in self.messages or ())
        looked_at = sum(each.tokens for each in self.seen)
        return characters // CHARACTERS_PER_TOKEN + looked_at + self.sampling.max_new_tokens


class Asking:
    """Makes of rows what a generator is asked.

    Args:
        defaults: sampling settings of rows without their own, as `sampling_config` takes them.
        chat: write the prompts of rows down as a user's message.
        has_template: whether messages can be written down at all.
        eyes: what is made of a row's pictures.
        folder: what their relative paths start from.

    Raises:
        ValueError: settings that cannot be.
    """

    def __init__(
        self, defaults: Mapping[str, Any], chat: bool, has_template: bool, eyes: Eyes = BLIND, folder: str = "."
    ) -> None:
        self.defaults, self.chat, self.has_template = dict(defaults), chat, has_template
        self.eyes, self.folder = eyes, folder
        self.sampling = sampling_config(self.defaults)
        self._made: dict[str, Settings] = {}

    def asked(self, row: Row, line: int) -> Asked:
        """What a row asks for.

        Args:
            line: its number in the file, from 1; the seed counts on with it.

        Raises:
            RowError: it asks for nothing, or for something that cannot be.
        """
        row, seen = self.eyes.look(row, self.folder)
        messages, prompt = self._prompt(row)
        if messages is not None and not self.has_template:
            raise RowError("the tokenizer has no chat template for messages; give --chat-template FILE, or a prompt")
        tools = row.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise RowError(f"tools is {_kind(tools)}, not a list")
        own = row.get("sampling")
        sampling = self._sampling(own)
        seed = None
        if isinstance(sampling, SamplingConfig):
            seed = sampling.seed if own is not None and "seed" in own else sampling.seed + line - 1
        return Asked(messages, prompt, tools or None, sampling, seed, seen)

    def _prompt(self, row: Row) -> tuple[list[Row] | None, str]:
        """Messages, or a text that goes on."""
        key = next((name for name in ("messages", "prompt") if row.get(name) is not None), None)
        if key is None:
            raise RowError(f"there is no prompt and there are no messages among its keys ({_names(row)})")
        value = row[key]
        if isinstance(value, list):
            messages = check_messages(value)
            if messages[-1]["role"] == "assistant":
                raise RowError(f"the last of the {key} is the assistant's: there is nothing to answer; leave it out")
            if not any(turn["content"].strip() for turn in messages):
                raise RowError(f"the {key} are empty")
            _check_text("".join(turn["content"] for turn in messages), key)
            return messages, ""
        if key == "messages" or not isinstance(value, str):
            wanted = "a list of messages" if key == "messages" else "a string or a list of messages"
            raise RowError(f"{key} is {_kind(value)}, not {wanted}")
        if not value.strip():
            raise RowError("the prompt is empty")
        _check_text(value, key)
        return ([{"role": "user", "content": value}], "") if self.chat else (None, value)

    def _sampling(self, own: Any) -> Settings:
        if own is None:
            return self.sampling
        if not isinstance(own, dict):
            raise RowError(f"sampling is {_kind(own)}, not an object")
        key = json.dumps(own, sort_keys=True)
        if key not in self._made:
            try:
                self._made[key] = sampling_config({**self.defaults, **own})
            except ValueError as error:
                raise RowError(" ".join(f"{error}".split())) from error
        return self._made[key]


class Prompter:
    """Turns what is asked into tokens, as the model was trained to see it."""

    def __init__(self, tokenizer: Any, render: Render | None, eyes: Eyes = BLIND) -> None:
        self.tokenizer, self.render, self.eyes = tokenizer, render, eyes

    @staticmethod
    def of(model: TextModel) -> Prompter:
        """That of an opened model."""
        return Prompter(model.tokenizer, model.render, model.eyes)

    def chat(self, messages: list[Row], tools: list[Any] | None = None) -> list[int]:
        """Messages by the chat template, up to where the answer begins.

        Raises:
            RowError: the template refuses them.
        """
        assert self.render is not None, "there is no chat template"
        return self.tokenizer.encode(self.render(messages, tools, True), add_special_tokens=False)

    def request(self, asked: Asked) -> Request:
        """A generator's request.

        Raises:
            RowError: the template refuses the messages, or a picture cannot be read.
        """
        if asked.messages is None:
            tokens = self.tokenizer.encode(asked.prompt)
        else:
            tokens = self.chat(asked.messages, asked.tools)
        tokens, sight = self.eyes.shown(tokens, asked.seen)
        return Request(tokens, asked.sampling, asked.seed, sight)


def _check_text(text: str, key: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{key}: half a surrogate pair at character {error.start}: not valid Unicode") from error


def _names(row: Row) -> str:
    names = [str(name) for name in row]
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8) if names else "none"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
