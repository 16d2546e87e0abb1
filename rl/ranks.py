"""The process group through which the ranks of one learner talk."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed
from torch._C._distributed_c10d import Store


def join(store: Store, rank: int, world_size: int, timeout_s: float) -> None:
    """Form a group with the other ranks at `store`: over gloo what lies in main memory, over NCCL what lies on GPUs."""
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
