"""New tokens for a model: into the tokenizer, and rows for them into the embedding and the head."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from convert.boxes import Tensors
from convert.copying import blocks
from convert.hf_folder_files import read_json, write_json
from convert.reshaped import Grown, Recipe, Taken, listed

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Init = Literal["mean", "subtokens"]


@dataclass(frozen=True)
class Tokens:
    """What adding tokens to a tokenizer did."""

    tokenizer: Any
    """With the new tokens."""
    added: Mapping[str, int]
    """New tokens and their ids."""
    pieces: Mapping[str, Sequence[int]]
    """What the tokenizer made of each new token before it knew it."""
    known: Mapping[str, int]
    """Asked for, but in the vocabulary already."""
    ids: Collection[int]
    """Every id the tokenizer had before."""


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; code that lies there is not run.

    Raises:
        ValueError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # the libraries below raise anything, even a bare Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read: {err}") from err


def add_tokens(tokenizer: Any, wanted: Sequence[str], special: bool) -> Tokens:
    """Add tokens, which are found in raw text wherever they stand; a known one is left alone.

    Args:
        special: left out when text is decoded without special tokens.

    Raises:
        ValueError: nothing to add, or the tokenizer does not find a token in its own text.
    """
    from transformers import AddedToken

    vocab = dict(tokenizer.get_vocab())
    known, pieces = {}, {}
    for token in wanted:
        ids = tokenizer.encode(token, add_special_tokens=False)
        if token in vocab:
            known[token] = vocab[token]
        elif len(ids) == 1 and tokenizer.decode(ids) == token:
            known[token] = ids[0]
        else:
            pieces[token] = ids
    if not pieces:
        raise ValueError(f"nothing to add, the tokenizer knows every token already:{listed(_with_ids(known))}")
    new = [AddedToken(token, normalized=False, special=special) for token in pieces]
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    else:
        tokenizer.add_tokens(new)
    added = {token: tokenizer.convert_tokens_to_ids(token) for token in pieces}
    lost = [token for token, i in added.items() if i not in tokenizer.encode(token, add_special_tokens=False)]
    if lost or set(added.values()) & set(vocab.values()):
        raise ValueError(f"the tokenizer does not take these tokens: {', '.join(map(repr, lost or added))}")
    return Tokens(tokenizer, added, pieces, known, set(vocab.values()))


def _with_ids(tokens: Mapping[str, int]) -> list[str]:
    return [f"{token!r} is {i}" for token, i in tokens.items()]


def save_tokenizer(tokenizer: Any, source: Path, target: Path) -> None:
    """Write a tokenizer over the files copied from `source`; its class stays what it was called there."""
    for stale in ("added_tokens.json", "special_tokens_map.json"):
        (target / stale).unlink(missing_ok=True)
    tokenizer.save_pretrained(target)
    theirs = read_json(source / "tokenizer_config.json").get("tokenizer_class")
    settings = read_json(target / "tokenizer_config.json")
    if theirs is not None:
        settings["tokenizer_class"] = theirs
    for key in ("is_local", "local_files_only"):  # how it was read here
        settings.pop(key, None)
    write_json(target / "tokenizer_config.json", settings)


def grown(
    weights: Tensors, config: Mapping[str, Any], tokens: Tokens, init: Init, multiple_of: int
) -> tuple[dict[str, Recipe], int]:
    """How every tensor of the grown model is made, and its vocab_size.

    Rows for new tokens go where their ids are, into spare rows first; the rest keeps its bits. Rows beyond the last
    token, up to the multiple, hold the mean.

    Raises:
        ValueError: see `growing_tensors`.
    """
    growing = growing_tensors(weights, config)
    old = config["vocab_size"]
    needed = max(tokens.added.values()) + 1
    total = old if needed <= old else -(-needed // multiple_of) * multiple_of
    recipes: dict[str, Recipe] = {}
    for name in weights.metas:
        if name not in growing:
            recipes[name] = Taken(name)
            continue
        mean = mean_row(weights, name, tokens.ids)
        placed = dict.fromkeys(tokens.added.values(), mean)
        if init == "subtokens":
            for token, i in tokens.added.items():
                rows = [
                    weights.rows(name, piece, piece + 1)[0].float() for piece in tokens.pieces[token] if piece < old
                ]
                placed[i] = torch.stack(rows).mean(0) if rows else mean
        recipes[name] = Grown(name, total, placed, mean)
    return recipes, total


def growing_tensors(weights: Tensors, config: Mapping[str, Any]) -> list[str]:
    """The tensors that have a row for each token.

    Raises:
        ValueError: no embedding that is known here, or not of vocab_size rows.
    """
    old = config.get("vocab_size")
    if EMBED not in weights.metas or not isinstance(old, int):
        raise ValueError(f"the model has no {EMBED}, or its config.json no vocab_size: it is of no family known here")
    classifier = "score.weight" in weights.metas
    tied = config.get("tie_word_embeddings", False)
    if not tied and not classifier and HEAD not in weights.metas:
        raise ValueError(f"the weights have no {HEAD}, and config.json does not say tie_word_embeddings=true")
    growing = [name for name in (EMBED, HEAD) if name in weights.metas]
    for name in growing:
        if weights.metas[name].shape[0] != old:
            raise ValueError(f"{name} has {weights.metas[name].shape[0]} rows, vocab_size of config.json is {old}")
    others = [
        name
        for name, meta in weights.metas.items()
        if name not in growing and meta.shape[:1] == (old,) and ("embed" in name or "head" in name)
    ]
    if others:
        raise ValueError(f"these tensors have a row for each token too and would have to grow:{listed(others)}")
    return growing


def mean_row(weights: Tensors, name: str, ids: Collection[int]) -> torch.Tensor:
    """The mean of the rows of real tokens, fp32 [columns], summed in fp64."""
    meta = weights.metas[name]
    real = torch.zeros(meta.shape[0], dtype=torch.bool)
    real[[i for i in ids if i < meta.shape[0]]] = True
    total = torch.zeros(meta.shape[1], dtype=torch.float64)
    for block in blocks(name, meta):
        rows = weights.rows(name, block.start, block.stop)
        total += rows[real[block.start : block.stop]].sum(0, dtype=torch.float64)
    return (total / real.sum()).float()
