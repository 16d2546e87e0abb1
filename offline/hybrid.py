"""MBPO: offline pairs and online groups in one optimizer step (arXiv 2506.08022).

An offline pair is a group of two with rewards (2, 0): 2 is the most an online answer can earn (right, and in the asked
form). Each stream is a mean of its own, one vote per group, and the objective is

    L = mean over online groups + weight * mean over offline pairs

`loss: grpo` normalises the pair to advantages (+1, -1), a contrast that never saturates: the KL term holds it.
`loss: dpo` puts the saturating contrast in its place. Old log-probs of offline answers are always the learner's own on
the clean picture, never the miner's: those were conditioned on the perturbed one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from offline.batch import PreferenceBatch, checked_preferences, collate_preferences, preference_rows
from offline.config import MBPOConfig
from offline.losses.dpo import DPO
from offline.preferences import Preference
from rl.advantages import Normalized
from rl.batch import PolicyBatch
from rl.build import build_renderer
from rl.learner import AnyLearner, Part
from rl.session import Summary
from rl.shares import token_shares
from rl.train import train as train_online
from rollout.prompts import Cursor, fingerprint
from rollout.render import Renderer

PAIR_REWARDS = (2.0, 0.0)


class OfflineStream:
    """Pairs for every online step."""

    def __init__(self, config: MBPOConfig, renderer: Renderer) -> None:
        self.config = config.offline
        self.updates_per_batch = config.updates_per_batch
        self.renderer = renderer
        pairs = checked_preferences(self.config.pairs, renderer, self.config.on_bad_rows)
        self.fingerprint = fingerprint(pairs)
        self.cursor = Cursor(pairs, self.config.per_step, config.seed)

    @property
    def needs_reference(self) -> bool:
        return self.config.loss.needs_reference

    def parts(self, learner: AnyLearner) -> list[Part]:
        pairs, loss = self.cursor.next(), self.config.loss
        batch: PolicyBatch | PreferenceBatch
        if isinstance(loss, DPO):
            batch = collate_preferences(pairs, self.renderer, beta=loss.beta, weight=self.config.weight)
        else:
            batch = collate_pairs(pairs, self.renderer, self.config.weight)
            if self.updates_per_batch > 1:
                batch = replace(batch, old_logprobs=learner.logprobs(batch.rows))
        if loss.needs_reference:
            batch = replace(batch, reference_logprobs=learner.reference_logprobs(batch.rows))
        return [Part(name="offline", batch=batch, loss=loss)]


def collate_pairs(pairs: Sequence[Preference], renderer: Renderer, weight: float) -> PolicyBatch:
    """Pairs as two-member groups of rewards (2, 0), one vote per pair, their votes summing to `weight`."""
    rows = preference_rows(pairs, renderer)
    advantage = Normalized()(torch.tensor(PAIR_REWARDS))  # [2]
    return PolicyBatch(
        rows=rows,
        advantages=advantage.repeat(len(pairs)),
        shares=token_shares(rows.lengths, rows.row_of, "groups", weight),
    )


def train(config: MBPOConfig, *, resume: bool = False) -> Summary:
    """The online run with the offline stream beside it."""
    return train_online(config, resume=resume, stream=OfflineStream(config, build_renderer(config)))
