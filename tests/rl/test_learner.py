"""The update is the same for any micro-batches, padding, fillers and sharing; resume continues bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offline.batch import PreferenceBatch
from offline.losses.dpo import DPO
from rl.batch import PolicyBatch, Rows
from rl.learner import Learner, Part
from rl.losses.grpo import GRPO
from rl.optimizer import Optimizer
from rl.packing import alone
from rl.policy import Lora, Model, Policy
from rl.reference import reference_for
from rl.shares import token_shares
from rl.torch_backend import TorchBackend
from rollout.render import Renderer

# SGD-like: AdamW divides by the gradient's own size, which would blow rounding of tiny gradients up to full steps.
OPTIMIZER = Optimizer(learning_rate=1e-3, eps=1e-2, clip_norm=1.0)

MakeLearner = Callable[..., Learner]
Measured = Callable[[str, float], None]


@pytest.fixture
def make_learner(tiny_model: Path, renderer: Renderer) -> MakeLearner:
    def make(tokens_per_micro_batch: int = 10_000, optimizer: Optimizer = OPTIMIZER, **model: object) -> Learner:
        config = replace(Model(path=str(tiny_model), dtype="float32"), **model)
        torch.manual_seed(0)
        policy = Policy(config.load(), config, renderer.placeholder_token_ids)
        reference = reference_for(policy)
        return Learner(TorchBackend(policy, optimizer, total_steps=10), reference, tokens_per_micro_batch)

    return make


def policy_part(rows: Rows, reference: Tensor, groups: Tensor) -> Part:
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(len(rows.lengths), generator=generator)
    shares = token_shares(rows.lengths, groups, "groups", weight=0.5)
    batch = PolicyBatch(rows=rows, advantages=advantages, shares=shares, reference_logprobs=reference)
    return Part(name="online", batch=batch, loss=GRPO(kl=0.1))


def preference_part(rows: Rows, reference: Tensor) -> Part:
    """Every context with at least two answers, the first preferred to the second."""
    units = [index for index, branches in enumerate(rows.branch_ids) if len(branches) > 1]
    branches = rows.branches_of(units)
    pairs = rows.select(units)
    firsts = torch.tensor([int((pairs.row_of == unit).nonzero()[0]) for unit in range(len(units))])
    batch = PreferenceBatch(
        rows=pairs,
        chosen=firsts,
        rejected={"answer": firsts + 1},
        shares=torch.full((len(units),), 0.5 / len(units)),
        beta=torch.full((len(units),), 0.2),
        reference_logprobs=reference[branches, : int(pairs.lengths.max())],
    )
    return Part(name="offline", batch=batch, loss=DPO(beta=0.2))


def three_updates(learner: Learner, rows: Rows) -> tuple[dict[str, Tensor], dict[str, float]]:
    metrics: dict[str, float] = {}
    for _ in range(3):
        reference = learner.reference_logprobs(rows)
        metrics = learner.update(policy_part(rows, reference, rows.row_of), preference_part(rows, reference))
    return {name: weight.clone() for name, weight in learner.weights()}, metrics


def largest_gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("tokens_per_micro_batch", [1, 60, 150])
def test_micro_batches_do_not_change_the_update(
    make_learner: MakeLearner, rows: Rows, tokens_per_micro_batch: int, measured: Measured
) -> None:
    whole, metrics = three_updates(make_learner(), rows)
    split, split_metrics = three_updates(make_learner(tokens_per_micro_batch), rows)
    gap = largest_gap(whole, split)
    measured(f"micro-batches of {tokens_per_micro_batch} tokens: weights after 3 updates", gap)
    assert gap < 1e-6
    assert split_metrics == pytest.approx(metrics, abs=1e-5)
    start = {name: weight.clone() for name, weight in make_learner().weights()}
    assert largest_gap(start, whole) > 1e-4  # the updates did something


def test_shared_rows_train_like_one_answer_rows(make_learner: MakeLearner, rows: Rows, measured: Measured) -> None:
    weights = []
    for same in (rows, alone(rows)):
        learner = make_learner()
        for _ in range(3):
            learner.update(policy_part(same, learner.reference_logprobs(same), rows.row_of))
        weights.append({name: weight.clone() for name, weight in learner.weights()})
    gap = largest_gap(*weights)
    measured("shared rows against one-answer rows: weights after 3 updates", gap)
    assert gap < 1e-6


def test_filler_changes_nothing(make_learner: MakeLearner, rows: Rows) -> None:
    learner, plain = make_learner(), make_learner()
    reference = learner.reference_logprobs(rows)
    part = policy_part(rows, reference, rows.row_of)
    learner.update(part, Part(name="filler", batch=part.batch.filler(), loss=part.loss))
    plain.update(part)
    assert largest_gap(dict(learner.weights()), dict(plain.weights())) == 0


def test_the_reference_stays_where_it_was(make_learner: MakeLearner, rows: Rows) -> None:
    learner = make_learner()
    before = learner.reference_logprobs(rows)
    assert torch.equal(before, learner.logprobs(rows))
    three_updates(learner, rows)
    assert torch.equal(before, learner.reference_logprobs(rows))
    assert (before - learner.logprobs(rows)).abs().max() > 1e-3


def test_resume_continues_bit_for_bit(make_learner: MakeLearner, rows: Rows, tmp_path: Path) -> None:
    through, stopped, resumed = make_learner(), make_learner(), make_learner()
    part = policy_part(rows, through.reference_logprobs(rows), rows.row_of)
    for _ in range(4):
        through.update(part)
    for _ in range(2):
        stopped.update(part)
    stopped.save(tmp_path)
    resumed.load(tmp_path)
    for _ in range(2):
        resumed.update(part)
    assert largest_gap(dict(through.weights()), dict(resumed.weights())) == 0


def test_frozen_modules_stay(make_learner: MakeLearner, rows: Rows) -> None:
    learner = make_learner(freeze=("model.visual",))
    before = {name: weight.clone() for name, weight in learner.weights()}
    after, _ = three_updates(learner, rows)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not any(name.startswith("visual") for name in moved)


def test_freezing_a_module_that_is_not_there_is_refused(make_learner: MakeLearner) -> None:
    with pytest.raises(ValueError, match=r"model\.vision_tower.*no weight starts with it.*model\.visual"):
        make_learner(freeze=("model.vision_tower",))


def test_lora_trains_adapters_only_and_merges_them(make_learner: MakeLearner, rows: Rows) -> None:
    learner = make_learner(lora=Lora(rank=4, alpha=8))
    plain = dict(make_learner().weights())
    before = learner.reference_logprobs(rows)
    assert torch.allclose(before, learner.logprobs(rows), atol=1e-6)
    merged, _ = three_updates(learner, rows)
    assert merged.keys() == plain.keys()
    assert {n for n in plain if not torch.equal(plain[n], merged[n])} <= {n for n in plain if "_proj" in n}
    assert torch.allclose(before, learner.reference_logprobs(rows), atol=1e-6)  # the adapter off is the start
    fresh = make_learner()
    policy = fresh.backend.policy
    policy.model.load_state_dict({own: merged[saved] for own, saved in policy.saved_names.items()})
    assert torch.allclose(fresh.logprobs(rows), learner.logprobs(rows), atol=1e-5)


def test_bfloat16_weights_are_trained_through_float32_masters(make_learner: MakeLearner, rows: Rows) -> None:
    """One step is far below bfloat16's resolution; many must add up nevertheless."""
    learner = make_learner(dtype="bfloat16", optimizer=Optimizer(learning_rate=1e-5))
    backend = learner.backend
    assert isinstance(backend, TorchBackend)
    part = policy_part(rows, learner.reference_logprobs(rows), rows.row_of)
    weights, masters = flat(backend.trainable.values()), flat(backend.masters)
    learner.update(part)
    assert share_of_changed(weights, flat(backend.trainable.values())) < 0.1
    assert share_of_changed(masters, flat(backend.masters)) > 0.9
    for _ in range(39):
        learner.update(part)
    assert all(parameter.dtype == torch.bfloat16 for parameter in backend.trainable.values())
    assert share_of_changed(weights, flat(backend.trainable.values())) > 0.7
    assert torch.equal(flat(backend.trainable.values()), flat(backend.masters).bfloat16())


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """A copy of all elements in one row."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def share_of_changed(before: Tensor, after: Tensor) -> float:
    return (before != after).float().mean().item()
