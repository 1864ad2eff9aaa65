"""What is computed: decoders and pairs of encoders, their families by name, and their sizes.

Shape legend: docs/architecture.md.
"""

import contextlib
import json
from pathlib import Path

from models.building import Model, build
from models.config import ModelConfig, RopeConfig, Runtime
from models.decoder import Chunk, Decoder
from models.families import FAMILIES, family_of, problems

__all__ = [
    "FAMILIES",
    "Chunk",
    "Decoder",
    "Model",
    "ModelConfig",
    "RopeConfig",
    "Runtime",
    "build",
    "config_from_hf_folder",
    "family_of",
    "problems",
]


def config_from_hf_folder(path: str | Path) -> ModelConfig:
    """The sizes of the model in a Hugging Face folder, from its config.json.

    Raises:
        ValueError: no such folder, no readable config.json, or a model of a family that is not here.
    """
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise ValueError(
            f"{path} is not a folder; give the folder of a Hugging Face checkpoint (config.json, *.safetensors)"
        )
    if not file.is_file():
        raise ValueError(
            f"{path} has no config.json, so it is not a Hugging Face checkpoint; use the folder that has one"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{file} is not readable as JSON ({err}); fetch it again") from err
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds no JSON object; fetch it again")
    prepared = Path(path) / "preprocessor_config.json"
    if prepared.is_file():
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # then pictures are prepared by default
            config["preprocessor_config"] = json.loads(prepared.read_text(encoding="utf-8"))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{file} says model_type={family!r}; the families here are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family].from_hf_config(config)
    except ValueError as err:
        raise ValueError(f"{file}: {err}") from err
