"""One rank of a learner, started as a process by test_deepspeed.py: trains with every backend and saves the weights.

    python learner_rank.py <model> <folder> <rank> <world size>

Reads what to train on from `folder/parts.pt`; writes `folder/<case>.pt` of every case.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, distributed, nn

import rl.policy
from rl.batch import Rows
from rl.build import build_learner
from rl.config import LearnerConfig, RunConfig
from rl.learner import Learner, Part
from rl.optimizer import Optimizer
from rl.policy import Lora, Model

UPDATES = 3
# A large eps keeps AdamW from blowing rounding errors of near-zero gradients up to whole steps.
OPTIMIZER = Optimizer(learning_rate=2e-3, weight_decay=0.01, eps=1e-6, warmup_steps=2, schedule="cosine", clip_norm=0.5)
LORA = Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"))
DROPOUT = replace(LORA, dropout=0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained: `zero` None is the torch backend."""

    zero: int | None = None
    lora: Lora | None = None
    freeze: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16"] = "float32"
    stop: bool = False  # save after the first update, go on in a new learner


KINDS: dict[str, tuple[Case, tuple[int | None, ...]]] = {
    "full": (Case(), (None, 0, 1, 2, 3)),
    "full_stopped": (Case(stop=True), (None, 2, 3)),
    "frozen": (Case(freeze=("model.visual",)), (None, 3)),
    "lora": (Case(lora=LORA), (None, 3)),
    "dropout": (Case(lora=DROPOUT), (None, 0, 3)),
    "dropout_stopped": (Case(lora=DROPOUT, stop=True), (None, 0, 3)),
    "bfloat16": (Case(dtype="bfloat16"), (None, 0, 3)),
}
CASES = {f"{kind}-{zero}": replace(case, zero=zero) for kind, (case, stages) in KINDS.items() for zero in stages}


def build(model: str, case: Case) -> Learner:
    config = RunConfig(
        name="rank",
        model=Model(path=model, dtype=case.dtype, lora=case.lora, freeze=case.freeze),
        steps=UPDATES,
        learner=LearnerConfig(
            backend="torch" if case.zero is None else "deepspeed",
            zero_stage=case.zero or 0,
            tokens_per_micro_batch=60,
            optimizer=OPTIMIZER,
        ),
    )
    return build_learner(config, needs_reference=True)


def dropped(learner: Learner, rows: Rows) -> Tensor:
    """What the first dropout layer drops of `rows` on every rank, [ranks, elements]: 1 where it does."""
    layer = next(module for module in learner.backend.policy.modules() if isinstance(module, nn.Dropout) and module.p)
    masks: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: masks.append(output.flatten() == 0))
    with torch.no_grad():
        learner.backend.module(rows)
    hook.remove()
    table = torch.zeros(learner.backend.world_size, len(masks[0]))
    table[learner.backend.rank] = masks[0].float()
    return learner.backend.sum_over_ranks(table)


def train(model: str, folder: Path, name: str, parts: list[Part]) -> dict[str, Tensor]:
    """Weights after the updates, and what was scored and measured on the way."""
    case = CASES[name]
    learner = build(model, case)
    measured = {"dropped": dropped(learner, parts[0].batch.rows)} if case.lora == DROPOUT else {}
    for update in range(UPDATES):
        if case.stop and update == 1:
            learner.save(folder / f"checkpoint-{name}")
            learner.close()
            learner = build(model, case)
            learner.load(folder / f"checkpoint-{name}")
        rows = parts[0].batch.rows
        measured[f"reference {update}"] = learner.reference_logprobs(rows)
        measured[f"logprobs {update}"] = learner.logprobs(rows)
        measured[f"metrics {update}"] = torch.tensor(list(learner.update(*parts).values()))
    weights = {f"weight {name}": tensor.detach().float().cpu().clone() for name, tensor in learner.weights()}
    learner.close()
    return weights | measured


def main(model: str, folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    rl.policy.PROJECTION_CHUNK = 4  # so that ranks project different numbers of chunks
    if world_size > 1:
        store = distributed.FileStore(str(folder / "store"), world_size)
        timeout = timedelta(seconds=60)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    parts = torch.load(folder / "parts.pt", weights_only=False)
    for name in CASES:
        trained = train(model, folder, name, parts)
        if rank == 0:
            torch.save(trained, folder / f"{name}.pt")
    if world_size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
