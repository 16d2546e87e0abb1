"""Which scored groups may teach: one whose rewards are all equal has no advantage and would only dilute the mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a group must be to enter the batch."""

    drop_equal_rewards: bool = True


def keep(scored: Sequence[ScoredGroup], rules: Rules) -> list[ScoredGroup]:
    """The groups that pass, in their order."""
    if not rules.drop_equal_rewards:
        return list(scored)
    return [group for group in scored if max(group.rewards) > min(group.rewards)]
