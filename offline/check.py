"""`--dry-run`: everything that can be known before anything starts: the whole config, the data, the placement."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console

from offline.batch import checked_preferences
from offline.compare import load_members, load_mining
from offline.config import CompareConfig, MBPOConfig, MineConfig, Pairs, PreferenceConfig
from rl.build import build_renderer
from rl.config import RLConfig, plain
from rl.session import checked_prompts, checked_suites
from rollout.render import Renderer

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
        mining = load_mining(config)
        if mining is not None:
            yield from findings(mining)
        for name, member in load_members(config).items():
            yield f"{name}:"
            mined = mining.folder / "data.jsonl" if mining else None
            yield from (f"  {line}" for line in run_findings(member, to_be_mined=mined))
    elif isinstance(config, MineConfig):
        renderer = Renderer.load(config.model.path, revision=config.model.revision, limits=config.pixels)
        prompts = checked_prompts(config.source, renderer, config.on_bad_rows)
        yield f"{config.source}: {len(prompts)} prompts to mine from, into {config.folder}"
    else:
        yield from run_findings(config, to_be_mined=None)


def run_findings(config: RLConfig | PreferenceConfig, to_be_mined: Path | None) -> Iterator[str]:
    """The data of a training run and where its parts would live; pairs that a comparison mines first may be missing."""
    renderer = build_renderer(config)
    if isinstance(config, RLConfig):
        prompts = checked_prompts(config.prompts.path, renderer, config.prompts.on_bad_rows)
        answers = config.sampling.num_samples
        yield f"{config.prompts.path}: {len(prompts)} prompts, {config.prompts.per_step} a step, {answers} answers each"
    stream: PreferenceConfig | Pairs | None = config if isinstance(config, PreferenceConfig) else None
    if isinstance(config, MBPOConfig):
        stream = config.offline
    if stream is not None and stream.pairs == to_be_mined and not stream.pairs.exists():
        yield f"{stream.pairs}: mined first"
    elif stream is not None:
        pairs = checked_preferences(stream.pairs, renderer, stream.on_bad_rows)
        yield f"{stream.pairs}: {len(pairs)} pairs, {stream.per_step} a step"
    for name, suite in checked_suites(config, renderer).items():
        yield f"{config.evaluation.suites[name]}: {len(suite)} prompts to evaluate {name}"
    if config.cluster is None:
        yield "engine and learner in this process"
    else:
        from rl.cluster import check_placement  # Ray is imported by those who use it

        yield check_placement(config.cluster)
