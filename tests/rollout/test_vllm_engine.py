"""The real vLLM on the CPU against transformers: tokens, log-probs, weights, seeds, and what it leaves behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

from rewards.base import score
from rewards.verifiers import Verify
from rl.advantages import Normalized
from rl.batch import collate
from rl.policy import Policy
from rollout.engines import VLLM
from rollout.hf_engine import saved_weights
from rollout.render import Renderer
from rollout.types import Engine, Group, Message, Prompt, Sampling

pytestmark = pytest.mark.slow

Measured = Callable[[str, float], None]
LogitsUnder = Callable[[Qwen, Group, Sequence[int]], Tensor]
LargestGap = Callable[..., float]


@pytest.fixture(scope="module")
def engine(tiny_model: Path, renderer: Renderer) -> Iterator[Engine]:
    """One engine for the file; what it leaves behind is checked when it has closed."""
    environment = dict(os.environ)
    children = psutil.Process().children(recursive=True)
    set_num_threads = torch.set_num_threads
    engine = VLLM().build(str(tiny_model), renderer, revision=None, dtype="bfloat16")
    assert torch.set_num_threads is set_num_threads
    yield engine
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="the engine is closed; build another"):
        engine.generate([], Sampling())
    assert psutil.Process().children(recursive=True) == children
    assert not torch.distributed.is_initialized()
    left = {name for name in os.environ.keys() | environment.keys() if os.environ.get(name) != environment.get(name)}
    assert left <= {"PYTEST_CURRENT_TEST"}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Qwen:
    return Qwen.from_pretrained(tiny_model)


@pytest.fixture
def weights(model: Qwen, engine: Engine) -> Iterator[dict[str, Tensor]]:
    """The checkpoint's weights, which the engine gets back after the test."""
    original = {name: weight.clone() for name, weight in saved_weights(model).items()}
    yield original
    engine.load_weights(original.items(), version=0)


@pytest.fixture
def largest_gap(logits_under: LogitsUnder) -> LargestGap:
    """Between the engine's log-probs and those a model gives the same tokens."""

    def measure(model: Qwen, groups: list[Group], temperature: float = 1.0) -> float:
        gap = 0.0
        for group in groups:
            for sample in group.samples:
                logprobs = (logits_under(model, group, sample.token_ids) / temperature).log_softmax(-1)  # [L, V]
                chosen = logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None]).squeeze(-1)  # [L]
                gap = max(gap, (chosen - torch.tensor(sample.logprobs)).abs().max().item())
        return gap

    return measure


def test_the_engine_reads_the_tokens_the_renderer_wrote(
    engine: Engine, renderer: Renderer, prompts: list[Prompt]
) -> None:
    groups = engine.generate(prompts, Sampling(num_samples=2, max_tokens=4))
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        assert group.prompt_ids == renderer.render(group.prompt).token_ids
        assert len(group.samples) == 2


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
def test_logprobs_are_those_of_transformers(
    engine: Engine,
    model: Qwen,
    prompts: list[Prompt],
    temperature: float,
    measured: Measured,
    largest_gap: LargestGap,
) -> None:
    groups = engine.generate(prompts, Sampling(num_samples=4, max_tokens=16, temperature=temperature))
    gap = largest_gap(model, groups, temperature or 1.0)
    measured(f"vLLM against transformers: log-probs at temperature {temperature}", gap)
    assert gap < 1e-4


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_are_those_of_the_learner(
    engine: Engine, policy: Policy, renderer: Renderer, prompts: list[Prompt], temperature: float, measured: Measured
) -> None:
    """On the way every training step takes: sampled, scored, collated and packed with a group in one row."""
    groups = engine.generate(prompts, Sampling(num_samples=4, max_tokens=16, temperature=temperature))
    scored = score(groups, {"correct": Verify()})
    batch = collate(scored, renderer, Normalized(), "sequences", temperature=temperature)
    assert batch.rollout_logprobs is not None
    with torch.no_grad():
        gap = (policy(batch.rows) - batch.rollout_logprobs).abs().max().item()
    measured(f"vLLM against the learner: log-probs at temperature {temperature}", gap)
    assert gap < 1e-4


def test_top_p_draws_from_the_head_and_reports_its_distribution(
    engine: Engine, model: Qwen, prompts: list[Prompt], logits_under: LogitsUnder
) -> None:
    (group,) = engine.generate(prompts[:1], Sampling(num_samples=64, max_tokens=1, top_p=0.3))
    ordered, token_ids = logits_under(model, group, (0,))[0].softmax(-1).sort(descending=True)
    head = int((ordered.cumsum(0) < 0.3).sum()) + 1  # the smallest set of at least that probability
    expected = dict(zip(token_ids[:head].tolist(), (ordered[:head] / ordered[:head].sum()).log().tolist(), strict=True))
    assert len(expected) < 200
    for sample in group.samples:
        assert sample.logprobs is not None
        assert sample.logprobs[0] == pytest.approx(expected[sample.token_ids[0]], abs=1e-5)


def test_placeholders_are_never_drawn_nor_counted(
    engine: Engine,
    model: Qwen,
    renderer: Renderer,
    prompts: list[Prompt],
    weights: dict[str, Tensor],
    measured: Measured,
    largest_gap: LargestGap,
) -> None:
    banned = sorted(renderer.placeholder_token_ids)
    tempting = weights["lm_head.weight"].clone()
    # One of each two is the most likely token by hundreds: a finite penalty would not keep it out.
    tempting[banned[::2]] = 5000 * tempting[renderer.end_token_id + 10]
    tempting[banned[1::2]] = -5000 * tempting[renderer.end_token_id + 10]
    engine.load_weights((weights | {"lm_head.weight": tempting}).items(), version=1)
    groups = engine.generate(prompts, Sampling(num_samples=128, max_tokens=16, temperature=2.0))
    drawn = [token_id for group in groups for sample in group.samples for token_id in sample.token_ids]
    assert len(set(drawn)) > 100
    assert set(drawn).isdisjoint(banned)
    # Far more than the 4096 tokens vLLM handles in one step, so that prompts are spread over several.
    assert sum(len(group.prompt_ids) for group in groups) * 128 > 3 * 4096
    # Banned tokens do not reach the distribution, so what they would have been does not matter to the log-probs.
    gap = largest_gap(model, groups[:1], temperature=2.0)
    measured("vLLM against transformers: log-probs beside tempting placeholders", gap)
    assert gap < 1e-4


def test_a_seed_gives_the_same_samples(engine: Engine, prompts: list[Prompt]) -> None:
    def draw(seed: int) -> list[tuple[int, ...]]:
        groups = engine.generate(prompts, Sampling(num_samples=4, max_tokens=8, seed=seed))
        return [sample.token_ids for group in groups for sample in group.samples]

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first
    assert len(set(first)) == len(first)


def test_a_prompt_that_leaves_no_room_is_refused(engine: Engine, prompts: list[Prompt]) -> None:
    with pytest.raises(ValueError, match=r"'picture-0' has \d+ tokens, at most 4 leave room for 1020 tokens of answer"):
        engine.generate(prompts, Sampling(max_tokens=1020))


@pytest.mark.parametrize("part", ["visual", "model.layers", "lm_head"])
def test_loaded_weights_take_effect_everywhere(
    engine: Engine,
    tiny_model: Path,
    prompts: list[Prompt],
    weights: dict[str, Tensor],
    part: str,
    measured: Measured,
    largest_gap: LargestGap,
) -> None:
    greedy = Sampling(max_tokens=8, temperature=0.0)
    # One prompt is longer than the blocks of 128 tokens whose keys and values vLLM keeps between calls.
    long = Message(role="user", text="what color is it? " * 40, images=prompts[0].images)
    pictured = [*prompts[:5], replace(prompts[0], messages=(long,))]
    before = engine.generate(pictured, greedy)
    assert part in {name[: len(part)] for name in weights}
    generator = torch.Generator().manual_seed(0)
    changed = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=generator) if name.startswith(part) else weight
        for name, weight in weights.items()
    }
    engine.load_weights(iter(changed.items()), version=7)
    after = engine.generate(pictured, greedy)
    assert {sample.policy_version for group in after for sample in group.samples} == {7}
    for old, new in zip(before, after, strict=True):
        assert old.samples[0].logprobs != new.samples[0].logprobs
    reference = Qwen.from_pretrained(tiny_model)
    for name, target in saved_weights(reference).items():
        target.copy_(changed[name])
    gap = largest_gap(reference, after)
    measured(f"vLLM against transformers: log-probs after loading {part}", gap)
    assert gap < 1e-4


def test_weights_that_were_not_sent_are_named(
    engine: Engine, prompts: list[Prompt], weights: dict[str, Tensor]
) -> None:
    some = {name: weight for name, weight in weights.items() if name != "visual.merger.mlp.2.weight"}
    with pytest.raises(
        ValueError, match=r"1 weights of the checkpoint were not sent, \['visual.merger.mlp.2.weight'\]"
    ):
        engine.load_weights(some.items(), version=1)
    with pytest.raises(ValueError, match="call load_weights before generate"):
        engine.generate(prompts, Sampling())
    with pytest.raises(ValueError, match="lm_tail"):
        engine.load_weights([*weights.items(), ("lm_tail.weight", torch.zeros(1))], version=1)


def test_a_renderer_of_another_model_is_refused(
    engine: Engine, renderer: Renderer, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = renderer.processor.image_processor
    monkeypatch.setattr(processor, "size", {"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    monkeypatch.setattr(engine, "_renderer", Renderer(renderer.processor))
    with pytest.raises(ValueError, match="vLLM reads prompt 'picture-4' as 52 tokens, the renderer as 40"):
        engine.generate(prompts[4:5], Sampling(max_tokens=1))


def test_sleeping_on_the_cpu_keeps_everything(engine: Engine, prompts: list[Prompt]) -> None:
    sampling = Sampling(num_samples=2, max_tokens=4)
    before = engine.generate(prompts, sampling)
    with engine.asleep():
        pass
    assert engine.generate(prompts, sampling) == before
