"""What the learner eats: contexts with their branches, and for policy gradients the numbers of every branch token.

Legend: B rows (contexts), N branches (answers) over all rows, L tokens of the longest answer. A table [N, L] is padded
with zeros on the right; which cells are tokens follows from the lengths alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol, Self

import torch
from torch import Tensor

from rewards.base import ScoredGroup
from rl.shares import MeanOver, token_shares
from rollout.render import Renderer
from rollout.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Each row is one rendered context (prompt and images) and the answers that branch off it.

    A GRPO group of 8 is one row with 8 branches; a preference pair is one row with 2.
    """

    context_ids: tuple[Tensor, ...]  # B x [context length]
    vision: tuple[Mapping[str, Tensor], ...]  # B opaque dicts the processor made
    branch_ids: tuple[tuple[Tensor, ...], ...]  # B x branches x [answer length]
    temperature: float = 1.0  # log-probs are those of logits / temperature

    def __post_init__(self) -> None:
        if not len(self.context_ids) == len(self.vision) == len(self.branch_ids):
            raise ValueError("a row needs one context, one vision dict and its branches")
        if any(len(ids) == 0 for branches in self.branch_ids for ids in branches):
            raise ValueError("an answer needs at least one token; an empty answer is its end-of-sequence token")

    def __len__(self) -> int:
        return len(self.context_ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of every branch, [N]."""
        return torch.tensor([len(ids) for branches in self.branch_ids for ids in branches])

    @property
    def row_of(self) -> Tensor:
        """The row every branch belongs to, [N]."""
        sizes = torch.tensor([len(branches) for branches in self.branch_ids])
        return torch.arange(len(self)).repeat_interleave(sizes)

    @property
    def num_tokens(self) -> list[int]:
        """What each row costs to forward: its context once and every branch, B numbers."""
        return [
            len(context) + sum(len(ids) for ids in branches)
            for context, branches in zip(self.context_ids, self.branch_ids, strict=True)
        ]

    def branches_of(self, rows: Sequence[int]) -> Tensor:
        """The branches of `rows`, in that order, [n]."""
        ends = list(accumulate(len(branches) for branches in self.branch_ids))
        return torch.tensor([n for row in rows for n in range(ends[row] - len(self.branch_ids[row]), ends[row])])

    def select(self, rows: Sequence[int]) -> Rows:
        """The given rows only, in the given order."""
        return replace(
            self,
            context_ids=tuple(self.context_ids[row] for row in rows),
            vision=tuple(self.vision[row] for row in rows),
            branch_ids=tuple(self.branch_ids[row] for row in rows),
        )


class Batch(Protocol):
    """A batch the learner can cut into micro-batches and spread over ranks, by units that must stay together."""

    @property
    def rows(self) -> Rows: ...

    @property
    def unit_tokens(self) -> list[int]:
        """What each unit costs to forward, in tokens."""
        ...

    def select(self, units: Sequence[int]) -> Self:
        """The given units, each token keeping its share of the whole batch."""
        ...

    def filler(self) -> Self:
        """One unit whose shares are all zero, so that every rank runs the same number of forwards."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBatch:
    """Groups of samples with their advantages; one row (one prompt's group) is one unit."""

    rows: Rows
    advantages: Tensor  # [N]
    shares: Tensor  # [N, L]
    rollout_logprobs: Tensor | None = None  # [N, L] the sampler's; None where somebody else wrote an answer
    old_logprobs: Tensor | None = (
        None  # [N, L] the learner's before the update; None: one update, the ratio starts at 1
    )
    reference_logprobs: Tensor | None = None  # [N, L] the frozen policy's

    @property
    def unit_tokens(self) -> list[int]:
        return self.rows.num_tokens

    def select(self, units: Sequence[int]) -> PolicyBatch:
        branches = self.rows.branches_of(units)
        width = int(self.rows.lengths[branches].max())

        def cut(table: Tensor | None) -> Tensor | None:
            return None if table is None else table[branches, :width]

        return PolicyBatch(
            rows=self.rows.select(units),
            advantages=self.advantages[branches],
            shares=self.shares[branches, :width],
            rollout_logprobs=cut(self.rollout_logprobs),
            old_logprobs=cut(self.old_logprobs),
            reference_logprobs=cut(self.reference_logprobs),
        )

    def filler(self) -> PolicyBatch:
        cheapest = min(range(len(self.rows)), key=self.unit_tokens.__getitem__)
        unit = self.select([cheapest])
        return replace(unit, shares=unit.shares * 0)


def pad(tables: Sequence[Sequence[float]]) -> Tensor:
    """Lists of N different lengths -> [N, L], zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float32) for row in tables], batch_first=True)


def check_same_prompts(groups: Sequence[Group], renderer: Renderer) -> None:
    """Raises ValueError where an engine read another prompt than the learner would: every log-prob would be off."""
    for group in groups:
        rendered = renderer.render(group.prompt)
        if rendered.token_ids != group.prompt_ids:
            raise ValueError(
                f"engine and learner rendered prompt {group.prompt.id!r} differently.\n"
                f"engine  ({len(group.prompt_ids)} tokens): {list(group.prompt_ids)}\n"
                f"learner ({len(rendered.token_ids)} tokens): {list(rendered.token_ids)}\n"
                "Check that both load the same processor, chat template and pixel limits."
            )


def collate(
    scored: Sequence[ScoredGroup],
    renderer: Renderer,
    advantage: Callable[[Tensor], Tensor],
    mean_over: MeanOver,
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> PolicyBatch:
    """Scored groups -> one batch, one row per group, its context as `check_same_prompts` found it."""
    samples = [sample for scored_group in scored for sample in scored_group.group.samples]
    logprobs = [sample.logprobs for sample in samples if sample.logprobs is not None]
    rows = Rows(
        context_ids=tuple(torch.tensor(s.group.prompt_ids) for s in scored),
        vision=tuple(renderer.render(s.group.prompt).vision for s in scored),
        branch_ids=tuple(tuple(torch.tensor(sample.token_ids) for sample in s.group.samples) for s in scored),
        temperature=temperature,
    )
    return PolicyBatch(
        rows=rows,
        advantages=torch.cat([advantage(torch.tensor(s.rewards, dtype=torch.float64)) for s in scored]).float(),
        shares=token_shares(rows.lengths, rows.row_of, mean_over, weight),
        rollout_logprobs=pad(logprobs) if len(logprobs) == len(samples) else None,
    )
