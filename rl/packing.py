"""One context, many branches: rows -> one sequence with a tree mask; a context is forwarded once for all its answers.

    [context 1 | answer 1a | answer 1b | context 2 | answer 2a | ...]

A token of an answer sees its own context and its own earlier tokens, nothing else. Positions of every answer continue
from the end of its context, so each answer is computed exactly as if it stood alone behind the prompt. The last token
of an answer is only ever predicted, never read, so it is not forwarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rl.batch import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One sequence of T tokens; S scored tokens are predicted at `scored_at` and land in `table_cell` of [N, L]."""

    token_ids: Tensor  # [1, T]
    position_ids: Tensor  # [axes, 1, T]; one axis, or three for M-RoPE
    segment: Tensor  # [T] which context or answer a token belongs to
    parent: Tensor  # [T] the context it may also see; its own for a token of a context
    scored_at: Tensor  # [S] index into T of the token that predicts
    targets: Tensor  # [S] token ids that are predicted
    table_cell: tuple[Tensor, Tensor]  # [S], [S]: branch n and place l


def pack(rows: Rows, context_positions: Sequence[Tensor]) -> Packed:
    """Lay rows one after another. `context_positions` holds one [axes, context length] table per row."""
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    segment: list[int] = []
    parent: list[int] = []
    scored_at: list[int] = []
    branches: list[int] = []
    places: list[int] = []
    num_segments, length, branch = 0, 0, 0
    for context, context_position, row_branches in zip(
        rows.context_ids, context_positions, rows.branch_ids, strict=True
    ):
        context_segment, context_end = num_segments, length + len(context) - 1
        next_position = int(context_position.max()) + 1
        ids.append(context)
        positions.append(context_position)
        segment += [context_segment] * len(context)
        parent += [context_segment] * len(context)
        length += len(context)
        num_segments += 1
        for answer in row_branches:
            read = answer[:-1]
            scored_at += [context_end, *range(length, length + len(read))]
            branches += [branch] * len(answer)
            places += range(len(answer))
            ids.append(read)
            axes = context_position.shape[0]
            positions.append((next_position + torch.arange(len(read))).expand(axes, -1))
            segment += [num_segments] * len(read)
            parent += [context_segment] * len(read)
            length += len(read)
            num_segments += 1
            branch += 1
    return Packed(
        token_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, dim=1)[:, None],
        segment=torch.tensor(segment),
        parent=torch.tensor(parent),
        scored_at=torch.tensor(scored_at),
        targets=torch.cat([answer for row_branches in rows.branch_ids for answer in row_branches]),
        table_cell=(torch.tensor(branches), torch.tensor(places)),
    )


def tree_mask(segment: Tensor, parent: Tensor) -> Tensor:
    """[T], [T] -> [T, T]: a token sees earlier tokens of its own segment and of its parent context."""
    own = segment[:, None] == segment[None, :]
    above = parent[:, None] == segment[None, :]
    earlier = torch.ones(len(segment), len(segment), dtype=torch.bool, device=segment.device).tril()
    return (own | above) & earlier


def alone(rows: Rows) -> Rows:
    """The same answers as one-answer rows, each repeating its context: the same numbers at K times the cost."""
    return Rows(
        context_ids=tuple(c for c, b in zip(rows.context_ids, rows.branch_ids, strict=True) for _ in b),
        vision=tuple(v for v, b in zip(rows.vision, rows.branch_ids, strict=True) for _ in b),
        branch_ids=tuple((answer,) for branches in rows.branch_ids for answer in branches),
        temperature=rows.temperature,
    )


def bins(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Units into micro-batches of at most `budget` tokens (a larger unit gets its own): first fit, longest first."""
    filled: list[tuple[int, list[int]]] = []
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        for index, (cost, units) in enumerate(filled):
            if cost + costs[unit] <= budget:
                filled[index] = (cost + costs[unit], [*units, unit])
                break
        else:
            filled.append((costs[unit], [unit]))
    return [sorted(units) for _, units in filled]


def deal(micro_batches: Sequence[list[int]], costs: Sequence[int], num_ranks: int) -> list[list[list[int]]]:
    """Micro-batches to ranks so that every rank carries about the same cost: heaviest first, to the lightest rank."""
    hands: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    for units in sorted(micro_batches, key=lambda units: -sum(costs[unit] for unit in units)):
        lightest = loads.index(min(loads))
        hands[lightest].append(units)
        loads[lightest] += sum(costs[unit] for unit in units)
    return hands
