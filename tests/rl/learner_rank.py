"""One rank of a learner, started as a process by test_deepspeed.py: trains with every backend and saves the weights.

    python learner_rank.py <folder> <rank> <world size>

Reads the model `folder/model`, what to train on from `folder/parts.pt`; writes `folder/<case>.pt` of every case.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed

import rl.policy
from rl.deepspeed_backend import DeepSpeedBackend
from rl.learner import Backend, Learner, Part
from rl.optimizer import Optimizer
from rl.policy import Lora, Model, Policy
from rl.reference import reference_for
from rl.torch_backend import TorchBackend

UPDATES = 3
OPTIMIZER = Optimizer(learning_rate=2e-3, weight_decay=0.01, warmup_steps=2, schedule="cosine", clip_norm=0.5)
LORA = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained: `zero` None is the torch backend."""

    zero: int | None
    lora: Lora | None = None
    freeze: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    stop: bool = False  # save after the first update, go on in a new learner

    @property
    def backend(self) -> str:
        return "torch" if self.zero is None else f"zero{self.zero}"


CASES = {
    f"{kind}-{case.backend}": case
    for zero in (None, 0, 1, 2, 3)
    for kind, case in {
        "full": Case(zero=zero),
        "frozen": Case(zero=zero, freeze=("model.visual",)),
        "lora": Case(zero=zero, lora=LORA),
        "dropout": Case(zero=zero, lora=replace(LORA, dropout=0.2)),
        "dropout_stopped": Case(zero=zero, lora=replace(LORA, dropout=0.2), stop=True),
        "full_stopped": Case(zero=zero, stop=True),
        "bfloat16": Case(zero=zero, dtype="bfloat16"),
    }.items()
}


def build(folder: Path, case: Case) -> Learner:
    torch.manual_seed(0)
    config = Model(path=str(folder / "model"), dtype=case.dtype, lora=case.lora, freeze=case.freeze)
    policy = Policy(config.load(), config, banned_token_ids=(5, 6))
    reference = reference_for(policy)
    backend: Backend
    if case.zero is None:
        backend = TorchBackend(policy, OPTIMIZER, UPDATES)
    else:
        backend = DeepSpeedBackend(policy, OPTIMIZER, UPDATES, case.zero)
    return Learner(backend, reference, tokens_per_micro_batch=60)


def train(folder: Path, name: str, parts: list[Part]) -> dict[str, Tensor]:
    """Weights after the updates, and as further rows what was scored and measured on the way."""
    case = CASES[name]
    learner = build(folder, case)
    measured = []
    for update in range(UPDATES):
        if case.stop and update == 1:
            learner.save(folder / f"checkpoint-{name}")
            learner.close()
            learner = build(folder, case)
            learner.load(folder / f"checkpoint-{name}")
        rows = parts[0].batch.rows
        scored = learner.reference_logprobs(rows)
        measured += [scored, learner.logprobs(rows), torch.tensor(list(learner.update(*parts).values()))]
    weights = {key: tensor.float().cpu().clone() for key, tensor in learner.weights()}
    learner.close()
    return weights | {f"measured {number}": values for number, values in enumerate(measured)}


def main(folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rl.policy.PROJECTION_CHUNK = 4  # so that ranks project different numbers of chunks
    if world_size > 1:
        store = distributed.FileStore(str(folder / "store"), world_size)
        timeout = timedelta(seconds=60)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    parts = torch.load(folder / "parts.pt", weights_only=False)
    for name in CASES:
        trained = train(folder, name, parts)
        if rank == 0:
            torch.save(trained, folder / f"{name}.pt")
    if world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
