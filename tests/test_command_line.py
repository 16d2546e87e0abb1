"""The command line as a user meets it: a process, its output, its exit code, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TRAIN = """
job: preference
name: dpo
model: {{path: {model}, dtype: float32}}
output_dir: {folder}/runs
steps: 3
pairs: {folder}/pairs.jsonl
per_step: 2
evaluation: {{suites: {{held_out: {folder}/prompts.jsonl}}, max_tokens: 3}}
"""


@pytest.fixture
def config(data: Path, tiny_model: Path) -> Path:
    """An offline run of three steps."""
    path = data / "dpo.yaml"
    path.write_text(TRAIN.format(model=tiny_model, folder=data))
    return path


def equipoise(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "equipoise", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def test_help_names_the_commands() -> None:
    done = equipoise("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "mine", "evaluate"))


def test_dry_run_reads_everything_and_starts_nothing(config: Path) -> None:
    done = equipoise("train", config, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 1.0e-06" in done.stdout  # the whole config, defaults included
    assert "pairs.jsonl: 6 pairs, 2 a step" in done.stdout
    assert "prompts.jsonl: 6 prompts to evaluate held_out" in done.stdout
    assert not (config.parent / "runs").exists()


def test_mistakes_end_with_a_message_and_not_a_traceback(config: Path) -> None:
    done = equipoise("train", config, "stesp=4")
    assert done.returncode == 2
    assert "stesp: unknown key; did you mean 'steps'" in done.stderr
    (config.parent / "pairs.jsonl").write_text('{"id": "a", "question": "?", "image": "../x.png", "chosen": "b"}\n')
    done = equipoise("train", config)
    assert done.returncode == 2
    assert re.search(r"pairs\.jsonl:1: image is .*expected a path inside the folder", done.stderr)
    assert "rejected is missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_offline_training_imports_neither_ray_nor_vllm(config: Path) -> None:
    code = (
        "import sys, equipoise\n"
        f"code = equipoise.main(['train', {str(config)!r}])\n"
        "print('exit', code, 'loaded', [name for name in ('ray', 'vllm') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert "exit 0 loaded []" in done.stdout
    summary = json.loads((config.parent / "runs/dpo/summary.json").read_text())
    assert summary["final"]["held_out"]["n"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_checkpoints_and_resume_finishes(config: Path, stop: signal.Signals) -> None:
    command = [sys.executable, "-m", "equipoise", "train", str(config), "steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = config.parent / "runs/dpo/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, stop)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    taken = int(re.findall(r"stopped after step (\d+); continue with --resume", output)[0])
    done = equipoise("train", config, "steps=100000", "--resume", "--dry-run")
    assert done.returncode == 0
    manifest = json.loads((config.parent / f"runs/dpo/checkpoints/step_{taken:06d}/manifest.json").read_text())
    assert manifest["step"] == manifest["policy_version"] == taken
