"""What an evaluation has to know of a tokenizer: the bytes its tokens stand for, and whether it is the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from convert.hf_folder_files import has_tokenizer
from convert.opened import Opened
from data.tokenizer import load_tokenizer, tokenizer_digest

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def byte_lengths(tokenizer: Any) -> np.ndarray | None:
    """UTF-8 bytes of text that each token stands for, int64 [V]; special tokens stand for none.

    Exact for byte-level BPE and for SentencePiece with byte fallback (whose added space before a text counts).

    Returns:
        None for any other kind of tokenizer: what a token stands for cannot be told there.
    """
    kinds = set(_types(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")))
    if "ByteLevel" in kinds:
        count = len  # one character of the token's name for each byte
    elif kinds & {"Metaspace", "ByteFallback"}:
        count = _sentencepiece_bytes
    else:
        return None
    vocab: dict[str, int] = tokenizer.get_vocab()
    bytes_V = np.zeros(max(vocab.values()) + 1, dtype=np.int64)
    for token, index in vocab.items():
        bytes_V[index] = count(token)
    for index, added in tokenizer.added_tokens_decoder.items():
        bytes_V[index] = 0 if added.special else len(added.content.encode("utf-8"))
    return bytes_V


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace(SPACE, " ").encode("utf-8"))


def _types(decoder: Any) -> list[str]:
    if not isinstance(decoder, dict):
        return []
    inner = decoder.get("decoders", [])
    return [decoder.get("type", ""), *(kind for each in inner for kind in _types(each))]


def tokenizer_folder(asked: str | None, opened: Opened, key: str = "--tokenizer") -> str:
    """The folder of the tokenizer to use: the one that was asked for, or the model's own.

    Raises:
        ValueError: there is none, or it gives other ids than the one that lies with the model.
    """
    own = str(opened.files) if opened.files is not None and has_tokenizer(opened.files) else None
    if asked is None and own is None:
        raise ValueError(f"{opened.path} has no tokenizer; name its folder with --tokenizer FOLDER")
    if asked is None or own is None or tokenizer_digest(asked, key) == tokenizer_digest(own):
        return asked or own or ""
    ours, theirs = (load_tokenizer(folder, key).get_vocab() for folder in (asked, own))
    differ = [token for token, index in ours.items() if theirs.get(token, index) != index]
    if differ:
        token = differ[0]
        raise ValueError(
            f"the tokenizer in {asked} is not the model's, which lies in {own}: {len(differ)} tokens have other ids "
            f"({token!r} is {ours[token]} against {theirs[token]}); use --tokenizer {Path(own)}"
        )
    return asked


def check_ids(largest: int, folder: str, vocab_size: int) -> None:
    """The ids that were made must have an embedding.

    Raises:
        ValueError: one has none.
    """
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} is not the model's: it makes ids up to {largest} on this data, and the model "
            f"has {vocab_size}; name the right one with --tokenizer FOLDER"
        )
