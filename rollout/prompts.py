"""Dataset file -> prompts: one report for everything wrong with it, and a cursor that resumes where it stopped."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Generic, Literal, TypeVar

from rollout.images import PixelLimits, problem
from rollout.types import Image, Message, Prompt

logger = logging.getLogger(__name__)
T = TypeVar("T")

PROMPT_KEYS = frozenset({"id", "image", "images", "question", "system", "kind", "answer", "choices", "source"})
_MAX_REPORTED = 50  # problems spelled out in one report; the rest is counted


class Row:
    """One line of a JSONL file under examination: every reader notes what is wrong and carries on.

    Attributes:
        source: `file:line`.
        readable: whether the line holds an object; if not, there are no fields to examine.
        values: the parsed object.
        problems: what was noted so far, one sentence each.
    """

    def __init__(self, path: Path, line: int) -> None:
        self.path = path
        self.source = f"{path}:{line}"
        self.readable = False
        self.values: dict[str, object] = {}
        self.problems: list[str] = []

    def note(self, field: str, given: object, expected: str, remedy: str) -> None:
        """Record that `field` holds `given` where `expected` was wanted, and what to do about it."""
        shown = json.dumps(given, ensure_ascii=False)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        self.problems.append(f"{self.source}: {field} is {shown}; expected {expected}; {remedy}")

    def text(self, field: str, *, required: bool = True) -> str:
        """A string; "" when it is absent and not `required`, or when a problem was noted."""
        if field not in self.values:
            if required:
                self.problems.append(f"{self.source}: {field} is missing; expected a string; add it")
            return ""
        value = self.values[field]
        if isinstance(value, str) and value.strip():
            return value
        self.note(field, value, "a string that is not empty", "write one in quotes")
        return ""

    def texts(self, field: str) -> tuple[str, ...]:
        """A list of strings; () when it is absent or when a problem was noted."""
        values = self.values.get(field, [])
        if isinstance(values, list) and all(isinstance(value, str) and value.strip() for value in values):
            return tuple(values)
        self.note(field, values, "a list of strings that are not empty", "write each in quotes")
        return ()

    def images(self, limits: PixelLimits) -> tuple[Image, ...]:
        """The pictures named by `image` or `images`, each decoded once to prove it is one."""
        if "image" in self.values and "images" in self.values:
            self.problems.append(f"{self.source}: both image and images are given; expected one; keep images")
            return ()
        field = "image" if "image" in self.values else "images"
        names = (self.text(field),) if field == "image" else self.texts(field)
        found = []
        for name in filter(None, names):
            try:
                image = safe_image(self.path.parent, name)
            except ValueError as error:
                self.note(field, name, "a path inside the folder of the JSONL file", str(error))
                continue
            if (reason := problem(image.path, limits)) is not None:
                self.note(field, name, "a picture", reason)
            found.append(image)
        return tuple(found)


class Report:
    """Collects the problems of all rows of a file, and refuses the file or skips its bad rows at the end."""

    def __init__(self, path: Path, on_bad_rows: Literal["refuse", "skip"]) -> None:
        self._path = path
        self._skip = on_bad_rows == "skip"
        self._problems: list[str] = []
        self._num_good = 0
        self._num_bad = 0

    def add(self, row: Row) -> None:
        """Count `row` once it has been examined completely."""
        self._problems += row.problems
        self._num_bad += bool(row.problems)
        self._num_good += not row.problems

    def close(self) -> None:
        """Log the skipped rows, or

        Raises:
            ValueError: there are bad rows and they may not be skipped, or no good row is left.
        """
        shown = self._problems[:_MAX_REPORTED]
        if len(self._problems) > len(shown):
            shown.append(f"... and {len(self._problems) - len(shown)} more")
        num_rows = self._num_good + self._num_bad
        summary = f"{self._path}: {self._num_bad} of {num_rows} rows cannot be used"
        details = "".join(f"\n  {problem}" for problem in shown)
        if not self._num_good:
            raise ValueError(f"{summary}; expected at least one usable row{details}")
        if self._num_bad and not self._skip:
            raise ValueError(f"{summary}; correct them, or set on_bad_rows to skip{details}")
        if self._num_bad:
            logger.warning("%s and are skipped%s", summary, details)


def read_rows(path: Path, keys: frozenset[str]) -> Iterator[Row]:
    """Every line of a JSONL file that is not blank, with broken lines and keys outside `keys` noted as problems.

    Raises:
        ValueError: there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; expected a JSONL file, one object per line; check the path")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _parse(Row(path, number), line, keys)


def safe_image(folder: Path, name: str) -> Image:
    """The image called `name`, a path relative to `folder` that does not lead out of it.

    Raises:
        ValueError: a path that is absolute, leads nowhere, or leaves `folder` once symbolic links are followed.
    """
    if Path(name).is_absolute():
        raise ValueError("the path is absolute; make it relative to the folder of the JSONL file")
    try:
        path = (folder / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # nothing there, a loop of symbolic links, a null byte
        raise ValueError(f"the path cannot be followed ({error}); check it") from error
    if not path.is_relative_to(folder.resolve()):
        raise ValueError("the path leads out of that folder; copy the file into it")
    return Image(path=path)


def load_prompts(
    path: Path,
    *,
    check: Callable[[Prompt], str | None],
    on_bad_rows: Literal["refuse", "skip"] = "refuse",
    limits: PixelLimits | None = None,
) -> list[Prompt]:
    """Read a JSONL file of prompts.

    A row has `id`, `question`, `kind`, `answer` (a string, or a list of which any is right), and may have `image` or
    `images` (relative to the file's folder), `system`, `choices` and `source`.

    Args:
        check: what else is wrong with a prompt (its kind, its answer, its text), or None.
        on_bad_rows: "refuse" the file, or "skip" its bad rows with a warning in the log.

    Raises:
        ValueError: one report naming every bad row: file and line, field, what was given and expected, what to do.
    """
    return load_rows(path, PROMPT_KEYS, partial(parse_prompt, limits=limits or PixelLimits()), check, on_bad_rows)


def load_rows(
    path: Path,
    keys: frozenset[str],
    parse: Callable[[Row], T | None],
    check: Callable[[T], str | None],
    on_bad_rows: Literal["refuse", "skip"],
) -> list[T]:
    """What `parse` makes of every row that has no problem and an `id` of its own; one report of the others."""
    report = Report(path, on_bad_rows)
    loaded: list[T] = []
    sources: dict[str, str] = {}  # id -> file:line
    for row in read_rows(path, keys):
        parsed = parse(row)
        if parsed is not None:
            name = row.text("id")
            if name in sources:
                row.note("id", name, f"an id of its own, {sources[name]} has it too", "rename one")
            if (reason := check(parsed)) is not None:
                row.problems.append(f"{row.source}: {reason}")
        if parsed is not None and not row.problems:
            loaded.append(parsed)
            sources[name] = row.source
        report.add(row)
    report.close()
    return loaded


def parse_prompt(row: Row, limits: PixelLimits) -> Prompt | None:
    """The prompt in `row`; None when it has problems, which are noted in the row."""
    if not row.readable:
        return None
    question = Message(role="user", text=row.text("question"), images=row.images(limits))
    system = row.text("system", required=False)
    messages = (Message(role="system", text=system), question) if system else (question,)
    several = isinstance(row.values.get("answer"), list)
    if row.values.get("answer") == []:
        row.note("answer", [], "a string or a list of strings", "give at least one right answer")
    parsed = Prompt(
        id=row.text("id"),
        messages=messages,
        answer=row.texts("answer") if several else row.text("answer"),
        kind=row.text("kind"),
        choices=row.texts("choices"),
        source=row.text("source", required=False) or row.source,
    )
    return None if row.problems else parsed


def fingerprint(rows: Iterable[object]) -> str:
    """SHA-256 over everything training sees of `rows` (prompts, or dataclasses that hold prompts).

    Images count by their bytes, not by their paths; where a row came from does not count.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(_content(row), sort_keys=True).encode())
    return digest.hexdigest()


class Cursor(Generic[T]):
    """Deals rows in batches without end: every epoch in its own order, a batch may reach into the next epoch.

    Args:
        seed: the order of an epoch depends on it and the epoch's number, and on nothing else.
    """

    def __init__(self, rows: Sequence[T], batch_size: int, seed: int) -> None:
        if not rows or batch_size < 1:
            raise ValueError(f"a cursor needs rows and a batch size: {len(rows)} rows, {batch_size} per batch")
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._start(epoch=0, position=0)

    def next(self) -> list[T]:
        """The next `batch_size` rows."""
        batch: list[T] = []
        while len(batch) < self._batch_size:
            if self._position == len(self._order):
                self._start(epoch=self._epoch + 1, position=0)
            batch.append(self._rows[self._order[self._position]])
            self._position += 1
        return batch

    def state(self) -> dict[str, int]:
        """What `restore` needs to continue with the batch after the last one dealt."""
        return {"epoch": self._epoch, "position": self._position, "num_rows": len(self._rows)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state belongs to a dataset of another size.
        """
        if state["num_rows"] != len(self._rows):
            raise ValueError(
                f"the checkpoint was taken over {state['num_rows']} rows, the dataset now has {len(self._rows)}; "
                "resume with the same file, or start a new run"
            )
        self._start(epoch=state["epoch"], position=state["position"])

    def _start(self, *, epoch: int, position: int) -> None:
        self._epoch = epoch
        self._position = position
        self._order = random.Random(f"{self._seed}/{epoch}").sample(range(len(self._rows)), len(self._rows))


def _content(value: object) -> object:
    """`value` as JSON can hold it."""
    if isinstance(value, Image):
        return hashlib.sha256(value.path.read_bytes()).hexdigest()
    if is_dataclass(value):
        return {field.name: _content(getattr(value, field.name)) for field in fields(value) if field.name != "source"}
    if isinstance(value, Mapping):
        return {key: _content(held) for key, held in value.items()}
    return [_content(held) for held in value] if isinstance(value, (tuple, list)) else value


def _parse(row: Row, line: bytes, keys: frozenset[str]) -> Row:
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        row.problems.append(f"{row.source}: byte {error.start} is no UTF-8; expected UTF-8 text; re-encode the file")
        return row
    except (ValueError, RecursionError) as error:  # no JSON, or numbers and brackets beyond all bounds
        row.problems.append(f"{row.source}: no JSON ({error}); expected one object on one line; correct the line")
        return row
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
        row.problems.append(f"{row.source}: the text holds half a character (\\ud800 to \\udfff); rewrite it")
        return row
    if not isinstance(values, dict):
        row.note("the line", values, "a JSON object", 'write {"id": ..., "question": ..., ...}')
        return row
    row.readable = True
    row.values = values
    for key in values.keys() - keys:
        nearest = difflib.get_close_matches(key, keys, n=1)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else "remove it"
        row.problems.append(f"{row.source}: unknown key {key!r}; expected some of {', '.join(sorted(keys))}; {remedy}")
    return row
