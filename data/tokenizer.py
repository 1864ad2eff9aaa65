"""The tokenizer folder: what its files say without loading it, and the loaded tokenizer for building a cache.

A warm start needs only the first: `transformers` (1.4 s to import) is loaded when tokens have to be made. Nothing here
touches the network.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
MAKES_TOKENS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class TokenizerInfo:
    """What a run needs to know of its tokenizer; kept in every cache, so that a warm start has it for free."""

    vocab_size: int
    """Ids lie in 0 .. vocab_size - 1."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    adds_bos: bool
    """Plain text starts with the BOS token."""
    has_chat_template: bool


def tokenizer_files(folder: str, key: str = "data.tokenizer") -> list[str]:
    """Paths of the files that decide what the tokenizer does, sorted.

    Raises:
        ValueError: no such folder, or no tokenizer in it.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{key}={folder} is not a folder; name the folder with tokenizer.json (no hub names)")
    if not any(glob.glob(os.path.join(glob.escape(folder), name)) for name in MAKES_TOKENS):
        raise ValueError(
            f"{key}={folder} holds no tokenizer ({', '.join(MAKES_TOKENS)}); "
            "copy tokenizer.json and tokenizer_config.json there or set data.tokenizer to another folder"
        )
    return sorted({path for name in FILES for path in glob.glob(os.path.join(glob.escape(folder), name))})


def tokenizer_digest(folder: str, key: str = "data.tokenizer") -> str:
    """Hash of the names and contents of the tokenizer's files: changes whenever they do."""
    digest = hashlib.blake2b(digest_size=16)
    for path in tokenizer_files(folder, key):
        with open(path, "rb") as stream:
            content = stream.read()
        digest.update(f"{os.path.basename(path)}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def vocab_size_of(folder: str) -> int | None:
    """Largest id + 1 from tokenizer.json, in milliseconds and without loading it; None where that file is missing.

    Raises:
        ValueError: tokenizer.json is damaged.
    """
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            content = json.load(stream)
        vocab = content["model"]["vocab"]
        ids = [len(vocab) - 1 if isinstance(vocab, list) else max(vocab.values(), default=-1)]
        ids += [token["id"] for token in content.get("added_tokens", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} is not a tokenizer file ({err!r}); copy it again") from err
    return max(ids) + 1


def load_tokenizer(folder: str, key: str = "data.tokenizer") -> Any:
    """The folder's tokenizer (a fast one: loss masks need to know which characters a token covers).

    Raises:
        ValueError: missing or unreadable files, or a tokenizer without a fast form.
    """
    tokenizer_files(folder, key)
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **_model_facts(folder))
    except Exception as err:  # whatever a damaged file makes it raise, the user needs the folder's name
        raise ValueError(f"{key}={folder}: the tokenizer cannot be loaded ({type(err).__name__}: {err})") from err
    if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(
            f"{key}={folder} has only a slow tokenizer ({type(tokenizer).__name__}); convert it to tokenizer.json first"
        )
    return tokenizer


def _model_facts(folder: str) -> dict[str, Any]:
    """What `transformers` asks of a model's config when it chooses the tokenizer's class.

    It would load the config's own class, and with it torch's compiler: 1.2 CPU-seconds at every start. Where the
    tokenizer's files do not name a class, or name one of their own code, it has to.
    """
    found: list[dict[str, Any]] = []
    for name in ("config.json", "tokenizer_config.json"):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as stream:
                found.append(json.load(stream))
        except (OSError, ValueError):  # not there, or broken: transformers then does or says what is to be
            return {}
    model, own = found
    if not isinstance(model, dict) or not isinstance(own, dict) or "auto_map" in {**model, **own}:
        return {}
    if not isinstance(own.get("tokenizer_class"), str) or not isinstance(model.get("model_type"), str):
        return {}
    facts = {key: model.get(key) for key in ("model_type", "model_name", "tokenizer_class")}
    return {"config": SimpleNamespace(**facts, _name_or_path=folder)}


def add_special(tokenizer: Any, text: str) -> None:
    """Make `text` one token of its own, wherever it stands in a text; it keeps its id where it has one."""
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False)], special_tokens=True)


def describe(tokenizer: Any) -> TokenizerInfo:
    """The facts of a loaded tokenizer."""
    ids = tokenizer.backend_tokenizer.encode("a", add_special_tokens=True).ids
    bos = tokenizer.bos_token_id
    return TokenizerInfo(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        bos_id=bos,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        adds_bos=bool(bos is not None and ids and ids[0] == bos),
        has_chat_template=tokenizer.chat_template is not None,
    )
