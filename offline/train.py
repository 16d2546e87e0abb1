"""Offline preference training: `next preferences -> collate -> annotate -> update`, and the run around it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from offline.batch import checked_preferences, collate_preferences
from offline.config import PreferenceConfig
from offline.preferences import Preference
from rl.build import build_renderer
from rl.learner import AnyLearner, Metrics, Part
from rl.log import Clock
from rl.session import Summary, session
from rollout.prompts import Cursor, fingerprint
from rollout.render import Renderer


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts a step is made of."""

    config: PreferenceConfig
    preferences: Cursor[Preference]
    renderer: Renderer
    learner: AnyLearner
    clock: Clock


def train_step(run: Run) -> Metrics:
    """Preferences in, one weight update out."""
    preferences = run.preferences.next()  # [P]
    with run.clock("learn"):
        batch = collate_preferences(preferences, run.renderer, beta=run.config.loss.beta)
        batch = replace(batch, reference_logprobs=run.learner.reference_logprobs(batch.rows))
        return run.learner.update(Part(name="offline", batch=batch, loss=run.config.loss))


def train(config: PreferenceConfig, *, resume: bool = False) -> Summary:
    """The whole offline run. Neither Ray nor vLLM is imported unless the config asks for them."""
    renderer = build_renderer(config)
    preferences = checked_preferences(config.pairs, renderer, config.on_bad_rows)
    cursor = Cursor(preferences, config.per_step, config.seed)
    with session(
        config,
        renderer,
        {"preferences": cursor},
        data_fingerprint=fingerprint(preferences),
        needs_reference=True,
        resume=resume,
    ) as s:
        run = Run(config=config, preferences=cursor, renderer=renderer, learner=s.learner, clock=s.clock)
        return s.run(lambda step: train_step(run))
