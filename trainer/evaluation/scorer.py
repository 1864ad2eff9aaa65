"""A model that is only asked for losses of tokens.

Legend: T tokens of a batch, N documents, S asked (position, token) pairs, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from convert.adapter_runs import with_virtual
from convert.adapters import AdapterWeights
from convert.opened import Opened
from convert.source import Source
from data.batch import MicroBatch
from models import Decoder, Runtime
from models.decoder import build
from models.heads import LMHead
from parallel.materialise import materialise
from parallel.sharding import SINGLE, WHOLE

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_LOGITS_BYTES, GPU_LOGITS_BYTES = 24 * 2**20, 512 * 2**20
"""fp32 logits that exist at one time; as in training, so that a vocabulary of any size costs no memory."""


@dataclass(frozen=True)
class Scorer:
    """A whole model on one device, and how it is run: fp32 weights; bf16 and fp16 under autocast, as in training."""

    model: Decoder
    device: torch.device
    precision: Precision

    @property
    def vocab_size(self) -> int:
        """Ids that the embedding holds."""
        return self.model.cfg.vocab_size

    @property
    def context(self) -> int:
        """Most tokens of a document."""
        return self.model.cfg.max_seq_len

    @torch.no_grad()
    def losses(self, batch: MicroBatch) -> torch.Tensor:
        """The loss of each token of a micro-batch as a trainer computes it: fp32 [T] on the CPU, 0 without a target."""
        with self.autocast():
            _, loss_T = self.model(
                batch.tokens_T.to(self.device),
                batch.positions_T.to(self.device),
                batch.cu_seqlens,
                targets_T=batch.targets_T.to(self.device),
                channel_T=batch.channel_T.to(self.device),
                pictures=None if batch.pictures is None else batch.pictures.to(self.device),
                rotary_3T=None if batch.rotary_3T is None else batch.rotary_3T.to(self.device),
            )
        return loss_T.cpu()

    @torch.no_grad()
    def asked(self, documents: Sequence[np.ndarray], row_S: np.ndarray, target_S: np.ndarray) -> torch.Tensor:
        """-log p(token | its document up to a position) for some tokens; several may be asked at one position.

        Args:
            documents: int64 [L] each, packed one after another.
            row_S: positions in the packed batch, behind which a token is asked for.
            target_S: those tokens.

        Returns:
            fp32 [S] on the CPU, in nats.
        """
        lengths = [len(document) for document in documents]
        borders = [0, *np.cumsum(lengths).tolist()]
        tokens_T = torch.from_numpy(np.concatenate(documents)).to(self.device)
        positions_T = torch.cat([torch.arange(length) for length in lengths]).to(self.device)
        assert isinstance(self.model.head, LMHead)
        with self.autocast():
            hidden_TD = self.model(tokens_T, positions_T, borders)
            asked_SD = hidden_TD[torch.from_numpy(row_S).to(self.device)]
            _, loss_S = self.model.head(asked_SD, torch.from_numpy(target_S).to(self.device))
        return loss_S.cpu()

    def autocast(self) -> torch.autocast:
        """The precision, around a forward pass."""
        return torch.autocast(self.device.type, DTYPES[self.precision], enabled=self.precision != "fp32")


def load_scorer(
    opened: Opened, device: torch.device, precision: Precision = "fp32", virtual: AdapterWeights | None = None
) -> Scorer:
    """Fill the model of an opened checkpoint; `virtual`: tokens that a run trained, before every document.

    Raises:
        ValueError: it is no language model, does not fit into memory, or its tensors are not the model's.
    """
    cfg = opened.cfg
    if cfg.head != "lm":
        raise ValueError(f"{opened.path} has a scalar head (a reward or value model): it gives tokens no probability")
    source = Source(opened, cfg)
    source.check()
    chunk = max((GPU_LOGITS_BYTES if device.type == "cuda" else CPU_LOGITS_BYTES) // (4 * cfg.vocab_size), 64)
    model = build(cfg, SINGLE, Runtime(loss_chunk=chunk))
    check_memory(opened.path, model, device)
    materialise(model, with_virtual(model, source, virtual), WHOLE, device)
    return Scorer(model.eval(), device, precision)


def check_memory(path: Path, model: Decoder, device: torch.device) -> None:
    """That a model's weights, read as fp32, fit where they shall lie.

    Raises:
        ValueError: they do not.
    """
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{path} needs {needed / 1e9:.3g} GB for its fp32 weights and {free / 1e9:.3g} GB are free on "
            f"{device}; use a machine with more memory"
        )
