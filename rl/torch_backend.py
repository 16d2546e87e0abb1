"""Plain torch: one process, or several over gloo or NCCL that hold the whole model each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn

from rl.optimizer import Optimizer
from rl.policy import Policy


class TorchBackend:
    """AdamW on float32 master weights; gradients are averaged over ranks just before the step."""

    def __init__(self, policy: Policy, optimizer: Optimizer, total_steps: int) -> None:
        self.policy = policy
        self.module: nn.Module = policy
        self.config = optimizer
        self.rank = distributed.get_rank() if distributed.is_initialized() else 0
        self.world_size = distributed.get_world_size() if distributed.is_initialized() else 1
        self.trainable = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
        # AdamW's steps are far below bfloat16's resolution: half-precision weights are trained through float32 copies.
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.trainable.values()]
        self.optimizer = torch.optim.AdamW(
            self.masters,
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: optimizer.factor(s, total_steps))

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self) -> float:
        for parameter, master in zip(self.trainable.values(), self.masters, strict=True):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            master.grad = self.sum_over_ranks(gradient.float()) / self.world_size
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.config.clip_norm)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for parameter, master in zip(self.trainable.values(), self.masters, strict=True):
                parameter.grad = master.grad = None
                if parameter is not master:
                    parameter.copy_(master)
        return float(norm)

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
        torch.save({"cpu": torch.get_rng_state()}, path / f"rng_{self.rank}.pt")
        self.wait_for_ranks()

    def load(self, path: Path) -> None:
        saved = load_file(path / "trainable.safetensors")
        with torch.no_grad():
            for (name, parameter), master in zip(self.trainable.items(), self.masters, strict=True):
                master.copy_(saved[name])
                parameter.copy_(master)
        state = torch.load(path / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(torch.load(path / f"rng_{self.rank}.pt", weights_only=True)["cpu"])

    def wait_for_ranks(self) -> None:
        if self.world_size > 1:
            distributed.barrier()
