"""Engine and learner on Ray: the same protocols, in processes that may live elsewhere; the only file that imports ray.

A run asks for one placement group: a bundle per engine and per learner rank. Whatever does not fit is refused with
numbers; whatever does not answer in time is named.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console
from torch import Tensor, distributed
from torch.distributed import TCPStore

from rl import ranks
from rl.batch import Rows
from rl.build import build_engine, build_learner
from rl.config import Cluster, RunConfig
from rl.learner import AnyLearner, Learner, Metrics, Part
from rollout.seeds import prompt_seed
from rollout.types import Engine, Group, Prompt, Sampling

CONNECT_S = 10  # how long the Ray of a given address may take to pick up
TOKEN = secrets.token_hex(32)  # of a Ray of our own
GOODBYE_S = 10  # how long an actor may take to close before it is killed

Ask = Callable[[Any], ray.ObjectRef]  # an actor -> where its answer will be


@contextmanager
def on_ray(config: RunConfig, *, needs_reference: bool) -> Iterator[tuple[Engine, AnyLearner]]:
    """The engine and the learner of `config`, placed where `config.cluster` says; everything is freed on the way out.

    Raises:
        ValueError: the cluster is smaller than what the run needs.
        TimeoutError: the cluster is busy, or a part did not start in time.
    """
    assert config.cluster is not None
    with started(config.cluster), reserved(config.cluster) as group, ExitStack() as stack:
        engine = RemoteEngine(config, group)
        stack.callback(engine.close)
        learner = RemoteLearner(config, group, needs_reference=needs_reference)
        stack.callback(learner.close)
        engine.wait_until_ready()  # both have been starting since they were made
        learner.wait_until_ready()
        yield engine, learner


def check_placement(cluster: Cluster) -> str:
    """What a run would need of its cluster and what is there, in one line. Raises ValueError if it does not fit."""
    plan = Plan(cluster=cluster)
    with started(cluster):
        have = ray.cluster_resources()
    plan.check(have)
    return plan.against(have)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run needs of a cluster.

    >>> print(Plan(cluster=Cluster(num_engines=2, num_learners=1)))
    2 CPU (2 engines) + 1 CPU (1 learner rank)
    """

    cluster: Cluster

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The resources of every process: engines first, then the ranks of the learner."""
        cluster = self.cluster
        engine = {"CPU": cluster.cpus_per_engine, "GPU": cluster.gpus_per_engine}
        learner = {"CPU": cluster.cpus_per_learner, "GPU": cluster.gpus_per_learner}
        wanted = [engine] * cluster.num_engines + [learner] * cluster.num_learners
        return [{name: float(number) for name, number in bundle.items() if number} for bundle in wanted]

    def __str__(self) -> str:
        engines, learners = self.cluster.num_engines, self.cluster.num_learners
        return (
            f"{amount(self.bundles[:engines])} ({engines} engine{'s' * (engines > 1)}) + "
            f"{amount(self.bundles[engines:])} ({learners} learner rank{'s' * (learners > 1)})"
        )

    def against(self, have: Mapping[str, float]) -> str:
        """The plan beside what the cluster holds, in one line."""
        return f"on Ray: need {self}, have {amount([have])}"

    def check(self, have: Mapping[str, float]) -> None:
        """Raises ValueError if the cluster could not hold the plan even if it were idle."""
        if any(need > have.get(name, 0) for name, need in total(self.bundles).items()):
            raise ValueError(
                f"the cluster is too small: need {self}, have {amount([have])}; lower the numbers under `cluster:` "
                "(num_engines, num_learners, cpus_per_..., gpus_per_...) or join a larger cluster by its address"
            )


def total(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in ("CPU", "GPU")}


def amount(bundles: Sequence[Mapping[str, float]]) -> str:
    """Resources as people say them: "4 CPU, 1 GPU"."""
    return ", ".join(f"{number:g} {name}" for name, number in total(bundles).items() if number) or "nothing"


@contextmanager
def started(cluster: Cluster) -> Iterator[None]:
    """Inside, this process is connected to a Ray: its own, or the running one that the config or RAY_ADDRESS names."""
    own = cluster.address is None and "RAY_ADDRESS" not in os.environ
    before, on_sigterm = dict(os.environ), signal.getsignal(signal.SIGTERM)
    if own:  # only this run may talk to it; Ray would leave a token in the home, which changes other clusters
        os.environ.setdefault("RAY_AUTH_TOKEN", TOKEN)
    try:
        if cluster.address is not None:
            knock(cluster.address)
        ray.init(
            address="local" if own else cluster.address,
            include_dashboard=False if own else None,
            log_to_driver=False,  # what matters comes back as a result or as an error
            logging_level=logging.ERROR,
        )
    except (ConnectionError, TimeoutError, socket.gaierror) as error:  # none of these names the key of the config
        if own:
            raise
        raise ValueError(
            f"cluster.address is {cluster.address!r}, but no Ray answers there ({error}); "
            "start one with `ray start --head`, or leave the address out to use one of the run's own"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler ends the process without freeing anything
    set_by_ray = [name for name, value in os.environ.items() if before.get(name) != value]
    share_tensors()
    try:
        yield
    finally:
        ray.shutdown()
        for name in set_by_ray:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in set_by_ray if name in before})


def knock(address: str) -> None:
    """Raises OSError if nobody listens at `host:port`: left alone, Ray tries for minutes and then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():  # "auto" is for Ray to resolve
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


@contextmanager
def reserved(cluster: Cluster) -> Iterator[PlacementGroup]:
    """Inside, the resources of the whole run are held as one group, so that no part waits for another's."""
    plan, have = Plan(cluster=cluster), ray.cluster_resources()
    plan.check(have)
    Console(soft_wrap=True).print(plan.against(have), highlight=False)
    group = placement_group(plan.bundles, strategy="PACK")
    try:
        if not group.wait(timeout_seconds=cluster.start_timeout_s):
            raise TimeoutError(
                f"the cluster did not free {plan} within {cluster.start_timeout_s} s; free now: "
                f"{amount([ray.available_resources()])}; wait for other jobs or raise cluster.start_timeout_s"
            )
        yield group
    finally:
        remove_placement_group(group)


class EngineActor:
    """An engine in a process of its own."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.sleeping = ExitStack()

    def start(self, config: RunConfig, folder: Path) -> None:
        assert config.cluster is not None
        settle(folder, config.cluster.cpus_per_engine)
        self.engine = build_engine(config)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        return self.ready.generate(prompts, sampling)

    def load_weights(self, weights: Mapping[str, Packed], version: int) -> None:
        self.ready.load_weights(((name, unpacked(weight)) for name, weight in weights.items()), version)

    def sleep(self) -> None:
        self.sleeping.enter_context(self.ready.asleep())

    def wake(self) -> None:
        self.sleeping.close()

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()

    @property
    def ready(self) -> Engine:
        assert self.engine is not None, "start comes first"
        return self.engine


class LearnerActor:
    """One rank of the learner in a process of its own."""

    def __init__(self) -> None:
        self.learner: Learner | None = None

    def open_meeting(self, num_ranks: int, same_machine: bool) -> tuple[str, int]:
        """Host and port where the ranks find each other; only the first rank is asked."""
        host = "127.0.0.1" if same_machine else ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def start(
        self, config: RunConfig, folder: Path, needs_reference: bool, rank: int, meeting: tuple[str, int] | None
    ) -> None:
        assert config.cluster is not None
        settle(folder, config.cluster.cpus_per_learner)
        if meeting is not None:
            (host, port), num_ranks = meeting, config.cluster.num_learners
            if host == "127.0.0.1":
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
            if rank > 0:
                self.store = TCPStore(host, port, num_ranks, is_master=False)
            ranks.join(self.store, rank, num_ranks, config.cluster.call_timeout_s)
        self.learner = build_learner(config, needs_reference=needs_reference)

    def logprobs(self, rows: Rows) -> Tensor:
        return self.ready.logprobs(rows)

    def reference_logprobs(self, rows: Rows) -> Tensor:
        return self.ready.reference_logprobs(rows)

    def update(self, parts: Sequence[Part]) -> Metrics:
        return self.ready.update(*parts)

    def store_weights(self) -> list[ray.ObjectRef]:
        """Every rank gathers; the first one puts the weights into the object store and returns where."""
        weights = {}
        for name, weight in self.ready.weights():
            if self.ready.backend.rank == 0:
                weights[name] = packed(weight)
        return [ray.put(weights)] if weights else []

    def save(self, path: Path) -> None:
        self.ready.save(path)

    def load(self, path: Path) -> None:
        self.ready.load(path)

    def close(self) -> None:
        if self.learner is not None:
            self.learner.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()

    @property
    def ready(self) -> Learner:
        assert self.learner is not None, "start comes first"
        return self.learner


class RemoteEngine:
    """The `Engine` of a config on as many actors as it asks for; prompts are split over them, their order kept."""

    def __init__(self, config: RunConfig, group: PlacementGroup) -> None:
        assert config.cluster is not None
        self.cluster = config.cluster
        actor = ray.remote(EngineActor)
        self.actors = {
            f"engine {index}": actor.options(**placed(group, index)).remote()
            for index in range(self.cluster.num_engines)
        }
        self.starts = {name: actor.start.remote(config, Path.cwd()) for name, actor in self.actors.items()}

    def wait_until_ready(self) -> None:
        gather("start", self.starts, self.cluster.start_timeout_s)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        calls = {}
        for index, (name, actor) in enumerate(self.actors.items()):
            share = prompts[index * len(prompts) // len(self.actors) : (index + 1) * len(prompts) // len(self.actors)]
            # An engine counts prompts from 0, so every further engine draws from a seed of its own.
            seed = sampling.seed if index == 0 else prompt_seed(sampling.seed, index)
            if share:
                calls[name] = actor.generate.remote(share, replace(sampling, seed=seed))
        return [group for groups in gather("generate", calls, self.cluster.call_timeout_s) for group in groups]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        stored = weights if isinstance(weights, StoredWeights) else StoredWeights.put(weights)
        self.ask_all("load_weights", lambda engine: engine.load_weights.remote(stored.reference, version))

    @contextmanager
    def asleep(self) -> Iterator[None]:
        self.ask_all("sleep", lambda engine: engine.sleep.remote())
        try:
            yield
        finally:
            self.ask_all("wake", lambda engine: engine.wake.remote())

    def close(self) -> None:
        dismiss(self.actors)

    def ask_all(self, what: str, ask: Ask) -> None:
        gather(what, {name: ask(actor) for name, actor in self.actors.items()}, self.cluster.call_timeout_s)


class RemoteLearner:
    """The `Learner` of a config as one actor per rank. Every rank is handed the whole batch, from one stored copy."""

    def __init__(self, config: RunConfig, group: PlacementGroup, *, needs_reference: bool) -> None:
        assert config.cluster is not None
        self.cluster = config.cluster
        num_ranks, first = self.cluster.num_learners, self.cluster.num_engines
        actor = ray.remote(LearnerActor)
        actors = [actor.options(**placed(group, first + rank)).remote() for rank in range(num_ranks)]
        nodes = placement_group_table(group)["bundles_to_node_id"]
        same_machine = len({nodes[first + rank] for rank in range(num_ranks)}) == 1
        meeting = actors[0].open_meeting.remote(num_ranks, same_machine) if num_ranks > 1 else None
        self.actors = {f"learner rank {rank}": actor for rank, actor in enumerate(actors)}
        self.starts = {
            name: actor.start.remote(config, Path.cwd(), needs_reference, rank, meeting)
            for rank, (name, actor) in enumerate(self.actors.items())
        }

    def wait_until_ready(self) -> None:
        gather("start", self.starts, self.cluster.start_timeout_s)

    def logprobs(self, rows: Rows) -> Tensor:
        stored = ray.put(rows)
        scored: Tensor = self.ask_all("logprobs", lambda rank: rank.logprobs.remote(stored))
        return scored

    def reference_logprobs(self, rows: Rows) -> Tensor:
        stored = ray.put(rows)
        scored: Tensor = self.ask_all("reference_logprobs", lambda rank: rank.reference_logprobs.remote(stored))
        return scored

    def update(self, *parts: Part) -> Metrics:
        stored = ray.put(parts)
        metrics: Metrics = self.ask_all("update", lambda rank: rank.update.remote(stored))
        return metrics

    def weights(self) -> StoredWeights:
        (reference,) = self.ask_all("weights", lambda rank: rank.store_weights.remote())
        return StoredWeights(reference)

    def save(self, path: Path) -> None:
        self.ask_all("save", lambda rank: rank.save.remote(path))

    def load(self, path: Path) -> None:
        self.ask_all("load", lambda rank: rank.load.remote(path))

    def close(self) -> None:
        dismiss(self.actors)

    def ask_all(self, what: str, ask: Ask) -> Any:
        """What the first rank answers, once every rank is done."""
        calls = {name: ask(actor) for name, actor in self.actors.items()}
        return gather(what, calls, self.cluster.call_timeout_s)[0]


class StoredWeights:
    """Weights in the object store: an engine on Ray takes the reference, anybody else iterates."""

    def __init__(self, reference: ray.ObjectRef) -> None:
        self.reference = reference

    @classmethod
    def put(cls, weights: Iterable[tuple[str, Tensor]]) -> StoredWeights:
        return cls(ray.put({name: packed(weight) for name, weight in weights}))

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in ray.get(self.reference).items():
            yield name, unpacked(weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor as bytes of numpy, whose memory Ray shares; tensors it would copy, many times slower."""

    content: NDArray[np.uint8]
    dtype: torch.dtype
    shape: torch.Size


def packed(tensor: Tensor) -> Packed:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return Packed(content=content, dtype=tensor.dtype, shape=tensor.shape)


def unpacked(value: Packed) -> Tensor:
    tensor = torch.empty(value.shape, dtype=value.dtype)
    tensor.flatten().view(torch.uint8).numpy()[:] = value.content  # a copy: stored memory is read-only
    return tensor


def share_tensors() -> None:
    """Send tensors inside arguments and results of this process as `Packed`."""
    ray.util.register_serializer(Tensor, serializer=packed, deserializer=unpacked)


def settle(folder: Path, num_cpus: int) -> None:
    """Make this actor's process like the driver's: its working folder, and no more threads than it was given."""
    if not folder.is_dir():
        raise ValueError(
            f"the folder {folder} of the driver does not exist on this machine; share it, or submit the run"
        )
    os.chdir(folder)
    torch.set_num_threads(num_cpus)
    share_tensors()


def placed(group: PlacementGroup, bundle: int) -> dict[str, object]:
    """Actor options that take exactly what `bundle` holds."""
    holds = group.bundle_specs[bundle]
    return {
        "num_cpus": holds.get("CPU", 0),
        "num_gpus": holds.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
    }


def gather(what: str, calls: Mapping[str, ray.ObjectRef], timeout_s: float) -> list[Any]:
    """Results in the order of `calls`. The first failure surfaces at once: others may be waiting for who failed.

    Raises:
        TimeoutError: names who has not answered after `timeout_s`.
        RuntimeError: names whose process died.
        Exception: what an actor raised, as it raised it.
    """
    deadline = time.monotonic() + timeout_s
    waiting = {reference: name for name, reference in calls.items()}
    results = {}
    while waiting:
        answered, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not answered:
            raise TimeoutError(
                f"{', '.join(waiting.values())} did not finish `{what}` within {timeout_s:g} s; "
                "see the logs in /tmp/ray/session_latest/logs, or raise the timeouts under `cluster:`"
            )
        for reference in answered:
            name = waiting.pop(reference)
            try:
                results[name] = ray.get(reference)
            except RayTaskError as error:  # holds the exception itself and the actor's traceback as text
                error.cause.add_note(f"raised by {name} during `{what}`")
                raise error.cause from (None if isinstance(error.cause, ValueError) else error)
            except RayError as error:  # the actor, its machine or its result is gone
                raise RuntimeError(f"{name} was lost during `{what}`: {error}") from error
    return [results[name] for name in calls]


def dismiss(actors: dict[str, Any]) -> None:
    """Let every actor close what it holds, then end its process."""
    goodbyes = {name: actor.close.remote() for name, actor in actors.items()}
    with suppress(TimeoutError, RuntimeError):  # it hangs or is dead already; either way it is killed next
        gather("close", goodbyes, GOODBYE_S)
    for actor in actors.values():
        ray.kill(actor)
    actors.clear()
