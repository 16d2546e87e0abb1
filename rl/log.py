"""What a run writes and shows: metrics.jsonl, sampled answers with their verdicts, trackers, and a live line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rewards.base import ScoredGroup

SHOWN = {  # metric -> what it is called on the screen
    "reward": "reward",
    "online/kl": "KL",
    "online/entropy": "entropy",
    "online/loss": "loss",
    "offline/loss": "offline loss",
    "offline/margin": "margin",
    "tokens_per_s": "tokens/s",
}


class Clock:
    """Seconds spent in each named phase, in total and since the last `lap`."""

    def __init__(self) -> None:
        self.total: dict[str, float] = {}
        self._lap: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.total[phase] = self.total.get(phase, 0.0) + spent
            self._lap[phase] = self._lap.get(phase, 0.0) + spent

    def lap(self) -> dict[str, float]:
        """Seconds of every phase since the last call."""
        lap, self._lap = self._lap, {}
        return lap


class Tracker(Protocol):
    """Somewhere else that metrics go."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Scalars in `<run>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Scalars in the Weights & Biases project `equipoise`, under the run's name; WANDB_* variables apply."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project="equipoise", name=folder.name, dir=str(folder), config=dict(config))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class RunLog:
    """The log of one run. After a resume at `first_step`, lines of steps that are taken again are dropped."""

    def __init__(
        self, folder: Path, config: Mapping[str, Any], steps: int, trackers: Sequence[str], first_step: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.console = Console(soft_wrap=True)
        for file in ("metrics.jsonl", "samples.jsonl"):
            keep_steps_before(folder / file, first_step)
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder),
            "wandb": lambda: WandB(folder, config),
        }
        try:
            self.trackers = [makers[name]() for name in trackers]
        except ModuleNotFoundError as error:
            raise ValueError(
                f"trackers needs {error.name}, which is not installed: pip install equipoise[track]"
            ) from None
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(folder.name, total=steps, completed=first_step, line="")
        self.steps = steps

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's metrics: to the file, the trackers and the screen."""
        if "sampled_tokens" in metrics:
            metrics = {**metrics, "tokens_per_s": metrics["sampled_tokens"] / metrics["seconds/sample"]}
        append(self.folder / "metrics.jsonl", [{"step": step, **metrics}])
        for tracker in self.trackers:
            tracker.log(metrics, step)
        line = "  ".join(f"{label} {metrics[name]:.3g}" for name, label in SHOWN.items() if name in metrics)
        phases = {name: seconds for name, seconds in metrics.items() if name.startswith("seconds/")}
        line += "  | " + "  ".join(f"{name.removeprefix('seconds/')} {s:.1f} s" for name, s in phases.items())
        if self.console.is_terminal:
            self.progress.update(self.task, completed=step + 1, line=line)
        else:
            self.console.print(f"{self.folder.name} {step + 1}/{self.steps}  {line}")

    def evaluation(self, step: int, accuracies: Mapping[str, float]) -> None:
        """Held-out accuracies after `step` steps, in the line after that step's own."""
        append(self.folder / "metrics.jsonl", [{"step": step - 1, **accuracies}])
        for tracker in self.trackers:
            tracker.log(accuracies, step)

    def samples(self, step: int, scored: Sequence[ScoredGroup]) -> None:
        """The first sampled answers of a step with what every reward said of them."""
        rows = [
            {
                "step": step,
                "prompt": group.group.prompt.id,
                "question": group.group.prompt.messages[-1].text,
                "answer": group.group.prompt.answer,
                "response": sample.text,
                "reward": group.rewards[index],
                "verdicts": {
                    part: {"score": v[index].score, "status": v[index].status, "extracted": v[index].extracted}
                    for part, v in group.parts.items()
                },
            }
            for group in scored
            for index, sample in enumerate(group.group.samples)
        ]
        append(self.folder / "samples.jsonl", rows)

    def say(self, text: str) -> None:
        self.console.print(text)

    def close(self) -> None:
        self.progress.stop()
        for tracker in self.trackers:
            tracker.close()


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def keep_steps_before(path: Path, first_step: int) -> None:
    """Cut a log file back to the steps before `first_step`; a line torn by a kill goes with them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the process died while writing this line
            continue
        if row["step"] < first_step:
            kept.append(line + "\n")
    path.write_text("".join(kept))
