"""Finds the answer in a response: the one extraction layer under every verifier, linear in the response's length.

Order: drop the reasoning; then the last `<answer>` block; then the last `\\boxed{}`; then the last explicit statement
("the answer is B"); then the whole text if it is short. Tags and boxes are found from the end with `str.rfind`;
statements are looked for in the head and tail only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase

from rewards.base import Status, Verdict
from rewards.characters import plain_characters

SHORT = 500  # characters: a longer text is an essay, not an answer
WINDOW = 8_000  # characters kept at either end of a long text when a statement is looked for

LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)  # unlike str.lower, never changes the length
ANSWER_OPENING = re.compile(r"<answer>", re.IGNORECASE)
ANSWER_CLOSING = re.compile(r"</answer>", re.IGNORECASE)
BOX_OPENING = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is not a brace
LIST_SEPARATOR = re.compile(r"(?:[\s,;/&$]|\\[()]|\bor\b|\band\b)*", re.IGNORECASE)
STATEMENT = re.compile(
    r"(?:\b(?:answer|(?:correct|right|best|final|my) (?:option|choice))(?: to (?:the|this|your) question)?"
    r"[\s*_\"']{0,4}(?:(?:is|would be|should be|must be)\b|[:=])|答案(?:应该|應該)?[是为為:])[\s*_:]{0,6}",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<!\b(?:St|Mr|Ms|Mt|Dr|Ft|Jr|Sr))[.!?](?=\s|$)|\n", re.IGNORECASE)
AFTERTHOUGHT = re.compile(  # a hedge, or the next option of a list: right here or after one or two words
    r"\s*(?:or|alternatively|(?:but )?(?:maybe|perhaps|possibly)|(?:but )?(?:it|that|this) (?:could|might|may))\b"
    r"|\s*\W{0,2}\w(?:[).:,;]|\s*(?:\n|$))|(?: [\w'-]{1,20}[,;]?){1,2}(?: or| and| /)?\s\(?[A-Z][).:](?:\s|$)",
    re.IGNORECASE,
)
SPECIAL_TOKEN = re.compile(r"<\|\w{1,20}\|>|</s>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What could be read: a value and "ok", or no value and a status and reason that say why.

    >>> Reading(value=None, status="no_answer", reason="empty")
    """

    value: str | None
    status: Status
    reason: str

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.status != "ok"), self


Reader = Callable[[str], Reading]  # an extracted answer -> its canonical form


def found(value: str) -> Reading:
    return Reading(value=value, status="ok", reason="")


def missing(status: Status, reason: str) -> Reading:
    return Reading(value=None, status=status, reason=reason)


def quote(value: object) -> str:
    """A value for an error message, cut to one short line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def judge(response: str | None, gold: str | Sequence[str], read: Reader) -> Verdict:
    """Score 1 if response and gold (any of several) read the same, with the same reader for both."""
    golds = gold if isinstance(gold, (list, tuple)) else (gold,)
    expected = [read_answer(each, read) for each in golds]
    for each, reading in zip(golds, expected, strict=True):
        if reading.value is None:
            return Verdict(score=0.0, status="bad_gold", extracted=None, reason=f"gold {quote(each)}: {reading.reason}")
    if not expected:
        return Verdict(score=0.0, status="bad_gold", extracted=None, reason="the gold answer is missing")
    given = read_answer(response, read)
    if given.value is None:
        return Verdict(score=0.0, status=given.status, extracted=None, reason=given.reason)
    values = [reading.value for reading in expected]
    right = given.value in values
    reason = f"read {quote(given.value)}, expected {' or '.join(map(quote, values))}"
    return Verdict(score=float(right), status="ok", extracted=given.value, reason=reason)


def read_answer(response: object, read: Reader) -> Reading:
    answer = extract(response)
    return answer if answer.value is None else read(answer.value)


def extract(response: object) -> Reading:
    """The text of the answer, at most `SHORT` characters, not yet interpreted; never raises, whatever it is given."""
    if not isinstance(response, str):
        return missing("no_answer", f"expected text, was given {type(response).__name__}")
    text = without_reasoning(response)
    for last in (last_answer_block, last_box):
        inner = last(text)
        if inner == "":
            return missing("no_answer", "the last <answer> or \\boxed{} is empty, too long or not closed")
        text = text if inner is None else inner
    text = SPECIAL_TOKEN.sub("", last_statement(text) or text).strip()
    if not text:
        return missing("no_answer", "empty, or nothing but reasoning")
    if len(text) > SHORT:
        return missing("no_answer", f"{len(text)} characters without <answer>, \\boxed{{}} or 'the answer is'")
    return found(text)


def without_reasoning(text: str) -> str:
    """What follows the last `</think>` (its opening may have been in the prompt), up to any unfinished `<think>`."""
    lower = text.translate(LOWER)
    end = lower.rfind("</think>")
    start = 0 if end < 0 else end + len("</think>")
    unfinished = lower.find("<think>", start)
    return text[start:] if unfinished < 0 else text[start:unfinished]


def last_answer_block(text: str) -> str | None:
    """The content of the last answer block; "" if that is empty or not closed, None if there is none."""
    return last_span(text, from_the_end(text, "<answer>", ANSWER_OPENING), closing_tag)


def last_box(text: str) -> str | None:
    """The content of the last box; "" if that is empty, too long or not closed, None if there is none."""
    return last_span(text, from_the_end(text, "\\boxed", BOX_OPENING), closing_brace)


def from_the_end(text: str, literal: str, opening: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Every match of `opening`, the last one first; each begins with `literal`, given in lower case."""
    lower = text.translate(LOWER)
    start = lower.rfind(literal)
    while start >= 0:
        mark = opening.match(text, start)
        if mark:
            yield mark
        start = lower.rfind(literal, 0, start)


def last_span(
    text: str, openings: Iterator[re.Match[str]], closing: Callable[[str, int, int], re.Match[str] | None]
) -> str | None:
    r"""The last span's content. Neighbours with only separators between, as `\boxed{A} or \boxed{B}`, are one list."""
    contents: list[str] = []
    start_of_next = len(text)
    for mark in openings:
        end = closing(text, mark.end(), start_of_next)
        if end is None or (contents and not LIST_SEPARATOR.fullmatch(text, end.end(), start_of_next)):
            break
        contents.append(text[mark.end() : end.start()].strip())
        start_of_next = mark.start()
    else:  # nothing broken off: either all spans are one list, or there are none
        if not contents:
            return None
    return ", ".join(filter(None, dict.fromkeys(reversed(contents))))


def closing_tag(text: str, start: int, end: int) -> re.Match[str] | None:
    return ANSWER_CLOSING.search(text, start, end)


def closing_brace(text: str, start: int, end: int) -> re.Match[str] | None:
    """The brace that closes a box whose content begins at `start`, within a bounded distance."""
    depth = 1
    for brace in BRACE.finditer(text, start, min(end, start + 4 * SHORT)):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace
    return None


def last_statement(text: str) -> str | None:
    """The first sentence after the last "the answer is", "answer:" or "答案是" that is followed by anything."""
    ends = plain_characters(text if len(text) <= 2 * WINDOW else f"{text[:WINDOW]}\n...\n{text[-WINDOW:]}")
    for mark in reversed(list(STATEMENT.finditer(ends))):
        rest = ends[mark.end() : mark.end() + SHORT].strip()
        if rest:
            return first_sentence(rest)
    return None


def first_sentence(text: str) -> str:
    """Up to the end of the sentence or line, or all of it when the next sentence takes the first one back."""
    end = SENTENCE_END.search(text)
    return text if end is None or AFTERTHOUGHT.match(text, end.end()) else text[: end.end()].strip()
