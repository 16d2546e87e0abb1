"""Whole runs on a tiny model in one process: MBPO and DPO learn, write what they promise, and resume bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from offline import hybrid
from offline import train as preference
from offline.config import MBPOConfig, Pairs, PreferenceConfig
from offline.losses.dpo import DPO
from rl.config import Answers, Checkpoints, Evaluation, LearnerConfig, Prompts
from rl.losses.grpo import GRPO
from rl.optimizer import Optimizer
from rl.policy import Model
from rl.selection import Rules

LEARNER = LearnerConfig(optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2, schedule="cosine"))


@pytest.fixture
def mbpo(data: Path, tmp_path: Path, tiny_model: Path) -> MBPOConfig:
    return MBPOConfig(
        name="mbpo",
        model=Model(path=str(tiny_model), dtype="float32"),
        output_dir=tmp_path / "runs",
        steps=4,
        prompts=Prompts(path=data / "prompts.jsonl", per_step=4),
        sampling=Answers(num_samples=3, max_tokens=3),
        selection=Rules(drop_equal_rewards=False),  # a random model is never right
        offline=Pairs(pairs=data / "pairs.jsonl", per_step=4, loss=GRPO(kl=0.01)),
        loss=GRPO(kl=0.01),
        learner=LEARNER,
        evaluation=Evaluation(suites={"held_out": data / "prompts.jsonl"}, max_tokens=3),
        checkpoints=Checkpoints(every=2, keep=3),
    )


@pytest.fixture
def dpo(data: Path, tmp_path: Path, tiny_model: Path) -> PreferenceConfig:
    return PreferenceConfig(
        name="dpo",
        model=Model(path=str(tiny_model), dtype="float32"),
        output_dir=tmp_path / "runs",
        steps=8,
        pairs=data / "pairs.jsonl",
        per_step=4,
        learner=LEARNER,
        evaluation=Evaluation(suites={"held_out": data / "prompts.jsonl"}, max_tokens=3),
    )


def metrics_of(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "grad_norm" in row]  # not the evaluations
    return [{k: v for k, v in row.items() if not k.startswith("seconds/") and k != "tokens_per_s"} for row in rows]


def test_mbpo_resumes_bit_for_bit(mbpo: MBPOConfig) -> None:
    hybrid.train(mbpo)
    through = mbpo.folder.rename(mbpo.folder.with_name("through"))
    shutil.copytree(through, mbpo.folder)  # as a kill after step 3 leaves it
    shutil.rmtree(mbpo.folder / "checkpoints/step_000004")
    with (mbpo.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "torn')
    hybrid.train(mbpo, resume=True)
    assert (through / "model/model.safetensors").read_bytes() == (mbpo.folder / "model/model.safetensors").read_bytes()
    assert metrics_of(through) == metrics_of(mbpo.folder)


def test_a_run_writes_what_it_promises(mbpo: MBPOConfig) -> None:
    config = replace(mbpo, offline=replace(mbpo.offline, loss=DPO(), weight=0.5), trackers=("tensorboard",))
    summary = hybrid.train(config)
    written = {path.name for path in mbpo.folder.iterdir()}
    assert {"config.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "summary.json"} <= written
    assert list((mbpo.folder / "tensorboard").glob("events.out.tfevents.*"))
    assert summary.final["held_out"].n == 6
    first = metrics_of(mbpo.folder)[0]
    assert {
        "reward",
        "online/kl",
        "online/entropy",
        "online/mismatch_kl",
        "offline/margin",
        "grad_norm",
    } <= first.keys()
    assert first["online/mismatch_kl"] < 1e-9  # engine and learner compute the same log-probs
    assert first["offline/loss"] == pytest.approx(0.5 * 0.6931, abs=1e-3)  # ln 2 at the start, times the weight
    sample = json.loads((mbpo.folder / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample["verdicts"]) == {"correct", "format"}


def test_dpo_raises_the_margin(dpo: PreferenceConfig) -> None:
    preference.train(dpo)
    rows = metrics_of(dpo.folder)
    assert rows[0]["offline/margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["offline/margin"] > 0.05
    assert rows[-1]["offline/accuracy"] == pytest.approx(1)
    assert load_file(dpo.folder / "model/model.safetensors")


def test_a_signal_checkpoints_and_stops(dpo: PreferenceConfig) -> None:
    endless = replace(dpo, steps=10_000)
    metrics = dpo.folder / "metrics.jsonl"

    def stop_once_it_learns() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not metrics.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    killer = threading.Thread(target=stop_once_it_learns)
    killer.start()
    summary = preference.train(endless)
    killer.join()
    assert summary.stopped_at is not None
    assert (dpo.folder / f"checkpoints/step_{summary.stopped_at:06d}/manifest.json").exists()


def test_resume_refuses_other_data_and_other_settings(dpo: PreferenceConfig, data: Path) -> None:
    preference.train(dpo)
    changed = replace(dpo, learner=LearnerConfig(optimizer=replace(LEARNER.optimizer, learning_rate=0.5)))
    with pytest.raises(ValueError, match=r"another config:\n  learner.optimizer.learning_rate: was 0.001, is 0.5"):
        preference.train(changed, resume=True)
    text = (data / "pairs.jsonl").read_text().replace("blue", "green")
    (data / "pairs.jsonl").write_text(text)
    with pytest.raises(ValueError, match="other data"):
        preference.train(dpo, resume=True)


def test_resume_without_a_checkpoint_says_so(dpo: PreferenceConfig) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        preference.train(dpo, resume=True)
