"""What a pair is matched with besides its own: never what is as good, harder ones more often, in any order."""

import torch

from trainer.losses.matching import LEAST, hard_negatives, same_pairs

CAPTION_N = torch.tensor([5, 7, 5, 9, 8, 6])
PICTURE_N = torch.tensor([1, 2, 3, 4, 4, 6])
KEY_N = torch.arange(6) * 7919 + 11
DRAWS = 3000


def logits() -> torch.Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(2)) * 2


def test_what_is_as_good_is_never_drawn_and_harder_ones_more_often() -> None:
    same_NN = same_pairs(CAPTION_N, PICTURE_N)
    assert same_NN.sum() == 6 + 2 + 2  # themselves; captions 0 and 2; pictures 3 and 4
    counts_NN = torch.zeros(6, 6)
    for draw in range(DRAWS):
        drawn_N = hard_negatives(logits(), same_NN, KEY_N, f"0:{draw}:text")
        counts_NN[torch.arange(6), drawn_N] += 1
    assert not counts_NN[same_NN].any()
    chance_NN = (torch.softmax(logits().double(), 1) + LEAST).masked_fill(same_NN, 0)
    wanted_NN = DRAWS * chance_NN / chance_NN.sum(1, keepdim=True)
    for counts_N, wanted_N in zip(counts_NN, wanted_NN, strict=True):
        kept = wanted_N > 5
        statistic = ((counts_N - wanted_N)[kept] ** 2 / wanted_N[kept]).sum()
        assert statistic < 25, "chi-square of at most five columns: below 25 in all but 1 of 5,000 cases"


def test_the_order_of_pairs_does_not_matter_and_none_is_left_where_all_are_as_good() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    same_NN = same_pairs(CAPTION_N, PICTURE_N)
    drawn_N = hard_negatives(logits(), same_NN, KEY_N, "0:1:text")
    again_N = hard_negatives(logits()[order][:, order], same_NN[order][:, order], KEY_N[order], "0:1:text")
    assert torch.equal(order[again_N], drawn_N[order])
    alike = torch.ones(2, 2, dtype=torch.bool)
    assert hard_negatives(torch.zeros(2, 2), alike, KEY_N[:2], "0:1:text").tolist() == [-1, -1]
