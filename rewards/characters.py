"""One spelling for what can be written in many: quotes, dashes, full-width forms, LaTeX styling and markdown."""

from __future__ import annotations

import re
import unicodedata

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
CHARACTERS = FULL_WIDTH | str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201b\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e", '"'),
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-"),  # minus, hyphens and the en dash
        **dict.fromkeys("\u2014\u2015", " - "),  # longer dashes separate words
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),  # zero width
        "\u3000": " ",
        "。": ". ",
        "、": ",",
    }
)
LATEX_STYLE = re.compile(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|sf)|boldsymbol|left|right)(?![a-z])|\\[()\[\]]|[{}$]")
LATEX_SPACE = re.compile(r"\\[,;:! ]")
MARKDOWN = re.compile(r"`|(?<![\w*])[*_]+(?=[^\s*])|(?<=[^\s*])[*_]+(?![\w*])|^#+ ", re.MULTILINE)  # 9**9 is none
IDEOGRAPH = re.compile(r"([\u3040-\u30ff\u3400-\u9fff])")


def plain_characters(text: str) -> str:
    """NFC with ASCII quotes, minus signs and full-width forms; zero-width characters dropped."""
    return unicodedata.normalize("NFC", text).translate(CHARACTERS)


def plain(text: str) -> str:
    """An extracted answer without LaTeX styling and markdown, ideographs set apart, ready to be read word by word."""
    text = LATEX_SPACE.sub("\u2009", plain_characters(text))
    text = MARKDOWN.sub(" ", LATEX_STYLE.sub("", text))
    return re.sub(r"[ \t]+", " ", IDEOGRAPH.sub(r" \1 ", text)).strip()
