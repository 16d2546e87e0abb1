"""DeepSpeed ZeRO, stages 0 to 3: what is spread over the ranks; the only file that imports deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import HashStore

from rl import ranks
from rl.batch import Rows
from rl.optimizer import Optimizer
from rl.policy import Policy

# DeepSpeed logs from its first import on, and calls what torch is about to rename; only errors are worth a line.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)

import deepspeed  # noqa: E402

TAG = "deepspeed"  # the folder inside a checkpoint
PERSISTENT_NUMEL = 10_000  # ZeRO-3 keeps weights up to this size whole: gathering them costs more than they take


class DeepSpeedBackend:
    """The same AdamW steps as `TorchBackend`, with optimizer (1), gradients (2) and weights (3) cut over the ranks.

    Joins the process group there is, or opens one of a single rank. bfloat16 weights are trained through float32
    masters. The policy is moved into the engine: use it through `module` from then on.
    """

    def __init__(self, policy: Policy, optimizer: Optimizer, total_steps: int, zero_stage: int) -> None:
        self.policy = policy
        self.clip_norm = optimizer.clip_norm
        # In bfloat16, DeepSpeed's stage 0 takes an AdamW step on zeros at the start; stage 1 computes the same without.
        self.zero_stage = max(zero_stage, int(policy.model.dtype == torch.bfloat16))
        self.owns_group = not distributed.is_initialized()
        if self.owns_group:
            ranks.join(HashStore(), rank=0, world_size=1, timeout_s=60)
        self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
        # DeepSpeed asks the environment for its device in every step; without a launcher a process has one device.
        self.owns_local_rank = "LOCAL_RANK" not in os.environ
        os.environ.setdefault("LOCAL_RANK", "0")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled C++ for what gloo does
        self.trainable = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        adamw, self.schedule = optimizer.build(self.trainable, total_steps)
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=adamw,
            lr_scheduler=self.schedule,
            config=configuration(policy.model.dtype, optimizer.clip_norm, self.zero_stage),
        )
        self.module: nn.Module = self.engine
        if self.zero_stage > 0 and self.world_size > 1:
            policy.register_forward_pre_hook(lambda _, arguments: (self.with_picture(arguments[0]),))
        if self.zero_stage == 3:
            hold_whole(policy, policy.model.get_output_embeddings())

    @property
    def learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def step(self) -> float:
        if self.zero_stage > 0:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, self.clip_norm)
        self.engine.step()
        return float(norm)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if self.world_size > 1:
            distributed.all_reduce(values)
        return values

    @torch.no_grad()
    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.zero_stage < 3:
            yield from self.policy.plain_weights()
            return
        for name, tensor in self.policy.model.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters(self.policy.needed_for(name, tensor)):
                yield from self.policy.plain_weight(name, tensor)

    def save(self, path: Path) -> None:
        self.engine.save_checkpoint(str(path), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
        ranks.save_random_state(path, self.rank)
        distributed.barrier()

    def load(self, path: Path) -> None:
        """DeepSpeed unpickles its own files: resume from checkpoints of your own only."""
        if not (path / TAG).is_dir():
            raise ValueError(f"{path} is no checkpoint of DeepSpeed; resume with the backend that wrote it")
        ranks.check_same_number(path, self.world_size)
        self.engine.load_checkpoint(str(path), tag=TAG, load_module_strict=False)
        ranks.load_random_state(path, self.rank)

    def close(self) -> None:
        """Let go of the engine, and of the process group and environment where they are this object's own."""
        self.engine.destroy()
        if self.owns_local_rank:
            os.environ.pop("LOCAL_RANK", None)
        if self.owns_group and distributed.is_initialized():
            deepspeed.comm.destroy_process_group()

    def with_picture(self, rows: Rows) -> Rows:
        """ZeRO's ranks must run the same modules: where one rank sees a picture, every rank sees one.

        A rank whose rows are text only borrows a context with a picture from another rank. It carries no answer, so
        it adds nothing but a zero gradient. The cost is one number over the network per forward.
        """
        sees = torch.zeros(self.world_size, dtype=torch.int64)
        sees[self.rank] = any(rows.vision)
        self.sum_over_ranks(sees)
        if sees.all() or not sees.any():
            return rows
        lender = int(sees.argmax())
        shared = [picture_of(rows) if self.rank == lender else None]
        distributed.broadcast_object_list(shared, src=lender)
        picture = shared[0]
        if any(rows.vision) or picture is None:
            return rows
        return replace(
            rows,
            context_ids=rows.context_ids + picture.context_ids,
            vision=rows.vision + picture.vision,
            branch_ids=rows.branch_ids + picture.branch_ids,
        )


def configuration(dtype: torch.dtype, clip_norm: float, zero_stage: int) -> dict[str, object]:
    """What DeepSpeed is told; the learner cuts micro-batches itself, so DeepSpeed divides by nothing but the ranks."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm if zero_stage > 0 else 0.0,  # stage 0 does not report the norm: see `step`
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": PERSISTENT_NUMEL},
    }


def hold_whole(policy: Policy, head: nn.Module) -> None:
    """Keep the vocabulary projection gathered from the start of a ZeRO-3 forward to the end of its backward.

    The policy calls it once per chunk of scored tokens. Ranks with fewer chunks would gather it less often and wait
    for each other forever, so it is gathered with the policy and its own gathering is switched off.
    """
    for module in head.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    for parameter in head.parameters():
        deepspeed.zero.register_external_parameter(policy, parameter)


def picture_of(rows: Rows) -> Rows:
    """The shortest context of `rows` that shows a picture, without answers."""
    shown = [row for row, vision in enumerate(rows.vision) if vision]
    return replace(rows.select([min(shown, key=lambda row: len(rows.context_ids[row]))]), branch_ids=((),))
