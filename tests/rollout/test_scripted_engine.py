"""The scripted engine says what it was told to."""

from __future__ import annotations

import pytest
import torch

from rollout.render import Renderer
from rollout.scripted_engine import ScriptedEngine
from rollout.types import Prompt, Sampling


def test_the_script_is_answered_in_order(renderer: Renderer, prompts: list[Prompt]) -> None:
    engine = ScriptedEngine({"picture-0": ["red", "", "blue"], "text": ["no", "yes"]}, renderer)
    sent = iter([("weight", torch.zeros(1))])
    engine.load_weights(sent, version=2)
    assert next(sent, None) is None
    with engine.asleep():
        pass
    first, second = engine.generate([prompts[0], prompts[5]], Sampling(num_samples=2))
    assert [sample.text for sample in first.samples] == ["red", ""]
    assert [sample.text for sample in second.samples] == ["no", "yes"]
    assert first.prompt_ids == renderer.render(prompts[0]).token_ids
    assert first.samples[1].token_ids == (renderer.end_token_id,)
    assert {(s.logprobs, s.finish_reason, s.policy_version) for s in first.samples} == {(None, "stop", 2)}
    engine.close()
    engine.close()


def test_a_script_that_is_too_short_is_refused(renderer: Renderer, prompts: list[Prompt]) -> None:
    engine = ScriptedEngine({"picture-0": ["red"]}, renderer)
    with pytest.raises(ValueError, match="the script has 1 answers for prompt 'picture-0'; expected 2; add them"):
        engine.generate(prompts[:1], Sampling(num_samples=2))
    with pytest.raises(ValueError, match="the script has 0 answers for prompt 'picture-1'"):
        engine.generate(prompts[1:2], Sampling())
