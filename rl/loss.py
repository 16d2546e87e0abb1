"""What a loss is: a frozen dataclass of hyper-parameters whose call is the formula.

A loss gets a differentiable `score` and a batch; it knows no cluster, no micro-batch and no mean: it multiplies by the
batch's shares and adds up. A new loss is one file in `losses/` and its name in the union of `losses/__init__.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from rl.batch import Batch, Rows

Score = Callable[[Rows], Tensor]  # rows -> differentiable log-probs [N, L] of every answer token


class Sums(dict[str, Tensor]):
    """Share-weighted sums by name. Sums of micro-batches and ranks simply add up to the mean of the whole batch."""

    @classmethod
    def of(cls, shares: Tensor, **values: Tensor) -> Self:
        """The sum of every value weighted by `shares` (both [N, L], or [P] for preferences)."""
        return cls({name: (value * shares).sum().detach() for name, value in values.items()})

    def __or__(self, other: dict[str, Tensor]) -> Sums:  # type: ignore[override]
        return Sums({**self, **other})


B = TypeVar("B", bound=Batch, contravariant=True)


class Loss(Protocol[B]):
    """One number to minimise for one batch, and the sums to log."""

    def __call__(self, score: Score, batch: B) -> tuple[Tensor, Sums]: ...


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:  # [N, L], [N, L] -> [N, L]
    """The estimator exp(d) - d - 1 of KL(policy || reference), d = reference - policy (Schulman; never negative)."""
    difference = (reference - logprobs).clamp(-20, 20)
    return torch.expm1(difference) - difference
