"""The transformers engine samples from the distribution it reports, reproducibly, without placeholders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

from examples.colored_digits.model import build
from rollout.hf_engine import HFEngine, saved_weights
from rollout.render import Renderer
from rollout.types import Group, Prompt, Sampling

Measured = Callable[[str, float], None]
LogitsUnder = Callable[[Qwen, Group, Sequence[int]], Tensor]


@pytest.fixture
def engine(tiny_model: Path, renderer: Renderer) -> HFEngine:
    return HFEngine.load(tiny_model, renderer)


@pytest.fixture
def model(tiny_model: Path) -> Qwen:
    return Qwen.from_pretrained(tiny_model)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 5.0])
def test_logprobs_are_those_of_a_forward_over_the_same_tokens(
    engine: HFEngine,
    model: Qwen,
    renderer: Renderer,
    prompts: list[Prompt],
    temperature: float,
    logits_under: LogitsUnder,
    measured: Measured,
) -> None:
    sampling = Sampling(num_samples=3, temperature=temperature, max_tokens=12, seed=5)
    gap = 0.0
    for group in engine.generate(prompts, sampling):
        assert group.prompt_ids == renderer.render(group.prompt).token_ids
        for sample in group.samples:
            logits = logits_under(model, group, sample.token_ids)
            expected = (logits / (temperature or 1.0)).log_softmax(-1)
            chosen = expected.gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)
            gap = max(gap, (torch.tensor(sample.logprobs) - chosen).abs().max().item())
            if temperature == 0:
                assert sample.token_ids == tuple(logits.argmax(-1).tolist())
    measured(f"HF engine against transformers: log-probs at temperature {temperature}", gap)
    assert gap < 1e-5


def test_top_p_draws_from_the_head_and_reports_its_distribution(
    engine: HFEngine, model: Qwen, prompts: list[Prompt], logits_under: LogitsUnder
) -> None:
    (group,) = engine.generate(prompts[:1], Sampling(num_samples=64, max_tokens=1, top_p=0.3))
    ordered, token_ids = logits_under(model, group, (0,))[0].softmax(-1).sort(descending=True)
    head = int((ordered.cumsum(0) < 0.3).sum()) + 1  # the smallest set of at least that probability
    expected = dict(zip(token_ids[:head].tolist(), (ordered[:head] / ordered[:head].sum()).log().tolist(), strict=True))
    assert len(expected) < 200
    for sample in group.samples:
        assert sample.logprobs is not None
        assert sample.logprobs[0] == pytest.approx(expected[sample.token_ids[0]], abs=1e-5)


def test_frequencies_follow_the_reported_probabilities(engine: HFEngine, prompts: list[Prompt]) -> None:
    # At this temperature a few tokens carry most of the probability, so that 1500 draws can tell.
    (group,) = engine.generate(prompts[:1], Sampling(num_samples=1500, max_tokens=1, temperature=0.05))
    counts = Counter(sample.token_ids[0] for sample in group.samples)
    probabilities = {
        sample.token_ids[0]: torch.tensor(sample.logprobs[0]).exp().item()
        for sample in group.samples
        if sample.logprobs is not None
    }
    common = [token_id for token_id, probability in probabilities.items() if probability * 1500 >= 50]
    assert common
    for token_id in common:
        expected = probabilities[token_id] * 1500
        assert abs(counts[token_id] - expected) < 5 * expected**0.5


def test_placeholders_are_never_drawn(model: Qwen, renderer: Renderer, prompts: list[Prompt]) -> None:
    banned = sorted(renderer.placeholder_token_ids)
    with torch.no_grad():
        model.lm_head.weight[banned[::2]] = 5000 * model.lm_head.weight[renderer.end_token_id + 10]
        model.lm_head.weight[banned[1::2]] = -5000 * model.lm_head.weight[renderer.end_token_id + 10]
    groups = HFEngine(model, renderer).generate(prompts, Sampling(num_samples=32, max_tokens=16, temperature=5.0))
    drawn = {token_id for group in groups for sample in group.samples for token_id in sample.token_ids}
    assert len(drawn) > 100
    assert drawn.isdisjoint(banned)


def test_a_seed_gives_the_same_samples_in_any_batch_size(
    tiny_model: Path, renderer: Renderer, prompts: list[Prompt]
) -> None:
    def token_ids(batch_size: int, seed: int) -> list[tuple[int, ...]]:
        engine = HFEngine.load(tiny_model, renderer, batch_size=batch_size)
        groups = engine.generate(prompts, Sampling(num_samples=3, max_tokens=8, seed=seed))
        return [sample.token_ids for group in groups for sample in group.samples]

    first = token_ids(batch_size=64, seed=1)
    assert token_ids(batch_size=64, seed=1) == first
    assert token_ids(batch_size=5, seed=1) == first
    assert token_ids(batch_size=64, seed=2) != first
    assert len(set(first)) == len(first)


def test_sampling_leaves_the_global_generator_and_the_mode_alone(engine: HFEngine, prompts: list[Prompt]) -> None:
    engine._model.train()
    before = torch.get_rng_state()
    engine.generate(prompts, Sampling(num_samples=2, max_tokens=4))
    assert torch.equal(torch.get_rng_state(), before)
    assert engine._model.training


def test_an_answer_ends_with_its_first_end_of_sequence(model: Qwen, renderer: Renderer, prompts: list[Prompt]) -> None:
    groups = HFEngine(model, renderer).generate(prompts, Sampling(num_samples=64, max_tokens=40, temperature=5.0))
    samples = [sample for group in groups for sample in group.samples]
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for sample in samples:
        assert renderer.end_token_id not in sample.token_ids[:-1]
        assert (sample.token_ids[-1] == renderer.end_token_id) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 40


def other_model() -> Qwen:
    return build(hidden_size=64, text_layers=2, vision_layers=1, seed=9)[0]


def test_loaded_weights_are_the_ones_sampled_from(engine: HFEngine, renderer: Renderer, prompts: list[Prompt]) -> None:
    other = other_model()
    sampling = Sampling(num_samples=2, max_tokens=8)
    engine.load_weights(iter(saved_weights(other).items()), version=4)
    groups = engine.generate(prompts, sampling)
    assert {sample.policy_version for group in groups for sample in group.samples} == {4}
    expected = HFEngine(other, renderer).generate(prompts, sampling)
    for group, expected_group in zip(groups, expected, strict=True):
        assert [s.token_ids for s in group.samples] == [s.token_ids for s in expected_group.samples]
        assert [s.logprobs for s in group.samples] == [s.logprobs for s in expected_group.samples]


def test_the_names_are_those_transformers_saves(model: Qwen, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved_weights(model).keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in saved_weights(model).items())


def test_weights_that_do_not_fit_are_named(engine: HFEngine) -> None:
    weights = saved_weights(other_model())
    some = {name: weight for name, weight in weights.items() if "norm" not in name}
    with pytest.raises(ValueError, match=r"7 missing \['model.layers.0.input_layernorm.weight', .*0 unexpected \[\]"):
        engine.load_weights(some.items(), version=1)
    with pytest.raises(ValueError, match=r"0 missing \[\], 1 unexpected \['lm_tail.weight'\]; send every weight under"):
        engine.load_weights([*weights.items(), ("lm_tail.weight", torch.zeros(1))], version=1)
    with pytest.raises(ValueError, match=r"weight lm_head.weight has shape \(3, 64\); expected \(\d+, 64\)"):
        engine.load_weights((weights | {"lm_head.weight": torch.zeros(3, 64)}).items(), version=1)
