"""Samples to tokens and loss masks: tokenise once, then mark the tokens that share a character with a learnt range."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data.captions import check_caption
from data.chat import ChatTemplate
from data.rows import Ask, Caption, Chat, Completion, Judged, Pair, RowError, Sample, Text
from data.tokenizer import TokenizerInfo

CUT, TRUNCATE, DROP = range(3)
"""What happens to a sample longer than a row: consecutive pieces, only its beginning, or it is left out and counted."""


@dataclass(frozen=True)
class Prepared:
    """A sample as the text to tokenise, with the character ranges to learn."""

    text: str
    spans: tuple[tuple[int, int], ...]
    plain: bool
    """BOS (if the tokenizer uses it) and EOS are added around the text; chats get theirs from the template."""
    turns: int
    """Endings to learn: assistant turns, or 1 for a text or a completion."""
    stops: int
    """How many of them are followed by a learnt stop token."""
    too_long: int
    """CUT, TRUNCATE or DROP."""
    content_hash: int = 0
    """64-bit hash of the sample itself: the same wherever it stands, and with any tokenizer, template or layout. Of
    preferences and prompts the hash of the prompt alone: all answers to it are held out together; of captions that of
    the picture."""
    blank: bool = False
    """There is no text to learn."""
    pictures: tuple[int, ...] = ()
    """Tokens that each of its pictures becomes; the text has one place for each."""
    caption: bool = False
    """It stands between the marks of the tokenizer's own rule, and its picture has no place in it."""


@dataclass(frozen=True)
class Encoded:
    """`tokens_L` and whether each is learnt, `learn_L`."""

    tokens_L: np.ndarray
    learn_L: np.ndarray
    starts: tuple[int, ...] = ()
    """First token of each picture."""


class Encoder:
    """Turns samples into tokens with one tokenizer, one template and one choice of what to learn."""

    def __init__(
        self,
        tokenizer: Any,
        info: TokenizerInfo,
        chat: Callable[[], ChatTemplate],
        loss_on: str,
        pictures: tuple[str, ...] = (),
        ends: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    ) -> None:
        """
        Args:
            tokenizer: a fast `transformers` tokenizer.
            info: its facts.
            chat: gives the chat template; called at the first chat, so that plain text needs none.
            loss_on: "assistant" (answers and completions) or "all" (every token).
            pictures: texts of the tokens that stand for pictures and videos, if the model sees any.
            ends: tokens before and behind a caption.
        """
        assert loss_on in ("assistant", "all"), loss_on
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._info = info
        self._get_chat = chat
        self._chat: ChatTemplate | None = None
        self._all = loss_on == "all"
        self._pictures, self._ends = pictures, ends
        self._picture_ids = [tokenizer.convert_tokens_to_ids(text) for text in pictures]

    def prepare(self, sample: Sample, pictures: tuple[int, ...] = (), identity: bytes = b"") -> tuple[Prepared, ...]:
        """The documents of a sample as texts, and what to learn of them: two of a pair, one of anything else.

        Args:
            pictures: tokens that each of its pictures becomes.
            identity: what tells samples with the same text and other pictures apart.

        Raises:
            RowError: the sample cannot be used.
            ValueError: a chat, and there is no usable chat template.
        """
        if isinstance(sample, Pair):
            chosen, rejected = self._answer(sample.chosen), self._answer(sample.rejected)
            documents = [replace(each, too_long=DROP) for each in (chosen, rejected)]
        elif isinstance(sample, Judged):
            documents = [self._answer(sample.answer)]
        elif isinstance(sample, Caption):
            documents = [self._caption(sample, pictures)]
        else:
            documents = [self._prepare(sample)]
        for document in documents:
            try:
                document.text.encode("utf-8")
            except UnicodeEncodeError as err:
                raise RowError(
                    f"the text has half a surrogate pair at character {err.start}: not valid Unicode"
                ) from err
        for document in documents:
            places = sum(document.text.count(text) for text in self._pictures)
            if places != len(pictures) and not document.caption:
                raise RowError(f"the text has {places} places for pictures, but the row has {len(pictures)} pictures")
        hashed = _content_hash(sample, identity)
        return tuple(replace(document, content_hash=hashed, pictures=pictures) for document in documents)

    def _answer(self, sample: Completion | Chat) -> Prepared:
        """A document of which only the answer counts, whatever `loss_on` says."""
        if isinstance(sample, Completion):
            start, text = len(sample.prompt), sample.prompt + sample.completion
            ends = int(self._info.eos_id is not None)
            return Prepared(text, ((start, len(text)),), True, 1, ends, TRUNCATE, blank=not sample.completion.strip())
        rendered = self._template().render(sample)
        said = [turn for turn in sample.messages[sample.first_target :] if turn["role"] == "assistant"]
        blank = not any(turn["content"].strip() or turn.get("tool_calls") for turn in said)
        return Prepared(rendered.text, rendered.spans, False, rendered.turns, rendered.stops, TRUNCATE, blank=blank)

    def _caption(self, sample: Caption, pictures: tuple[int, ...]) -> Prepared:
        text = sample.text
        for token in self._pictures:
            text = text.replace(token, "")
        text = text.strip()
        check_caption(text, len(pictures))
        return Prepared(text, ((0, len(text)),), False, 1, int(bool(self._ends[1])), TRUNCATE, caption=True)

    def _template(self) -> ChatTemplate:
        if self._chat is None:
            self._chat = self._get_chat()
        return self._chat

    def _prepare(self, sample: Sample) -> Prepared:
        ends = int(self._info.eos_id is not None)
        if isinstance(sample, Text):
            spans = ((0, len(sample.text)),) if self._all else ()
            return Prepared(sample.text, spans, True, int(self._all), ends * int(self._all), CUT)
        if isinstance(sample, Completion):
            text = sample.prompt + sample.completion
            return Prepared(text, ((0 if self._all else len(sample.prompt), len(text)),), True, 1, ends, TRUNCATE)
        if isinstance(sample, Ask):
            text = sample.prompt
            if not isinstance(text, str):
                text = self._template().ask(Chat(text, tools=sample.tools))
            return Prepared(text, (), isinstance(sample.prompt, str), 0, 0, DROP)
        assert isinstance(sample, Chat)
        if self._all:
            return self._whole_chat(sample, self._template())
        rendered = self._template().render(sample)
        return Prepared(rendered.text, rendered.spans, False, rendered.turns, rendered.stops, TRUNCATE)

    def _whole_chat(self, sample: Chat, chat: ChatTemplate) -> Prepared:
        """All of a conversation; where its answers end matters only for the report on stop tokens."""
        text = chat.text(sample)
        try:
            rendered = chat.render(sample)
            turns, stops = rendered.turns, rendered.stops
        except RowError:
            turns, stops = 1, 0
        return Prepared(text, ((0, len(text)),), False, turns, stops, TRUNCATE)

    def encode(self, batch: list[Prepared]) -> list[Encoded]:
        """Tokens and masks of a batch, in order; runs on all threads the tokenizer has."""
        whole = [index for index, item in enumerate(batch) if _all_or_nothing(item)]
        parts = [index for index, item in enumerate(batch) if not _all_or_nothing(item)]
        results: list[Encoded | None] = [None] * len(batch)
        texts = [batch[index].text for index in whole]
        for index, encoding in zip(
            whole, self._backend.encode_batch_fast(texts, add_special_tokens=False), strict=True
        ):
            tokens_L = np.array(encoding.ids, dtype=np.int64)
            results[index] = self._finish(batch[index], tokens_L, np.full(len(tokens_L), bool(batch[index].spans)))
        texts = [batch[index].text for index in parts]
        for index, encoding in zip(parts, self._backend.encode_batch(texts, add_special_tokens=False), strict=True):
            tokens_L = np.array(encoding.ids, dtype=np.int64)
            learn_L = mask_from_spans(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), batch[index].spans)
            results[index] = self._finish(batch[index], tokens_L, learn_L)
        return [result for result in results if result is not None]

    def _finish(self, item: Prepared, tokens_L: np.ndarray, learn_L: np.ndarray) -> Encoded:
        if item.plain:
            tokens_L, learn_L = self._with_ends(item, tokens_L, learn_L)
        if item.caption:
            before, behind = self._ends
            tokens_L = np.concatenate([np.array(before, np.int64), tokens_L, np.array(behind, np.int64)])
            return Encoded(tokens_L, np.ones(len(tokens_L), dtype=bool), (0,))
        if not item.pictures:
            return Encoded(tokens_L, learn_L)
        places = np.flatnonzero(np.isin(tokens_L, self._picture_ids))
        assert len(places) == len(item.pictures), "the tokenizer knows the token of pictures under another text"
        times_L = np.ones(len(tokens_L), dtype=np.int64)
        times_L[places] = item.pictures
        learn_L[places] = False
        starts = (np.cumsum(times_L) - times_L)[places]
        return Encoded(np.repeat(tokens_L, times_L), np.repeat(learn_L, times_L), tuple(starts.tolist()))

    def _with_ends(
        self, item: Prepared, tokens_L: np.ndarray, learn_L: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """A text between the tokenizer's marks of its beginning and its end."""
        bos, eos = self._info.bos_id, self._info.eos_id
        if bos is not None and self._info.adds_bos and (not len(tokens_L) or tokens_L[0] != bos):
            tokens_L, learn_L = np.insert(tokens_L, 0, bos), np.insert(learn_L, 0, self._all)
        asks = item.too_long == DROP and not item.turns  # a prompt goes on
        if eos is not None and not asks and (not len(tokens_L) or tokens_L[-1] != eos):
            tokens_L, learn_L = np.append(tokens_L, eos), np.append(learn_L, bool(item.spans))
        return tokens_L, learn_L


def _content_hash(sample: Sample, identity: bytes) -> int:
    of: Any = "" if isinstance(sample, Caption) else vars(sample)
    if isinstance(sample, Pair | Judged | Ask):
        of = _prompt_of(sample) or (repr(sample) if isinstance(sample, Pair | Judged) else "")
    content = json.dumps(of, sort_keys=True, default=str).encode("utf-8")
    return int.from_bytes(hashlib.blake2b(content + identity, digest_size=8).digest(), "little")


def _prompt_of(sample: Pair | Judged | Ask) -> str | list[Any]:
    if isinstance(sample, Ask):
        return sample.prompt
    document = sample.chosen if isinstance(sample, Pair) else sample.answer
    return document.prompt if isinstance(document, Completion) else document.messages[: document.first_target]


def mask_from_spans(offsets_L2: np.ndarray, spans: tuple[tuple[int, int], ...]) -> np.ndarray:
    """Which tokens share a character with a span.

    Args:
        offsets_L2: [start, stop) characters of each token. Byte-level tokenizers leave white space out of them, so a
            gap is counted to the token behind it.
        spans: ascending [start, stop) ranges of characters.

    Returns:
        bool [L].
    """
    if not len(offsets_L2):
        return np.zeros(0, dtype=bool)
    stop_L = np.maximum.accumulate(offsets_L2[:, 1])
    start_L = np.minimum(offsets_L2[:, 0], np.concatenate([[0], stop_L[:-1]]))
    learn_L = np.zeros(len(offsets_L2), dtype=bool)
    for begin, end in spans:
        learn_L |= (start_L < end) & (stop_L > begin)
    return learn_L


def _all_or_nothing(item: Prepared) -> bool:
    return not item.spans or item.spans == ((0, len(item.text)),)
