"""Verifies short free text by equality after normalisation."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.base import Verdict
from rewards.characters import LATEX_STYLE, plain_characters
from rewards.parse import Reading, found, judge, missing, quote

EMPHASIS = re.compile(r"\*\*|__|`")
EDGES = " \t\r\n\"'*_.,;:!?"


def exact(
    response: str | None, gold: str | Sequence[str], *, choices: Sequence[str] = (), question: str = ""
) -> Verdict:
    """The gold text (any of several), whatever its case, white space, quotes, markdown and final punctuation."""
    return judge(response, gold, read_text)


def read_text(text: str) -> Reading:
    value = normalised(text)
    return found(value) if value else missing("unparsable", f"expected a word, found {quote(text)}")


def normalised(text: str) -> str:
    """Case folded, NFC, one blank between words, without emphasis marks and punctuation at the edges."""
    text = EMPHASIS.sub("", LATEX_STYLE.sub("", plain_characters(text)))
    return " ".join(plain_characters(text.casefold()).split()).strip(EDGES)
