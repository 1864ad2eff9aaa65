"""Token embedding of the decoder."""

from models.config import ModelConfig
from parallel.layers import VocabEmbedding
from parallel.sharding import Place


def token_embedding(cfg: ModelConfig, place: Place) -> VocabEmbedding:
    """The table of `vocab_size` rows of `hidden_size`, drawn with standard deviation `init_std`."""
    return VocabEmbedding(cfg.vocab_size, cfg.hidden_size, "normal", place)
