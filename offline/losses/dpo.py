"""DPO: raise the chosen answer above the rejected one, relative to a frozen reference (arXiv 2305.18290, eq. 7).

    loss = -log sigmoid(z),   z = beta * [(logp_w - ref_w) - (logp_l - ref_l)]

Against GRPO on the same two answers it saturates: a pair that is well apart stops pushing. Log-probs are sums over the
answer's tokens, end-of-sequence included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn.functional import logsigmoid

from offline.batch import PreferenceBatch
from rl.loss import Score, Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class DPO:
    """`beta` is how far the policy may move for a preference: larger stays closer to the reference."""

    name: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1

    @property
    def needs_reference(self) -> bool:
        return True

    def __call__(self, score: Score, batch: PreferenceBatch) -> tuple[Tensor, Sums]:
        assert batch.reference_logprobs is not None, "DPO compares with a reference: annotate the batch first"
        logprobs = score(batch.rows)  # [N, L]
        device = logprobs.device
        shares, beta = batch.shares.to(device), batch.beta.to(device)
        delta = (logprobs - batch.reference_logprobs.to(device)).sum(-1)  # [N]
        chosen, rejected = delta[batch.chosen.to(device)], delta[batch.rejected["answer"].to(device)]  # [P]
        margin = beta * (chosen - rejected)
        sums = Sums.of(
            shares,
            margin=margin,
            accuracy=(margin > 0).float(),
            chosen_reward=beta * chosen,
            rejected_reward=beta * rejected,
        )
        loss = (-logsigmoid(margin) * shares).sum()
        return loss, sums | {"loss": loss.detach()}
