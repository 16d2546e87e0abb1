"""A run's configuration: YAML and `key=value` overrides -> one frozen, complete object. Unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from rewards.parts import RewardPart
from rewards.shape import Format
from rewards.verifiers import Verify
from rl.advantages import Advantage, Normalized
from rl.losses import PolicyLoss
from rl.losses.grpo import GRPO
from rl.optimizer import Optimizer
from rl.policy import Model
from rl.selection import Rules
from rl.shares import MeanOver
from rollout.engines import HF, VLLM, EngineConfig
from rollout.images import PixelLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Close-ended prompts (JSONL, see docs/data.md) and how many make a step."""

    path: Path
    per_step: PositiveInt = 64
    on_bad_rows: Literal["refuse", "skip"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """How the policy is sampled for training: the log-probs of exactly this distribution are trained on."""

    num_samples: PositiveInt = 8
    temperature: float = 1.0
    max_tokens: PositiveInt = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerConfig:
    """How gradient steps are taken. `tokens_per_micro_batch` bounds the memory of one forward."""

    backend: Literal["torch", "deepspeed"] = "torch"
    zero_stage: Literal[0, 1, 2, 3] = (
        0  # DeepSpeed only: what is spread over ranks (nothing, optimizer, + gradients, + weights)
    )
    tokens_per_micro_batch: PositiveInt = 8192
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the parts live. `address` None starts a Ray of this run's own; "auto" joins the one that is running."""

    address: str | None = None
    num_engines: PositiveInt = 1
    cpus_per_engine: PositiveInt = 1
    gpus_per_engine: NonNegativeInt = 0
    num_learners: PositiveInt = 1  # ranks of the one learner
    cpus_per_learner: PositiveInt = 1
    gpus_per_learner: NonNegativeInt = 0
    start_timeout_s: PositiveInt = 600
    call_timeout_s: PositiveInt = 1800


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out prompt files by name, answered greedily: before training, every `every` steps, and at the end."""

    suites: dict[str, Path] = field(default_factory=dict)
    every: NonNegativeInt = 0  # 0: only before and after
    max_tokens: PositiveInt = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """A checkpoint every `every` steps and at the end; the newest `keep` stay."""

    every: NonNegativeInt = 0  # 0: only at the end
    keep: PositiveInt = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """What every training run has, online or offline."""

    name: str
    model: Model
    output_dir: Path = Path("runs")
    seed: int = 0
    steps: PositiveInt = 100
    prepare: str | None = None  # a module run once before anything is loaded (`python -m ...`): it makes missing data
    pixels: PixelLimits = field(default_factory=PixelLimits)
    engine: EngineConfig = field(default_factory=HF)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    cluster: Cluster | None = None  # None: everything in this process

    @property
    def folder(self) -> Path:
        return self.output_dir / self.name

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the whole run: what a learning-rate schedule runs over."""
        return self.steps

    def __post_init__(self) -> None:
        if self.cluster is not None and isinstance(self.engine, VLLM):
            size, gpus = self.engine.tensor_parallel_size, self.cluster.gpus_per_engine
            if size > max(1, gpus):
                raise ValueError(f"engine.tensor_parallel_size is {size}, but cluster.gpus_per_engine is {gpus}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RLConfig(RunConfig):
    """Online RL from verified rewards."""

    job: Literal["rl"] = "rl"
    prompts: Prompts
    sampling: Answers = field(default_factory=Answers)
    rewards: dict[str, RewardPart] = field(default_factory=lambda: {"correct": Verify(), "format": Format()})
    advantage: Advantage = field(default_factory=Normalized)
    selection: Rules = field(default_factory=Rules)
    loss: PolicyLoss = field(default_factory=GRPO)
    mean_over: MeanOver = "sequences"
    updates_per_batch: PositiveInt = 1

    @property
    def total_updates(self) -> int:
        return self.steps * self.updates_per_batch

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        if self.sampling.temperature <= 0:
            raise ValueError(f"sampling.temperature is {self.sampling.temperature}; training needs samples: > 0")
        if self.sampling.num_samples < 2:
            raise ValueError("sampling.num_samples is 1; a group needs at least 2 answers to compare")


C = TypeVar("C")


def load(path: Path, overrides: Sequence[str], kinds: Mapping[str, type[C]]) -> C:
    """Read a YAML file, apply `a.b=value` overrides, and build the dataclass that its `job:` key names.

    Raises ValueError with every problem of the file in one message; an unknown key names the nearest known one.
    """
    values = read_yaml(path)
    for override in overrides:
        assign(values, override)
    job = str(values.get("job"))
    if job not in kinds:
        raise ValueError(f"{path}: `job:` is {job!r}; it must be one of {', '.join(sorted(kinds))}")
    kind = kinds[job]
    try:
        return TypeAdapter(kind).validate_python(values, extra="forbid")
    except ValidationError as error:
        raise ValueError(f"{path}:\n" + "\n".join(f"  {explain(e, kind, values)}" for e in error.errors())) from None


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(p) for p in Path("configs").rglob("*.yaml")], n=3)
        raise ValueError(f"{path}: no such config file" + (f"; is it one of {near}?" if near else "")) from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a config is a mapping of keys to values, this file holds {type(values).__name__}")
    return values


def assign(values: dict[str, Any], override: str) -> None:
    """Set `a.b.c=value` in nested mappings; the value is read as YAML, so `null`, `1e-6` and `[a, b]` work."""
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"override {override!r}: expected key=value, such as seed=1 or learner.zero_stage=2")
    *parents, leaf = key.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            raise ValueError(f"override {override!r}: {name!r} holds {child!r}, which has no keys inside")
        values = child
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML: {error}") from None
    values[leaf] = number(value) if isinstance(value, str) else value


def number(text: str) -> str | float:
    """YAML reads 1e-6 as text; people mean the number."""
    try:
        return float(text)
    except ValueError:  # any other text stays text
        return text


def explain(error: Any, kind: type[Any], values: Any) -> str:
    """One pydantic error as: where, what was given, what was expected."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        known = siblings(kind, error["loc"][:-1])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing; this key is required"
    return f"{where}: given {error['input']!r}: {error['msg']}"


def siblings(kind: Any, location: Sequence[Any]) -> list[str]:
    """The keys that are known at `location` inside `kind`: follow the JSON schema, through unions and references."""
    schema = TypeAdapter(kind).json_schema()
    nodes = expanded(schema, schema)
    for part in location:
        inside = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
        inside += [node["additionalProperties"] for node in nodes if node.get("additionalProperties")]  # dict[str, X]
        chosen = [node for node in nodes if node.get("properties", {}).get("name", {}).get("const") == part]
        nodes = chosen or [leaf for node in inside for leaf in expanded(node, schema)]  # a union is followed by name
    return sorted({key for node in nodes for key in node.get("properties", {})})


def expanded(node: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema node with its references and alternatives followed."""
    if "$ref" in node:
        return expanded(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
    alternatives = node.get("anyOf", []) + node.get("oneOf", [])
    return [leaf for child in alternatives for leaf in expanded(child, schema)] or [node]


def plain(value: Any, kind: Any = None) -> Any:
    """A dataclass as JSON types."""
    return TypeAdapter(kind or type(value)).dump_python(value, mode="json")


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], ignore: Collection[str] = (), prefix: str = ""
) -> list[str]:
    """What changed between two plain configs, one line per key; `ignore` holds dotted keys."""
    lines = []
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if prefix + key in ignore or old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, ignore, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: was {old!r}, is {new!r}")
    return lines
