"""What a task says, written down behind the policy's text so that it goes on from there.

The tokens the policy wrote are never made anew: rendering a conversation and encoding it again may give other tokens
than were drawn (another way to cut the same text, thoughts that the template drops from earlier turns). Only what the
chat template writes *behind* the last answer is encoded and appended: its end, the task's turn, the next header.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.chat import Render
from data.formats import Row, RowError
from data.prompt import Prompt
from trainer.rollout.types import Turn

_MARK = "Q7x0x7Q"


class Continuation:
    """Tokens between one text of the policy and the next.

    Args:
        render: the chat template; None where prompts are plain texts, behind which answers stand as they are.
        role: whose turn an answer is.
    """

    def __init__(self, tokenizer: Any, render: Render | None, role: str) -> None:
        self.tokenizer, self.render, self.role = tokenizer, render, role

    def check(self) -> None:
        """Whether the chat template writes a task's turn behind an answer.

        Raises:
            ValueError: it does not.
        """
        if self.render is None:
            return
        asked = Prompt(0, 0, "", (), "", ({"role": "user", "content": "question"},), {})
        try:
            shown = "Z5answerZ5" in self._tail(asked, [Turn("assistant", "text", 0, 0)], "Z5answerZ5")
            reason = "the chat template does not write it down"
        except RowError as error:
            shown, reason = False, str(error)
        if not shown:
            other = "user" if self.role == "tool" else "tool"
            raise ValueError(
                f"rollout.task_role={self.role}: a turn of this role cannot follow an answer ({reason}); set "
                f"rollout.task_role={other} or another data.chat_template"
            )

    def tokens(self, prompt: Prompt, turns: Sequence[Turn], last: int, answer: str) -> list[int]:
        """What follows the token `last`, with which the policy ended the last of `turns`.

        Raises:
            RowError: the chat template refuses the conversation, or hides where its last answer ends.
        """
        tail = answer if prompt.messages is None else self._tail(prompt, turns, answer)
        stop = self.tokenizer.decode([last], skip_special_tokens=False)
        begun = tail.lstrip()
        if prompt.messages is not None and stop.strip() and begun.startswith(stop):
            tail = begun[len(stop) :]  # the policy wrote the end of its turn itself
        return list(self.tokenizer.encode(tail, add_special_tokens=False))

    def _tail(self, prompt: Prompt, turns: Sequence[Turn], answer: str) -> str:
        """What the chat template writes behind the last answer."""
        assert self.render is not None and prompt.messages is not None and turns[-1].learnt
        said: list[Row] = [{"role": turn.role, "content": turn.text} for turn in turns[:-1]]
        end: list[Row] = [{"role": "assistant", "content": _MARK}, {"role": self.role, "content": answer}]
        tools = prompt.fields.get("tools")
        text = self.render([*map(dict, prompt.messages), *said, *end], tools if isinstance(tools, list) else None, True)
        before, mark, tail = text.rpartition(_MARK)
        if not mark or _MARK in before:
            raise RowError("the chat template does not show an answer once, as it is")
        return tail
