"""A dataset is read completely or refused with one report; a cursor resumes exactly."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest

from rollout.prompts import Cursor, fingerprint, load_prompts
from rollout.types import Image, Message, Prompt

GOOD: dict[str, object] = {
    "id": "1",
    "image": "a.png",
    "question": "What color?",
    "kind": "exact",
    "answer": "red",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    PIL.Image.new("RGB", (60, 60), "red").save(data / "a.png")
    PIL.Image.new("RGB", (60, 60), "red").save(tmp_path / "outside.png")
    (data / "link.png").symlink_to(tmp_path / "outside.png")
    (data / "loop.png").symlink_to(data / "loop.png")
    (data / "text.png").write_text("no picture")
    return data


@pytest.fixture
def write(folder: Path) -> Callable[..., Path]:
    def write_rows(*rows: object) -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (folder / "train.jsonl").write_bytes(b"\n".join(lines))
        return folder / "train.jsonl"

    return write_rows


def accept(prompt: Prompt) -> str | None:
    return None


def test_a_full_row_becomes_a_prompt(folder: Path, write: Callable[..., Path]) -> None:
    path = write(
        GOOD,
        {
            "id": "2",
            "images": ["a.png", "./a.png"],
            "system": "Be brief.",
            "question": "Same?",
            "kind": "multiple_choice",
            "answer": ["A", "yes"],
            "choices": ["yes", "no"],
            "source": "survey, page 3",
        },
    )
    picture = Image(path=(folder / "a.png").resolve())
    first, second = load_prompts(path, check=accept)
    assert first == Prompt(
        id="1",
        messages=(Message(role="user", text="What color?", images=(picture,)),),
        answer="red",
        kind="exact",
        source=f"{path}:1",
    )
    assert second == Prompt(
        id="2",
        messages=(
            Message(role="system", text="Be brief."),
            Message(role="user", text="Same?", images=(picture, picture)),
        ),
        answer=("A", "yes"),
        kind="multiple_choice",
        choices=("yes", "no"),
        source="survey, page 3",
    )


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_read(write: Callable[..., Path]) -> None:
    path = write(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"  \r", GOOD | {"id": "2"})
    assert [prompt.source for prompt in load_prompts(path, check=accept)] == [f"{path}:1", f"{path}:3"]


def without(key: str) -> dict[str, object]:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("id"), "id is missing; expected a string; add it"),
        (without("question"), "question is missing; expected a string; add it"),
        (without("kind"), "kind is missing; expected a string; add it"),
        (without("answer"), "answer is missing; expected a string; add it"),
        (GOOD | {"id": 7}, "id is 7; expected a string that is not empty; write one in quotes"),
        (GOOD | {"question": "  "}, 'question is "  "; expected a string that is not empty; write one in quotes'),
        (GOOD | {"system": None}, "system is null; expected a string that is not empty"),
        (GOOD | {"answer": 3}, "answer is 3; expected a string that is not empty; write one in quotes"),
        (GOOD | {"answer": []}, "answer is []; expected a string or a list of strings; give at least one right answer"),
        (GOOD | {"answer": ["a", 3]}, 'answer is ["a", 3]; expected a list of strings that are not empty'),
        (GOOD | {"choices": "yes"}, 'choices is "yes"; expected a list of strings that are not empty'),
        (GOOD | {"imagee": "a.png"}, "unknown key 'imagee'; expected some of answer, choices, "),
        (GOOD | {"imagee": "a.png"}, "did you mean 'image'?"),
        (GOOD | {"zzzz": 1}, "unknown key 'zzzz'; expected some of answer, choices, "),
        (GOOD | {"images": ["a.png"]}, "both image and images are given; expected one; keep images"),
        (GOOD | {"image": ["a.png"]}, 'image is ["a.png"]; expected a string that is not empty'),
        (GOOD | {"image": "b.png"}, "the path cannot be followed ([Errno 2] No such file or directory"),
        (GOOD | {"image": "text.png"}, 'image is "text.png"; expected a picture; the file cannot be opened'),
        (GOOD | {"image": "/etc/passwd"}, "expected a path inside the folder of the JSONL file; the path is absolute"),
        (GOOD | {"image": "../outside.png"}, "the path leads out of that folder; copy the file into it"),
        (GOOD | {"image": "link.png"}, "the path leads out of that folder; copy the file into it"),
        (GOOD | {"image": "loop.png"}, "the path cannot be followed (Symlink loop"),
        (GOOD | {"image": "a\0.png"}, "the path cannot be followed (embedded null byte); check it"),
        (GOOD | {"image": "x" * 300}, 'image is "' + "x" * 76 + "...; expected"),
        (GOOD | {"kind": "riddle"}, "kind 'riddle' is unknown"),
        ([1, 2], "the line is [1, 2]; expected a JSON object"),
        (b'{"id": "1", ', "no JSON (Expecting property name"),
        (b"[" * 100_000, "no JSON ("),
        (b'{"id": "\xff"}', "byte 8 is no UTF-8; expected UTF-8 text; re-encode the file"),
    ],
)
def test_what_is_wrong_with_a_row_is_told(write: Callable[..., Path], row: object, message: str) -> None:
    def check(prompt: Prompt) -> str | None:
        return None if prompt.kind == "exact" else f"kind {prompt.kind!r} is unknown; expected 'exact'; correct it"

    path = write(GOOD | {"id": "good"}, row)
    with pytest.raises(
        ValueError, match="1 of 2 rows cannot be used; correct them, or set on_bad_rows to skip"
    ) as error:
        load_prompts(path, check=check)
    (line,) = [line for line in str(error.value).splitlines() if message in line]
    assert line.startswith(f"  {path}:2: ")


def test_one_report_names_every_problem(write: Callable[..., Path]) -> None:
    path = write(GOOD, GOOD, {"id": "3", "kin": "exact"}, b"{")
    with pytest.raises(ValueError, match="3 of 4 rows cannot be used") as error:
        load_prompts(path, check=accept)
    report = str(error.value)
    assert f'{path}:2: id is "1"; expected an id of its own, {path}:1 has it too; rename one' in report
    for told in ("unknown key 'kin'", "did you mean 'kind'?", "question is missing", "kind is missing", ":4: no JSON"):
        assert told in report


def test_a_long_report_is_cut_and_counted(write: Callable[..., Path]) -> None:
    path = write(GOOD, *[[]] * 60)
    with pytest.raises(ValueError, match="60 of 61 rows cannot be used") as error:
        load_prompts(path, check=accept)
    assert str(error.value).endswith("\n  ... and 10 more")


def test_bad_rows_are_skipped_on_request(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    path = write(without("answer"), GOOD)
    with caplog.at_level(logging.WARNING):
        (prompt,) = load_prompts(path, check=accept, on_bad_rows="skip")
    assert prompt.id == "1"
    assert "1 of 2 rows cannot be used and are skipped" in caplog.text
    assert f"{path}:1: answer is missing" in caplog.text


@pytest.mark.parametrize("rows", [[], [without("answer")]])
def test_nothing_left_is_an_error(write: Callable[..., Path], rows: list[object]) -> None:
    with pytest.raises(ValueError, match="expected at least one usable row"):
        load_prompts(write(*rows), check=accept, on_bad_rows="skip")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl is no file; expected a JSONL file"):
        load_prompts(tmp_path / "none.jsonl", check=accept)


def numbered(count: int) -> list[Prompt]:
    return [
        Prompt(id=str(index), messages=(Message(role="user", text="?"),), answer="a", kind="exact")
        for index in range(count)
    ]


def test_every_epoch_deals_each_prompt_once_in_its_own_order() -> None:
    cursor = Cursor(numbered(10), batch_size=4, seed=3)
    dealt = [prompt.id for _ in range(5) for prompt in cursor.next()]
    first, second = dealt[:10], dealt[10:]
    assert sorted(first) == sorted(second) == [str(index) for index in range(10)]
    assert first != second
    assert first != [prompt.id for prompt in Cursor(numbered(10), batch_size=10, seed=4).next()]


def test_a_restored_cursor_continues_exactly() -> None:
    cursor = Cursor(numbered(7), batch_size=3, seed=1)
    for _ in range(4):
        cursor.next()
    state = json.loads(json.dumps(cursor.state()))
    expected = [cursor.next() for _ in range(6)]
    resumed = Cursor(numbered(7), batch_size=3, seed=1)
    resumed.restore(state)
    assert [resumed.next() for _ in range(6)] == expected


def test_a_cursor_refuses_the_state_of_another_dataset() -> None:
    state = Cursor(numbered(7), batch_size=3, seed=1).state()
    with pytest.raises(ValueError, match="taken over 7 rows, the dataset now has 8; resume with the same file"):
        Cursor(numbered(8), batch_size=3, seed=1).restore(state)


def test_an_empty_cursor_is_refused() -> None:
    with pytest.raises(ValueError, match="0 rows, 3 per batch"):
        Cursor([], batch_size=3, seed=1)


@dataclass(frozen=True)
class Pair:
    """A row that holds a prompt, as a preference does."""

    prompt: Prompt
    rejected: dict[str, str]


def test_the_fingerprint_sees_what_training_sees(folder: Path, write: Callable[..., Path]) -> None:
    def print_of(row: dict[str, object]) -> str:
        return fingerprint(load_prompts(write(row), check=accept))

    original = print_of(GOOD)
    assert print_of(GOOD | {"source": "elsewhere"}) == original
    changed = [{"id": "2"}, {"question": "Which color?"}, {"answer": "blue"}, {"answer": ["red"]}, {"kind": "count"}]
    prints = {print_of(GOOD | change) for change in changed}
    PIL.Image.new("RGB", (60, 60), "blue").save(folder / "a.png")
    prints.add(print_of(GOOD))
    assert len(prints | {original}) == len(changed) + 2


def test_the_fingerprint_reaches_into_rows_that_hold_prompts() -> None:
    (prompt,) = numbered(1)
    pair = Pair(prompt=prompt, rejected={"answer": "blue"})
    assert fingerprint([pair]) == fingerprint([Pair(prompt=prompt, rejected={"answer": "blue"})])
    assert fingerprint([pair]) != fingerprint([Pair(prompt=prompt, rejected={"answer": "green"})])
    assert fingerprint([pair]) != fingerprint([pair, pair])
