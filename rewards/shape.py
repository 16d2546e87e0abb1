"""Rewards the form of a response, whatever it says: nothing but the answer, or the tags it was asked to use."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rewards.base import Verdict
from rewards.choice import listed_options, option_letters
from rewards.parse import BOX_OPENING, last_box, without_reasoning
from rewards.verifiers import kind_problem, question_of
from rollout.types import Prompt, Sample

Style = Literal["closed", "think_answer", "boxed", "think_boxed"]

CLOSED: Mapping[str, re.Pattern[str]] = {
    "multiple_choice": re.compile(r"\(?([A-Za-z])\)?\.?"),
    "yes_no": re.compile(r"(?:yes|no|true|false)\.?", re.IGNORECASE),
    "count": re.compile(r"-?[0-9]{1,18}\.?"),
    # One to six words on one line, no verb that makes them a sentence, no punctuation between sentences.
    "exact": re.compile(
        r"(?!.*\b(?:is|are|was|were|has|have|looks|seems|appears|because|answer)\b)(?!.*(?:\w{3}\.|[;:!?]) )"
        r"[^\s<>\\]{1,40}(?: [^\s<>\\]{1,40}){0,5}",
        re.IGNORECASE,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """Rewards a finished response in the named style of at most `max_tokens` tokens, its end token included.

    closed: nothing but the answer as its kind asks for it: one option letter, possibly in parentheses; one yes, no,
    true or false; one integer in digits; a phrase of up to six words. A final full stop is fine.
    think_answer: one think block, one answer block, neither empty, and only white space around them.
    boxed: exactly one box outside the reasoning, complete and not empty.
    think_boxed: one think block first, then text with a complete box.
    """

    name: Literal["format"] = "format"
    style: Style = "closed"
    max_tokens: int | None = None
    weight: float = 1.0

    def __call__(self, prompt: Prompt, sample: Sample) -> Verdict:
        if sample.finish_reason == "length":
            return judged(False, f"cut off at the token limit, after {len(sample.token_ids)} tokens")
        if self.max_tokens is not None and len(sample.token_ids) > self.max_tokens:
            return judged(False, f"{len(sample.token_ids)} tokens, at most {self.max_tokens} are rewarded")
        fits = is_closed(sample.text, prompt) if self.style == "closed" else STYLES[self.style](sample.text)
        return judged(fits, f"the response is {'' if fits else 'not '}in the style {self.style!r}")


def judged(fits: bool, reason: str) -> Verdict:
    return Verdict(score=float(fits), status="ok", extracted=None, reason=reason)


def is_closed(text: str, prompt: Prompt) -> bool:
    """Whether the text is nothing but an answer of the prompt's kind; an unknown kind is a ValueError."""
    problem = kind_problem(prompt.kind)
    if problem:
        raise ValueError(problem)
    match = CLOSED[prompt.kind].fullmatch(text.strip())
    if match and prompt.kind == "multiple_choice":
        return match[1].upper() in option_letters(prompt.choices or listed_options(question_of(prompt)))
    return match is not None


def is_think_answer(text: str) -> bool:
    reasoning, rest = split_reasoning(text)
    answer = rest.removeprefix("<answer>").removesuffix("</answer>")
    return bool(
        reasoning
        and rest.startswith("<answer>")
        and rest.endswith("</answer>")
        and text.count("<answer>") == text.count("</answer>") == 1
        and answer.strip()
    )


def is_boxed(text: str) -> bool:
    text = without_reasoning(text)
    return len(BOX_OPENING.findall(text)) == 1 and bool(last_box(text))


def is_think_boxed(text: str) -> bool:
    reasoning, rest = split_reasoning(text)
    return bool(reasoning and last_box(rest))


def split_reasoning(text: str) -> tuple[str, str]:
    """The content of the one think block a text starts with, and what follows it; two empty strings if it does not."""
    text = text.strip()
    if not text.startswith("<think>") or not text.count("<think>") == text.count("</think>") == 1:
        return "", ""
    reasoning, rest = text.removeprefix("<think>").split("</think>")
    return reasoning.strip(), rest.strip()


STYLES: Mapping[str, Callable[[str], bool]] = {
    "think_answer": is_think_answer,
    "boxed": is_boxed,
    "think_boxed": is_think_boxed,
}
