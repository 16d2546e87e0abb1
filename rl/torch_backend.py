"""Plain torch: one process, or several over gloo or NCCL that hold the whole model each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from rl import ranks
from rl.optimizer import Optimizer
from rl.policy import Policy


class TorchBackend:
    """AdamW on float32 master weights; gradients are averaged over ranks just before the step."""

    def __init__(self, policy: Policy, optimizer: Optimizer, total_steps: int) -> None:
        self.policy = policy
        self.module: nn.Module = policy
        self.clip_norm = optimizer.clip_norm
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.trainable = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        # AdamW's steps are far below bfloat16's resolution: half-precision weights are trained through float32 copies.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trainable.values()]
        self.optimizer, self.schedule = optimizer.build(self.masters, total_steps)

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        for parameter, master in self.half_precision():  # micro-batches add up in float32 too
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def step(self) -> float:
        for master in self.masters:
            gradient = torch.zeros_like(master) if master.grad is None else master.grad
            master.grad = self.sum_over_ranks(gradient) / self.world_size
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.round_masters()
        return float(norm)

    def half_precision(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that is a rounded copy of its master, with that master."""
        pairs = zip(self.trainable.values(), self.masters, strict=True)
        return [(parameter, master) for parameter, master in pairs if parameter is not master]

    @torch.no_grad()
    def round_masters(self) -> None:
        for parameter, master in self.half_precision():
            parameter.copy_(master)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.policy.plain_weights()

    def save(self, path: Path) -> None:
        if self.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            masters = zip(self.trainable, self.masters, strict=True)
            save_file({name: master.detach().contiguous() for name, master in masters}, path / "trainable.safetensors")
            state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            torch.save(state, path / "optimizer.pt")
        self.wait_for_ranks()
        ranks.save_random_state(path, self.rank)
        self.wait_for_ranks()

    def load(self, path: Path) -> None:
        if not (path / "trainable.safetensors").is_file():
            raise ValueError(f"{path} is no checkpoint of the torch backend; resume with the backend that wrote it")
        ranks.check_same_number(path, self.world_size)
        saved = load_file(path / "trainable.safetensors")
        with torch.no_grad():
            for name, master in zip(self.trainable, self.masters, strict=True):
                master.copy_(saved[name])
        self.round_masters()
        state = torch.load(path / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        ranks.load_random_state(path, self.rank)

    def wait_for_ranks(self) -> None:
        if self.world_size > 1:
            distributed.barrier()

    def close(self) -> None:
        """Nothing to free: the process group, if any, belongs to whoever opened it."""
