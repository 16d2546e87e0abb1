"""Tables of responses with the score and status each must get, one file per kind of answer and one for formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rewards import VERIFIERS, verify
from rewards.shape import Format
from rollout.types import Message, Prompt, Sample

CASES = Path(__file__).parent / "cases"


def cases(name: str) -> list[Any]:
    lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [pytest.param(name, row, id=f"{name}:{number}") for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("kind", VERIFIERS)
def test_every_kind_has_a_table(kind: str) -> None:
    assert len(cases(kind)) >= 40


@pytest.mark.parametrize(("kind", "case"), [case for kind in VERIFIERS for case in cases(kind)])
def test_verifier(kind: str, case: dict[str, Any]) -> None:
    choices, question = tuple(case.get("choices", ())), case.get("question", "")
    verdict = verify(kind, case["response"], case["gold"], choices=choices, question=question)
    assert (verdict.score, verdict.status) == (case["score"], case["status"]), f"{case['class']}: {verdict.reason}"


@pytest.mark.parametrize(("name", "case"), cases("format"))
def test_format(name: str, case: dict[str, Any]) -> None:
    choices = ("red", "blue", "dark red", "green") if case["kind"] == "multiple_choice" else ()
    question = Message(role="user", text="What is it?")
    prompt = Prompt(id="0", messages=(question,), answer=case["gold"], kind=case["kind"], choices=choices)
    sample = Sample(token_ids=(1,), logprobs=None, text=case["response"], finish_reason="stop", policy_version=0)
    assert Format(style=case["style"])(prompt, sample).score == case["score"]
