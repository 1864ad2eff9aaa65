"""Per-channel numbers of a global batch, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests import cases, engine_cases
from trainer import channels
from trainer.stages.next_token import NextToken

NAMES = ("chat", "code", "maths")


def terms(**sums: tuple[float, float]) -> torch.Tensor:
    """[C, 2] of one micro-batch."""
    return torch.tensor([sums.get(name, (0.0, 0.0)) for name in NAMES], dtype=torch.float64)


def test_local_sums_add_micro_batches_and_leave_out_what_did_not_occur() -> None:
    found = channels.local_sums([terms(chat=(6.0, 3)), terms(chat=(1.0, 1), maths=(2.0, 4))], NAMES)
    assert found == {"chat": (7.0, 4.0), "maths": (2.0, 4.0)}


def test_a_channel_learnt_to_loss_0_is_still_there() -> None:
    """Presence is told by tokens, not by loss."""
    assert channels.local_sums([terms(code=(0.0, 5))], NAMES) == {"code": (0.0, 5.0)}


def test_ranks_with_different_channels_are_merged() -> None:
    merged = channels.merge([{"maths": (2.0, 4.0), "chat": (7.0, 4.0)}, {}, {"code": (1.0, 1.0), "chat": (3.0, 6.0)}])
    assert merged == {"chat": (10.0, 10.0), "code": (1.0, 1.0), "maths": (2.0, 4.0)}
    assert list(merged) == ["chat", "code", "maths"], "every rank must log in the same order"


def gathering(*others: channels.Sums):
    return lambda mine: [mine, *others]


def test_losses_are_means_over_tokens_not_over_micro_batches_or_ranks() -> None:
    """9 over 9 tokens here, 1 over 1 and 10 over 2 there: 20 / 12, where a mean of means would say 2.33."""
    mine = [terms(chat=(6.0, 3)), terms(chat=(3.0, 6))]
    other = {"chat": (1.0, 1.0), "code": (10.0, 2.0)}
    found = channels.metrics(mine, NAMES, gathering(other), "train")
    assert found == {
        "train/loss": 20 / 12,
        "train/tokens": 12.0,
        "channel/chat/loss": 1.0,
        "channel/chat/tokens": 10.0,
        "channel/code/loss": 5.0,
        "channel/code/tokens": 2.0,
    }


def test_a_late_channel_appears_when_it_comes_and_not_before() -> None:
    early = channels.metrics([terms(chat=(2.0, 1))], NAMES, gathering(), "train")
    late = channels.metrics([terms(chat=(2.0, 1))], NAMES, gathering({"maths": (3.0, 2.0)}), "train")
    assert not any("maths" in key for key in early)
    assert late.keys() - early.keys() == {"channel/maths/loss", "channel/maths/tokens"}
    assert late["channel/maths/loss"] == 1.5


def test_evaluation_names_and_perplexities() -> None:
    """ln 2 of loss is a perplexity of 2, ln 8 one of 8; together (ln 2 + 3 ln 8) / 4 = ln(2^2.5)."""
    mine = [terms(chat=(math.log(2), 1), code=(3 * math.log(8), 3))]
    found = channels.metrics(mine, NAMES, gathering(), "eval")
    assert found.keys() == {
        "eval/loss", "eval/tokens", "eval/perplexity",
        "eval/chat/loss", "eval/chat/tokens", "eval/chat/perplexity",
        "eval/code/loss", "eval/code/tokens", "eval/code/perplexity",
    }  # fmt: skip
    assert found["eval/chat/perplexity"] == pytest.approx(2.0, rel=1e-12)
    assert found["eval/code/perplexity"] == pytest.approx(8.0, rel=1e-12)
    assert found["eval/perplexity"] == pytest.approx(2**2.5, rel=1e-12)


def test_perplexity_overflow_is_infinite_and_no_error() -> None:
    assert channels.perplexity(1e6) == math.inf
    assert channels.perplexity(math.inf) == math.inf
    assert channels.perplexity(699.0) == math.exp(699.0)


def test_a_loss_that_is_no_number_has_no_perplexity() -> None:
    assert math.isnan(channels.perplexity(math.nan))


def test_sums_are_float64() -> None:
    """2^24 tokens and one more: float32 would count 2^24."""
    found = channels.metrics([terms(chat=(0.0, 2.0**24)), terms(chat=(0.0, 1.0))], NAMES, gathering(), "train")
    assert found["train/tokens"] == 2.0**24 + 1


class Told(torch.nn.Module):
    """Stands where the model stands: the loss of each token is told."""

    def __init__(self, loss_T: list[float]):
        super().__init__()
        self.loss_T = torch.tensor(loss_T)

    def forward(self, tokens_T, positions_T, cu_seqlens, max_seqlen, channel_T, targets_T, loss_weight):
        assert channel_T.shape == tokens_T.shape
        loss_T = self.loss_T.where(targets_T != -100, torch.zeros(()))
        return loss_weight * loss_T.sum(), loss_T


def test_a_stage_gives_every_token_to_the_channel_of_its_document() -> None:
    """Documents of 4, 3 and 2 tokens in channels 2, 0 and 2; the last token of a document has no target."""
    import numpy as np

    from data.batch import Document, collate

    docs = [Document(np.arange(n), np.ones(n, dtype=bool), c) for n, c in ((4, 2), (3, 0), (2, 2))]
    batch = collate(docs)
    told = Told([1.0, 2.0, 4.0, 99.0, 8.0, 16.0, 99.0, 32.0, 99.0])
    loss, sums = NextToken(3).forward(told, batch, 0.5)
    assert sums.tolist() == [[24.0, 2.0], [0.0, 0.0], [1 + 2 + 4 + 32.0, 4.0]]
    assert float(loss) == 0.5 * 63.0


def test_a_channel_on_one_rank_only_reaches_both(pool) -> None:
    """Real ranks: rank 0 has documents of channel 0 alone, rank 1 of the rest; both log the same, by hand."""
    for found in pool(2).run(engine_cases.merged_channels):
        assert found == {
            "train/loss": 3.0,
            "train/tokens": 4.0,
            f"channel/{cases.NAMES[0]}/loss": 2.0,
            f"channel/{cases.NAMES[0]}/tokens": 3.0,
            f"channel/{cases.NAMES[2]}/loss": 6.0,
            f"channel/{cases.NAMES[2]}/tokens": 1.0,
        }
