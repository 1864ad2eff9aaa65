"""Text from a decoder: a cache of keys and values, continuous batching, sampling, searches, streams of tokens."""

from models.generation.config import (
    Completion,
    GeneratorConfig,
    Request,
    SamplingConfig,
    Settings,
    Step,
    sampling_config,
)
from models.generation.generator import Generator
from models.generation.search_config import BeamConfig, ContrastiveConfig
from models.generation.sight import Sight
from models.generation.speculative import DraftStats

__all__ = [
    "BeamConfig",
    "Completion",
    "ContrastiveConfig",
    "DraftStats",
    "Generator",
    "GeneratorConfig",
    "Request",
    "SamplingConfig",
    "Settings",
    "Sight",
    "Step",
    "sampling_config",
]
