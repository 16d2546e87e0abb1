"""Held-out accuracy: greedy answers of an engine, judged by the same verifiers that train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rewards.verifiers import Verify
from rollout.types import Engine, Prompt, Sample, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The result on one file of prompts.

    >>> Suite(accuracy=0.96, n=300, by_kind={"yes_no": 0.97}, unparsed=0.0)
    """

    accuracy: float
    n: int
    by_kind: Mapping[str, float]
    unparsed: float  # share of answers in which no answer was found


def evaluate(engine: Engine, suites: Mapping[str, Sequence[Prompt]], max_tokens: int) -> dict[str, Suite]:
    """Answer every prompt greedily, all suites in one go."""
    prompts = [prompt for suite in suites.values() for prompt in suite]
    if not prompts:
        return {}
    groups = iter(engine.generate(prompts, Sampling(temperature=0.0, max_tokens=max_tokens)))
    return {name: judge(suite, [next(groups).samples[0] for _ in suite]) for name, suite in suites.items()}


def judge(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> Suite:
    """Score one answer per prompt, as the reward `verify` does."""
    verify = Verify()
    verdicts = [verify(prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)]
    kinds = sorted({prompt.kind for prompt in prompts})
    by_kind = {
        kind: mean([v.score for p, v in zip(prompts, verdicts, strict=True) if p.kind == kind]) for kind in kinds
    }
    return Suite(
        accuracy=mean([verdict.score for verdict in verdicts]),
        n=len(prompts),
        by_kind=by_kind,
        unparsed=mean([float(verdict.status != "ok") for verdict in verdicts]),
    )


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
