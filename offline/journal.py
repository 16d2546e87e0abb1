"""A journal: what a job has finished, one durable line each, so that a killed job continues where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rl.checkpoint import sync
from rl.config import differences


class Journal:
    """An append-only JSONL file. Its first line says what the job was started with, every other is a finished record.

    A line counts once its line break is on disk; one that a kill tore is cut off, and its work done again.

    Args:
        header: must equal that of the journal to be continued.

    Raises:
        ValueError: another process holds the journal, or it was started with another header.

    >>> with Journal(Path("journal.jsonl"), {"seed": 0}) as journal:
    ...     journal.append([{"id": "color-0007", "outcome": "kept"}])
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.file = path.open("a+b")
        try:
            self.records = self._opened(header)
        except BaseException:  # whoever cannot enter has nothing to close
            self.file.close()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Make `records` durable, all in one write."""
        self._write(records)
        self.records |= {record["id"]: dict(record) for record in records}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    def _opened(self, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Lock the file, cut off a torn line, compare the header. Returns the records by id."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is in use by another process; wait for it or use another name") from None
        self.file.seek(0)
        written = self.file.read()
        whole = written[: written.rfind(b"\n") + 1]
        self.file.truncate(len(whole))
        if not whole:
            self._write([header])
            return {}
        first, *records = map(json.loads, whole.splitlines())
        if changed := differences(first, header):
            raise ValueError(
                f"{self.path} was started with something else:\n  "
                + "\n  ".join(changed)
                + "\nRestore it to continue, or use another name, or remove that folder."
            )
        return {record["id"]: record for record in records}

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self.file.flush()
        os.fsync(self.file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is whole and durable once it has its name."""
    aside = path.with_name(f"{path.name}.partial")
    aside.write_bytes(content)
    sync(aside)
    aside.rename(path)
    sync(path.parent)
