"""Every YAML in the repository loads; a mistake in one is answered with the nearest right key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equipoise import JOBS
from offline.config import CompareConfig, MBPOConfig, MineConfig, PreferenceConfig
from rl.config import RLConfig, load

ROOT = Path(__file__).parents[1]
KINDS: dict[str, type[Any]] = {
    "rl": RLConfig,
    "mbpo": MBPOConfig,
    "preference": PreferenceConfig,
    "compare": CompareConfig,
    "mine": MineConfig,
}
DEMO = ROOT / "configs/demo/mbpo.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads(path: Path) -> None:
    config = load(path, [], KINDS)
    assert config.name


def test_every_job_of_the_command_line_is_tested_here() -> None:
    assert {job for jobs in JOBS.values() for job in jobs} == set(KINDS)


def test_overrides_reach_nested_keys_and_keep_their_type() -> None:
    config = load(DEMO, ["learner.optimizer.learning_rate=1e-6", "seed=7", "cluster=null", "name=other"], KINDS)
    assert isinstance(config, MBPOConfig)
    assert config.learner.optimizer.learning_rate == 1e-6
    assert (config.seed, config.cluster, config.name) == (7, None, "other")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["learner.optimizer.learning_rte=1"],
            "learner.optimizer.learning_rte: unknown key; did you mean 'learning_rate'",
        ),
        (["samplng.num_samples=4"], "samplng: unknown key; did you mean 'sampling'"),
        (["loss.clip_hihg=1"], "clip_hihg: unknown key; did you mean 'clip_high'"),
        (["loss.name=grop"], "loss.*'grop'.*'grpo'"),
        (["engine.name=sglang"], "engine.*'sglang'.*'vllm'"),
        (["rewards.correct.name=vrify"], "rewards.correct.*'vrify'.*'verify'"),
        (["steps=0"], "steps: given 0: .*greater than 0"),
        (["steps"], "expected key=value"),
        (["sampling.num_samples=1"], "at least 2 answers"),
        (["sampling.temperature=0"], "training needs samples: > 0"),
        (["job=mbop"], "`job:` is 'mbop'; it must be one of"),
        (["model=null"], "model: given None: Input should be a dictionary"),
    ],
)
def test_mistakes_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(DEMO, overrides, KINDS)


def test_a_missing_file_names_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"configs/dem.yaml: no such config file.*configs/demo.yaml"):
        load(Path("configs/dem.yaml"), [], KINDS)
