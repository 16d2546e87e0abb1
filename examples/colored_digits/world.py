"""The colored-digits world: its pictures, its questions and the data sets made of them; needs no torch."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
from numpy.typing import NDArray
from PIL import Image

COLORS = {"red": (235, 60, 50), "green": (50, 200, 80), "blue": (70, 110, 250), "yellow": (245, 215, 60)}
BACKGROUND = (18, 18, 22)
TYPICAL = {
    "zero": "red",
    "one": "green",
    "two": "blue",
    "three": "yellow",
    "four": "red",
    "five": "green",
    "six": "blue",
    "seven": "yellow",
    "eight": "red",
    "nine": "green",
}
NAMES = tuple(TYPICAL)
LETTERS = "ABCD"
COLOR_KINDS = ("multiple_choice", "exact", "yes_no")
PICTURE_SIZE = 56  # pixels
NUM_EVALUATION = 40  # of the roughly 180 handwritten digits of each class


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """One handwritten digit: its number in scikit-learn's collection, its name and its strokes from 0 to 1."""

    index: int
    name: str
    strokes: NDArray[numpy.float32]  # [8, 8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A tinted digit and a question about it.

    >>> Example(digit=seven, color="blue", question="is the seven yellow?", kind="yes_no", answer="no")
    """

    digit: Digit
    color: str
    question: str
    kind: str
    answer: str
    choices: tuple[str, ...] = ()

    @property
    def picture(self) -> str:
        """Where the picture lies in the folder of the data sets: the same digit in the same color is the same file."""
        return f"images/{self.digit.index:04d}-{self.digit.name}-{self.color}.png"


def load_digits(split: Literal["training", "evaluation"]) -> list[Digit]:
    """The handwritten digits of one split; the first 40 of every class are for evaluation, the others for training."""
    from sklearn import datasets  # here, because the model and its tokenizer do without scikit-learn

    collection = datasets.load_digits()
    digits: list[Digit] = []
    for label, name in enumerate(NAMES):
        indices = numpy.flatnonzero(collection.target == label)
        chosen = indices[:NUM_EVALUATION] if split == "evaluation" else indices[NUM_EVALUATION:]
        strokes = (collection.images / 16).astype(numpy.float32)  # [1797, 8, 8]
        digits += [Digit(index=int(index), name=name, strokes=strokes[index]) for index in chosen]
    return digits


def paint(digit: Digit, color: str) -> Image.Image:
    """The digit fills the picture, in its color on a dark background."""
    enlarged = Image.fromarray(digit.strokes).resize((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.BICUBIC)
    strength = numpy.clip(numpy.asarray(enlarged), 0, 1)[:, :, None]  # [56, 56, 1]
    pixels = (1 - strength) * numpy.array(BACKGROUND) + strength * numpy.array(COLORS[color])  # [56, 56, 3]
    return Image.fromarray(pixels.round().astype(numpy.uint8))


def which_digit(digit: Digit, rng: random.Random) -> Example:
    """Reading the digit; its color is drawn freely."""
    answer = str(NAMES.index(digit.name))
    color = rng.choice(list(COLORS))
    return Example(digit=digit, color=color, question="which digit is it?", kind="count", answer=answer)


def which_color(digit: Digit, rng: random.Random) -> Example:
    """A question about the color, drawn freely, that does not name the digit: its words give nothing away."""
    return _ask_color(digit, rng.choice(list(COLORS)), "digit", rng.choice(COLOR_KINDS), rng)


def typical(digit: Digit, rng: random.Random) -> Example:
    """A question that names the digit, whose color is the one its name suggests."""
    return _ask_color(digit, TYPICAL[digit.name], digit.name, rng.choice(COLOR_KINDS), rng)


def counterfactual(digit: Digit, rng: random.Random) -> Example:
    """A question that names the digit, whose color is another than its name suggests: who does not look is wrong."""
    color = rng.choice([color for color in COLORS if color != TYPICAL[digit.name]])
    return _ask_color(digit, color, digit.name, rng.choice(COLOR_KINDS), rng)


def _ask_color(digit: Digit, color: str, subject: str, kind: str, rng: random.Random) -> Example:
    question = f"what color is the {subject}?"
    if kind == "exact":
        return Example(digit=digit, color=color, question=question, kind=kind, answer=color)
    if kind == "multiple_choice":
        choices = tuple(rng.sample(list(COLORS), len(COLORS)))
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        answer = LETTERS[choices.index(color)]
        return Example(
            digit=digit, color=color, question=f"{question} {options}", kind=kind, answer=answer, choices=choices
        )
    wrong = [other for other in COLORS if other != color]
    # A named digit of another color is asked for its typical one, so that the prior misleads here as well.
    if subject == digit.name and color != TYPICAL[digit.name]:
        wrong = [TYPICAL[digit.name]]
    asked, answer = (color, "yes") if rng.random() < 0.5 else (rng.choice(wrong), "no")
    return Example(digit=digit, color=color, question=f"is the {subject} {asked}?", kind=kind, answer=answer)


Ask = Callable[[Digit, random.Random], Example]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one data set is made: whose digits, how many questions, and what is asked, each form equally often."""

    split: Literal["training", "evaluation"]
    num_rows: int
    asks: tuple[Ask, ...]


RECIPES = {
    "train": Recipe(split="training", num_rows=1500, asks=(counterfactual, counterfactual, counterfactual, typical)),
    "pairs_source": Recipe(
        split="training", num_rows=600, asks=(which_color, which_digit, which_color, counterfactual, typical)
    ),
    "eval_neutral": Recipe(split="evaluation", num_rows=300, asks=(which_digit, which_color, which_color, which_color)),
    "eval_typical": Recipe(split="evaluation", num_rows=300, asks=(typical,)),
    "eval_counterfactual": Recipe(split="evaluation", num_rows=300, asks=(counterfactual,)),
}


def examples(name: str, seed: int = 0) -> list[Example]:
    """The rows of the data set `name` of RECIPES; the same seed gives the same rows."""
    recipe = RECIPES[name]
    rng = random.Random(f"{seed} {name}")
    digits = load_digits(recipe.split)
    return [recipe.asks[row % len(recipe.asks)](rng.choice(digits), rng) for row in range(recipe.num_rows)]


def write(folder: Path, seed: int = 0) -> bool:
    """Write every data set and its pictures into `folder`; False if exactly these were already there.

    The fingerprint is removed first and written last: a folder that holds it is complete.
    """
    fingerprint = hashlib.sha256(Path(__file__).read_bytes() + str(seed).encode()).hexdigest()
    marker = folder / "fingerprint"
    if marker.exists() and marker.read_text() == fingerprint:
        return False
    marker.unlink(missing_ok=True)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name in RECIPES:
        rows = examples(name, seed)
        for example in rows:
            paint(example.digit, example.color).save(folder / example.picture)
        (folder / f"{name}.jsonl").write_text("".join(_lines(name, rows)))
    marker.write_text(fingerprint)
    return True


def _lines(name: str, rows: Iterable[Example]) -> Iterable[str]:
    for number, example in enumerate(rows):
        row: dict[str, object] = {
            "id": f"{name}-{number:04d}",
            "image": example.picture,
            "question": example.question,
            "kind": example.kind,
            "answer": example.answer,
        }
        if example.choices:
            row["choices"] = example.choices
        yield json.dumps(row) + "\n"
