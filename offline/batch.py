"""Preferences -> rows: one context, the chosen answer and the rejected ones as its branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from offline.preferences import Preference, load_preferences
from rl.batch import Rows
from rollout.render import Renderer


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """P preferences; one preference is one unit. Shares sum to the stream's weight over the whole batch."""

    rows: Rows
    chosen: Tensor  # [P] branch of the chosen answer
    rejected: Mapping[str, Tensor]  # name -> [P] branch of that rejected answer
    shares: Tensor  # [P]
    beta: Tensor  # [P]
    reference_logprobs: Tensor | None = None  # [N, L]

    @property
    def unit_tokens(self) -> list[int]:
        return self.rows.num_tokens

    def select(self, units: Sequence[int]) -> PreferenceBatch:
        branches = self.rows.branches_of(units)
        width = int(self.rows.lengths[branches].max())
        new_place = torch.full((len(self.rows.lengths),), -1).index_put((branches,), torch.arange(len(branches)))
        index = torch.tensor(units)
        reference = self.reference_logprobs
        return PreferenceBatch(
            rows=self.rows.select(units),
            chosen=new_place[self.chosen[index]],
            rejected={name: new_place[branch[index]] for name, branch in self.rejected.items()},
            shares=self.shares[index],
            beta=self.beta[index],
            reference_logprobs=None if reference is None else reference[branches, :width],
        )

    def filler(self) -> PreferenceBatch:
        cheapest = min(range(len(self.rows)), key=self.unit_tokens.__getitem__)
        unit = self.select([cheapest])
        return replace(unit, shares=unit.shares * 0)


def checked_preferences(path: Path, renderer: Renderer, on_bad_rows: Literal["refuse", "skip"]) -> list[Preference]:
    """The preferences of a file, each one renderable and with answers whose tokens differ."""
    return load_preferences(
        path,
        check=lambda preference: problem(preference, renderer),
        on_bad_rows=on_bad_rows,
        limits=renderer.limits,
    )


def problem(preference: Preference, renderer: Renderer) -> str | None:
    """Why a preference cannot be trained on, or None."""
    if (reason := renderer.problem(preference.prompt)) is not None:
        return reason
    try:
        answers = [renderer.encode_answer(text) for text in (preference.chosen, *preference.rejected.values())]
    except ValueError as error:  # an answer spells a control token
        return str(error)
    if answers[0] in answers[1:]:
        return "chosen and rejected are the same tokens; expected answers that differ; remove the row"
    return None


def preference_rows(preferences: Sequence[Preference], renderer: Renderer) -> Rows:
    """One row per preference: the chosen answer is the first branch, the rejected ones follow in their order."""
    contexts = [renderer.render(preference.prompt) for preference in preferences]
    return Rows(
        context_ids=tuple(torch.tensor(context.token_ids) for context in contexts),
        vision=tuple(context.vision for context in contexts),
        branch_ids=tuple(
            tuple(torch.tensor(renderer.encode_answer(text)) for text in (p.chosen, *p.rejected.values()))
            for p in preferences
        ),
    )


def collate_preferences(
    preferences: Sequence[Preference], renderer: Renderer, *, beta: float, weight: float = 1.0
) -> PreferenceBatch:
    """Preferences -> one batch with a constant beta, every preference counting the same."""
    rows = preference_rows(preferences, renderer)
    names = list(preferences[0].rejected)
    first = torch.arange(len(preferences)) * (1 + len(names))
    return PreferenceBatch(
        rows=rows,
        chosen=first,
        rejected={name: first + 1 + place for place, name in enumerate(names)},
        shares=torch.full((len(preferences),), weight / len(preferences)),
        beta=torch.full((len(preferences),), beta),
    )
