"""Do two checkpoints compute the same? Logits of the same random tokens, on the CPU in fp32."""

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from convert.boxes import Columns, Meta, Tensors
from convert.opened import Opened
from convert.source import Source
from models import Runtime, build
from models.config import ModelConfig
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE

TOKENS = 64
TOLERANCE = 1e-4
"""Of the largest logit. fp32 sums in another order differ by 1e-6 or so; a wrong row by much more than this."""
SPARE = 1.5
"""Memory that a model is held to need, as a multiple of its fp32 weights."""


def compare_logits(source: Opened, output: Opened, metas: Mapping[str, Meta]) -> str:
    """Compare the logits of a source and an output, one of which may be a Hugging Face folder: transformers runs that.

    Returns:
        What was compared, in a line; or why not.

    Raises:
        ValueError: they differ.
    """
    cfg = output.cfg
    parameters = sum(torch.Size(meta.shape).numel() for meta in metas.values())
    needed, free = int(parameters * 4 * SPARE), psutil.virtual_memory().available
    if cfg.head != "lm":
        return "logits: not compared, the model has none"
    if needed > free:
        return f"logits: not compared, the model needs {needed / 1e9:.3g} GB of memory and {free / 1e9:.3g} are free"
    tokens = torch.randint(cfg.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    given = source.tensors.metas
    rounded = {meta.dtype for hf, meta in metas.items() if meta.dtype != given[hf].dtype} - {torch.float32}
    assert len(rounded) <= 1, f"tensors were converted to {rounded}"
    logits = []
    for opened in (replace(source, tensors=Converted(source.tensors, metas)), output):
        if opened.format == "hugging_face":
            logits.append(
                transformers_logits(opened.path, tokens, None if opened is output else next(iter(rounded), None))
            )
        else:
            logits.append(_ours(opened, cfg, tokens))
        gc.collect()
    largest = logits[0].abs().max().item()
    difference = (logits[0] - logits[1]).abs().max().item()
    names = [f"{'transformers' if x.format == 'hugging_face' else 'Loom'} on {x.format}" for x in (source, output)]
    numbers = f"largest difference {difference:.1e}, largest logit {largest:.3g}, allowed {TOLERANCE:.0e} of it"
    if not difference <= TOLERANCE * largest:
        raise ValueError(f"logits differ ({' against '.join(names)}): {numbers}")
    return f"logits: {names[0]} against {names[1]}, {TOKENS} tokens: {numbers}"


class Converted:
    """Tensors as a conversion to other dtypes leaves them. Is `Tensors`."""

    def __init__(self, tensors: Tensors, metas: Mapping[str, Meta]) -> None:
        self._tensors, self.metas = tensors, metas

    def rows(self, hf: str, start: int, stop: int, columns: Columns | None = None) -> torch.Tensor:
        """Rows [start, stop) of one tensor, all columns or some."""
        return self._tensors.rows(hf, start, stop, columns).to(self.metas[hf].dtype)


@torch.no_grad()
def _ours(opened: Opened, cfg: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    model = build(cfg, SINGLE, Runtime())
    materialise(model, Source(opened, cfg), WHOLE, torch.device("cpu"))
    return model(tokens, torch.arange(len(tokens)), [0, len(tokens)], output="head")


@torch.no_grad()
def transformers_logits(folder: Path, tokens: torch.Tensor, rounded: torch.dtype | None) -> torch.Tensor:
    """Logits by transformers; its weights (not its buffers) are rounded to a dtype first, if there is one."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for parameter in model.parameters() if rounded is not None else ():
        parameter.copy_(parameter.to(rounded))
    return model(tokens[None]).logits[0]
