"""The losses of online RL; this union is the registry that a config's `loss: {name: ...}` is read against."""

from __future__ import annotations

from rl.losses.grpo import GRPO

PolicyLoss = GRPO
