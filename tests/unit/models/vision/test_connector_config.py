"""Connectors that cannot be are refused with a way out that works."""

import dataclasses

import pytest

from models import ModelConfig, problems
from models.vision.config import (
    ConnectorConfig,
    ImageConfig,
    PerceiverConfig,
    QFormerConfig,
    ResamplerConfig,
    TowerConfig,
    VisionConfig,
)


def refused(connector: ConnectorConfig, width: int = 24) -> list[tuple[str, object, str, str]]:
    vision = VisionConfig("loom", TowerConfig("siglip", 16, 32, 1, 2, 7, 28), connector, ImageConfig())
    return problems(ModelConfig("llama", 64, width, 32, 1, 2, 2, 4, 64, vision=vision))


@pytest.mark.parametrize(
    ("connector", "key", "reason", "way"),
    [
        (QFormerConfig(hidden_size=20, num_heads=3), "num_heads", "hidden_size=20 is not shared out", "num_heads=2"),
        (QFormerConfig(cross_every=0), "cross_every", "must be at least 1", "cross_every=1 or more"),
        (PerceiverConfig(queries=0), "queries", "must be at least 1", "queries=1 or more"),
        (PerceiverConfig(norm_eps=0.0), "norm_eps", "must be above 0", "norm_eps=1e-6"),
        (
            ResamplerConfig(side=2, num_heads=5),
            "num_heads",
            "the decoder's hidden_size=24 is not shared",
            "num_heads=4",
        ),
    ],
)
def test_a_connector_that_cannot_be_is_told(connector: ConnectorConfig, key: str, reason: str, way: str) -> None:
    ((told, value, why, out),) = refused(connector)
    assert told == f"vision.connector.{key}" and value == getattr(connector, key)
    assert reason in why and out == f"model.vision.connector.{way}"
    name, _, wanted = way.partition("=")
    if wanted.isdigit():
        assert not refused(dataclasses.replace(connector, **{name: int(wanted)}))


def test_positions_of_a_resampler_need_a_width_in_quarters() -> None:
    ((key, *_),) = refused(ResamplerConfig(side=2, num_heads=2), width=26)
    assert key == "vision.connector.name"
