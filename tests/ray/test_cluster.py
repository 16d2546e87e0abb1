"""Engine and learner on a real local Ray do what they do in this process; what does not fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from rl.batch import PolicyBatch, Rows
from rl.build import build_engine, build_learner
from rl.config import Cluster, LearnerConfig, RunConfig
from rl.learner import Part
from rl.losses.grpo import GRPO
from rl.optimizer import Optimizer
from rl.policy import Model
from rl.shares import token_shares
from rollout.types import Prompt, Sampling

pytestmark = pytest.mark.slow
cluster = pytest.importorskip("rl.cluster")

SAMPLING = Sampling(num_samples=3, max_tokens=6, seed=5)


@pytest.fixture(scope="module")
def running_ray() -> Iterator[str]:
    """One Ray for the module; its address. Nothing of it may be left afterwards."""
    import ray

    children = set(psutil.Process().children(recursive=True))
    begin = time.monotonic()
    with cluster.started(Cluster()):
        print(f"Ray started in {time.monotonic() - begin:.1f} s")
        yield ray.get_runtime_context().gcs_address
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.fixture
def config(tiny_model: Path) -> RunConfig:
    return RunConfig(
        name="cluster",
        model=Model(path=str(tiny_model), dtype="float32"),
        learner=LearnerConfig(tokens_per_micro_batch=60, optimizer=Optimizer(learning_rate=1e-3, eps=1e-6)),
        cluster=Cluster(start_timeout_s=120, call_timeout_s=120),
    )


@pytest.fixture(scope="module")
def part(rows: Rows) -> Part:
    generator = torch.Generator().manual_seed(0)
    lengths = rows.lengths
    batch = PolicyBatch(
        rows=rows,
        advantages=torch.randn(len(lengths), generator=generator),
        shares=token_shares(lengths, rows.row_of, "sequences"),
    )
    return Part(name="online", batch=batch, loss=GRPO(kl=0))


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize(("num_learners", "backend"), [(1, "torch"), (2, "torch"), (2, "deepspeed")])
def test_a_remote_learner_takes_the_steps_of_a_local_one(
    config: RunConfig, part: Part, running_ray: str, tmp_path: Path, num_learners: int, backend: str
) -> None:
    local = build_learner(config, needs_reference=True)
    assert config.cluster is not None
    placed = replace(
        config,
        cluster=replace(config.cluster, num_engines=1, num_learners=num_learners, cpus_per_engine=1),
        learner=replace(config.learner, backend=backend, zero_stage=3),
    )
    begin = time.monotonic()
    with only_learner(placed) as remote:
        print(f"{num_learners} {backend} ranks ready after {time.monotonic() - begin:.1f} s")
        rows = part.batch.rows
        assert (remote.reference_logprobs(rows) - local.reference_logprobs(rows)).abs().max() < 1e-5
        metrics, expected = remote.update(part), local.update(part)
        assert metrics == pytest.approx(expected, abs=1e-5)
        difference = largest_difference(dict(remote.weights()), dict(local.weights()))
        print(f"{num_learners} {backend} ranks: largest difference after one update {difference:.1e}")
        assert difference < 1e-6
        assert (remote.logprobs(rows) - local.logprobs(rows)).abs().max() < 1e-5
        remote.save(tmp_path / "checkpoint")
        moved = remote.update(part)
        remote.load(tmp_path / "checkpoint")
        assert remote.update(part) == moved


def only_learner(config: RunConfig):  # type: ignore[no-untyped-def]
    raise NotImplementedError
