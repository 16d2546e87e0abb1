"""What holds for every verifier and every text: no crash, nothing for nothing, and time linear in the length."""

from __future__ import annotations

import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewards import VERIFIERS, verify
from rewards.parse import extract

COLORS = ("red", "blue", "dark red", "green")
GOLDS = {"multiple_choice": "B", "yes_no": "yes", "count": "3", "exact": "red"}
PIECES = (
    *("<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "}", "{", "The answer is ", "Answer: ", "答案是"),
    *("A", "(B)", "B. blue", "yes", "no", "3", "three", "red", "3,000", "\u2212", "٣", "İ", "\ud800", "\x00", "\u200b"),
    *(" ", "\n", ", ", " or ", " not ", "?", "**", "`", "$", "\\frac12", "9**9**9", "1e999999999", "nan", "maybe "),
)
SEPARATORS = (", ", "; ", " / ", " or ", " and ", " ", "\n")
STATEMENTS = ("The answer is {}", "Answer: {}")  # end with their line
UNITS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen")
TEENS = ("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

TAGS = ("<think>\n", "</think>", "<answer>", "<answer>B</answer>", "</answer>", "\\boxed{", "\\boxed{A}, ", "\\boxed ")
PROSE = ("answer: ", "the answer is ", "答案是", "{", "A ", "not ", " ", "\n", "9", "one and ", "İ", "*", "a\u0301")

kinds = st.sampled_from(sorted(VERIFIERS))
responses = st.one_of(st.text(), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5))).map("".join))
blanks = st.text(alphabet=" \t\n\r\u00a0\u3000")
words = st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=9)
wrappings = st.sampled_from(("{}", "<answer>{}</answer>", "<think>A</think>{}", *STATEMENTS))


def judged(kind: str, response: str | None) -> float:
    return verify(kind, response, GOLDS[kind], choices=COLORS if kind == "multiple_choice" else ()).score


@given(kinds, responses, st.one_of(st.text(), st.lists(st.text(), max_size=3)))
@settings(deadline=None, max_examples=300)
def test_never_raises(kind: str, response: str, gold: str | list[str]) -> None:
    assert verify(kind, response, gold, choices=COLORS, question=response).score in (0.0, 1.0)
    assert judged(kind, response) in (0.0, 1.0)


@pytest.mark.parametrize("kind", VERIFIERS)
@pytest.mark.parametrize("response", [None, 3, 3.0, b"B", ["B"], {"answer": "B"}, True])
def test_what_is_not_text_scores_nothing(kind: str, response: object) -> None:
    assert verify(kind, response, GOLDS[kind]).status == "no_answer"  # type: ignore[arg-type]


@given(
    kinds, blanks, st.sampled_from(("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "<think>B 3</think>{}")), st.text()
)
@settings(deadline=None)
def test_empty_never_scores(kind: str, blank: str, wrapping: str, gold: str) -> None:
    assert judged(kind, wrapping.format(blank)) == 0
    assert verify(kind, wrapping.format(blank), gold).score == 0


@given(kinds, responses, blanks, blanks)
@settings(deadline=None)
def test_surrounding_white_space_changes_nothing(kind: str, response: str, before: str, after: str) -> None:
    assert judged(kind, before + response + after) == judged(kind, response)


@given(kinds, responses, responses)
@settings(deadline=None)
def test_reasoning_changes_nothing(kind: str, thought: str, response: str) -> None:
    assume("think>" not in response.lower())
    assert judged(kind, f"<think>{thought}</think>{response}") == judged(kind, response)
    assert judged(kind, f"{thought}</think>{response}") == judged(kind, response)


@given(
    st.lists(st.sampled_from(("red", "blue", "dark red", "green", "teal", "pink")), min_size=2, unique=True),
    st.sampled_from(
        ("{letter}", "({letter})", "{letter}.", "{letter}. {text}", "({letter}) {text}", "{letter}: {text}", "{text}")
    ),
    st.sampled_from(SEPARATORS),
    wrappings,
    st.integers(min_value=0, max_value=5),
)
@settings(deadline=None, max_examples=300)
def test_listing_every_option_never_scores(
    choices: list[str], dress: str, separator: str, wrapping: str, right: int
) -> None:
    assume(dress != "{text}" or separator != "\n" or wrapping not in STATEMENTS)
    options = [dress.format(letter=letter, text=text) for letter, text in zip("ABCDEF", choices, strict=False)]
    gold = "ABCDEF"[right % len(choices)]
    response = wrapping.format(separator.join(options))
    assert verify("multiple_choice", response, gold, choices=choices).score == 0


@given(st.permutations(("yes", "no")), st.sampled_from(SEPARATORS), wrappings, st.sampled_from(("yes", "no")))
@settings(deadline=None)
def test_yes_and_no_never_scores(verdicts: list[str], separator: str, wrapping: str, gold: str) -> None:
    assume(separator != "\n" or wrapping not in STATEMENTS)
    assert verify("yes_no", wrapping.format(separator.join(verdicts)), gold).score == 0


@given(st.lists(words, min_size=2, max_size=8, unique=True), st.data(), wrappings)
@settings(deadline=None)
def test_gold_fed_back_scores_one(choices: list[str], data: st.DataObject, wrapping: str) -> None:
    index = data.draw(st.integers(min_value=0, max_value=len(choices) - 1))
    integer = str(data.draw(st.integers(min_value=-(10**17), max_value=10**17)))
    letter, text = "ABCDEFGH"[index], choices[index]
    for gold in (letter, text):
        assert verify("multiple_choice", wrapping.format(gold), gold, choices=choices).score == 1
    for gold in ("yes", "no", "True", "False"):
        assert verify("yes_no", wrapping.format(gold), gold).score == 1
    assert verify("count", wrapping.format(integer), integer).score == 1
    assert verify("exact", wrapping.format(text), text).score == 1


@given(responses)
@settings(deadline=None, max_examples=300)
def test_exact_text_fed_back_scores_one_or_is_a_bad_gold(text: str) -> None:
    verdict = verify("exact", text, text)
    assert verdict.score == 1 or verdict.status == "bad_gold"


def in_words(number: int) -> str:
    if number < 20:
        return ("zero", *UNITS, *TEENS)[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{in_words(number % 10)}" if number % 10 else "")
    scale, name = next((s, n) for s, n in ((10**6, "million"), (1000, "thousand"), (100, "hundred")) if number >= s)
    rest = number % scale
    return f"{in_words(number // scale)} {name}" + (f"{' and' if rest < 100 else ''} {in_words(rest)}" if rest else "")


@given(st.one_of(st.integers(min_value=0, max_value=1200), st.integers(min_value=0, max_value=10**8)))
@settings(deadline=None)
def test_number_words(number: int) -> None:
    assert verify("count", in_words(number), str(number)).score == 1
    assert verify("count", in_words(number), str(number + 1)).score == 0


@pytest.mark.parametrize("unit", TAGS + PROSE)
def test_time_grows_with_the_length(unit: str) -> None:
    def seconds(length: int) -> float:
        text = unit * (length // len(unit))
        start = time.process_time()
        extract(text + "<answer>B</answer>")
        extract(text)
        return time.process_time() - start

    short = min(seconds(250_000) for _ in range(3))
    long = min(seconds(1_000_000) for _ in range(3))
    assert long < 10 * max(short, 0.01)  # linear is a factor of 4, quadratic of 16


@pytest.mark.parametrize("kind", VERIFIERS)
def test_a_megabyte_of_text_is_no_answer_but_may_hold_one(kind: str) -> None:
    essay = "It looks like a photograph. " * 40_000
    assert judged(kind, essay) == 0
    assert judged(kind, f"{essay}<answer>{GOLDS[kind]}</answer>") == 1
    assert judged(kind, f"{essay}\nThe answer is {GOLDS[kind]}.") == 1
    assert judged(kind, f"<think>{essay}</think>{GOLDS[kind]}") == 1
