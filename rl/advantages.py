"""Rewards of one group -> advantages of its samples.

Sources: GRPO, arXiv 2402.03300 eq. 21 (normalised); Dr. GRPO, arXiv 2503.20783 (centred). A group whose rewards are
all equal, and a group of one, have advantage 0: there is nothing to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalized:
    """(reward - mean) / (std + 1e-6). The population std makes a pair of rewards exactly +1 and -1."""

    name: Literal["normalized"] = "normalized"
    std: Literal["population", "sample"] = "population"

    def __call__(self, rewards: Tensor) -> Tensor:  # [G] -> [G]
        if len(rewards) == 1:
            return rewards * 0
        return (rewards - rewards.mean()) / (rewards.std(correction=int(self.std == "sample")) + 1e-6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Centered:
    """reward - mean: no division, so a group's weight does not depend on how often it is right."""

    name: Literal["centered"] = "centered"

    def __call__(self, rewards: Tensor) -> Tensor:  # [G] -> [G]
        return rewards - rewards.mean()


Advantage = Annotated[Normalized | Centered, Field(discriminator="name")]
