"""Verifies answers out of a closed set: the letter or text of an option, and yes or no."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from string import ascii_uppercase

from rewards.base import Verdict
from rewards.characters import plain
from rewards.claims import Mention, settle
from rewards.parse import Reading, found, judge, missing, quote
from rewards.text import normalised

ONLY_A_LETTER = re.compile(r"[\s\"'(\[<]*([A-Za-z])[\s\"')\]>.,:;!]*")
LETTER_AND_TEXT = re.compile(
    r"(?:option |answer )?[(\[\"']*([A-Za-z])(?:[)\].:,\"'\s-]+)(\S.*)", re.IGNORECASE | re.DOTALL
)
LETTER = re.compile(r"(?<![\w'.-])([A-Za-z])(?!['+#]|-?\w|\.\w)")
NAMED = re.compile(r"\b(?:options?|choice|answer|letter|alternative)[\s:]*[\"'(\[]*$", re.IGNORECASE)
CUE = re.compile(
    r"(?:\b(?:select(?:ed)?|choose|chose|pick(?:ed)?|go with|going with|is|be|it's|that's|think|believe|say|or|and|nor"
    r"|but|not|than|of|so|therefore|thus|hence|either|neither|both|probably|likely|clearly|definitely)"
    r"|[选择项是]|[:=>/&,;-])[\s\"'(\[]*$",
    re.IGNORECASE,
)
SENTENCE_START = re.compile(r"(?:^|[.!?\n])[\s\"'(\[*-]*$")
CLOSED = re.compile(r"[\s\"']*(?:[)\].:,;!?]|$)")
OPENING_GOES_ON = re.compile(r"[ \"']*(?:[)\].:,;!\n]|$|- |(?:is|or|and|because|since|but|not|nor|rather|instead)\b)")
ARTICLE_GOES_ON = re.compile(r"\s+(?!(?:is|or|and|because|since|but|not|nor|rather)\b)[a-z]")
LISTED_OPTION = re.compile(r"(?:^|(?<=\s))\(?([A-Z])[).:]\s+")

VERDICT_WORD = re.compile(r"(?<![\w'-])(yes|no|true|false)(?![\w'-])", re.IGNORECASE)
DETERMINER_GOES_ON = re.compile(
    r" (?!(?:because|since|and|or|but|it|there|this|that|the|they|he|she|i|we|is|not|yes)\b)\w", re.IGNORECASE
)
MEANING = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}


def multiple_choice(
    response: str | None, gold: str | Sequence[str], *, choices: Sequence[str] = (), question: str = ""
) -> Verdict:
    """An option's letter in any usual dress, or its exact text; `choices` default to those listed in `question`."""
    return judge(response, gold, partial(read_option, choices=tuple(choices) or listed_options(question)))


def yes_no(
    response: str | None, gold: str | Sequence[str], *, choices: Sequence[str] = (), question: str = ""
) -> Verdict:
    """Yes or no, true or false, as whole words; true means yes. The "no" of "there is no dog" is no verdict."""
    return judge(response, gold, read_yes_no)


def option_letters(choices: Sequence[str]) -> str:
    """The letters of the options; every letter if the options are not known."""
    return ascii_uppercase[: len(choices) or None]


def listed_options(question: str) -> tuple[str, ...]:
    """The options a question spells out, "(A) red (B) blue" or one "A. red" per line; none unless they run A, B, C."""
    marks = list(LISTED_OPTION.finditer(question))
    letters = "".join(mark[1] for mark in marks)
    if len(letters) < 2 or letters != ascii_uppercase[: len(letters)]:
        return ()
    ends = [*(mark.start() for mark in marks[1:]), len(question)]
    return tuple(question[mark.end() : end].strip().split("\n")[0] for mark, end in zip(marks, ends, strict=True))


def read_option(text: str, choices: Sequence[str]) -> Reading:
    """The letter of the one option that `text` names."""
    letters = option_letters(choices)
    expected = f"an option {letters[0]}-{letters[-1]}"
    text = plain(text)
    alone = ONLY_A_LETTER.fullmatch(text)
    if alone:
        letter = alone[1].upper()
        return found(letter) if letter in letters else missing("unparsable", f"expected {expected}, found {letter!r}")
    texts = [normalised(choice) for choice in choices]
    same = [letter for letter, choice in zip(letters, texts, strict=False) if choice == normalised(text)]
    if same:
        return found(same[0]) if len(same) == 1 else missing("ambiguous", f"options {same} are both {quote(text)}")
    dressed = LETTER_AND_TEXT.fullmatch(text)
    if dressed and dressed[1].upper() in letters and normalised(dressed[2]) in texts:
        letter, rest = dressed[1].upper(), normalised(dressed[2])
        agrees = texts[letters.index(letter)] == rest
        return found(letter) if agrees else missing("ambiguous", f"letter and option text disagree in {quote(text)}")
    return settle(text, list(letter_mentions(text, letters)), expected)


def letter_mentions(text: str, letters: str) -> Iterator[Mention]:
    """Single letters that may name an option; firm where the words around one say so, articles and "I" left out."""
    for match in LETTER.finditer(text):
        letter, before, after = match[1], text[: match.start()], text[match.end() :]
        if letter.upper() not in letters:
            continue
        bracketed = after[:1] in (")", "]") or (before.endswith("(") and CLOSED.match(after))
        named = NAMED.search(before) and CLOSED.match(after)
        pronoun_or_article = letter in "aiI" or (letter == "A" and ARTICLE_GOES_ON.match(after))
        opening = SENTENCE_START.search(before) and OPENING_GOES_ON.match(after)
        cued = NAMED.search(before) or CUE.search(before)
        firm = bool(bracketed or named or (not pronoun_or_article and (opening or cued)))
        if firm or (letter.isupper() and not pronoun_or_article):
            yield Mention(value=letter.upper(), start=match.start(), end=match.end(), firm=firm)


def read_yes_no(text: str) -> Reading:
    """Yes or no, whichever one the text stands by."""
    text = plain(text)
    mentions = [
        Mention(value=MEANING[match[1].lower()], start=match.start(), end=match.end())
        for match in VERDICT_WORD.finditer(text)
        if match[1].lower() != "no" or not DETERMINER_GOES_ON.match(text, match.end())
    ]
    return settle(text, mentions, "yes or no")
