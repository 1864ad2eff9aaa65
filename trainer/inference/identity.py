"""What results depend on: two runs of the same may share a folder and go on with each other's rows."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from convert.opened import Opened
from data.tokenizer import tokenizer_digest
from models.generation.config import Settings
from trainer.inference.loading import TextModel


def identity_of(
    model: TextModel, draft: TextModel | None, sampling: Settings, data: str, **choices: str | bool
) -> dict[str, Any]:
    """The settings that results depend on, as values for JSON.

    Args:
        data: digest of the input's content.
        choices: other settings by their names.
    """
    settings = {f"sampling.{key}": value for key, value in dataclasses.asdict(sampling).items()}
    kind = type(sampling).__name__
    return _plain(
        {
            "model": weights_digest(model.opened),
            "tokenizer": tokenizer_digest(model.folder),
            "chat template": _digest(repr(model.tokenizer.chat_template).encode()),
            "stop tokens": list(model.stop_tokens),
            "draft": None if draft is None else weights_digest(draft.opened),
            "data": data,
            "sampling": kind,
            **settings,
            **choices,
        }
    )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    found = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key in ("model", "tokenizer", "chat template", "draft", "data"):
            found.append(f"{key}: its content is another" if old and new else f"{key}: was {_given(old)}")
        else:
            found.append(f"{key}: was {old!r}, now {new!r}")
    return found


def weights_digest(opened: Opened) -> str:
    """Of the names and shapes of all tensors and the values of the smallest, which training changes too.

    A copy in another place has the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, meta in sorted(opened.tensors.metas.items()):
        digest.update(f"{name} {tuple(meta.shape)} {meta.dtype}\n".encode())
        if len(meta.shape) == 1:
            values = opened.tensors.rows(name, 0, meta.shape[0])
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _given(value: Any) -> str:
    return "not given, and is now" if value is None else "given, and is not now"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """With lists where there were tuples, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
