"""The optimizer and its schedule, the same for every backend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeInt, PositiveFloat
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW (arXiv 1711.05101) with linear warm-up, then a constant, linear or cosine schedule down to zero."""

    learning_rate: PositiveFloat = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: PositiveFloat = 1.0
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def build(self, parameters: Sequence[torch.Tensor], total_steps: int) -> tuple[AdamW, LambdaLR]:
        """The optimizer over `parameters`, and the schedule that is stepped after it."""
        adamw = AdamW(parameters, lr=self.learning_rate, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)
        return adamw, LambdaLR(adamw, lambda step: self.factor(step, total_steps))

    def factor(self, step: int, total_steps: int) -> float:
        """What the learning rate is multiplied by at `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        if self.schedule == "linear":
            return 1 - progress
        return 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0
