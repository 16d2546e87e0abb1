"""The preference noun and its file: a prompt, the answer to prefer, and the answers it is preferred to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from offline.journal import write_atomically
from rollout.images import PixelLimits
from rollout.prompts import PROMPT_KEYS, Row, load_rows, parse_prompt
from rollout.types import Prompt

PREFERENCE_KEYS = PROMPT_KEYS | {"chosen", "rejected", "provenance"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """One answer that is preferred to each of several named ones, all to the same prompt on the clean picture.

    >>> Preference(prompt=prompt, chosen="It is blue.", rejected={"answer": "It is yellow."})
    """

    prompt: Prompt
    chosen: str
    rejected: Mapping[str, str]  # name -> answer; a pair has just "answer"

    def __post_init__(self) -> None:
        if not self.rejected:
            raise ValueError(f"the preference {self.prompt.id!r} rejects nothing; it needs a rejected answer")
        if self.chosen in self.rejected.values():
            raise ValueError(f"the preference {self.prompt.id!r} chooses and rejects the same {self.chosen!r}")


def load_preferences(
    path: Path,
    *,
    check: Callable[[Preference], str | None] = lambda preference: None,
    on_bad_rows: Literal["refuse", "skip"] = "refuse",
    limits: PixelLimits | None = None,
) -> list[Preference]:
    """Read a JSONL file of preference pairs.

    A row has `id`, `question`, `chosen` and `rejected`, and may have `image` or `images` (relative to the file's
    folder), `system`, `source`, `provenance` (how it was made) and, for closed questions, `kind`, `answer`, `choices`.

    Args:
        check: what else is wrong with a preference, or None.
        on_bad_rows: "refuse" the file, or "skip" its bad rows with a warning in the log.

    Raises:
        ValueError: one report naming every bad row: file and line, field, what was given and expected, what to do.
    """
    parse = partial(parse_preference, limits=limits or PixelLimits())
    return load_rows(path, PREFERENCE_KEYS, parse, check, on_bad_rows)


def parse_preference(row: Row, limits: PixelLimits) -> Preference | None:
    """The preference in `row`; None when it has problems, which are noted in the row."""
    if not row.readable:
        return None
    # An open question has no right answer but the chosen one.
    row.values = {"kind": "exact", "answer": str(row.values.get("chosen", "")).strip() or "?", **row.values}
    prompt = parse_prompt(row, limits)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen and chosen.strip() == rejected.strip():
        row.note("rejected", rejected, "another answer than the chosen one", "correct it, or remove the row")
    if not isinstance(row.values.get("provenance", {}), dict):
        row.note("provenance", row.values["provenance"], "a JSON object", "remove it")
    if prompt is None or row.problems:
        return None
    return Preference(prompt=prompt, chosen=chosen, rejected={"answer": rejected})


def preference_row(
    preference: Preference, images: Sequence[str], provenance: Mapping[str, object]
) -> dict[str, object]:
    """The JSON object of a pair; `images` are the names of its pictures, relative to the file it will stand in."""
    *before, question = preference.prompt.messages
    row: dict[str, object] = {
        "id": preference.prompt.id,
        "images": list(images),
        "question": question.text,
        "kind": preference.prompt.kind,
        "answer": preference.prompt.answer,
        "choices": list(preference.prompt.choices),
        "chosen": preference.chosen,
        "rejected": preference.rejected["answer"],
        "provenance": dict(provenance),
    }
    return row | ({"system": before[0].text} if before else {})


def write_preferences(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows of `preference_row` to a JSONL file, which is replaced as a whole or not at all."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
