"""`--dry-run`: everything that can be known before anything starts: the whole config, the data, the placement."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from rich.console import Console

from offline.compare import load_members
from offline.config import CompareConfig, MBPOConfig, MineConfig, PreferenceConfig
from offline.preferences import load_preferences
from rewards.verifiers import gold_problem
from rl.config import RLConfig, RunConfig, load
from rl.session import load_suites, plain
from rollout.prompts import load_prompts

AnyConfig = CompareConfig | MineConfig | PreferenceConfig | RLConfig


def check(config: AnyConfig) -> None:
    """Print the resolved config, read all data, plan the placement; raises ValueError for whatever would fail."""
    console = Console(soft_wrap=True)
    console.print(yaml.safe_dump(plain(config), sort_keys=False), markup=False, highlight=False)
    for line in findings(config):
        console.print(line, markup=False, highlight=False)
    console.print("nothing was started")


def findings(config: AnyConfig) -> Iterator[str]:
    """One line per thing that was found in order."""
    if isinstance(config, CompareConfig):
        mining = load(config.mine, [], {"mine": MineConfig}) if config.mine else None
        if mining is not None:
            yield from findings(mining)
        for name, member in load_members(config).items():
            yield f"{name}:"
            mined = mining.folder / "data.jsonl" if mining else None
            yield from (f"  {line}" for line in run_findings(member, to_be_mined=mined))
    elif isinstance(config, MineConfig):
        prompts = load_prompts(config.source, check=gold_problem, on_bad_rows=config.on_bad_rows, limits=config.pixels)
        yield f"{config.source}: {len(prompts)} prompts to mine from, into {config.folder}"
    else:
        yield from run_findings(config, to_be_mined=None)


def run_findings(config: RunConfig, to_be_mined: object) -> Iterator[str]:
    """The data of a training run and where its parts would live; pairs that a comparison mines first may be missing."""
    if isinstance(config, RLConfig):
        data = config.prompts
        prompts = load_prompts(data.path, check=gold_problem, on_bad_rows=data.on_bad_rows, limits=config.pixels)
        yield f"{data.path}: {len(prompts)} prompts, {data.per_step} a step, {config.sampling.num_samples} answers each"
    pairs = (
        config.offline if isinstance(config, MBPOConfig) else config if isinstance(config, PreferenceConfig) else None
    )
    if pairs is not None and pairs.pairs == to_be_mined and not pairs.pairs.exists():
        yield f"{pairs.pairs}: mined first"
    elif pairs is not None:
        found = load_preferences(pairs.pairs, on_bad_rows=pairs.on_bad_rows, limits=config.pixels)
        yield f"{pairs.pairs}: {len(found)} pairs, {pairs.per_step} a step"
    for name, suite in load_suites(config).items():
        yield f"{config.evaluation.suites[name]}: {len(suite)} prompts to evaluate {name}"
    if config.cluster is None:
        yield "engine and learner in this process"
    else:
        from rl.cluster import plan  # Ray is imported by those who use it

        yield str(plan(config.cluster))
