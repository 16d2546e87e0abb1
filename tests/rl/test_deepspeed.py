"""DeepSpeedBackend takes the steps TorchBackend takes, at every ZeRO stage and on one or two real gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

import rl
from rl.batch import PolicyBatch, Rows
from rl.learner import Backend, Part
from rl.losses.grpo import GRPO
from rl.optimizer import Optimizer
from rl.policy import Model, Policy
from rl.shares import MeanOver, token_shares
from rl.torch_backend import TorchBackend
from rollout.render import Renderer

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("learner_rank.py")
ROOT = Path(rl.__file__).parents[1]
Trained = dict[tuple[int, str], dict[str, Tensor]]  # by number of ranks and case
Measured = Callable[[str, float], None]


def batch_of(rows: Rows, mean_over: MeanOver, weight: float, seed: int) -> PolicyBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = rows.lengths
    return PolicyBatch(
        rows=rows,
        advantages=torch.randn(len(lengths), generator=generator),
        shares=token_shares(lengths, rows.row_of, mean_over, weight),
        reference_logprobs=torch.rand(len(lengths), int(lengths.max()), generator=generator) - 6,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Rows) -> Trained:
    """Every case of learner_rank.py on one rank and on two: weights, scores and metrics."""
    parts = [
        Part(name="online", batch=batch_of(rows, "sequences", 0.6, seed=0), loss=GRPO()),
        Part(name="second", batch=batch_of(rows.select([1, 5, 3]), "groups", 0.4, seed=1), loss=GRPO(kl=0.1)),
    ]
    results = {}
    for world_size in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks_{world_size}")
        torch.save(parts, folder / "parts.pt")
        run_ranks(tiny_model, folder, world_size)
        results |= {(world_size, path.stem): torch.load(path) for path in folder.glob("*-*.pt")}
    return results


def run_ranks(model: Path, folder: Path, world_size: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(model), str(folder)]
    logs = [folder / f"{rank}.log" for rank in range(world_size)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size)], env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [rank.wait(timeout=250) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert not any(codes), "\n".join(log.read_text()[-2000:] for log in logs)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor], only: str = "") -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first if name.startswith(only))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "zero"), [("full", 0), ("full", 1), ("full", 2), ("full", 3), ("frozen", 3), ("lora", 3)]
)
def test_deepspeed_takes_the_steps_torch_takes(
    trained: Trained, kind: str, zero: int, world_size: int, measured: Measured
) -> None:
    torch_backend, deepspeed = trained[1, f"{kind}-None"], trained[world_size, f"{kind}-{zero}"]
    difference = largest_difference(torch_backend, deepspeed, only="weight")
    measured(f"DeepSpeed ZeRO {zero} against torch, {kind}, ranks: {world_size}, weights after 3 updates", difference)
    assert difference < 1e-5
    assert largest_difference(torch_backend, deepspeed) < 1e-5  # log-probs and metrics on the way too


@pytest.mark.parametrize("kind", ["full", "frozen", "lora"])
def test_two_torch_ranks_take_the_steps_of_one(trained: Trained, kind: str, measured: Measured) -> None:
    one, two = trained[1, f"{kind}-None"], trained[2, f"{kind}-None"]
    difference = largest_difference(one, two, only="weight")
    measured(f"torch on 2 ranks against 1, {kind}: weights after 3 updates", difference)
    assert difference < 1e-6


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("kind", "zero"), [("full", None), ("full", 2), ("full", 3), ("dropout", None), ("dropout", 0), ("dropout", 3)]
)
def test_a_stopped_run_continues_bit_for_bit(trained: Trained, kind: str, zero: int | None, world_size: int) -> None:
    whole, stopped = trained[world_size, f"{kind}-{zero}"], trained[world_size, f"{kind}_stopped-{zero}"]
    assert largest_difference(whole, stopped, only="weight") == 0


@pytest.mark.parametrize("zero", [None, 0, 3])
def test_dropout_draws_differently_on_every_rank(trained: Trained, zero: int | None) -> None:
    first, second = trained[2, f"dropout-{zero}"]["dropped"]
    assert first.mean() == pytest.approx(0.2, abs=0.02)
    assert (first * second).mean() == pytest.approx(0.04, abs=0.01)  # both at once as rarely as chance has it


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("zero", [0, 3])
def test_bfloat16_takes_the_steps_torch_takes(trained: Trained, zero: int, world_size: int, measured: Measured) -> None:
    """A unit of bfloat16 at a logit of 4 is 0.03; an update of a wrong size moves log-probs by 0.1."""
    torch_backend, deepspeed = trained[1, "bfloat16-None"], trained[world_size, f"bfloat16-{zero}"]
    difference = largest_difference(torch_backend, deepspeed, only="logprobs")
    measured(f"DeepSpeed ZeRO {zero} against torch, bfloat16, ranks: {world_size}, log-probs", difference)
    assert difference < 0.03
    assert (deepspeed["logprobs 2"] - deepspeed["logprobs 0"]).abs().max() > 1  # two updates go this far


def test_bfloat16_is_trained_through_float32_masters(
    tiny_model: Path, renderer: Renderer, rows: Rows, measured: Measured
) -> None:
    """Steps far below bfloat16's resolution add up, as they do in torch."""
    from rl.deepspeed_backend import DeepSpeedBackend

    config, optimizer = Model(path=str(tiny_model), dtype="bfloat16"), Optimizer(learning_rate=1e-5)

    def head_after(num_updates: int, make: Callable[[Policy], Backend]) -> Tensor:
        backend = make(Policy(config.load(), config, renderer.placeholder_token_ids))
        for _ in range(num_updates):
            backend.backward(-backend.module(rows).mean(), last=True)
            backend.step()
        weight = dict(backend.full_weights())["lm_head.weight"].float().clone()
        backend.close()
        return weight

    start = head_after(0, lambda policy: TorchBackend(policy, optimizer, 30))
    expected = head_after(30, lambda policy: TorchBackend(policy, optimizer, 30))
    trained = head_after(30, lambda policy: DeepSpeedBackend(policy, optimizer, 30, zero_stage=2))
    difference = float((trained - expected).abs().mean())
    measured("DeepSpeed against torch, bfloat16, mean over weights after 30 updates of 1e-5", difference)
    assert difference < 1e-5
    assert (expected - start).abs().mean() > 1e-4  # rounding after every step would leave most weights at the start


def test_one_process_needs_no_launcher(policy: Policy, rows: Rows, tmp_path: Path) -> None:
    """The backend opens its own group without environment variables, and leaves nothing behind."""
    from rl.deepspeed_backend import DeepSpeedBackend

    before = dict(policy.plain_weights())["lm_head.weight"].clone()
    backend = DeepSpeedBackend(policy, Optimizer(learning_rate=1e-2), total_steps=10, zero_stage=3)
    assert backend.world_size == 1
    backend.backward(-backend.module(rows).mean(), last=True)
    assert backend.step() > 0
    after = dict(backend.full_weights())["lm_head.weight"]
    backend.close()
    assert (after - before).abs().max() > 5e-3
    assert not distributed.is_initialized()
