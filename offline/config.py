"""What the offline jobs are told: YAML -> frozen, complete objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from offline.losses import PreferenceLoss
from offline.losses.dpo import DPO
from offline.negatives import PGD
from rl.config import Cluster, RLConfig, RunConfig
from rl.losses.grpo import GRPO
from rl.policy import Model
from rl.shares import MeanOver
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


PairLoss = Annotated[GRPO | DPO, Field(discriminator="name")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """MBPO's offline stream: which pairs, how many per step, and how they weigh against the online groups."""

    pairs: Path
    per_step: PositiveInt = 32
    weight: float = 1.0  # of the mean over pairs, where the mean over online groups weighs 1
    loss: PairLoss = field(default_factory=GRPO)
    on_bad_rows: Literal["refuse", "skip"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class MBPOConfig(RLConfig):
    """Online RL with offline pairs in the same optimizer step (arXiv 2506.08022)."""

    job: Literal["mbpo"] = "mbpo"  # type: ignore[assignment]
    offline: Pairs
    mean_over: MeanOver = "groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceConfig(RunConfig):
    """Offline training on preference pairs; needs neither Ray nor vLLM."""

    job: Literal["preference"] = "preference"
    pairs: Path
    per_step: PositiveInt = 32
    loss: PreferenceLoss = field(default_factory=DPO)
    on_bad_rows: Literal["refuse", "skip"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Trainings from one base model, side by side. Its seed and cluster take the place of those of its runs."""

    job: Literal["compare"] = "compare"
    name: str
    output_dir: Path = Path("runs")
    seed: int = 0
    prepare: str | None = None
    mine: Path | None = None  # a mine config that is run first (or resumed, or found complete)
    runs: dict[str, Path]
    cluster: Cluster | None = None  # for the online runs
