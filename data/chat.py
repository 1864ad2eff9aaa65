"""Which characters of a rendered conversation are the assistant's, whatever the chat template.

The template is a black box. The conversation is rendered twice: as it is, and with every assistant content replaced by
a unique mark. Cut at the marks, the second rendering gives the template's own text around each answer; found again in
the first, these literals leave exactly what the template made of each answer (stripped, with a thinking block, with
tool calls). An answer starts where the generation prompt ends, as it does when the model is asked, and reaches over the
stop token. Where the literals do not fit, the row is refused with a reason: never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from data.rows import Chat, Row, RowError

Render = Callable[[list[Row], list[Any] | None, bool], str]
"""(messages, tools, with generation prompt) -> text; raises RowError where the template refuses."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character ranges [start, stop) to learn."""

    text: str
    spans: tuple[tuple[int, int], ...]
    turns: int
    """Assistant turns in `spans`."""
    stops: int
    """How many of them end with a stop token."""


class ChatTemplate:
    """A chat template and what one probe of it tells: its generation prompt and its stop token."""

    def __init__(self, render: Render, special_tokens: Iterable[str], eos: str | None, bos: str | None) -> None:
        """
        Args:
            render: the template.
            special_tokens: texts of the tokenizer's special tokens.
            eos: text of the end-of-sequence token.
            bos: text of the beginning-of-sequence token (never a stop token, unless it is `eos` too).
        """
        self._render = render
        specials: set[str] = set(special_tokens) | ({eos} if eos else set())
        self._special = (
            re.compile(r"\s*(" + "|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)) + ")")
            if specials
            else None
        )
        self._not_stops = {bos} - {eos}
        self.header = self._probe_header()
        self.stop_tokens = {eos} if eos else set()
        probed = self._probe_stop()
        if probed is not None:
            self.stop_tokens.add(probed)

    def text(self, chat: Chat) -> str:
        """The whole conversation as the template writes it; RowError if it refuses."""
        return self._render(chat.messages, chat.tools, False)

    def ask(self, chat: Chat) -> str:
        """The conversation and the template's generation prompt; RowError if the template refuses."""
        return self._render(chat.messages, chat.tools, True)

    def render(self, chat: Chat) -> Rendered:
        """Text and learnable ranges of a conversation.

        Raises:
            RowError: the template refuses the conversation, or does something to it that hides where an answer lies.
        """
        text = self.text(chat)
        answers = [i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
        if not any(i >= chat.first_target for i in answers):
            return Rendered(text, (), 0, 0)
        literals, kept = self._literals(chat, answers, text)
        spans, stops, at = [], 0, 0
        for nth, turn in enumerate(kept):
            begin = self._skip(text, at, literals[nth], turn)
            at = self._answer_end(text, begin, literals, nth, chat.messages[turn])
            if turn < chat.first_target:
                continue
            stop = self._stop_end(text, at)
            stops += stop > at
            spans.append((begin, stop))
        return Rendered(text, tuple(spans), len(spans), stops)

    def _literals(self, chat: Chat, answers: list[int], text: str) -> tuple[list[str], list[int]]:
        """The template's text around the answers it shows (one more than answers), and those answers' indices."""
        marks = {i: _unused_mark(i, text) for i in answers}
        messages = [
            {"role": "assistant", "content": marks[i]} if i in marks else m for i, m in enumerate(chat.messages)
        ]
        skeleton = self._render(messages, chat.tools, False)
        kept, literals, at = [], [], 0
        for i in answers:
            count = skeleton.count(marks[i])
            if count == 0:
                continue  # the template shows no such turn: there is nothing to learn in it
            where = skeleton.find(marks[i], at)
            if count > 1 or where < 0:
                raise RowError(f"the chat template shows message {i} more than once or out of order")
            literals.append(skeleton[at:where])
            kept.append(i)
            at = where + len(marks[i])
        literals.append(skeleton[at:])
        return literals, kept

    def _before_answer(self, literal: str) -> str:
        """The literal up to the end of its generation prompt: what the template adds after that is the answer's."""
        cut = literal.rfind(self.header) if self.header else -1
        return literal if cut < 0 else literal[: cut + len(self.header)]

    def _skip(self, text: str, at: int, literal: str, turn: int) -> int:
        head = self._before_answer(literal)
        if not text.startswith(head, at):
            raise RowError(f"the chat template writes different text before message {turn} depending on its content")
        return at + len(head)

    def _answer_end(self, text: str, begin: int, literals: list[str], nth: int, message: Row) -> int:
        """Where the answer that starts at `begin` ends (before its stop token)."""
        last = nth + 2 == len(literals)
        after = literals[nth + 1] if last else self._before_answer(literals[nth + 1])
        added = literals[nth][len(self._before_answer(literals[nth])) :]
        content = message["content"]
        for form in (content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n")):
            end = begin + len(added) + len(form)
            if text.startswith(added + form + after, begin) and (not last or end + len(after) == len(text)):
                return end
        # The template rewrote the answer (thinking block, tool calls): it is what lies between the two literals.
        end = len(text) - len(after) if last else text.find(after, begin)
        if end < begin or not after.strip() or not text.startswith(after, end):
            raise RowError("cannot tell where an answer ends: the chat template rewrites it beyond recognition")
        if self.header and self.header in text[begin:end]:
            raise RowError("cannot tell where an answer ends: its text repeats the chat template's own marks")
        return end

    def _stop_end(self, text: str, at: int) -> int:
        """End of the stop token that follows `at` (white space between belongs to it); `at` if none follows."""
        found = self._special.match(text, at) if self._special else None
        return found.end() if found and found.group(1) in self.stop_tokens else at

    def _probe_header(self) -> str:
        """The generation prompt: what the template adds to ask for an answer; empty if it adds nothing."""
        question = [{"role": "user", "content": "question"}]
        try:
            plain, asking = self._render(question, None, False), self._render(question, None, True)
        except RowError:
            return ""  # a template that refuses a lone question: answers then start where their content does
        return asking[len(plain) :] if asking.startswith(plain) else ""

    def _probe_stop(self) -> str | None:
        """The special token after the answer that ends a conversation; None if there is none."""
        mark = _unused_mark(0, "")
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        try:
            text = self._render(turns, None, False)
        except RowError:
            return None
        at = text.find(mark)
        found = self._special.match(text, at + len(mark)) if self._special and at >= 0 else None
        return found.group(1) if found and found.group(1) not in self._not_stops else None


def special_tokens(tokenizer: Any) -> set[str]:
    """Texts of all special tokens; `all_special_tokens` alone lacks those without a role, such as <|eot_id|>."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def template_renderer(tokenizer: Any, template: str | None, where: str) -> Render:
    """The tokenizer's chat template (or `template`, jinja text) as a function.

    Args:
        where: what to call the template in messages: its file or the tokenizer's folder.

    Raises:
        ValueError: no template at all, or one that is not valid jinja.
    """
    import jinja2  # comes with transformers, needed only where chats are rendered

    if template is None and tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer in {where} has no chat template, but the data are chats; set data.chat_template=FILE.jinja "
            "or turn the rows into format=text or format=prompt_completion with plain strings"
        )
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_without_marks(template or ""))
    except jinja2.TemplateSyntaxError as err:
        raise ValueError(f"data.chat_template={where} is not valid jinja: line {err.lineno}: {err.message}") from err

    def render(messages: list[Row], tools: list[Any] | None, ask: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, add_generation_prompt=ask, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as err:
            raise RowError(f"the chat template refuses the conversation: {err}") from err

    return render


def _without_marks(template: str) -> str:
    """`{% generation %}` blocks are an extension of transformers; plain jinja would call them a syntax error."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def _unused_mark(index: int, text: str) -> str:
    mark = f"Q7x{index}x7Q"
    while mark in text:
        mark = f"Q{mark}Q"
    return mark
