"""A config names an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from rollout.engines import HF, VLLM, EngineConfig
from rollout.render import Renderer
from rollout.types import Prompt, Sampling

CONFIG: TypeAdapter[EngineConfig] = TypeAdapter(EngineConfig)


def test_the_name_chooses_the_engine() -> None:
    assert CONFIG.validate_python({"name": "hf", "batch_size": 3}) == HF(batch_size=3)
    assert CONFIG.validate_python({"name": "vllm", "max_model_len": 512}) == VLLM(max_model_len=512)
    with pytest.raises(
        ValidationError, match=r"'sglang' found using 'name' does not match any of the expected tags: 'vllm', 'hf'"
    ):
        CONFIG.validate_python({"name": "sglang"})


def test_a_config_builds_its_engine(tiny_model: Path, renderer: Renderer, prompts: list[Prompt]) -> None:
    engine = HF(batch_size=2).build(str(tiny_model), renderer, revision=None, dtype="float32")
    (group,) = engine.generate(prompts[:1], Sampling(num_samples=3, max_tokens=2))
    assert len(group.samples) == 3
    with engine.asleep():
        pass
    engine.close()
