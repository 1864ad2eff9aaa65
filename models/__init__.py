"""What is computed: decoders and pairs of encoders, their families by name, and their sizes.

Shape legend: docs/architecture.md.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from models.building import Model, build
from models.config import ModelConfig, RopeConfig, Runtime
from models.decoder import Chunk, Decoder
from models.families import FAMILIES, family_in, family_of, problems

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
    config |= _preparations(Path(path))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"{file} says model_type={family!r}; the families here are {', '.join(FAMILIES)}")
    try:
        return family_in(config).from_hf_config(config)
    except ValueError as err:
        raise ValueError(f"{file}: {err}") from err


def _preparations(folder: Path) -> dict[str, Any]:
    """How pictures and videos are prepared, as transformers finds it: in one file for all, else in one for each."""
    found: dict[str, Any] = {}
    for name in ("preprocessor_config", "video_preprocessor_config", "processor_config"):
        file = folder / f"{name}.json"
        if file.is_file():
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # then they are prepared by default
                found[name] = json.loads(file.read_text(encoding="utf-8"))
    whole = found.pop("processor_config", {})
    whole = whole if isinstance(whole, dict) else {}
    inner = {"preprocessor_config": "image_processor", "video_preprocessor_config": "video_processor"}
    return found | {name: whole[part] for name, part in inner.items() if isinstance(whole.get(part), dict)}
