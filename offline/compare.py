"""Several trainings from one base model, side by side in one table: what `make demo` runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from offline import hybrid
from offline import train as preference
from offline.config import CompareConfig, MBPOConfig, MineConfig, PreferenceConfig
from offline.mine import mine
from rl import checkpoint
from rl import train as online
from rl.config import RLConfig, load
from rl.evaluate import Suite
from rl.log import Clock
from rl.session import Summary, prepare

TRAINING_JOBS: dict[str, type[RLConfig | PreferenceConfig]] = {
    "rl": RLConfig,
    "mbpo": MBPOConfig,
    "preference": PreferenceConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The summaries of every run, by name."""

    runs: Mapping[str, Summary]
    stopped_at: int | None = None


def train(config: CompareConfig, *, resume: bool = False) -> Comparison:
    """Mine what has to be mined, then run every training after the other; a signal stops the whole comparison.

    With `resume`, finished runs are read, the one that was stopped goes on from its checkpoint, the others start.
    """
    clock = Clock()
    members = load_members(config)
    if (mining := load_mining(config)) is not None:
        with clock("mine"):
            mine(mining)
    summaries: dict[str, Summary] = {}
    for name, member in members.items():
        prepare(member.prepare)
        finished = member.folder / "summary.json"
        if resume and finished.exists():
            summaries[name] = TypeAdapter(Summary).validate_json(finished.read_text())
            continue
        summaries[name] = train_one(member, resume=resume and bool(checkpoint.complete(member.folder / "checkpoints")))
        if summaries[name].stopped_at is not None:
            return Comparison(runs=summaries, stopped_at=summaries[name].stopped_at)
    write(config, summaries, clock)
    return Comparison(runs=summaries)


def load_mining(config: CompareConfig) -> MineConfig | None:
    if config.mine is None:
        return None
    return replace(load(config.mine, [], {"mine": MineConfig}), output_dir=config.output_dir)


def load_members(config: CompareConfig) -> dict[str, RLConfig | PreferenceConfig]:
    """The configs of all runs, with the comparison's seed, cluster, folder and mined pairs."""
    mining = load_mining(config)
    members: dict[str, RLConfig | PreferenceConfig] = {}
    for name, path in config.runs.items():
        loaded: RLConfig | PreferenceConfig = load(path, [], TRAINING_JOBS)
        member = replace(loaded, name=f"{config.name}/{name}", seed=config.seed, output_dir=config.output_dir)
        if isinstance(member, RLConfig):
            member = replace(member, cluster=config.cluster)
        if mining is not None and isinstance(member, MBPOConfig):
            member = replace(member, offline=replace(member.offline, pairs=mining.folder / "data.jsonl"))
        elif mining is not None and isinstance(member, PreferenceConfig):
            member = replace(member, pairs=mining.folder / "data.jsonl")
        members[name] = member
    return members


def train_one(config: RLConfig | PreferenceConfig, *, resume: bool) -> Summary:
    """The training that the config's type asks for."""
    if isinstance(config, PreferenceConfig):
        return preference.train(config, resume=resume)
    if isinstance(config, MBPOConfig):
        return hybrid.train(config, resume=resume)
    return online.train(config, resume=resume)


def write(config: CompareConfig, summaries: Mapping[str, Summary], clock: Clock) -> None:
    """summary.json and the table: the base model, then every run."""
    first = next(iter(summaries.values()))
    rows: dict[str, tuple[Mapping[str, Suite], Mapping[str, float]]] = {"base": (first.base, clock.total)}
    rows |= {name: (summary.final, summary.seconds) for name, summary in summaries.items()}
    table = Table("", *first.base, "seconds", title=f"{config.name}: held-out accuracy, seed {config.seed}")
    for name, (suites, seconds) in rows.items():
        table.add_row(name, *(f"{suite.accuracy:.1%}" for suite in suites.values()), f"{sum(seconds.values()):.0f}")
    Console().print(table)
    written = {
        name: {suite: result.accuracy for suite, result in suites.items()}
        | {"n": {suite: result.n for suite, result in suites.items()}, "seconds": dict(seconds)}
        for name, (suites, seconds) in rows.items()
    }
    path = Path(config.output_dir) / config.name / "summary.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(written, indent=2))
    Console(soft_wrap=True).print(f"written to {path.resolve()}")
