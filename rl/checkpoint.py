"""Checkpoints: written aside, made durable, then renamed, so a folder that has its final name is whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PARTIAL = ".partial"


def save(folder: Path, step: int, manifest: Mapping[str, Any], write: Callable[[Path], None], keep: int) -> Path:
    """One checkpoint `folder/step_000040`: what `write` puts there, and manifest.json. The newest `keep` stay."""
    final = folder / f"step_{step:06d}"
    aside = final.with_name(final.name + PARTIAL)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    (aside / "manifest.json").write_text(json.dumps({"step": step, **manifest}, indent=2))
    for path in [*aside.rglob("*"), aside]:
        sync(path)
    shutil.rmtree(final, ignore_errors=True)  # the same step, saved by the run that is being resumed
    aside.rename(final)
    sync(folder)
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def complete(folder: Path) -> list[Path]:
    """Every whole checkpoint in `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob("step_*/manifest.json") if not path.parent.name.endswith(PARTIAL))


def latest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint and its manifest; ValueError where there is none."""
    found = complete(folder)
    if not found:
        raise ValueError(f"{folder} holds no complete checkpoint to resume from; start the run without --resume")
    return found[-1], json.loads((found[-1] / "manifest.json").read_text())


def sync(path: Path) -> None:
    """Make a file or a folder's list of names durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
