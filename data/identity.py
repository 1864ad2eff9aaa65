"""What makes two tokenizers the same: which id each token has, how text is cut, how conversations are written down.

Told from the files alone, in a fraction of a second, so that a run can be compared with what it starts from.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from data.tokenizer import MAKES_TOKENS, tokenizer_files

TEMPLATE_FILE = "chat_template.jinja"
CUTS_TEXT = (*MAKES_TOKENS, "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as far as a model's embeddings and habits hang on it."""

    tokens: tuple[str, ...] | None
    """Text of each id, "" where an id has none; None where the files do not say (no tokenizer.json)."""
    vocabulary: str
    """Hash of them."""
    cutting: str
    """Hash of how text becomes tokens: normaliser, first cuts, merges."""

    def begins_with(self, size: int, vocabulary: str) -> bool:
        """Whether the first ``size`` tokens are those of the vocabulary with this hash: then others only follow."""
        return self.tokens is not None and size <= len(self.tokens) and _hash(self.tokens[:size]) == vocabulary


def files_hash(folder: str) -> str:
    """Hash of the files that decide which tokens a text becomes. Where it is the same, so is all else here.

    Raises:
        ValueError: there is no tokenizer.
    """
    texts: list[str] = []
    for path in tokenizer_files(folder, "tokenizer"):
        if any(fnmatch.fnmatch(os.path.basename(path), pattern) for pattern in CUTS_TEXT):
            with open(path, "rb") as stream:
                texts += [os.path.basename(path), hashlib.blake2b(stream.read()).hexdigest()]
    return _hash(tuple(texts))


def vocabulary_of(folder: str) -> Vocabulary:
    """The tokenizer in a folder.

    Raises:
        ValueError: there is none.
    """
    changed = max(os.stat(path).st_mtime_ns for path in tokenizer_files(folder, "tokenizer"))
    return _vocabulary(os.path.realpath(folder), changed)


@functools.lru_cache(maxsize=4)
def _vocabulary(folder: str, changed: int) -> Vocabulary:
    try:
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as stream:
            content = json.load(stream)
        tokens = _tokens(content)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
    ):  # none, or of another make: its bytes
        digest = files_hash(folder)
        return Vocabulary(None, digest, digest)
    model = {key: value for key, value in content["model"].items() if key != "vocab"}
    if isinstance(model.get("merges"), list):  # "a b" and ["a", "b"] are two spellings of the same
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    cutting = _said({key: content.get(key) for key in ("normalizer", "pre_tokenizer")} | {"model": model})
    return Vocabulary(tokens, _hash(tokens), _hash((json.dumps(cutting, sort_keys=True),)))


def _tokens(content: dict[str, Any]) -> tuple[str, ...]:
    vocab = content["model"]["vocab"]
    ids = {entry[0]: at for at, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    texts = [""] * (max(ids.values()) + 1)
    for text, number in ids.items():
        texts[number] = text
    return tuple(texts)


def _said(value: Any) -> Any:
    """Without what is null or false: some versions write it out and others leave it away."""
    if isinstance(value, dict):
        return {key: _said(each) for key, each in value.items() if each is not None and each is not False}
    return [_said(each) for each in value] if isinstance(value, list) else value


def template_hash(folder: str | None, file: str | None) -> str | None:
    """Hash of the chat template: that of a file if one is named, else the tokenizer's own; None where there is none.

    Raises:
        ValueError: the file cannot be read.
    """
    text = _read(file) if file is not None else _own_template(folder) if folder is not None else None
    return None if text is None else _hash((text.rstrip("\n"),))


def _read(path: str) -> str:
    try:
        with open(os.path.expanduser(path), encoding="utf-8") as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the chat template {path} cannot be read ({error}); name another file") from error


def _own_template(folder: str) -> str | None:
    path = os.path.join(folder, TEMPLATE_FILE)
    if os.path.isfile(path):
        return _read(path)
    try:
        with open(os.path.join(folder, "tokenizer_config.json"), encoding="utf-8") as stream:
            found = json.load(stream).get("chat_template")
    except (OSError, ValueError, AttributeError):  # no such file: then there is no template either
        return None
    if isinstance(found, list):  # several, by name
        found = next((each.get("template") for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _hash(texts: tuple[str, ...]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
