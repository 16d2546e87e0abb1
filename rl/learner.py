"""The learner: whatever takes gradient steps. One loop for every loss, every backend and every number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rl.batch import Batch, Rows
from rl.loss import Loss
from rl.packing import bins, deal
from rl.policy import Policy
from rl.reference import Reference


class Backend(Protocol):
    """What torch and DeepSpeed do differently, and nothing else. Every rank of a learner holds one."""

    module: nn.Module  # called with rows: log-probs [N, L]
    policy: Policy  # the policy inside `module`
    rank: int
    world_size: int

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of `loss`; `last` marks the final call before `step`. Gradients are averaged over ranks."""
        ...

    def step(self) -> float:
        """Clip, update, advance the schedule, zero. Returns the norm of the gradient before clipping."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, on every rank."""
        ...

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors under the names transformers saves, gathered one at a time; every rank must iterate."""
        ...

    def save(self, path: Path) -> None:
        """Weights, optimizer, schedule and RNG of every rank into the folder `path`; every rank must call it."""
        ...

    def load(self, path: Path) -> None:
        """The inverse of `save`."""
        ...

    def close(self) -> None:
        """Free whatever outlives the object; safe to call twice."""
        ...

    @property
    def learning_rate(self) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One batch and its loss. An optimizer step is taken on the sum of its parts.

    >>> learner.update(Part(name="online", batch=groups, loss=GRPO()), Part(name="offline", batch=pairs, loss=DPO()))
    """

    name: str
    batch: Batch
    loss: Loss[Any]


Metrics = dict[str, float]


class AnyLearner(Protocol):
    """A learner, here or on a cluster."""

    def logprobs(self, rows: Rows) -> Tensor: ...
    def reference_logprobs(self, rows: Rows) -> Tensor: ...
    def update(self, *parts: Part) -> Metrics: ...
    def weights(self) -> Iterable[tuple[str, Tensor]]: ...
    def save(self, path: Path) -> None: ...
    def load(self, path: Path) -> None: ...
    def close(self) -> None: ...


class Learner:
    """Scores rows and updates the policy. Every rank is given the whole batch and works on its own share of it."""

    def __init__(self, backend: Backend, reference: Reference | None, tokens_per_micro_batch: int) -> None:
        self.backend = backend
        self.reference = reference
        self.tokens_per_micro_batch = tokens_per_micro_batch

    @torch.no_grad()
    def logprobs(self, rows: Rows) -> Tensor:
        """The policy's log-probs [N, L] of every answer token, on every rank."""
        self.backend.module.eval()
        try:
            return self._score_all(self.backend.module, rows)
        finally:
            self.backend.module.train()

    @torch.no_grad()
    def reference_logprobs(self, rows: Rows) -> Tensor:
        """The frozen policy's log-probs [N, L]: of the model the run started from."""
        assert self.reference is not None, "the learner was built without a reference"
        with self.reference.module() as module:
            return self._score_all(module, rows)

    def update(self, *parts: Part) -> Metrics:
        """One optimizer step on the sum of the parts. Consumes whole batches, produces metrics of the whole step."""
        work = [(part, micro) for part in parts for micro in self._my_micro_batches(part.batch)]
        totals: dict[str, Tensor] = {}
        for index, (part, micro) in enumerate(work):
            loss, sums = part.loss(self.backend.module, micro)
            self.backend.backward(loss * self.backend.world_size, last=index == len(work) - 1)
            for name, value in sums.items():
                key = f"{part.name}/{name}"
                totals[key] = totals.get(key, torch.zeros(())) + value.float().cpu()
        metrics = {"learning_rate": self.backend.learning_rate, "grad_norm": self.backend.step()}
        summed = self.backend.sum_over_ranks(torch.stack(list(totals.values())))
        return metrics | dict(zip(totals, summed.tolist(), strict=True))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors under the names transformers saves, for an engine to load; every rank must iterate."""
        return self.backend.full_weights()

    def save(self, path: Path) -> None:
        self.backend.save(path)

    def load(self, path: Path) -> None:
        self.backend.load(path)

    def close(self) -> None:
        """Let go of what the backend holds."""
        self.backend.close()

    def _my_micro_batches(self, batch: Batch) -> Iterator[Batch]:
        """This rank's micro-batches, filled up to the busiest rank's with units of share zero: all forward as often."""
        hands = self._deal(batch.unit_tokens)
        mine = hands[self.backend.rank]
        for units in mine:
            yield batch.select(units)
        for _ in range(max(map(len, hands)) - len(mine)):
            yield batch.filler()

    def _score_all(self, module: nn.Module, rows: Rows) -> Tensor:
        """Every rank scores its share of the rows; the sum over ranks is the whole table."""
        lengths = rows.lengths
        table = torch.zeros(len(lengths), int(lengths.max()))
        hands = self._deal(rows.num_tokens)
        mine = hands[self.backend.rank]
        for units in mine:
            scored = module(rows.select(units)).float().cpu()
            table[rows.branches_of(units), : scored.shape[1]] = scored
        cheapest = min(range(len(rows)), key=rows.num_tokens.__getitem__)
        for _ in range(max(map(len, hands)) - len(mine)):
            module(rows.select([cheapest]))
        return self.backend.sum_over_ranks(table)

    def _deal(self, costs: Sequence[int]) -> list[list[list[int]]]:
        fair_share = -(-sum(costs) // self.backend.world_size)  # no rank idles while another holds everything
        micro_batches = bins(costs, min(self.tokens_per_micro_batch, fair_share))
        return deal(micro_batches, costs, self.backend.world_size)
