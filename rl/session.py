"""What every training run does around its steps, online or offline: evaluate, log, checkpoint, stop cleanly, export."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from huggingface_hub import save_torch_state_dict
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, GenerationConfig

from rewards.verifiers import gold_problem
from rl import checkpoint
from rl.build import build_engine, build_learner, build_renderer
from rl.config import RunConfig
from rl.evaluate import Suite, evaluate
from rl.learner import AnyLearner, Metrics
from rl.log import Clock, RunLog
from rollout.prompts import load_prompts
from rollout.render import Renderer
from rollout.types import Engine, Prompt


class Resumable(Protocol):
    """Something whose place in the data belongs in a checkpoint."""

    def state(self) -> dict[str, int]: ...
    def restore(self, state: Mapping[str, int]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run did: accuracy before and after, and where its time went."""

    base: Mapping[str, Suite]
    final: Mapping[str, Suite]
    seconds: Mapping[str, float]
    stopped_at: int | None = None  # the step after which a signal stopped the run


@dataclass(kw_only=True)
class Session:
    """One run's parts and its loop. `take_step(step)` does the learning; everything else is here."""

    config: RunConfig
    engine: Engine
    learner: AnyLearner
    renderer: Renderer
    suites: Mapping[str, Sequence[Prompt]]
    cursors: Mapping[str, Resumable]
    data_fingerprint: str
    resume: bool = False
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.folder = self.config.folder
        self.first_step, self.base = 0, None
        if self.resume:
            self.first_step, self.base = self.restore()
        else:
            set_aside(self.folder)
        self.log = RunLog(self.folder, plain(self.config), self.config.steps, self.config.trackers, self.first_step)

    def run(self, take_step: Callable[[int], Metrics]) -> Summary:
        """Take every step that is left. A signal lets the step finish, then checkpoints and returns."""
        base = self.base if self.base is not None else self.evaluate(self.first_step)
        self.clock.lap()  # what came before the first step is not part of it
        with self.log.progress, stop_requested() as stopping:
            for step in range(self.first_step, self.config.steps):
                metrics = take_step(step)
                self.log.step(step, metrics | {f"seconds/{name}": s for name, s in self.clock.lap().items()})
                done = step + 1
                if stopping():
                    self.checkpoint(done, base)
                    self.log.say(f"stopped after step {done}; continue with --resume")
                    return Summary(base=base, final={}, seconds=self.clock.total, stopped_at=done)
                if self.config.checkpoints.every and done % self.config.checkpoints.every == 0:
                    self.checkpoint(done, base)
                if self.config.evaluation.every and done % self.config.evaluation.every == 0 < self.config.steps - done:
                    self.evaluate(done)
        self.checkpoint(self.config.steps, base)
        self.export()
        summary = Summary(base=base, final=self.evaluate(self.config.steps), seconds=self.clock.total)
        (self.folder / "summary.json").write_text(json.dumps(plain(summary), indent=2))
        self.show(summary)
        return summary

    def evaluate(self, step: int) -> dict[str, Suite]:
        """Accuracy of the policy as it is after `step` steps, on every held-out suite."""
        with self.clock("evaluate"):
            self.engine.load_weights(self.learner.weights(), version=step)
            suites = evaluate(self.engine, self.suites, self.config.evaluation.max_tokens)
        for name, suite in suites.items():
            self.log.say(
                f"step {step}: {name} {suite.accuracy:.1%} of {suite.n} ({suite.unparsed:.1%} without an answer)"
            )
        return suites

    def checkpoint(self, step: int, base: Mapping[str, Suite]) -> None:
        with self.clock("checkpoint"):
            manifest = {
                "policy_version": step,
                "cursors": {name: cursor.state() for name, cursor in self.cursors.items()},
                "data_fingerprint": self.data_fingerprint,
                "config": plain(self.config),
                "base": plain(dict(base), dict[str, Suite]),
            }
            keep = self.config.checkpoints.keep
            checkpoint.save(self.folder / "checkpoints", step, manifest, lambda path: self.learner.save(path), keep)

    def restore(self) -> tuple[int, dict[str, Suite]]:
        """Load the newest checkpoint into every part; the first step to take, and the accuracies before training."""
        path, manifest = checkpoint.latest(self.folder / "checkpoints")
        if manifest["data_fingerprint"] != self.data_fingerprint:
            raise ValueError(f"{path} was written on other data; restore the data files or start without --resume")
        changed = differences(manifest["config"], plain(self.config))
        if changed:
            raise ValueError(f"{path} was written by another config:\n  " + "\n  ".join(changed))
        self.learner.load(path)
        for name, cursor in self.cursors.items():
            cursor.restore(manifest["cursors"][name])
        self.engine.load_weights(self.learner.weights(), version=manifest["policy_version"])
        return manifest["step"], TypeAdapter(dict[str, Suite]).validate_python(manifest["base"])

    def export(self) -> None:
        """The trained model as a plain transformers folder, safetensors only: <run>/model."""
        model, folder = self.config.model, self.folder / "model"
        folder.mkdir()
        AutoConfig.from_pretrained(model.path, revision=model.revision).save_pretrained(folder)
        GenerationConfig.from_pretrained(model.path, revision=model.revision).save_pretrained(folder)
        self.renderer.processor.save_pretrained(folder)
        # ZeRO's weights are views into one flat buffer: each is copied out of it.
        save_torch_state_dict({name: tensor.cpu().clone() for name, tensor in self.learner.weights()}, folder)

    def show(self, summary: Summary) -> None:
        table = Table("", *summary.final, title=f"{self.config.name}: held-out accuracy")
        for name, suites in (("before", summary.base), ("after", summary.final)):
            table.add_row(name, *(f"{suite.accuracy:.1%}" for suite in suites.values()))
        self.log.console.print(table)
        spent = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary.seconds.items())
        self.log.say(f"{spent}\nwritten to {self.folder.resolve()}")


RESUMABLE_CHANGES = ("output_dir", "trackers", "checkpoints", "evaluation")  # keys that do not touch what is learned


def differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What changed between two plain configs, one line per key."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if prefix + key in RESUMABLE_CHANGES or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: was {old!r}, is {new!r}")
    return lines


def plain(value: Any, kind: Any = None) -> Any:
    """A dataclass as JSON types."""
    return TypeAdapter(kind or type(value)).dump_python(value, mode="json")


@contextmanager
def session(
    config: RunConfig,
    renderer: Renderer,
    cursors: Mapping[str, Resumable],
    *,
    data_fingerprint: str,
    needs_reference: bool,
    resume: bool,
) -> Iterator[Session]:
    """Place engine and learner, open the run's folder, and free everything on the way out."""
    suites = checked_suites(config, renderer)
    clock = Clock()
    with ExitStack() as stack:
        with clock("start"):
            engine, learner = stack.enter_context(placed(config, needs_reference))
        opened = Session(
            config=config,
            engine=engine,
            learner=learner,
            renderer=renderer,
            suites=suites,
            cursors=cursors,
            data_fingerprint=data_fingerprint,
            resume=resume,
            clock=clock,
        )
        stack.callback(opened.log.close)
        yield opened


def evaluate_only(config: RunConfig) -> dict[str, Suite]:
    """Answer the held-out suites with the model as the config names it, and print the accuracies."""
    suites = checked_suites(config, build_renderer(config))
    if not suites:
        raise ValueError("evaluation.suites is empty; name at least one file of prompts: {held_out: data/test.jsonl}")
    engine = build_engine(config)
    try:
        results = evaluate(engine, suites, config.evaluation.max_tokens)
    finally:
        engine.close()
    table = Table("suite", "accuracy", "n", "no answer", "by kind", title=config.model.path)
    for name, suite in results.items():
        kinds = "  ".join(f"{kind} {accuracy:.1%}" for kind, accuracy in suite.by_kind.items())
        table.add_row(name, f"{suite.accuracy:.1%}", str(suite.n), f"{suite.unparsed:.1%}", kinds)
    Console().print(table)
    return results


@contextmanager
def placed(config: RunConfig, needs_reference: bool) -> Iterator[tuple[Engine, AnyLearner]]:
    """Engine and learner, in this process or, where the config has a cluster, on Ray."""
    if config.cluster is not None:
        from rl.cluster import on_ray  # imported by those who use it: Ray takes seconds

        with on_ray(config, needs_reference=needs_reference) as remote:
            yield remote
        return
    engine = build_engine(config)
    learner = build_learner(config, needs_reference=needs_reference)
    try:
        yield engine, learner
    finally:
        learner.close()
        engine.close()


def prepare(module: str | None) -> None:
    """Run `python -m module` once: it makes the data a config needs and returns at once where they are there."""
    if module is not None:
        subprocess.run([sys.executable, "-m", module], check=True)


def checked_prompts(path: Path, renderer: Renderer, on_bad_rows: Literal["refuse", "skip"] = "refuse") -> list[Prompt]:
    """The prompts of a file, each one renderable and with a right answer that its own verifier accepts."""
    return load_prompts(
        path,
        check=lambda prompt: gold_problem(prompt) or renderer.problem(prompt),
        on_bad_rows=on_bad_rows,
        limits=renderer.limits,
    )


def checked_suites(config: RunConfig, renderer: Renderer) -> dict[str, list[Prompt]]:
    return {name: checked_prompts(path, renderer) for name, path in config.evaluation.suites.items()}


def set_aside(folder: Path) -> None:
    """Nothing is overwritten: an earlier run of the same name is kept as <name>.1, .2, ..."""
    if folder.exists():
        number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """While inside, the first Ctrl-C or SIGTERM only asks to stop; a second one interrupts at once."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
