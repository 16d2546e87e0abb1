"""The preference losses; this union is the registry that a config's `loss: {name: ...}` is read against."""

from __future__ import annotations

from offline.losses.dpo import DPO

PreferenceLoss = DPO
