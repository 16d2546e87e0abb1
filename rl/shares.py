"""How much each token counts: every token carries its share of the mean, and the shares of a batch sum to one.

Normalisation is decided here, once, on the whole batch. A loss is `(token_loss * shares).sum()`, so it is the same
number for any split into micro-batches, any number of ranks and any padding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MeanOver = Literal["tokens", "sequences", "groups"]


def token_mask(lengths: Tensor) -> Tensor:
    """Which cells of a padded [N, L] table hold a token, from `lengths` [N]."""
    width = int(lengths.max()) if len(lengths) else 0
    return torch.arange(width)[None, :] < lengths[:, None]  # [N, L]


def token_shares(lengths: Tensor, group_of: Tensor, mean_over: MeanOver, weight: float = 1.0) -> Tensor:
    """The shares [N, L] of branches with `lengths` [N], where branch n belongs to group `group_of[n]`.

    - tokens: every token counts the same (DAPO);
    - sequences: every answer counts the same, its tokens share it (GRPO as in DeepSeekMath);
    - groups: every prompt counts the same, its answers share it (MBPO's one vote per group).

    `weight` is what the shares sum to: a stream's weight when several streams make one objective.
    """
    mask = token_mask(lengths).float()
    per_sequence = mask / lengths[:, None]  # each row sums to one
    if mean_over == "tokens":
        shares = mask / lengths.sum()
    elif mean_over == "sequences":
        shares = per_sequence / len(lengths)
    else:
        group_sizes = torch.bincount(group_of)  # [groups]
        num_groups = int((group_sizes > 0).sum())
        shares = per_sequence / (group_sizes[group_of] * num_groups)[:, None]
    return shares * weight
