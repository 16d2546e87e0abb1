"""Which of the values a text mentions it stands by: rejected ones do not count, doubt or several leave no answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rewards.parse import Reading, found, missing, quote

DOUBT = re.compile(
    r"\b(?:maybe|perhaps|possibly|unsure|uncertain|unclear|unknown|not (?:sure|certain)|no idea|it depends"
    r"|(?:can(?:not|'t| not)|could(?: not|n't)|unable to|impossible to|not possible to|hard to) (?:really )?"
    r"(?:tell|say|know|decide|answer|determine|be (?:determined|answered))|(?:do not|don't|does not|doesn't) know)\b",
    re.IGNORECASE,
)
HEDGED = re.compile(r"\b(?:could|might|may)\b", re.IGNORECASE)
REJECTED = re.compile(
    r"\b(?:not|cannot|never|neither|nor|rather than|instead of|other than|except|excluding|eliminate[sd]?|rules? out"
    r"|ruled out|reject(?:s|ed)?)\b|n't\b|[不非]",
    re.IGNORECASE,
)
REJECTED_AFTER = re.compile(
    r"[\s)\]\"']*(?:(?:is|are|was|were|seems?|looks?|must be|would be) (?:clearly |definitely |obviously |also |both )?"
    r"(?:wrong|incorrect|false|impossible|excluded|eliminated|ruled out|not (?:right|correct|true|possible|the answer))"
    r"|can be (?:ruled out|excluded|eliminated)"
    r"|(?:isn't|aren't|cannot be|can't be) (?:right|correct|true|the answer))\b",
    re.IGNORECASE,
)
CODE = re.compile(r"\w\(\s*[\"')]|\w\.\w+\(|==")
QUESTION = re.compile(r"[^.!?\n]*\?")
CLAUSE_BREAK = re.compile(r"[.,;:!?\n]|\s-\s|\b(?:but|so|thus|therefore|hence|because|since)\b", re.IGNORECASE)
CONNECTOR = re.compile(
    r"[\s()\[\]\"']*(?:,|/|,?\s*\b(?:or|nor|and)\b)[\s()\[\]\"']*(?:options?\s*)?[(\[\"']*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mention:
    """A value and where the text names it; `firm` unless it may be a mere word, as the C of "vitamin C"."""

    value: str
    start: int
    end: int
    firm: bool = True


def settle(text: str, mentions: Sequence[Mention], expected: str) -> Reading:
    """The one value that stands. `mentions` are in the order of the text; `expected` names them for the reason."""
    if DOUBT.search(text) or any(HEDGED.search(clause_before(text, mention)) for mention in mentions):
        return missing("ambiguous", f"the answer is in doubt: {quote(text)}")
    if CODE.search(text):
        return missing("unparsable", f"expected {expected}, found code: {quote(text)}")
    standing = not_rejected(text, mentions)
    values = sorted({mention.value for mention in standing})
    if len(values) > 1:
        return missing("ambiguous", f"several answers ({', '.join(values)}) in {quote(text)}")
    if any(mention.firm for mention in standing):
        return found(values[0])
    if mentions and not standing:
        return missing("ambiguous", f"only rejected answers in {quote(text)}")
    return missing("unparsable", f"expected {expected}, found {quote(text)}")


def not_rejected(text: str, mentions: Sequence[Mention]) -> list[Mention]:
    """Without those negated, called wrong or asked about, nor their company: "neither A nor B", "A and B are wrong"."""
    before = [bool(REJECTED.search(clause_before(text, mention))) for mention in mentions]
    after = [bool(REJECTED_AFTER.match(text, mention.end)) for mention in mentions]
    joined = [bool(CONNECTOR.fullmatch(text, one.end, other.start)) for one, other in pairwise(mentions)]
    for index, is_joined in enumerate(joined):
        before[index + 1] |= is_joined and before[index]
    for index, is_joined in reversed(list(enumerate(joined))):
        after[index] |= is_joined and after[index + 1]
    asked = [bool(QUESTION.match(text, mention.end)) for mention in mentions]
    return [mention for mention, *flags in zip(mentions, before, after, asked, strict=True) if not any(flags)]


def clause_before(text: str, mention: Mention) -> str:
    return CLAUSE_BREAK.split(text[: mention.start])[-1][-40:]
