"""Stages in a chain: whether a run agrees with the runs and folders it starts from or measures itself by.

What would make its numbers meaningless is refused before the start: another vocabulary, and for a stage whose policy
writes texts another chat template than its parent learnt. What may be meant is told: a template that changes, text cut
in another way, another rotary embedding, weights that changed since a resumed run began.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.identity import files_hash, template_hash, vocabulary_of
from models.config import ModelConfig
from trainer import folders, manifest
from trainer.problems import Problem

if TYPE_CHECKING:  # it asks this file for its problems
    from trainer.config import RunConfig

WRITES_TEXTS = ("ppo", "grpo")
"""Stages whose policy writes: it does so after the template it has learnt."""
START = "init_from"


@dataclass(frozen=True)
class Link:
    """A run, as far as the chain goes."""

    stage: str
    model: ModelConfig
    tokenizer: str | None
    """Folder of its tokenizer; None where it is not known, which is told elsewhere."""
    chat_template: str | None
    """A file with the chat template, where it is not the tokenizer's own."""
    parents: dict[str, str]
    """What it starts from or measures itself by: folder by config key."""


@dataclass(frozen=True)
class _Words:
    """What a parent was trained with. Hashes are those of `data.identity`."""

    vocabulary: str
    tokens: int | None
    cutting: str
    files: str
    chat_template: str | None
    stage: str | None
    """None where it is no run of Loom that says so."""


def link_of(cfg: RunConfig) -> Link:
    """The link that a run is."""
    stage, start = cfg.stage, cfg.init_from
    asked: dict[str, str | None] = {START: start}
    asked |= {f"stage.{key}": getattr(stage, key, None) for key in ("reference", "critic")}
    if stage.name in WRITES_TEXTS:
        asked["rollout.reward_model"] = cfg.rollout.reward_model
    asked["init_parts.decoder"] = cfg.init_parts.decoder
    parents = {key: path for key, path in asked.items() if path is not None and _usable(path)}
    tokenizer, template = cfg.data.tokenizer, cfg.data.chat_template
    first = parents.get(START, parents.get("init_parts.decoder"))
    if first is not None and tokenizer is None:
        tokenizer, template = folders.tokenizer_in(first), template or folders.template_in(first)
    whole = tokenizer is not None and folders.tokenizer_problem(tokenizer, None) is None
    whole = whole and Path(tokenizer or "").is_dir() and (template is None or Path(template).is_file())
    return Link(stage.name, cfg.model, tokenizer if whole else None, template, parents)


def _usable(path: str) -> bool:
    """Whether a folder can be looked into; that it cannot is told elsewhere, with its reason."""
    return folders.folder_problem(path) is None


def problems(link: Link) -> list[Problem]:
    """Every reason why the run and a parent do not go together."""
    found: list[Problem] = []
    for key, path in link.parents.items():
        found += [p for p in (_size_problem(link, key, path),) if p is not None]
        if link.tokenizer is None or (theirs := _words_of(link, path)) is None:
            continue
        if link.stage != "pretrain" and (reason := _other_tokens(link, theirs)):
            way = f"leave data.tokenizer out, or name the tokenizer of {path}"
            found.append(Problem("data.tokenizer", link.tokenizer, f"{reason} ({key}={path})", way))
        elif key == START and theirs.stage is not None and link.stage in WRITES_TEXTS and _other_template(link, theirs):
            reason = (
                f"the run in {path} (stage {theirs.stage}) learnt another chat template, and stage.name={link.stage} "
                "lets it write: it would go on from what it has never seen"
            )
            way = "leave data.chat_template and data.tokenizer out, or teach it the new one by stage=sft first"
            found.append(Problem("data.chat_template", link.chat_template, reason, way))
    return found


def notes(link: Link) -> list[str]:
    """What differs from a parent and may be meant, one sentence each."""
    found: list[str] = []
    for key, path in link.parents.items():
        rope = folders.model_in(path).rope
        if rope != link.model.rope and key in (START, "stage.reference"):
            old, new = dataclasses.asdict(rope), dataclasses.asdict(link.model.rope)
            differ = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old if old[name] != new[name])
            found.append(f"the rotary embedding differs from that of {key}={path}: {differ}")
        if link.tokenizer is None or (theirs := _words_of(link, path)) is None:
            continue
        if reason := _other_tokens(link, theirs):
            if link.stage == "pretrain":
                found.append(f"{reason} ({key}={path}); pretraining has to teach them anew")
        elif files_hash(link.tokenizer) == theirs.files:
            pass
        elif (words := vocabulary_of(link.tokenizer)).vocabulary != theirs.vocabulary:
            more = len(words.tokens or ()) - (theirs.tokens or 0)
            found.append(f"the tokenizer has {more} tokens more than that of {key}={path}, which have not been trained")
        elif words.cutting != theirs.cutting:
            found.append(f"the tokenizer has the tokens of that of {key}={path}, but cuts text in another way")
        if _other_template(link, theirs):
            had = f"learnt in stage {theirs.stage}" if theirs.stage else "of its tokenizer"
            found.append(f"the chat template is not the one of {key}={path} ({had})")
    return found


def changed(link: Link, run_dir: Path) -> list[str]:
    """On resuming: which parents have other weights than when the run began, one sentence each."""
    began = manifest.read(run_dir)
    before = {parent.key: parent for parent in began.parents} if began else {}
    return [
        f"{key}={path} is not what it was when this run began ({before[key].path}); "
        "where the run measures itself by it, it now has another measure"
        for key, path in link.parents.items()
        if key in before and manifest.fingerprint(path) != before[key].fingerprint
    ]


def begin(link: Link, run_dir: Path, data: str, resumed: bool) -> tuple[str, ...]:
    """Write the run's manifest; a resumed run keeps that of its beginning. Returns the stages behind it.

    Args:
        data: fingerprint of the data and their order.
    """
    began = manifest.read(run_dir) if resumed else None
    if began is not None:
        return began.lineage
    assert link.tokenizer is not None, "the data were read with it"
    made = manifest.describe(link.stage, link.model, link.tokenizer, link.chat_template, data, link.parents)
    manifest.write(run_dir, made)
    return made.lineage


def _size_problem(link: Link, key: str, path: str) -> Problem | None:
    """A model beside the policy that cannot be asked the same tokens (of `init_from` the sizes are compared anyway)."""
    if key == START or key.startswith("init_parts."):
        return None
    theirs, ours = folders.model_in(path).vocab_size, link.model.vocab_size
    if theirs == ours or (key != "stage.reference" and theirs > ours):
        return None
    reason = f"has a vocabulary of {theirs}, and the policy one of {ours}: a token of one is none of the other"
    return Problem(key, path, reason, "a model with the policy's tokenizer and model.vocab_size")


def _words_of(link: Link, path: str) -> _Words | None:
    """Tokenizer and template of what lies in a folder: as its run noted them, else as its files are. None: not known,
    or the very same files."""
    made = manifest.read(path)
    if made is not None:
        return _Words(made.vocabulary, made.tokens, made.cutting, made.files, made.chat_template, made.stage)
    folder, template = folders.tokenizer_in(path), folders.template_in(path)
    if folder is None or link.tokenizer is None or folders.tokenizer_problem(folder, None) is not None:
        return None
    if link.chat_template == template and Path(folder).resolve() == Path(link.tokenizer).resolve():
        return None
    words = vocabulary_of(folder)
    size = None if words.tokens is None else len(words.tokens)
    return _Words(
        words.vocabulary, size, words.cutting, files_hash(folder), template_hash(folder, template), stage=None
    )


def _other_tokens(link: Link, theirs: _Words) -> str | None:
    """How the run's tokens are other ones than a parent's; None if they are the same or only more follow."""
    assert link.tokenizer is not None
    if files_hash(link.tokenizer) == theirs.files:
        return None
    words = vocabulary_of(link.tokenizer)
    if words.vocabulary == theirs.vocabulary:
        return None
    if words.tokens is None or theirs.tokens is None:
        return "its files are other ones than those of the tokenizer the parent was trained with"
    if words.begins_with(theirs.tokens, theirs.vocabulary):
        return None
    sizes = f"{len(words.tokens)} tokens and {theirs.tokens}"
    return f"an id is another token than for the parent ({sizes}): its embeddings would mean something else"


def _other_template(link: Link, theirs: _Words) -> bool:
    """Whether conversations are written down otherwise; a parent or stage without a template does not care."""
    if link.stage == "pretrain" or theirs.chat_template is None:
        return False
    return template_hash(link.tokenizer, link.chat_template) != theirs.chat_template
