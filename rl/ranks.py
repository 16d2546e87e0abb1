"""The ranks of one learner: the group through which they talk, and the random state each of them keeps."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed


def join(store: distributed.Store, rank: int, world_size: int, timeout_s: float) -> None:
    """Form a group with the other ranks at `store`: over gloo what lies in main memory, over NCCL what lies on GPUs."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def save_random_state(folder: Path, rank: int) -> None:
    """Keep this rank's generators in a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, folder / f"rng_{rank}.pt")


def check_same_number(folder: Path, world_size: int) -> None:
    """Raises ValueError if the checkpoint in `folder` was written by another number of ranks."""
    writers = len(list(folder.glob("rng_*.pt")))
    if writers != world_size:
        raise ValueError(
            f"{folder} was written by {writers} learner ranks, and this run has {world_size}; resume with as many"
        )


def load_random_state(folder: Path, rank: int) -> None:
    """The inverse of `save_random_state`."""
    state: dict[str, Tensor] = torch.load(folder / f"rng_{rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
