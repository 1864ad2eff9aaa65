"""A generator from whatever lies in a folder: the weights, with the tokenizer and stop tokens they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from convert.adapter_runs import open_beside, with_virtual
from convert.adapters import AdapterWeights
from convert.hf_folder_files import CONFIG, GENERATION, read_json
from convert.opened import Opened
from convert.source import Source
from data.chat import ChatTemplate, Render, special_tokens, template_renderer
from data.config import DataConfig
from data.tokenizer import describe, load_tokenizer
from models import Decoder, Runtime
from models.decoder import build
from models.generation import Generator, GeneratorConfig
from parallel.config import EngineConfig, ParallelConfig
from parallel.groups import Groups
from parallel.materialise import materialise
from parallel.sharding import SINGLE, Place
from trainer import layout_rules
from trainer.evaluation.scorer import check_memory
from trainer.evaluation.tokens import tokenizer_folder
from trainer.inference.eyes import BLIND, Eyes

Dtype = Literal["fp32", "bf16"]
DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
DATA = DataConfig(sources=(), seq_len=1, micro_batch_rows=1, global_batch_rows=1)
"""The layout rules ask for a data section; the one for tp does not look at it."""


@dataclass(frozen=True)
class TextModel:
    """A language model's checkpoint, opened, with the tokenizer that belongs to it; no weight is read yet."""

    opened: Opened
    tokenizer: Any
    """With the chat template that is to be used as its own."""
    folder: str
    """Where the tokenizer lies."""
    render: Render | None
    """Writes messages down by the chat template; None where there is none."""
    stop_tokens: tuple[int, ...]
    """End of text by the tokenizer, generation_config.json and the chat template."""
    virtual: AdapterWeights | None = None
    """Virtual tokens that a run trained, before every text."""
    eyes: Eyes = BLIND
    """What it makes of pictures."""


def open_text_model(
    path: str | Path, *, tokenizer: str | None = None, chat_template: str | Path | None = None
) -> TextModel:
    """Open a checkpoint of any kind and find what turns text into its tokens.

    Args:
        path: a Hugging Face folder, a Megatron checkpoint or a run of Loom.
        tokenizer: folder of the tokenizer, where it does not lie with the checkpoint.
        chat_template: a jinja file instead of the run's or the tokenizer's own template.

    Raises:
        ValueError: nothing that is known lies there, it is no language model, there is no tokenizer or another model's,
            or the chat template cannot be used.
    """
    opened, virtual = open_beside(Path(path))
    opened.check_decoder()
    if opened.cfg.head != "lm":
        raise ValueError(f"{opened.path} has a scalar head (a reward or value model): it writes no text")
    folder = tokenizer_folder(tokenizer, opened)
    made = load_tokenizer(folder, "--tokenizer")
    known, vocab = describe(made).vocab_size, opened.cfg.vocab_size
    if known > vocab:
        raise ValueError(
            f"the tokenizer in {folder} has {known} tokens and the model only {vocab}: it belongs to another model; "
            "name the right one with --tokenizer FOLDER"
        )
    render = renderer_of(made, folder, chat_template or opened.chat_template)
    stop_tokens = stop_tokens_of(made, opened.files, render)
    wrong = [token for token in stop_tokens if not 0 <= token < vocab]
    if wrong:
        raise ValueError(
            f"{opened.files}: {GENERATION} names token {wrong[0]} as end of text and the model has {vocab} tokens: the "
            "file belongs to another model; copy the right one there"
        )
    return TextModel(opened, made, folder, render, stop_tokens, virtual, Eyes.of(opened.cfg, made))


def load_generator(
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: Dtype = "fp32",
    config: GeneratorConfig | None = None,
    groups: Groups | None = None,
    tokenizer: str | None = None,
    chat_template: str | Path | None = None,
    draft: str | Path | None = None,
) -> Generator:
    """A generator with the weights of a checkpoint, and of another that runs ahead if `draft` names one.

    Its `tokenizer` has the chat template to use. Other arguments and errors as of `open_text_model` and `generator_of`.
    """
    found = open_text_model(path, tokenizer=tokenizer, chat_template=chat_template)
    small = None if draft is None else open_text_model(draft)
    if small is not None:
        check_draft(found, small)
    return generator_of(found, device=device, dtype=dtype, config=config, groups=groups, draft=small)


def generator_of(
    found: TextModel,
    *,
    device: torch.device | str,
    dtype: Dtype = "fp32",
    config: GeneratorConfig | None = None,
    groups: Groups | None = None,
    draft: TextModel | None = None,
) -> Generator:
    """Read the weights of an opened model.

    Args:
        device: where they shall lie.
        dtype: of weights, cache and activations; logits are fp32.
        config: how much is worked on at once.
        groups: of any layout: tp ranks share the model, ranks of the other axes have copies; None = it lies whole in
            this process.
        draft: a small model that runs ahead, checked by `check_draft`.

    Raises:
        ValueError: tensors are not the model's, do not fit into memory, or cannot be shared by so many tp ranks.
    """
    place = SINGLE if groups is None else Place(tp=groups.tp)
    where = torch.device(device)
    model = _filled(found, place, where, dtype)
    small = None if draft is None else _filled(draft, place, where, dtype)
    return Generator(model, found.tokenizer, config, found.stop_tokens, small)


def _filled(found: TextModel, place: Place, device: torch.device, dtype: Dtype) -> Decoder:
    opened = found.opened
    if problem := tp_problem(opened, place.tp.size):
        raise ValueError(problem)
    source = Source(opened, opened.cfg)
    source.check()
    model = build(opened.cfg, place, Runtime())
    check_memory(opened.path, model, device)
    materialise(model, with_virtual(model, source, found.virtual), place.cut, device)
    for parameter in model.parameters():  # one after another; buffers stay fp32, as a router's corrections must
        parameter.data = parameter.data.to(DTYPES[dtype])
    return model.eval()


def check_draft(model: TextModel, draft: TextModel) -> None:
    """Whether a small model can run ahead of another: its tokens must mean the same.

    Raises:
        ValueError: they do not.
    """
    if draft.virtual is not None:
        raise ValueError(
            f"the draft {draft.opened.path} has virtual tokens (adapter.name={draft.virtual.cfg.name}), which a draft "
            "begins without; take a model whose weights are whole"
        )
    ours, theirs = model.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours == theirs and model.opened.cfg.vocab_size == draft.opened.cfg.vocab_size:
        return
    differ = [token for token, index in ours.items() if theirs.get(token) != index]
    example = f"; {differ[0]!r} is {ours[differ[0]]} and {theirs.get(differ[0], 'no token')}" if differ else ""
    raise ValueError(
        f"the draft {draft.opened.path} has another vocabulary than {model.opened.path}: {draft.opened.cfg.vocab_size} "
        f"tokens and {model.opened.cfg.vocab_size}{example}; take a smaller model of the same family"
    )


def tp_problem(opened: Opened, tp: int) -> str | None:
    """Why so many ranks cannot share a model, and how many can; None if they can."""
    if (reason := _uneven(opened, tp)) is None:
        return None
    ways = ", ".join(f"{n}" for n in range(1, opened.cfg.num_heads + 1) if _uneven(opened, n) is None)
    return f"{opened.path} cannot be shared by {tp} ranks: tp={tp} {reason}; tp may be {ways}"


def _uneven(opened: Opened, tp: int) -> str | None:
    """The reason of the layout rules."""
    layout = layout_rules.Layout(opened.cfg, ParallelConfig(tp=tp), EngineConfig(), DATA)
    return next((fault.reason for fault in layout_rules.broken(layout, tp) if fault.key == "parallel.tp"), None)


def renderer_of(tokenizer: Any, folder: str, template: str | Path | None) -> Render | None:
    """The chat template as a function; a template that is given becomes the tokenizer's own.

    Raises:
        ValueError: the template cannot be read or used.
    """
    where = folder
    if template is not None:
        where = str(template)
        try:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the chat template {template} cannot be read ({error}); name another file") from error
    own = tokenizer.chat_template
    if own is None:
        return None
    try:
        return template_renderer(tokenizer, own if isinstance(own, str) else None, where)
    except ValueError as error:
        raise ValueError(f"{error}".replace("data.chat_template=", "the chat template of ")) from error


def stop_tokens_of(tokenizer: Any, files: Path | None, render: Render | None) -> tuple[int, ...]:
    """Ids that end a text, each once: the tokenizer's, those of the model's files, and those of the chat template."""
    found: list[int] = []
    for file in () if files is None else (CONFIG, GENERATION):
        assert files is not None
        ends = read_json(files / file).get("eos_token_id")
        found += [token for token in (ends if isinstance(ends, list) else [ends]) if type(token) is int]
    texts = {tokenizer.eos_token} - {None}
    if render is not None:
        own = ChatTemplate(render, special_tokens(tokenizer), tokenizer.eos_token, tokenizer.bos_token)
        texts |= own.stop_tokens
    found += [tokenizer.convert_tokens_to_ids(text) for text in texts]
    return tuple(sorted(set(found)))
