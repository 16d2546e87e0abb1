"""What the offline jobs are told: YAML -> frozen, complete objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from offline.negatives import PGD
from rl.policy import Model
from rollout.images import PixelLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class MineConfig:
    """Mine hard-negative pairs: prompts with right answers in, `<output_dir>/<name>/data.jsonl` out."""

    job: Literal["mine"] = "mine"
    name: str
    model: Model
    source: Path  # prompts (JSONL, see docs/data.md)
    output_dir: Path = Path("runs")
    prepare: str | None = None  # a module run once before anything is loaded (`python -m ...`): it makes missing data
    seed: int = 0
    pixels: PixelLimits = field(default_factory=PixelLimits)
    on_bad_rows: Literal["refuse", "skip"] = "refuse"
    attack: PGD = field(default_factory=PGD)
    min_information_gain: float = 0.0  # nats per answer token that the picture must be worth
    without_image: Literal["no_image", "black"] = "no_image"  # what the picture is compared with
    batch_size: PositiveInt = 8  # prompts attacked in one forward: bounds its memory
    max_tokens: PositiveInt = 64  # of a rejected answer
    max_pairs: PositiveInt | None = None  # None: as many as the prompts give

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name
