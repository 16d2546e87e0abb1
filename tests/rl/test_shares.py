"""The law of shares: a batch's shares sum to its weight, and say who counts how much."""

from __future__ import annotations

import pytest
import torch

from rl.shares import MeanOver, token_shares

LENGTHS = torch.tensor([2, 1, 4, 3])
GROUPS = torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize("mean_over", ["tokens", "sequences", "groups"])
def test_shares_sum_to_the_weight(mean_over: MeanOver) -> None:
    shares = token_shares(LENGTHS, GROUPS, mean_over, weight=0.5)
    assert shares.shape == (4, 4)
    assert shares.sum().item() == pytest.approx(0.5)
    assert shares[1, 1:].sum() == 0  # nothing beyond an answer's end


def test_who_counts_how_much() -> None:
    assert token_shares(LENGTHS, GROUPS, "tokens").sum(1).tolist() == pytest.approx([0.2, 0.1, 0.4, 0.3])
    assert token_shares(LENGTHS, GROUPS, "sequences").sum(1).tolist() == pytest.approx([0.25] * 4)
    assert token_shares(LENGTHS, GROUPS, "groups").sum(1).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
