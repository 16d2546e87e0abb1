"""The pieces around the verifiers: verdicts, scored groups, the parts of a reward, and the check of gold answers."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pydantic
import pytest

from rewards import VERIFIERS, Verdict, verify
from rewards.base import ScoredGroup, count_statuses, score
from rewards.parts import RewardPart
from rewards.shape import CLOSED, Format
from rewards.verifiers import Verify, gold_problem
from rollout.types import Group, Message, Prompt, Sample


def prompt(kind: str = "multiple_choice", answer: str | tuple[str, ...] = "B", **more: tuple[str, ...]) -> Prompt:
    choices = more.get("choices", ("red", "blue") if kind == "multiple_choice" else ())
    message = Message(role="user", text="What is it?")
    return Prompt(id="p7", messages=(message,), answer=answer, kind=kind, choices=choices, source="train.jsonl:8")


def sample(text: str, num_tokens: int = 2, *, is_cut_off: bool = False) -> Sample:
    return Sample(
        token_ids=(5,) * num_tokens,
        logprobs=None,
        text=text,
        finish_reason="length" if is_cut_off else "stop",
        policy_version=0,
    )


def group(*texts: str) -> Group:
    return Group(prompt=prompt(), prompt_ids=(1, 2), samples=tuple(sample(text) for text in texts))


RIGHT = Verdict(score=1.0, status="ok", extracted="B", reason="")


@pytest.mark.parametrize(("value", "status"), [(1.0, "no_answer"), (float("nan"), "ok"), (float("inf"), "ok")])
def test_only_a_judged_answer_scores(value: float, status: str) -> None:
    with pytest.raises(ValueError, match="a score is finite, and 0 unless"):
        Verdict(score=value, status=status, extracted=None, reason="")  # type: ignore[arg-type]


def test_rewards_are_the_weighted_sum_of_the_parts() -> None:
    groups = [group("B", "It is B.", "A", "What?"), group("B")]
    scored = score(groups, {"correct": Verify(), "format": Format(weight=0.25)})
    assert [each.group for each in scored] == groups
    assert [each.rewards for each in scored] == [(1.25, 1.0, 0.25, 0.0), (1.25,)]
    assert [verdict.status for verdict in scored[0].parts["correct"]] == ["ok", "ok", "ok", "unparsable"]
    assert pickle.loads(pickle.dumps(scored)) == scored


def test_scoring_without_a_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="name at least one part"):
        score([group("B")], {})


def test_a_scored_group_needs_one_verdict_per_sample() -> None:
    with pytest.raises(ValueError, match=r"2 samples, \{'correct': 1, 'rewards': 2\}"):
        ScoredGroup(group=group("A", "B"), parts={"correct": (RIGHT,)}, rewards=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"2 samples, \{'correct': 2, 'rewards': 1\}"):
        ScoredGroup(group=group("A", "B"), parts={"correct": (RIGHT, RIGHT)}, rewards=(1.0,))


def test_statuses_are_counted_over_all_groups() -> None:
    scored = score([group("B", "A", ""), group("B or A")], {"correct": Verify(weight=3.0)})
    shares = {"correct/ok": 0.5, "correct/no_answer": 0.25, "correct/ambiguous": 0.25}
    assert count_statuses(scored) == {"correct/score": 0.25, **shares}
    assert count_statuses([]) == {}


def test_verify_routes_each_prompt_by_its_kind() -> None:
    answers = {"multiple_choice": "B", "yes_no": "no", "count": "3", "exact": "red"}
    assert answers.keys() == VERIFIERS.keys() == CLOSED.keys()
    for kind, answer in answers.items():
        scores = [Verify()(prompt(kind, answer), sample(text)).score for text in answers.values()]
        assert scores == [float(other == kind) for other in answers]


def test_a_truncated_sample_is_wrong() -> None:
    for part in (Verify(), Format()):
        assert part(prompt(), sample("B")).score == 1
        verdict = part(prompt(), sample("B", is_cut_off=True))
        assert verdict.score == 0
        assert "cut off at the token limit, after 2 tokens" in verdict.reason


def test_a_format_may_limit_the_tokens() -> None:
    assert Format(max_tokens=2)(prompt(), sample("B", 2)).score == 1
    verdict = Format(max_tokens=2)(prompt(), sample("B", 3))
    assert (verdict.score, verdict.status) == (0.0, "ok")
    assert "3 tokens, at most 2" in verdict.reason


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown kind of answer 'multi_choice'; did you mean 'multiple_choice'"):
        verify("multi_choice", "B", "B")
    with pytest.raises(ValueError, match="did you mean 'yes_no'"):
        Format()(prompt("yesno", "yes"), sample("yes"))


@pytest.mark.parametrize(
    ("kind", "answer", "choices"),
    [
        ("multiple_choice", "B", ("red", "blue")),
        ("multiple_choice", "blue", ("red", "blue")),
        ("multiple_choice", "J", ()),
        ("yes_no", "False", ()),
        ("count", "twelve", ()),
        ("exact", ("red", "crimson"), ()),
    ],
)
def test_good_gold(kind: str, answer: str | tuple[str, ...], choices: tuple[str, ...]) -> None:
    assert gold_problem(prompt(kind, answer, choices=choices)) is None


@pytest.mark.parametrize(
    ("kind", "answer", "message"),
    [
        ("multiple_choice", "C", "gold 'C': expected an option A-B, found 'C'"),
        ("multiple_choice", "green", "gold 'green': expected an option A-B"),
        ("multiple_choice", "A or B", r"gold 'A or B': several answers \(A, B\)"),
        ("yes_no", "maybe", "gold 'maybe': the answer is in doubt"),
        ("count", "3.5", "gold '3.5': expected one integer"),
        ("exact", "", "gold '': empty"),
        ("exact", (), "the answer is missing"),
        ("exact", ("red", "..."), r"gold '\.\.\.': expected a word"),
        ("yesno", "yes", "unknown kind of answer 'yesno'; did you mean 'yes_no'"),
    ],
)
def test_bad_gold_is_explained(kind: str, answer: str | tuple[str, ...], message: str) -> None:
    problem = gold_problem(prompt(kind, answer))
    assert problem is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)
    assert problem.startswith("prompt 'p7' (train.jsonl:8): ")
    assert problem.endswith("; correct its kind, answer or choices, or drop it")


def test_parts_are_read_from_a_configuration() -> None:
    read = pydantic.TypeAdapter(RewardPart).validate_python
    assert read({"name": "verify", "weight": 2}) == Verify(weight=2.0)
    assert read({"name": "format", "style": "boxed", "max_tokens": 9}) == Format(style="boxed", max_tokens=9)
    with pytest.raises(pydantic.ValidationError, match="'verify', 'format'"):
        read({"name": "verfy"})
    with pytest.raises(pydantic.ValidationError, match="'closed', 'think_answer', 'boxed' or 'think_boxed'"):
        read({"name": "format", "style": "xml"})


def test_import_is_light() -> None:
    code = "import rewards, sys; print([name for name in ('torch', 'pydantic', 'numpy', 'ray') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
