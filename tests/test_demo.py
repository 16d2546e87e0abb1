"""The story of the demo, shortened: MBPO on mined pairs repairs the prior and keeps what the model could do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples.colored_digits import world
from offline import hybrid
from offline.config import MBPOConfig, MineConfig
from offline.mine import mine
from rl.config import Prompts, load
from rollout.engines import HF

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mbpo_repairs_the_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    data = tmp_path / "data"
    world.write(data)
    kinds: dict[str, type[Any]] = {"mine": MineConfig, "mbpo": MBPOConfig}
    mining = load(Path("configs/demo/mine.yaml"), [], kinds)
    mined = mine(replace(mining, source=data / "pairs_source.jsonl", output_dir=tmp_path, max_pairs=100))
    assert mined.pairs == 100
    config = load(Path("configs/demo/mbpo.yaml"), [f"output_dir={tmp_path}", "learner.backend=torch"], kinds)
    assert isinstance(config, MBPOConfig)
    suites = {name: data / path.name for name, path in config.evaluation.suites.items()}
    summary = hybrid.train(
        replace(
            config,
            steps=15,
            engine=HF(batch_size=256),
            prompts=Prompts(path=data / "train.jsonl", per_step=32),
            offline=replace(config.offline, pairs=tmp_path / mining.name / "data.jsonl", per_step=16),
            evaluation=replace(config.evaluation, suites=suites),
        )
    )
    assert summary.base["counterfactual"].accuracy < 0.1
    assert summary.final["counterfactual"].accuracy > 0.5
    assert summary.final["typical"].accuracy > 0.9
    assert summary.final["neutral"].accuracy > 0.9
