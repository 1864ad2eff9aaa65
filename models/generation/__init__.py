"""Text from a decoder: a cache of keys and values, continuous batching, sampling, streams of tokens."""

from models.generation.config import (
    Completion,
    GeneratorConfig,
    Request,
    SamplingConfig,
    Step,
    sampling_config,
)
from models.generation.generator import Generator

__all__ = ["Completion", "Generator", "GeneratorConfig", "Request", "SamplingConfig", "Step", "sampling_config"]
