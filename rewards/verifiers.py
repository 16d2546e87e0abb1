"""The verifiers by kind of answer, and the reward that routes every sample to the verifier its prompt names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rewards.base import Verdict
from rewards.choice import multiple_choice, yes_no
from rewards.numeric import count
from rewards.text import exact
from rollout.types import Prompt, Sample


class Verifier(Protocol):
    """Compares a response with a gold answer (any of several): linear time, never raises, whatever the response is."""

    def __call__(
        self, response: str | None, gold: str | Sequence[str], *, choices: Sequence[str] = (), question: str = ""
    ) -> Verdict: ...


VERIFIERS: Mapping[str, Verifier] = {
    "multiple_choice": multiple_choice,
    "yes_no": yes_no,
    "count": count,
    "exact": exact,
}


def verify(
    kind: str,
    response: str | None,
    gold: str | Sequence[str],
    *,
    choices: Sequence[str] = (),
    question: str = "",
) -> Verdict:
    """Judges a response by the verifier of its kind; an unknown kind is a ValueError.

    >>> verify("multiple_choice", "<think>It looks red.</think> (B)", "B", choices=("blue", "red")).score
    1.0
    """
    problem = kind_problem(kind)
    if problem:
        raise ValueError(problem)
    return VERIFIERS[kind](response, gold, choices=choices, question=question)


def kind_problem(kind: str) -> str | None:
    if kind in VERIFIERS:
        return None
    from difflib import get_close_matches  # only ever needed for this message

    nearest = get_close_matches(kind, VERIFIERS, n=1, cutoff=0.0)[0]
    return f"unknown kind of answer {kind!r}; did you mean {nearest!r}? The kinds are {', '.join(VERIFIERS)}"


def gold_problem(prompt: Prompt) -> str | None:
    """Why the prompt's own answer could never be rewarded, and what to do about it; None if all is well.

    Every gold answer is fed back to its verifier and must score 1. To be asked once, when prompts are loaded.
    """
    golds = (prompt.answer,) if isinstance(prompt.answer, str) else prompt.answer
    problem = kind_problem(prompt.kind) or (None if golds else "the answer is missing")
    for gold in golds if problem is None else ():
        verdict = verify(prompt.kind, gold, gold, choices=prompt.choices, question=question_of(prompt))
        if verdict.score != 1.0:
            problem = verdict.reason
            break
    if problem is None:
        return None
    where = f"prompt {prompt.id!r}" + (f" ({prompt.source})" if prompt.source else "")
    return f"{where}: {problem}; correct its kind, answer or choices, or drop it"


def question_of(prompt: Prompt) -> str:
    return prompt.messages[-1].text


@dataclass(frozen=True, slots=True, kw_only=True)
class Verify:
    """Rewards the right answer, as judged by the verifier that the prompt's kind names; a truncated one is wrong."""

    name: Literal["verify"] = "verify"
    weight: float = 1.0

    def __call__(self, prompt: Prompt, sample: Sample) -> Verdict:
        if sample.finish_reason == "length":
            reason = f"cut off at the token limit, after {len(sample.token_ids)} tokens"
            return Verdict(score=0.0, status="no_answer", extracted=None, reason=reason)
        return verify(prompt.kind, sample.text, prompt.answer, choices=prompt.choices, question=question_of(prompt))
