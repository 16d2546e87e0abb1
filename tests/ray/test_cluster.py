"""Engine and learner on a real local Ray do what they do in this process; what does not fit is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from rl.batch import PolicyBatch, Rows
from rl.build import build_engine, build_learner
from rl.cluster import RemoteEngine, RemoteLearner, packed, reserved, started, unpacked
from rl.config import Cluster, LearnerConfig, RunConfig
from rl.learner import Part
from rl.losses.grpo import GRPO
from rl.optimizer import Optimizer
from rl.policy import Model
from rl.shares import token_shares
from rollout.types import Image, Prompt, Sampling

pytestmark = pytest.mark.slow

CLUSTER = Cluster(start_timeout_s=120, call_timeout_s=120)
SAMPLING = Sampling(num_samples=3, max_tokens=6, seed=5)

Measured = Callable[[str, float], None]


@pytest.fixture(scope="module")
def running_ray() -> Iterator[str]:
    """One Ray for the module; its address. Nothing of it may be left afterwards."""
    import ray

    children = set(psutil.Process().children(recursive=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 4}')  # so that the same tests run on two cores
        with started(Cluster()):
            yield ray.get_runtime_context().gcs_address
    assert set(psutil.Process().children(recursive=True)) <= children


@pytest.fixture
def config(tiny_model: Path) -> RunConfig:
    return RunConfig(
        name="cluster",
        model=Model(path=str(tiny_model), dtype="float32"),
        learner=LearnerConfig(tokens_per_micro_batch=60, optimizer=Optimizer(learning_rate=1e-3, eps=1e-6)),
        cluster=CLUSTER,
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


@contextmanager
def remote_learner(config: RunConfig) -> Iterator[RemoteLearner]:
    assert config.cluster is not None
    with reserved(config.cluster) as group:
        learner = RemoteLearner(config, group, needs_reference=True)
        try:
            learner.wait_until_ready()
            yield learner
        finally:
            learner.close()


@contextmanager
def remote_engine(config: RunConfig) -> Iterator[RemoteEngine]:
    assert config.cluster is not None
    with reserved(config.cluster) as group:
        engine = RemoteEngine(config, group)
        try:
            engine.wait_until_ready()
            yield engine
        finally:
            engine.close()


@pytest.mark.parametrize(("num_learners", "backend"), [(1, "torch"), (2, "torch"), (2, "deepspeed")])
def test_a_remote_learner_takes_the_steps_of_a_local_one(
    config: RunConfig,
    part: Part,
    running_ray: str,
    tmp_path: Path,
    num_learners: int,
    backend: str,
    measured: Measured,
) -> None:
    local = build_learner(config, needs_reference=True)
    placed = replace(
        config,
        cluster=replace(CLUSTER, num_learners=num_learners),
        learner=replace(config.learner, backend=backend, zero_stage=3),
    )
    with remote_learner(placed) as remote:
        rows = part.batch.rows
        assert (remote.reference_logprobs(rows) - local.reference_logprobs(rows)).abs().max() < 1e-5
        assert remote.update(part) == pytest.approx(local.update(part), abs=1e-5)
        difference = largest_difference(dict(remote.weights()), dict(local.weights()))
        measured(f"{num_learners} {backend} ranks on Ray against a local learner: weights after one update", difference)
        assert difference < 1e-6
        assert (remote.logprobs(rows) - local.logprobs(rows)).abs().max() < 1e-5
        remote.save(tmp_path / "checkpoint")
        after = remote.update(part)
        remote.load(tmp_path / "checkpoint")
        assert remote.update(part) == after


@pytest.mark.parametrize("num_engines", [1, 2])
def test_a_remote_engine_answers_as_a_local_one(
    config: RunConfig, prompts: list[Prompt], running_ray: str, num_engines: int
) -> None:
    local = build_engine(config)
    weights = [(name, weight + 0.01) for name, weight in build_learner(config, needs_reference=False).weights()]
    with remote_engine(replace(config, cluster=replace(CLUSTER, num_engines=num_engines))) as remote:
        for version in (0, 7):
            if version:
                local.load_weights(weights, version)
                remote.load_weights(iter(weights), version)
            groups = remote.generate(prompts, SAMPLING)
            assert [group.prompt for group in groups] == prompts
            share = len(prompts) // num_engines  # of which the first engine draws as the local one does
            assert groups[:share] == local.generate(prompts[:share], SAMPLING)
            assert {sample.policy_version for group in groups for sample in group.samples} == {version}
            with remote.asleep():
                pass
        assert len(remote.generate(prompts[:1], SAMPLING)) == 1  # fewer prompts than engines


def test_weights_go_from_learner_to_engine_by_reference(
    config: RunConfig, part: Part, prompts: list[Prompt], running_ray: str
) -> None:
    local, local_learner = build_engine(config), build_learner(config, needs_reference=False)
    with remote_learner(config) as learner, remote_engine(config) as engine:
        for each in (learner, local_learner):
            each.update(part)
        local.load_weights(local_learner.weights(), version=1)
        engine.load_weights(learner.weights(), version=1)
        assert engine.generate(prompts, SAMPLING) == local.generate(prompts, SAMPLING)


def test_tensors_of_every_kind_survive_packing() -> None:
    table = torch.randn(4, 6)
    for tensor in (table, table[:, ::2], table.to(torch.bfloat16), torch.tensor(3.5), torch.zeros(0, 5), table > 0):
        again = unpacked(packed(tensor))
        assert again.dtype == tensor.dtype
        assert torch.equal(again, tensor)


def test_a_plan_that_does_not_fit_is_refused_with_numbers(running_ray: str) -> None:
    begin = time.monotonic()
    wanted = r"need 64 CPU \(2 engines\) \+ 3 CPU \(3 learner ranks\), have 4 CPU"
    with (
        pytest.raises(ValueError, match=wanted),
        reserved(Cluster(num_engines=2, cpus_per_engine=32, num_learners=3)),
    ):
        pass
    assert time.monotonic() - begin < 5


def test_a_busy_cluster_is_named_after_the_deadline(running_ray: str) -> None:
    whole = Cluster(cpus_per_engine=3, start_timeout_s=2)
    with reserved(whole), pytest.raises(TimeoutError, match=r"did not free 3 CPU .* within 2 s"), reserved(whole):
        pass


def test_who_does_not_answer_is_named(config: RunConfig, prompts: list[Prompt], running_ray: str) -> None:
    slow = replace(config, cluster=replace(CLUSTER, call_timeout_s=1))
    with remote_engine(slow) as engine, pytest.raises(TimeoutError, match=r"engine 0 did not finish `generate`"):
        engine.generate(prompts * 20, Sampling(num_samples=8, max_tokens=200))


def test_a_users_mistake_comes_back_as_itself(config: RunConfig, prompts: list[Prompt], running_ray: str) -> None:
    with remote_engine(config) as engine:
        missing = replace(prompts[0].messages[0], images=(Image(path=Path("nowhere.png")),))
        with pytest.raises(ValueError, match=r"nowhere.png") as raised:
            engine.generate([replace(prompts[0], messages=(missing,))], SAMPLING)
        assert type(raised.value) is ValueError
        assert raised.value.__notes__ == ["raised by engine 0 during `generate`"]
        assert engine.generate(prompts[:1], SAMPLING)  # and the engine lives on


def test_a_part_that_cannot_start_says_why(config: RunConfig, running_ray: str) -> None:
    broken = replace(config, model=replace(config.model, freeze=("model.nowhere",)))
    with pytest.raises(ValueError, match=r"model.freeze names 'model.nowhere'"), remote_learner(broken):
        pass


def test_a_dead_actor_is_named(config: RunConfig, prompts: list[Prompt], running_ray: str) -> None:
    import ray

    with remote_engine(config) as engine:
        ray.kill(engine.actors["engine 0"])
        with pytest.raises(RuntimeError, match=r"engine 0 was lost during `generate`"):
            engine.generate(prompts, SAMPLING)


def test_a_run_joins_the_ray_that_the_environment_names(
    tiny_model: Path, prompts: list[Prompt], running_ray: str, tmp_path: Path
) -> None:
    """As inside `ray job submit`: the whole run is placed on the Ray there is, which outlives it."""
    import ray

    script = f"""
import ray
from pathlib import Path
from rl.cluster import check_placement, on_ray
from rl.config import Cluster, RunConfig
from rl.policy import Model

print(check_placement(Cluster()))
config = RunConfig(name="joins", model=Model(path={str(tiny_model)!r}, dtype="float32"), cluster=Cluster())
with on_ray(config, needs_reference=False) as (engine, learner):
    engine.load_weights(learner.weights(), version=1)
    learner.save(Path("checkpoint"))
    print(ray.get_runtime_context().gcs_address, len(ray.nodes()), ray.available_resources()["CPU"])
"""
    checked, reserved_for, placed = run(script, cwd=tmp_path, RAY_ADDRESS=running_ray).splitlines()
    assert checked == reserved_for == "on Ray: need 1 CPU (1 engine) + 1 CPU (1 learner rank), have 4 CPU"
    assert placed.split() == [running_ray, "1", "2.0"]
    assert (tmp_path / "checkpoint").is_dir()  # a relative path is the driver's
    assert ray.cluster_resources()["CPU"] == 4


def test_an_address_without_a_ray_is_a_mistake() -> None:
    script = """
from rl.cluster import started
from rl.config import Cluster

try:
    with started(Cluster(address="127.0.0.1:9")):
        pass
except ValueError as error:
    print(error)
"""
    assert run(script).startswith("cluster.address is '127.0.0.1:9', but no Ray answers there")


def test_a_ray_of_its_own_leaves_nothing_behind() -> None:
    script = """
import os, psutil
from rl.cluster import started
from rl.cluster import RemoteEngine, RemoteLearner, packed, reserved, started, unpacked
from rl.config import Cluster

before = dict(os.environ)
with started(Cluster()):
    print(len(psutil.Process().children(recursive=True)))
print(len(psutil.Process().children(recursive=True)), before == dict(os.environ))
"""
    inside, after, same_environment = run(script).split()
    assert int(inside) > 2
    assert (after, same_environment) == ("0", "True")


def run(script: str, cwd: Path | None = None, **environment: str) -> str:
    """What `script` prints in a process of its own."""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
