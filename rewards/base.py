"""What a reward says about a sample: a verdict with a status, and a group scored by the weighted sum of its parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rollout.types import Group, Prompt, Sample

Status = Literal["ok", "no_answer", "unparsable", "ambiguous", "timeout", "error", "bad_gold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judgement. Status "ok" means judged, right or wrong; every other status says why that was not possible.

    >>> Verdict(score=1.0, status="ok", extracted="B", reason="'B' is right")
    """

    score: float
    status: Status
    extracted: str | None  # the answer as it was read
    reason: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.score) or (self.status != "ok" and self.score != 0):
            raise ValueError(f"a score is finite, and 0 unless the status is 'ok': {self.score}, {self.status!r}")


class Reward(Protocol):
    """One part of the reward: judges a sample; `weight` multiplies its score in the sum."""

    @property
    def weight(self) -> float: ...

    def __call__(self, prompt: Prompt, sample: Sample) -> Verdict: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """A group, the verdicts of every part of the reward, and per sample the weighted sum of their scores.

    Two samples, judged for correctness (weight 1) and for format (weight 0.5):

    >>> ScoredGroup(
    ...     group=group,  # answers "B" and "It is A." to a prompt whose answer is "B"
    ...     parts={"correct": (right, wrong), "format": (closed, open)},  # scores (1, 0) and (1, 0)
    ...     rewards=(1.5, 0.0),
    ... )
    """

    group: Group
    parts: Mapping[str, tuple[Verdict, ...]]
    rewards: tuple[float, ...]

    def __post_init__(self) -> None:
        num_samples = len(self.group.samples)
        lengths = {name: len(verdicts) for name, verdicts in self.parts.items()} | {"rewards": len(self.rewards)}
        if any(length != num_samples for length in lengths.values()):
            raise ValueError(f"every part needs one verdict per sample: {num_samples} samples, {lengths}")


def score(groups: Sequence[Group], rewards: Mapping[str, Reward]) -> list[ScoredGroup]:
    """Judges every sample by every part of the reward; the groups keep their order."""
    if not rewards:
        raise ValueError("no reward was given; name at least one part, e.g. {'correct': Verify()}")
    return [score_group(group, rewards) for group in groups]


def score_group(group: Group, rewards: Mapping[str, Reward]) -> ScoredGroup:
    parts = {name: tuple(reward(group.prompt, sample) for sample in group.samples) for name, reward in rewards.items()}
    weights = [reward.weight for reward in rewards.values()]
    totals = tuple(
        math.fsum(weight * verdict.score for weight, verdict in zip(weights, verdicts, strict=True))
        for verdicts in zip(*parts.values(), strict=True)
    )
    return ScoredGroup(group=group, parts=parts, rewards=totals)


def count_statuses(scored: Sequence[ScoredGroup]) -> dict[str, float]:
    """Per part, the share of samples with each status that occurs, and the mean score before weighting.

    >>> count_statuses(scored)  # ten samples, one without an answer, seven right
    {'correct/score': 0.7, 'correct/ok': 0.9, 'correct/no_answer': 0.1}
    """
    verdicts: dict[str, list[Verdict]] = {}
    for group in scored:
        for name, part in group.parts.items():
            verdicts.setdefault(name, []).extend(part)
    counts: dict[str, float] = {}
    for name, judged in verdicts.items():
        counts[f"{name}/score"] = math.fsum(verdict.score for verdict in judged) / len(judged)
        for status, count in Counter(verdict.status for verdict in judged).items():
            counts[f"{name}/{status}"] = count / len(judged)
    return counts
