"""Preference files: what is written is read again, and everything wrong with a file is said at once."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from offline.preferences import Preference, load_preferences, preference_row, write_preferences
from rollout.images import PixelLimits
from rollout.types import Image, Message, Prompt

GOOD: dict[str, object] = {"id": "a", "image": "red.png", "question": "color?", "chosen": "red", "rejected": "blue"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one picture and one file that is none; a picture lies beside it."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    picture = PIL.Image.fromarray(np.full((56, 56, 3), (200, 0, 0), dtype=np.uint8))
    picture.save(folder / "red.png")
    picture.save(tmp_path / "outside.png")
    (folder / "text.png").write_text("not a picture")
    return folder


def write(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_an_open_question_is_its_own_gold(folder: Path) -> None:
    (pair,) = load_preferences(write(folder, GOOD))
    assert pair.chosen == "red"
    assert dict(pair.rejected) == {"answer": "blue"}
    assert (pair.prompt.kind, pair.prompt.answer) == ("exact", "red")
    assert pair.prompt.images == (Image(path=(folder / "red.png").resolve()),)
    assert pair.prompt.source == f"{folder / 'data.jsonl'}:1"


def test_a_closed_question_keeps_its_kind(folder: Path) -> None:
    closed = {"kind": "multiple_choice", "answer": "B", "choices": ["blue", "red"], "chosen": "B", "rejected": "A"}
    (pair,) = load_preferences(write(folder, GOOD | closed))
    assert (pair.prompt.kind, pair.prompt.answer, pair.prompt.choices) == ("multiple_choice", "B", ("blue", "red"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"image": "gone.png"}, 'image is "gone.png"; expected a'),
        ({"image": "text.png"}, 'image is "text.png"; expected a'),
        ({"image": "../outside.png"}, "leads out of that folder"),
        ({"image": "/outside.png"}, "the path is absolute"),
        ({"image": None, "images": ["red.png", "gone.png"]}, "gone.png"),
        ({"chosen": ""}, 'chosen is ""; expected a string that is not empty'),
        ({"chosen": None}, "chosen is null; expected a string"),
        ({"rejected": "  "}, 'rejected is "  "; expected a string that is not empty'),
        ({"rejected": ["blue"]}, r'rejected is \["blue"\]; expected a string'),
        ({"rejected": "red "}, 'rejected is "red "; expected another answer than the chosen one'),
        ({"question": ""}, 'question is ""; expected a string that is not empty'),
        ({"id": 7}, "id is 7; expected a string"),
        ({"provenance": "me"}, 'provenance is "me"; expected a JSON object'),
        ({"rejcted": "blue"}, "unknown key 'rejcted'.*did you mean 'rejected'"),
    ],
)
def test_a_bad_row_is_named_with_what_was_expected(folder: Path, change: dict[str, object], told: str) -> None:
    bad = {key: value for key, value in (GOOD | {"id": "b"} | change).items() if key != "image" or value}
    path = write(folder, GOOD, bad)
    with pytest.raises(ValueError, match=rf"1 of 2 rows cannot be used[^\n]*\n  [^\n]*data.jsonl:2: .*{told}"):
        load_preferences(path)
    assert [pair.prompt.id for pair in load_preferences(path, on_bad_rows="skip")] == ["a"]


@pytest.mark.parametrize("missing", ["id", "question", "chosen", "rejected"])
def test_a_missing_field_is_the_only_thing_reported(folder: Path, missing: str) -> None:
    row = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(ValueError, match=f"data.jsonl:1: {missing} is missing") as error:
        load_preferences(write(folder, row))
    assert str(error.value).count("data.jsonl:1:") == 1


def test_every_bad_row_is_in_one_report(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder, GOOD, GOOD, GOOD | {"id": "c", "chosen": "", "image": "gone.png"}, GOOD | {"id": "d"})
    with path.open("a") as file:
        file.write('{"id": "e", ')
    with pytest.raises(ValueError, match="3 of 5 rows cannot be used") as error:
        load_preferences(path)
    report = str(error.value)
    for line, words in [(2, "an id of its own"), (3, "gone.png"), (3, "chosen is"), (5, "no JSON")]:
        assert any(f"data.jsonl:{line}: " in told and words in told for told in report.splitlines()), (line, words)
    with caplog.at_level(logging.WARNING):
        assert [pair.prompt.id for pair in load_preferences(path, on_bad_rows="skip")] == ["a", "d"]
    assert "3 of 5 rows cannot be used and are skipped" in caplog.text


def test_limits_are_those_that_were_given(folder: Path) -> None:
    limits = PixelLimits(min_pixels=1, max_pixels=1000, max_source_pixels=1000)
    path = write(folder, GOOD)
    with pytest.raises(ValueError, match=r"red\.png.*1000"):
        load_preferences(path, limits=limits)


def test_a_written_pair_is_read_again(folder: Path) -> None:
    messages = (Message(role="system", text="Look."), Message(role="user", text="which? «é»", images=()))
    prompt = Prompt(id="x", messages=messages, answer=("B", "b"), kind="multiple_choice", choices=("blue", "red"))
    pair = Preference(prompt=prompt, chosen="B", rejected={"answer": "A"})
    path = folder / "data.jsonl"
    write_preferences(path, [preference_row(pair, ["red.png"], {"seed": 3})])
    assert json.loads(path.read_text())["provenance"] == {"seed": 3}
    (read,) = load_preferences(path)
    assert (read.chosen, read.rejected) == (pair.chosen, pair.rejected)
    assert (read.prompt.answer, read.prompt.choices) == (prompt.answer, prompt.choices)
    assert [(message.role, message.text) for message in read.prompt.messages] == [
        ("system", "Look."),
        ("user", "which? «é»"),
    ]
    assert read.prompt.images == (Image(path=(folder / "red.png").resolve()),)
    assert pickle.loads(pickle.dumps(read)) == read


@pytest.mark.parametrize("rejected", [{}, {"answer": "red"}, {"answer": "blue", "language_bias": "red"}])
def test_a_preference_prefers_something_to_something_else(rejected: dict[str, str]) -> None:
    prompt = Prompt(id="p", messages=(Message(role="user", text="?"),), answer="red", kind="exact")
    with pytest.raises(ValueError, match="the preference 'p'"):
        Preference(prompt=prompt, chosen="red", rejected=rejected)
