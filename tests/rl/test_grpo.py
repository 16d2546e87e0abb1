"""GRPO, its advantages and its KL against numbers worked out independently (tests/vectors.json)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards.base import ScoredGroup
from rl.advantages import Centered, Normalized
from rl.batch import PolicyBatch, Rows
from rl.loss import k3
from rl.losses.grpo import GRPO
from rl.selection import Rules, keep
from rl.shares import MeanOver, token_shares

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())


def cases(name: str) -> list[Any]:
    return [pytest.param(case["inputs"], case["expected"], id=case["id"]) for case in VECTORS[name]]


def table(rows: list[list[float]]) -> Tensor:  # -> [N, L] float64
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)


def hand_made(lengths: list[int], advantages: list[float], shares: Tensor, **logprobs: Tensor | None) -> PolicyBatch:
    """A batch of one row whose branches have the given lengths; the token ids do not matter to a loss."""
    rows = Rows(
        context_ids=(torch.tensor([1]),),
        vision=({},),
        branch_ids=(tuple(torch.ones(length, dtype=torch.long) for length in lengths),),
    )
    return PolicyBatch(rows=rows, advantages=torch.tensor(advantages, dtype=torch.float64), shares=shares, **logprobs)


def loss_and_gradient(loss: GRPO, logprobs: Tensor, batch: PolicyBatch) -> tuple[float, Tensor]:
    leaf = logprobs.clone().requires_grad_()
    value, _ = loss(lambda rows: leaf, batch)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


@pytest.mark.parametrize(("given", "expected"), cases("grpo_advantage"))
def test_advantages(given: dict[str, Any], expected: dict[str, Any]) -> None:
    rewards = torch.tensor(given["rewards"], dtype=torch.float64)
    for advantage, key in (
        (Normalized(), "population_eps_1e-6"),
        (Normalized(std="sample"), "verl_sample_eps_1e-6"),
        (Centered(), "no_std_dr_grpo"),
    ):
        wanted = expected[key] if len(rewards) > 1 else [0.0]  # a group of one has nothing to compare
        assert advantage(rewards).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("given", "expected"), cases("grpo_clip_token"))
def test_clipped_token(given: dict[str, Any], expected: dict[str, Any]) -> None:
    batch = hand_made(
        [1], [given["advantage"]], torch.ones(1, 1, dtype=torch.float64), old_logprobs=table([[given["old_logp"]]])
    )
    loss = GRPO(clip_low=given["eps_low"], clip_high=given["eps_high"], kl=0)
    value, gradient = loss_and_gradient(loss, table([[given["logp"]]]), batch)
    assert value == pytest.approx(expected["loss"], abs=1e-9)
    assert gradient.item() == pytest.approx(expected["grad_logp"], abs=1e-9)


@pytest.mark.parametrize(("given", "expected"), cases("kl_estimators"))
def test_kl(given: dict[str, Any], expected: dict[str, Any]) -> None:
    logprobs = torch.tensor(given["logp"], dtype=torch.float64, requires_grad=True)
    value = k3(logprobs, torch.tensor(given["ref_logp"], dtype=torch.float64))
    value.backward()
    assert value.item() == pytest.approx(expected["k3"], abs=1e-9)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(expected["grad_k3_wrt_logp"], abs=1e-9)


@pytest.mark.parametrize(
    ("mean_over", "key"), [("sequences", "seq_mean_token_mean_grpo"), ("tokens", "token_mean_dapo")]
)
@pytest.mark.parametrize(
    ("given", "expected"), [case for case in cases("grpo_aggregation") if "seq_mean_token_mean_grpo" in case.values[1]]
)
def test_aggregation(given: dict[str, Any], expected: dict[str, Any], mean_over: MeanOver, key: str) -> None:
    lengths = [len(row) for row in given["logp"]]
    shares = token_shares(torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.long), mean_over)
    batch = hand_made(
        lengths,
        given["advantage_per_sequence"],
        shares,
        old_logprobs=table(given["old_logp"]),
        reference_logprobs=table(given["ref_logp"]) if given["kl_beta"] else None,
    )
    loss = GRPO(clip_low=given["eps_low"], clip_high=given["eps_high"], kl=given["kl_beta"])
    value, _ = loss_and_gradient(loss, table(given["logp"]), batch)
    assert value == pytest.approx(expected[key], abs=1e-7)  # shares are float32


def test_mean_over_tokens_survives_micro_batches() -> None:
    """The trap of averaging micro-batch means: 0.3517 against 0.0006."""
    case = next(case for case in VECTORS["grpo_aggregation"] if case["id"] == "agg_grad_accum_trap")
    given = case["inputs"]
    logprobs, old = table(given["logp"]), table(given["old_logp"])
    shares = token_shares(torch.tensor([2, 4]), torch.zeros(2, dtype=torch.long), "tokens")
    total = 0.0
    for (index,) in given["microbatches"]:
        batch = hand_made(
            [len(given["logp"][index])],
            [given["advantage_per_sequence"][index]],
            shares[[index]],
            old_logprobs=old[[index]],
        )
        total += loss_and_gradient(GRPO(kl=0), logprobs[[index]], batch)[0]
    assert total == pytest.approx(case["expected"]["true_token_mean"], abs=1e-7)


def test_gradient_by_central_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    logprobs, old, reference = (torch.randn(3, 4, generator=generator, dtype=torch.float64) * 0.3 - 1 for _ in range(3))
    shares = token_shares(torch.tensor([4, 2, 3]), torch.tensor([0, 0, 0]), "sequences").double()
    batch = hand_made([4, 2, 3], [1.0, -0.5, 0.2], shares, old_logprobs=old, reference_logprobs=reference)
    loss = GRPO(clip_low=0.2, clip_high=0.28, kl=0.1)
    leaf = logprobs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(lambda rows: x, batch)[0], leaf, eps=1e-6, atol=1e-6)


def test_on_policy_the_ratio_starts_at_one() -> None:
    shares = token_shares(torch.tensor([2]), torch.tensor([0]), "sequences").double()
    case = VECTORS["mbpo_offline_ratio"][0]
    batch = hand_made([2], [case["inputs"]["advantage"]], shares)
    value, gradient = loss_and_gradient(GRPO(kl=0), table([case["inputs"]["logp_theta"]]), batch)
    assert value == pytest.approx(case["expected"]["loss_seq_mean"])
    assert gradient[0].tolist() == pytest.approx(case["expected"]["grad_each_logp"])


def test_equal_rewards_cannot_teach(scored_with: Any) -> None:
    case = VECTORS["dapo_dynamic_sampling"][0]
    scored: list[ScoredGroup] = [scored_with(rewards) for rewards in case["inputs"]["group_rewards"]]
    kept = keep(scored, Rules())
    assert [group in kept for group in scored] == case["expected"]["keep"]
    assert keep(scored, Rules(drop_equal_rewards=False)) == scored
