"""Rows that share a context equal rows that repeat it, and the packing helpers keep their promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from rl.batch import Rows
from rl.packing import alone, bins, deal, pack, tree_mask
from rl.policy import Model, Policy


def test_shared_rows_equal_one_answer_rows(policy: Policy, rows: Rows, measured: Callable[[str, float], None]) -> None:
    with torch.no_grad():
        shared, repeated = policy(rows), policy(alone(rows))
    gap = (shared - repeated).abs().max().item()
    measured("shared rows against one-answer rows: log-probs", gap)
    assert gap < 1e-5
    assert shared.abs().max() > 1  # the table holds log-probs, not zeros


def test_packed_rows_equal_a_plain_transformers_forward(policy: Policy, rows: Rows) -> None:
    """The reference is the model's own forward on one answer at a time: its own mask, positions and logits."""
    with torch.no_grad():
        table = policy(rows)
    branch = 0
    for context, vision, answers in zip(rows.context_ids, rows.vision, rows.branch_ids, strict=True):
        for answer in answers:
            ids = torch.cat([context, answer])[None]
            types = (ids == policy.model.config.image_token_id).int()
            with torch.no_grad():
                logits = policy.model(input_ids=ids, mm_token_type_ids=types, **vision).logits[0]
            logits[:, policy.banned_token_ids] = -torch.inf
            expected = logits.log_softmax(-1)[len(context) - 1 : -1].gather(1, answer[:, None])[:, 0]
            assert torch.allclose(table[branch, : len(answer)], expected, atol=1e-5)
            assert (table[branch, len(answer) :] == 0).all()
            branch += 1


def test_gradients_of_shared_rows_equal_those_of_one_answer_rows(policy: Policy, rows: Rows) -> None:
    gradients = []
    for same in (rows, alone(rows)):
        policy.zero_grad()
        policy(same).pow(2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5 * float(scale)), name


def test_temperature_divides_the_logits(policy: Policy, rows: Rows) -> None:
    hot = Rows(context_ids=rows.context_ids, vision=rows.vision, branch_ids=rows.branch_ids, temperature=1e6)
    allowed = policy.model.config.text_config.vocab_size - len(policy.banned_token_ids)
    with torch.no_grad():
        uniform = policy(hot)[0, 0]
    assert uniform.item() == pytest.approx(-torch.log(torch.tensor(float(allowed))).item(), abs=1e-3)


def test_placeholders_have_no_probability(policy: Policy, rows: Rows) -> None:
    banned = policy.banned_token_ids[:1]
    placeholder = Rows(context_ids=rows.context_ids[:1], vision=rows.vision[:1], branch_ids=((banned,),))
    with torch.no_grad():
        assert policy(placeholder).item() == -torch.inf


def test_gradient_checkpointing_and_eager_attention_change_nothing(policy: Policy, rows: Rows, tiny_model: str) -> None:
    config = Model(path=str(tiny_model), dtype="float32", attention="eager", gradient_checkpointing=True)
    other = Policy(config.load(), config, policy.banned_token_ids.tolist())
    results = []
    for each in (policy, other):
        table = each(rows)
        table.sum().backward()
        results.append((table.detach(), each.model.get_input_embeddings().weight.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-4)


def test_tree_mask_by_hand() -> None:
    segment, parent = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([0, 0, 0, 0, 0, 3])
    assert tree_mask(segment, parent).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_one_context_is_packed_once() -> None:
    rows = Rows(
        context_ids=(torch.arange(10),), vision=({},), branch_ids=((torch.tensor([1, 2, 3]), torch.tensor([4])),)
    )
    packed = pack(rows, [torch.arange(10)[None]])
    assert packed.token_ids.tolist() == [[*range(10), 1, 2]]  # last tokens are predicted, not read
    assert packed.position_ids[0, 0].tolist() == [*range(10), 10, 11]
    assert packed.scored_at.tolist() == [9, 10, 11, 9]
    assert packed.targets.tolist() == [1, 2, 3, 4]


def test_bins_respect_the_budget_and_lose_nothing() -> None:
    costs = [5, 9, 3, 30, 7, 1, 1]
    filled = bins(costs, 10)
    assert sorted(unit for units in filled for unit in units) == list(range(len(costs)))
    assert all(sum(costs[unit] for unit in units) <= 10 or len(units) == 1 for units in filled)


def test_deal_balances_ranks() -> None:
    costs = [8, 1, 1, 1, 1, 4]
    hands = deal([[unit] for unit in range(6)], costs, 2)
    loads = [sum(costs[unit] for units in hand for unit in units) for hand in hands]
    assert sorted(loads) == [8, 8]
