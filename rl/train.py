"""Online RL: sample, judge, learn, send the weights back. One step on one screen, and the run around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rewards.base import ScoredGroup, count_statuses, score
from rl.batch import PolicyBatch, check_same_prompts, collate
from rl.build import build_renderer
from rl.config import RLConfig
from rl.learner import AnyLearner, Metrics, Part
from rl.log import Clock
from rl.selection import keep
from rl.session import Resumable, Summary, checked_prompts, session
from rollout.prompts import Cursor, fingerprint
from rollout.render import Renderer
from rollout.types import Engine, Prompt, Sampling


class Stream(Protocol):
    """A second stream of data for the same optimizer step, such as MBPO's offline pairs."""

    @property
    def cursor(self) -> Resumable: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def needs_reference(self) -> bool: ...

    def parts(self, learner: AnyLearner) -> list[Part]:
        """The next step's share of this stream."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts a step is made of."""

    config: RLConfig
    prompts: Cursor[Prompt]
    engine: Engine
    renderer: Renderer
    learner: AnyLearner
    clock: Clock
    show: Callable[[int, Sequence[ScoredGroup]], None]
    stream: Stream | None = None

    def sampling(self, step: int) -> Sampling:
        answers = self.config.sampling
        return Sampling(
            num_samples=answers.num_samples,
            temperature=answers.temperature,
            max_tokens=answers.max_tokens,
            seed=self.config.seed * 1_000_003 + step,
        )


def train_step(run: Run, step: int) -> Metrics:
    """Prompts in, one weight update out."""
    config = run.config
    prompts = run.prompts.next()  # [P]
    with run.clock("sample"):
        groups = run.engine.generate(prompts, run.sampling(step))  # [P] groups of G samples
    check_same_prompts(groups, run.renderer)
    scored = score(groups, config.rewards)
    kept = keep(scored, config.selection)  # the groups that can teach
    with run.engine.asleep(), run.clock("learn"):
        parts = run.stream.parts(run.learner) if run.stream else []
        if kept:
            batch = collate(
                kept, run.renderer, config.advantage, config.mean_over, temperature=config.sampling.temperature
            )
            parts = [Part(name="online", batch=annotate(run, batch), loss=config.loss), *parts]
        metrics = {}
        for _ in range(config.updates_per_batch if parts else 0):
            metrics = run.learner.update(*parts)
    with run.clock("sync"):
        run.engine.load_weights(run.learner.weights(), version=step + 1)
    run.show(step, scored[:2])
    return metrics | describe(scored, kept)


def annotate(run: Run, batch: PolicyBatch) -> PolicyBatch:
    """Add the log-probs the loss compares with: the policy's before the update, and the frozen reference's."""
    if run.config.updates_per_batch > 1:
        batch = replace(batch, old_logprobs=run.learner.logprobs(batch.rows))
    if run.config.loss.needs_reference:
        batch = replace(batch, reference_logprobs=run.learner.reference_logprobs(batch.rows))
    return batch


def describe(scored: Sequence[ScoredGroup], kept: Sequence[ScoredGroup]) -> Metrics:
    """What was sampled: mean reward, how it was judged, how long the answers are, how many groups could teach."""
    samples = [sample for group in scored for sample in group.group.samples]
    rewards = [reward for group in scored for reward in group.rewards]
    return {
        "reward": sum(rewards) / len(rewards),
        "kept_groups": len(kept) / len(scored),
        "sampled_tokens": sum(len(sample.token_ids) for sample in samples),
        "truncated": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        **count_statuses(scored),
    }


def train(config: RLConfig, *, resume: bool = False, stream: Stream | None = None) -> Summary:
    """The whole online run, with a second stream where a method has one."""
    renderer = build_renderer(config)
    prompts = checked_prompts(config.prompts.path, renderer, config.prompts.on_bad_rows)
    cursor = Cursor(prompts, config.prompts.per_step, config.seed)
    cursors: dict[str, Resumable] = {"prompts": cursor} | ({"stream": stream.cursor} if stream else {})
    needs_reference = config.loss.needs_reference or (stream is not None and stream.needs_reference)
    with session(
        config,
        renderer,
        cursors,
        data_fingerprint=fingerprint(prompts) + (stream.fingerprint if stream else ""),
        needs_reference=needs_reference,
        resume=resume,
    ) as s:
        run = Run(
            config=config,
            prompts=cursor,
            engine=s.engine,
            renderer=renderer,
            learner=s.learner,
            clock=s.clock,
            show=s.log.samples,
            stream=stream,
        )
        return s.run(lambda step: train_step(run, step))
