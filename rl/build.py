"""From a config to its parts: renderer, engine and learner, the same here and inside a Ray actor."""

from __future__ import annotations

import torch

from rl.config import RunConfig
from rl.learner import Backend, Learner
from rl.policy import Policy
from rl.reference import reference_for
from rl.torch_backend import TorchBackend
from rollout.render import Renderer
from rollout.types import Engine


def build_renderer(config: RunConfig) -> Renderer:
    return Renderer.load(config.model.path, revision=config.model.revision, limits=config.pixels)


def on_gpu(config: RunConfig) -> bool:
    """Whether the learner has a GPU: as the cluster plans it, else whether there is one."""
    return torch.cuda.is_available() if config.cluster is None else config.cluster.gpus_per_learner > 0


def build_engine(config: RunConfig) -> Engine:
    """The engine that answers, with the weights the run starts from."""
    return config.engine.build(
        config.model.path, build_renderer(config), revision=config.model.revision, dtype=config.model.dtype
    )


def build_learner(config: RunConfig, *, needs_reference: bool) -> Learner:
    """The learner of this process; several processes form one learner through torch.distributed."""
    torch.manual_seed(config.seed)  # adapters start the same on every rank
    policy = Policy(config.model.load(), config.model, build_renderer(config).placeholder_token_ids)
    policy.to("cuda" if on_gpu(config) else "cpu")
    reference = reference_for(policy) if needs_reference else None
    backend: Backend
    if config.learner.backend == "deepspeed":
        from rl.deepspeed_backend import DeepSpeedBackend  # DeepSpeed takes seconds to import and is not always wanted

        backend = DeepSpeedBackend(policy, config.learner.optimizer, config.total_updates, config.learner.zero_stage)
    else:
        backend = TorchBackend(policy, config.learner.optimizer, config.total_updates)
    torch.manual_seed(config.seed * 1_000_003 + backend.rank)  # from here on every rank draws its own dropout
    return Learner(backend, reference, config.learner.tokens_per_micro_batch)
