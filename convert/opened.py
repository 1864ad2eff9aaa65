"""Weights found somewhere, whatever they lie in: what every command and training start from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from convert.boxes import Tensors
from convert.megatron.layout import Layout
from models.config import ModelConfig

Format = Literal["hugging_face", "torch", "torch_dist", "safetensors", "loom"]
"""A Hugging Face folder; Megatron's three; a checkpoint of one of Loom's runs."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose names and shapes were checked; no value is read yet."""

    path: Path
    format: Format
    cfg: ModelConfig
    tensors: Tensors
    files: Path | None
    """Where config.json, generation_config.json and the tokenizer's files lie; None where there are none."""
    layout: Layout | None = None
    """How it is cut, where it is Megatron's."""
    chat_template: Path | None = None
    """A file with the chat template the model was trained with, where that is not the one in `files`."""

    def check_decoder(self) -> None:
        """That what lies here reads a text token by token.

        Raises:
            ValueError: it is a pair of encoders.
        """
        if self.cfg.compares:
            raise ValueError(
                f"{self.path} holds a pair of encoders (family {self.cfg.family}), which compares pictures with texts: "
                "it gives tokens no probability and writes no text; give a model with a decoder, which such a "
                "tower may be a part of (init_parts.vision)"
            )
