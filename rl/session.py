"""What every training run does around its steps, online or offline: evaluate, log, checkpoint, stop cleanly, export."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from rl.config import RLConfig, RunConfig, differences, plain
from rl.evaluate import Suite, evaluate
from rl.learner import AnyLearner, Metrics
from rl.log import Clock, RunLog
from rollout.prompts import load_prompts
from rollout.render import Renderer
from rollout.scripted_engine import ScriptedEngine
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
    resume: tuple[Path, Mapping[str, Any]] | None = None  # a checkpoint and its manifest
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.folder = self.config.folder
        self.first_step, self.base = 0, None
        if self.resume is not None:
            self.first_step, self.base = self.restore(*self.resume)
        else:
            set_aside(self.folder)
        self.log = RunLog(self.folder, plain(self.config), self.config.steps, self.config.trackers, self.first_step)

    def run(self, take_step: Callable[[int], Metrics]) -> Summary:
        """Take every step that is left. A signal lets the step finish, then checkpoints and returns."""
        self.engine.load_weights(self.learner.weights(), version=self.first_step)
        base = self.base if self.base is not None else self.evaluate(self.first_step)
        steps, saves, evaluations = self.config.steps, self.config.checkpoints.every, self.config.evaluation.every
        self.clock.lap()  # what came before the first step is not part of it
        with self.log.progress, stop_requested() as stopping:
            for step in range(self.first_step, steps):
                metrics = take_step(step)
                self.log.step(step, metrics | {f"seconds/{name}": s for name, s in self.clock.lap().items()})
                done, stop = step + 1, stopping()
                if stop or done == steps or (saves and done % saves == 0):
                    self.checkpoint(done, base)
                if stop and done < steps:
                    self.log.say(f"stopped after step {done}; continue with --resume")
                    return Summary(base=base, final={}, seconds=self.clock.total, stopped_at=done)
                if evaluations and done % evaluations == 0 and done < steps:
                    self.evaluate(done)
        self.export()
        summary = Summary(base=base, final=self.evaluate(steps), seconds=self.clock.total)
        (self.folder / "summary.json").write_text(json.dumps(plain(summary), indent=2))
        self.show(summary)
        return summary

    def evaluate(self, step: int) -> dict[str, Suite]:
        """Accuracy of the policy as it is after `step` steps, on every held-out suite."""
        if not self.suites:
            return {}
        with self.clock("evaluate"):
            self.engine.load_weights(self.learner.weights(), version=step)
            suites = evaluate(self.engine, self.suites, self.config.evaluation.max_tokens)
        for name, suite in suites.items():
            self.log.say(
                f"step {step}: {name} {suite.accuracy:.1%} of {suite.n} ({suite.unparsed:.1%} without an answer)"
            )
        self.log.evaluation(step, {f"evaluation/{name}": suite.accuracy for name, suite in suites.items()})
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

    def restore(self, path: Path, manifest: Mapping[str, Any]) -> tuple[int, dict[str, Suite]]:
        """Load a checkpoint into every part; the first step to take, and the accuracies before training."""
        self.learner.load(path)
        for name, cursor in self.cursors.items():
            cursor.restore(manifest["cursors"][name])
        return manifest["step"], TypeAdapter(dict[str, Suite]).validate_python(manifest["base"])

    def export(self) -> None:
        """The trained model as a plain transformers folder, safetensors only: <run>/model."""
        model, folder = self.config.model, self.folder / "model"
        aside = folder.with_name("model.partial")
        for leftover in (aside, folder):  # of a run that was killed here and resumed
            shutil.rmtree(leftover, ignore_errors=True)
        aside.mkdir()
        AutoConfig.from_pretrained(model.path, revision=model.revision, trust_remote_code=False).save_pretrained(aside)
        with suppress(OSError):  # a model need not have one
            GenerationConfig.from_pretrained(model.path, revision=model.revision).save_pretrained(aside)
        self.renderer.processor.save_pretrained(aside)
        # ZeRO's weights are views into one flat buffer: each is copied out of it.
        save_torch_state_dict({name: tensor.cpu().clone() for name, tensor in self.learner.weights()}, aside)
        aside.rename(folder)

    def show(self, summary: Summary) -> None:
        table = Table("", *summary.final, title=f"{self.config.name}: held-out accuracy")
        for name, suites in (("before", summary.base), ("after", summary.final)):
            table.add_row(name, *(f"{suite.accuracy:.1%}" for suite in suites.values()))
        self.log.console.print(table)
        spent = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in summary.seconds.items())
        self.log.say(f"{spent}\nwritten to {self.folder.resolve()}")


MAY_CHANGE = frozenset(  # keys of a config that do not touch what is learned
    {
        *("output_dir", "trackers", "checkpoints", "evaluation", "prepare", "learner.tokens_per_micro_batch"),
        *("cluster.address", "cluster.start_timeout_s", "cluster.call_timeout_s"),
    }
)


def resumable(config: RunConfig, data_fingerprint: str) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of the run and its manifest; ValueError if it is not one of this config and data."""
    path, manifest = checkpoint.latest(config.folder / "checkpoints")
    if manifest["data_fingerprint"] != data_fingerprint:
        raise ValueError(f"{path} was written on other data; restore the data files or start without --resume")
    if changed := differences(manifest["config"], plain(config), ignore=MAY_CHANGE):
        raise ValueError(f"{path} was written by another config:\n  " + "\n  ".join(changed))
    return path, manifest


def prepare(module: str | None) -> None:
    """Run `python -m module`: it makes the data a config needs and returns at once where they are there."""
    if module is not None and subprocess.run([sys.executable, "-m", module], check=False).returncode != 0:
        raise ValueError(f"prepare: `python -m {module}` failed, see above; mend it or set prepare=null")


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
    checkpoint_to_resume = resumable(config, data_fingerprint) if resume else None  # before anything slow starts
    clock = Clock()
    with ExitStack() as stack:
        with clock("start"):
            engine, learner = stack.enter_context(placed(config, renderer, needs_reference))
        opened = Session(
            config=config,
            engine=engine,
            learner=learner,
            renderer=renderer,
            suites=suites,
            cursors=cursors,
            data_fingerprint=data_fingerprint,
            resume=checkpoint_to_resume,
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
def placed(config: RunConfig, renderer: Renderer, needs_reference: bool) -> Iterator[tuple[Engine, AnyLearner]]:
    """Engine and learner, in this process or, where the config has a cluster, on Ray."""
    if config.cluster is not None:
        from rl.cluster import on_ray  # imported by those who use it: Ray takes seconds

        with on_ray(config, needs_reference=needs_reference) as remote:
            yield remote
        return
    with ExitStack() as stack:
        asked = isinstance(config, RLConfig) or config.evaluation.suites
        engine = build_engine(config) if asked else ScriptedEngine({}, renderer)
        stack.callback(engine.close)
        with engine.asleep():  # leaves the learner room on a GPU they share
            learner = build_learner(config, needs_reference=needs_reference)
        stack.callback(learner.close)
        yield engine, learner


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
