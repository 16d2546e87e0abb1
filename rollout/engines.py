"""Which engine answers, as a config names it; building one imports what it needs, and not before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from rollout.render import Renderer
from rollout.types import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLM:
    """vLLM, on GPUs or on the CPU; the fields are those of `VLLMEngine`.

    >>> VLLM(max_model_len=4096, tensor_parallel_size=2)
    """

    name: Literal["vllm"] = "vllm"
    max_model_len: int | None = None  # tokens of prompt and answer together; None: as many as the model allows
    max_images: int = 1  # per prompt
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    cpu_cache_bytes: int = 1 << 30  # key-value cache where there is no GPU

    def build(self, model_path: str, renderer: Renderer, *, revision: str | None, dtype: str) -> Engine:
        """Start vLLM with the model at `model_path`; takes about a minute."""
        from rollout.vllm_engine import VLLMEngine

        return VLLMEngine(
            model_path,
            renderer,
            revision=revision,
            dtype=dtype,
            max_model_len=self.max_model_len,
            max_images=self.max_images,
            gpu_memory_utilization=self.gpu_memory_utilization,
            tensor_parallel_size=self.tensor_parallel_size,
            cpu_cache_bytes=self.cpu_cache_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HF:
    """transformers, on the first GPU or on the CPU.

    >>> HF(batch_size=16)
    """

    name: Literal["hf"] = "hf"
    batch_size: int = 64  # samples drawn at once

    def build(self, model_path: str, renderer: Renderer, *, revision: str | None, dtype: str) -> Engine:
        """Load the engine's own copy of the model at `model_path`."""
        from rollout.hf_engine import HFEngine

        device = "cuda" if torch.cuda.is_available() else "cpu"
        return HFEngine.load(
            model_path, renderer, revision=revision, dtype=dtype, device=device, batch_size=self.batch_size
        )


EngineConfig = Annotated[VLLM | HF, Field(discriminator="name")]
