"""Several trainings from one base model, side by side in one table: what `make demo` runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from offline import hybrid
from offline import train as preference
from offline.config import CompareConfig, MBPOConfig, MineConfig, PreferenceConfig
from offline.mine import mine
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
    """Mine what has to be mined, then run every training after the other; a signal stops the whole comparison."""
    if resume:
        raise ValueError("a comparison is not resumed as a whole: resume its runs one by one, or start it again")
    clock = Clock()
    members = load_members(config)
    if config.mine is not None:
        with clock("mine"):
            mine(load(config.mine, [], {"mine": MineConfig}))
    summaries: dict[str, Summary] = {}
    for name, member in members.items():
        prepare(member.prepare)
        summaries[name] = train_one(member)
        if summaries[name].stopped_at is not None:
            return Comparison(runs=summaries, stopped_at=summaries[name].stopped_at)
    write(config, summaries, clock)
    return Comparison(runs=summaries)


def load_members(config: CompareConfig) -> dict[str, RLConfig | PreferenceConfig]:
    """The configs of the runs, all read before the first one starts, with the comparison's seed and cluster."""
    members: dict[str, RLConfig | PreferenceConfig] = {}
    for name, path in config.runs.items():
        loaded: RLConfig | PreferenceConfig = load(path, [], TRAINING_JOBS)
        member = replace(loaded, name=f"{config.name}/{name}", seed=config.seed)
        members[name] = replace(member, cluster=config.cluster) if isinstance(member, RLConfig) else member
    return members


def train_one(config: RLConfig | PreferenceConfig) -> Summary:
    """The training that the config's type asks for."""
    if isinstance(config, PreferenceConfig):
        return preference.train(config)
    return hybrid.train(config) if isinstance(config, MBPOConfig) else online.train(config)


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
