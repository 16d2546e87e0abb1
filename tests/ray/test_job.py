"""A comparison handed to a running Ray with `ray job submit`, as the README tells; nothing outlives that Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
START_S, RUN_S, STOP_S = 90, 240, 30  # how long Ray may take to listen, the job to end, and every process to go

MEMBER = """
model: {{path: {model}, dtype: float32}}
steps: 2
evaluation: {{suites: {{held_out: {folder}/prompts.jsonl}}, max_tokens: 3}}
"""
RL = """
job: rl
name: rl
prompts: {{path: {folder}/prompts.jsonl, per_step: 2}}
sampling: {{num_samples: 2, max_tokens: 3}}
selection: {{drop_equal_rewards: false}}
engine: {{name: hf}}
learner: {{backend: torch}}
"""
PREFERENCE = """
job: preference
name: preference
pairs: {folder}/pairs.jsonl
per_step: 2
"""
COMPARE = """
job: compare
name: both
output_dir: {folder}/runs
runs: {{online: {folder}/rl.yaml, offline: {folder}/preference.yaml}}
cluster: {{}}
"""


@pytest.fixture
def config(data: Path, tiny_model: Path) -> Path:
    """A comparison of two runs of two steps."""
    for name, text in (("rl", RL + MEMBER), ("preference", PREFERENCE + MEMBER), ("compare", COMPARE)):
        (data / f"{name}.yaml").write_text(text.format(model=tiny_model, folder=data))
    return data / "compare.yaml"


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def head() -> Iterator[str]:
    """A Ray beside any other on this machine; the address that takes its jobs."""
    port, dashboard, client, agent = free_ports(4)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"  # where the job finds `python`
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: the names of sockets are bounded
        command = [
            *(BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--temp-dir={folder}"),
            *(f"--port={port}", f"--dashboard-port={dashboard}"),
            *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        ]
        log = Path(folder, "start.log")
        with log.open("w") as file:
            process = psutil.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            wait_for(address, log)
            yield address
        finally:
            everything = [process, *process.children(recursive=True)]
            process.send_signal(signal.SIGTERM)  # what `ray stop` sends, to this Ray only
            _, left = psutil.wait_procs(everything, timeout=STOP_S)
            for each in left:
                each.kill()
    assert not left, f"still there after {STOP_S} s: {left}"


def wait_for(address: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):  # not listening yet
            time.sleep(0.5)
    raise TimeoutError(f"Ray does not listen at {address} after {START_S} s: {log.read_text()}")


def submit(address: str, name: str, *command: str | Path) -> str:
    """What a job prints that runs `command` on a copy of the repository; returns when it has ended."""
    line = [BIN / "ray", "job", "submit", "--address", address, "--submission-id", name, "--working-dir", "."]
    done = subprocess.run([*line, "--", *command], cwd=ROOT, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def status(address: str, name: str) -> str:
    with urllib.request.urlopen(f"{address}/api/jobs/{name}", timeout=10) as answer:
        return str(json.load(answer)["status"])


@pytest.mark.timeout(START_S + RUN_S + 2 * STOP_S)
def test_a_comparison_runs_as_a_job(config: Path) -> None:
    with head() as address:
        log = submit(address, "both", "python", "-m", "equipoise", "train", config)
        assert status(address, "both") == "SUCCEEDED"
    assert "need 1 CPU (1 engine) + 1 CPU (1 learner rank), have 2 CPU" in log
    _, title, table = log.partition("both: held-out accuracy, seed 0")
    assert title, log
    assert all(f"│ {name} " in table for name in ("base", "online", "offline")), log
    assert json.loads((config.parent / "runs/both/summary.json").read_text()).keys() == {"base", "online", "offline"}
