"""What scripts/inspect_model.py runs: texts as tokens, with the pictures that are shown among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from convert.opened import Opened
from data.pictures.geometry import plan
from data.pictures.load import load
from data.pictures.notes import Seen
from data.pictures.regions import spot_regions
from data.pictures.rows import MARK
from data.pictures.types import Pictures
from data.rows import RowError
from data.tokenizer import describe, tokenizer_files
from models import ModelConfig
from models.generation import Sight
from trainer.inference.eyes import Eyes
from trainer.inference.loading import renderer_of


@dataclass(frozen=True)
class Shown:
    """A picture among the tokens."""

    name: str
    image: Image.Image
    start: int
    """Its first token of all."""
    stop: int
    regions_S4: np.ndarray
    """Of its spots, see `data.pictures.regions`; those of all pictures follow each other."""


@dataclass(frozen=True)
class Text:
    """Documents as tokens, one after another."""

    documents: tuple[str, ...]
    """As they were tokenised, with one place for each picture."""
    tokens_T: torch.Tensor
    borders: tuple[int, ...]
    letters_T2: np.ndarray
    """int64 [T, 2]: where each token begins and ends in its document."""
    shown: tuple[Shown, ...] = ()
    pictures: Pictures | None = None
    rotary_3T: torch.Tensor | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return np.diff(self.borders).tolist()

    @property
    def patches(self) -> int:
        """Of all pictures."""
        return 0 if self.pictures is None else len(self.pictures.patches_PX)


def read_documents(texts: list[str] | None, file: Path | None) -> tuple[str, ...]:
    """The documents of the command line.

    Raises:
        ValueError: an empty one, no such file, or one that is not UTF-8.
    """
    if file is None:
        documents = tuple(texts or ())
    elif not file.is_file():
        raise ValueError(f"--text-file {file}: there is no such file")
    else:
        try:
            documents = (file.read_text(encoding="utf-8"),)
        except UnicodeDecodeError as error:
            raise ValueError(f"--text-file {file}: not UTF-8 ({error}); convert the file first") from error
    if not all(document.strip() for document in documents):
        where = "--text" if file is None else f"--text-file {file}"
        raise ValueError(f"{where}: the text is empty; give a sentence or more")
    return documents


def dealt_out(documents: Sequence[str], images: Sequence[str]) -> list[list[str]]:
    """The pictures of each document, by the `<image>` in them.

    Raises:
        ValueError: more or fewer of these than pictures; or several documents and none of them says where.
    """
    marks = [document.count(MARK) for document in documents]
    if images and not sum(marks):
        if len(documents) > 1:
            raise ValueError(f"--image with several --text: say with {MARK} where each picture stands")
        return [list(images)]  # before the text, as in rows of data
    if sum(marks) != len(images):
        raise ValueError(
            f"the text has {sum(marks)} places for pictures ({MARK}), and {len(images)} are given; give --image PATH "
            "once for each"
        )
    ends = list(accumulate(marks))
    return [list(images[stop - count : stop]) for count, stop in zip(marks, ends, strict=True)]


class Encoder:
    """Makes tokens of documents and pictures.

    Args:
        tokenizer: the model's; its token for pictures becomes one of its own.
        where: its folder.
        chat: the texts are questions, written down by the chat template.
        answer: what the assistant says to each, if anything.

    Raises:
        ValueError: the tokenizer belongs to a model with a larger vocabulary, or has no chat template.
    """

    def __init__(self, tokenizer: Any, opened: Opened, where: Path, chat: bool, answer: str | None) -> None:
        self.tokenizer, self.cfg, self.answer = tokenizer, opened.cfg, answer
        _check_tokenizer(tokenizer, self.cfg, where)
        self.eyes = Eyes.of(self.cfg, tokenizer)
        self.render = renderer_of(tokenizer, str(where), opened.chat_template) if chat else None
        if chat and self.render is None:
            raise ValueError(
                f"--chat: the tokenizer in {where} has no chat template; write the text as it shall be read"
            )
        if answer is not None and not chat:
            raise ValueError("--answer belongs to --chat; without it, write the answer into --text")

    def encode(self, documents: tuple[str, ...], images: Sequence[str]) -> Text:
        """All documents.

        Raises:
            ValueError: pictures for a model that sees none, ones that cannot be read, more or fewer places than
                pictures, or a document longer than the context.
        """
        if images and self.eyes.cfg is None:
            raise ValueError(
                "--image: the model sees no pictures (model.vision=null); leave it out, or take one that does"
            )
        owned = dealt_out(documents, images) if self.eyes.cfg is not None else [[] for _ in documents]
        parts = [self._one(document, own) for document, own in zip(documents, owned, strict=True)]
        lengths = [len(tokens) for _, tokens, _, _, _ in parts]
        self._check_lengths(max(lengths))
        borders = (0, *accumulate(lengths))
        shown, letters, sights = [], [], []
        for (_, _, spans, seen, sight), start in zip(parts, borders, strict=False):
            shown += self._shown(seen, sight, start)
            letters.append(spans)
            sights.append(sight)
        tokens_T = torch.tensor([token for _, tokens, _, _, _ in parts for token in tokens], dtype=torch.int64)
        pictures, rotary_3T = _joined(sights, borders, bool(self.cfg.rope.sections))
        texts = tuple(text for text, *_ in parts)
        return Text(texts, tokens_T, borders, np.concatenate(letters), tuple(shown), pictures, rotary_3T)

    def _one(
        self, document: str, images: list[str]
    ) -> tuple[str, list[int], np.ndarray, tuple[Seen, ...], Sight | None]:
        """Text, tokens, where they stand in it, and what it shows."""
        try:
            row, seen = self.eyes.look({"prompt": document, "images": images}, ".")
            text = row["prompt"]
            if self.render is not None:
                said = [{"role": "user", "content": text}]
                if self.answer is not None:
                    said.append({"role": "assistant", "content": self.answer})
                text = self.render(said, None, self.answer is None)
            made = self.tokenizer(text, add_special_tokens=self.render is None, return_offsets_mapping=True)
            tokens, sight = self.eyes.shown(made["input_ids"], seen)
        except RowError as error:
            raise ValueError(f"--image: {error}" if images else str(error)) from error
        spans = np.array(made["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        times = np.ones(len(spans), dtype=np.int64)
        times[[token in self.eyes.token_ids for token in made["input_ids"]]] = [each.tokens for each in seen]
        return text, tokens, np.repeat(spans, times, axis=0), seen, sight

    def _shown(self, seen: Sequence[Seen], sight: Sight | None, start: int) -> list[Shown]:
        if sight is None:
            return []
        cfg, found, at = self.eyes.cfg, [], 0
        assert cfg is not None
        for each in seen:
            planned = plan(each.width, each.height, cfg)
            first = start + int(sight.pictures.slots_F[at])
            image = load(each.where.content or each.where.path or "", self.eyes.max_pixels)
            regions = spot_regions(each.width, each.height, planned, cfg)
            name = each.where.named or f"picture {len(found)}"
            found.append(Shown(name, image, first, first + planned.tokens, regions))
            at += planned.tokens
        return found

    def _check_lengths(self, longest: int) -> None:
        if longest > self.cfg.max_seq_len:
            raise ValueError(
                f"the text has {longest} tokens and the model's context is {self.cfg.max_seq_len}; give a shorter one"
            )
        if longest < 1:
            raise ValueError("the tokenizer makes no token of the text; give another text")


def _joined(
    sights: Sequence[Sight | None], borders: Sequence[int], turns: bool
) -> tuple[Pictures | None, torch.Tensor | None]:
    """The pictures of all documents, and time, row and column of their tokens where the model turns by them."""
    seen = [(sight, start) for sight, start in zip(sights, borders, strict=False) if sight is not None]
    if not seen:
        return None, None
    made = [sight.pictures for sight, _ in seen if isinstance(sight.pictures, Pictures)]
    pictures = Pictures.join(made, [start for _, start in seen], [sight.features for sight, _ in seen])
    if not turns:
        return pictures, None
    lengths = np.diff(borders).tolist()
    plain = [torch.arange(length).repeat(3, 1) for length in lengths]
    own = [None if sight is None else sight.rotary_3L for sight in sights]
    return pictures, torch.cat([p if o is None else o for p, o in zip(plain, own, strict=True)], 1)


def _check_tokenizer(tokenizer: Any, cfg: ModelConfig, where: Path) -> None:
    known = describe(tokenizer).vocab_size
    if known > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer in {where} has {known} tokens and the model only {cfg.vocab_size}: it belongs to another "
            "model. Name the folder of the model's own with --tokenizer"
        )


def find_tokenizer(opened: Opened, given: Path | None) -> Path:
    """The folder of the tokenizer.

    Raises:
        ValueError: there is none.
    """
    if given is not None:
        tokenizer_files(str(given), "--tokenizer")
        return given
    if opened.files is None:
        raise ValueError(f"{opened.path} has no tokenizer; name the folder of one with --tokenizer")
    try:
        tokenizer_files(str(opened.files))
    except ValueError:
        raise ValueError(f"{opened.files} has no tokenizer; name the folder of one with --tokenizer") from None
    return opened.files
