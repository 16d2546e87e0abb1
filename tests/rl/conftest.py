"""Groups with given rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from rewards.base import ScoredGroup, Verdict
from rollout.types import Group, Message, Prompt, Sample


@pytest.fixture
def scored_with() -> Callable[[Sequence[float]], ScoredGroup]:
    def make(rewards: Sequence[float]) -> ScoredGroup:
        prompt = Prompt(id="p", messages=(Message(role="user", text="?"),), answer="red", kind="exact")
        sample = Sample(token_ids=(1,), logprobs=(-1.0,), text="red", finish_reason="stop", policy_version=0)
        group = Group(prompt=prompt, prompt_ids=(1,), samples=(sample,) * len(rewards))
        verdicts = tuple(Verdict(score=reward, status="ok", extracted="red", reason="") for reward in rewards)
        return ScoredGroup(group=group, parts={"correct": verdicts}, rewards=tuple(map(float, rewards)))

    return make
