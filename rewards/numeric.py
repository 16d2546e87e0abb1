"""Verifies counts: one integer, in digits or in English number words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rewards.base import Verdict
from rewards.characters import plain
from rewards.claims import Mention, settle
from rewards.parse import Reading, judge, missing, quote

UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SMALL = {word: value for value, word in enumerate(UNITS)} | {word: 10 * value for value, word in enumerate(TENS, 2)}
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1_000, "million": 1_000_000}

NUMBER_WORD = "|".join([*SMALL, *SCALES])
NOT_A_COUNT = (
    r"(?![\s-]*(?:%|percent\b|point\b|and an? \w+|half\b|halves\b|(?:third|quarter|fourth|fifth|sixth|eighth|tenth)s?\b"
    r"|hundreds?\b|thousands?\b|[mb]illions?\b|dozens?\b))"
)
DIGITS = (
    r"(?<![\w.,^*])-?(?:[0-9]{1,3}(?:[,\u2009\u202f\u00a0][0-9]{3})+|[0-9]{1,18})(?:\.[0-9]{1,9})?"
    r"(?![\w^*]|[.,][0-9]|-[A-Za-z])"
)
WORDS = rf"(?<![\w-])(?<!\bno )(?<![0-9]\s)(?:{NUMBER_WORD})(?:[\s-]+(?:and\s+)?(?:{NUMBER_WORD}))*(?!\w|-[A-Za-z])"
COUNT = re.compile(f"(?:(?P<digits>{DIGITS})|(?P<words>{WORDS})){NOT_A_COUNT}", re.IGNORECASE)
BOUND_BEFORE = re.compile(
    r"(?:\b(?:about|around|approximately|approx\.?|roughly|nearly|almost|over|under|above|below|at least|at most|up to"
    r"|(?:more|less|fewer|greater|larger|smaller|other) than|maximum of|minimum of|between|from|exceeds"
    r"|some|several|few|many)"
    r"|[~≈<>≤≥±]|\\(?:leq?|geq?|lt|gt|approx|sim|pm))\s*$",
    re.IGNORECASE,
)
BOUND_AFTER = re.compile(
    r"\s*(?:[+*/^=\u00d7\u00f7]|-\s*[0-9]|\\(?:times|cdot|div|pm)|-ish\b"
    r"|(?:or (?:more|less|fewer|so)|and (?:more|up)|at (?:least|most)|plus|minus|times|to)\b)",
    re.IGNORECASE,
)
INTEGER = re.compile(r"-?[0-9]+")
MINUS = re.compile(r"\b(?:minus|negative)\s+$", re.IGNORECASE)


def count(
    response: str | None, gold: str | Sequence[str], *, choices: Sequence[str] = (), question: str = ""
) -> Verdict:
    """The same integer; approximations, bounds, ranges and several numbers are no count."""
    return judge(response, gold, read_count)


def read_count(text: str) -> Reading:
    """The one integer of the text, in plain digits."""
    text = plain(text)
    mentions = list(count_mentions(text))
    if any(BOUND_BEFORE.search(text[: each.start]) or BOUND_AFTER.match(text, each.end) for each in mentions):
        return missing("ambiguous", f"a bound, range, approximation or sum instead of a count: {quote(text)}")
    reading = settle(text, mentions, "one integer")
    if reading.value is not None and not INTEGER.fullmatch(reading.value):
        return missing("unparsable", f"expected one integer, found {quote(text)}")
    return reading


def count_mentions(text: str) -> Iterator[Mention]:
    for match in COUNT.finditer(text):
        value = spoken(match["words"]) if match["words"] else written(match["digits"])
        sign = "-" if MINUS.search(text[: match.start()]) else ""
        yield Mention(value=sign + value, start=match.start(), end=match.end())


def written(digits: str) -> str:
    """Digits without separators and leading zeros; a fraction other than .0 is kept, so it is no integer."""
    whole, _, fraction = re.sub(r"[^0-9.-]", "", digits).partition(".")
    return f"{int(whole)}.{fraction}" if fraction.strip("0") else str(int(whole))


def spoken(words: str) -> str:
    """Digits for a run of number words; the words themselves if they are not one number.

    >>> spoken("two hundred and five"), spoken("two and three")
    ('205', 'two and three')
    """
    total, part, room, previous = 0, 0, 1_000_000_000, ""
    for word in re.split(r"[\s-]+", words.lower()):
        if word == "and":
            well_formed = previous in SCALES
        elif word in SMALL:
            well_formed = SMALL[word] < room
            part, room = part + SMALL[word], 10 if SMALL[word] >= 20 else 0
        elif SCALES[word] <= 100:
            well_formed = part < 100 and previous not in SCALES
            part, room = (part or 1) * SCALES[word], SCALES[word]
        else:
            well_formed = previous not in ("thousand", "million") and (total == 0 or total > SCALES[word])
            total, part, room = total + (part or 1) * SCALES[word], 0, SCALES[word]
        if not well_formed:
            return words
        previous = word
    return str(total + part)
