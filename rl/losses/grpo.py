"""GRPO: clipped policy gradient with a per-token KL term (DeepSeekMath, arXiv 2402.03300, eq. 3 and 4).

    loss_t = -min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl * (exp(ref_t - lp_t) - (ref_t - lp_t) - 1)

with r_t = exp(lp_t - old_t). `clip_high` above `clip_low` is DAPO's clip-higher (arXiv 2503.14476). The KL estimator
is k3, added outside the minimum with the same share as the policy term. The mean over tokens is not here but in the
batch's shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat

from rl.batch import PolicyBatch
from rl.loss import Score, Sums, k3


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPO:
    """Hyper-parameters of the loss, and the loss itself. `kl` 0 needs no reference model."""

    name: Literal["grpo"] = "grpo"
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    clip_high: NonNegativeFloat = 0.2
    kl: NonNegativeFloat = 0.04

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def __call__(self, score: Score, batch: PolicyBatch) -> tuple[torch.Tensor, Sums]:
        logprobs = score(batch.rows)  # [N, L]
        shares = batch.shares.to(logprobs.device)
        advantages = batch.advantages.to(logprobs.device)[:, None]  # [N, 1]
        old = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs.to(logprobs.device)
        ratio = (logprobs - old).clamp(-20, 20).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        token_loss = -torch.minimum(ratio * advantages, clipped * advantages)
        sums = Sums.of(shares, clipped=(clipped * advantages < ratio * advantages).float())
        if batch.rollout_logprobs is not None:  # the policy's own samples
            gap = k3(batch.rollout_logprobs.to(logprobs.device), old)
            sums |= Sums.of(shares, entropy=-logprobs, mismatch_kl=gap)  # both are unbiased estimates
        else:  # somebody else's answers: how likely the better and the worse ones are
            better = (advantages > 0).float()
            sums |= Sums.of(shares, better_logprob=2 * better * logprobs, worse_logprob=2 * (1 - better) * logprobs)
        if batch.reference_logprobs is not None:
            kl = k3(logprobs, batch.reference_logprobs.to(logprobs.device))
            token_loss = token_loss + self.kl * kl
            sums |= Sums.of(shares, kl=kl.detach())
        loss = (token_loss * shares).sum()
        return loss, sums | {"loss": loss.detach()}
