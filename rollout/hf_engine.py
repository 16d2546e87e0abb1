"""Engine on transformers: for laptops and tests, and the reference other engines are compared against."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)
from transformers.core_model_loading import revert_weight_conversion

from rollout.render import Rendered, Renderer
from rollout.seeds import prompt_seed
from rollout.types import Group, Prompt, Sample, Sampling

_MAX_NAMED = 5  # weights spelled out in an error


class HFEngine:
    """Samples with `transformers.generate`, one row per sample, left-padded.

    A sample depends on the weights, its prompt, its place in the call and `Sampling.seed`, and not on `batch_size`
    beyond rounding. Log-probs are those of the distribution drawn from: placeholders banned, then temperature, then
    top-p. At temperature 0 they are those of temperature 1, of which the most likely token is taken.

    Args:
        batch_size: how many samples are drawn at once.
    """

    def __init__(self, model: PreTrainedModel, renderer: Renderer, batch_size: int = 64) -> None:
        self._model = model
        self._renderer = renderer
        self._batch_size = batch_size
        self._version = 0
        self._types_tokens = "mm_token_type_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        path: str | Path,
        renderer: Renderer,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        batch_size: int = 64,
    ) -> HFEngine:
        """An engine on its own copy of the model at `path`, a folder or the name of a model on the hub."""
        model = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        return cls(model.to(device), renderer, batch_size)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group of `sampling.num_samples` samples per prompt, in the order of `prompts`."""
        contexts = [self._renderer.render(prompt) for prompt in prompts]
        draws = [
            _Draw(context=context, seed=prompt_seed(sampling.seed, index) + number)
            for index, context in enumerate(contexts)
            for number in range(sampling.num_samples)
        ]
        samples: list[Sample] = []
        with _evaluating(self._model):
            for start in range(0, len(draws), self._batch_size):
                samples += self._sample(draws[start : start + self._batch_size], sampling)
        return [
            Group(
                prompt=prompt,
                prompt_ids=context.token_ids,
                samples=tuple(samples[index * sampling.num_samples : (index + 1) * sampling.num_samples]),
            )
            for index, (prompt, context) in enumerate(zip(prompts, contexts, strict=True))
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy `weights` into the module.

        Raises:
            ValueError: a shape that differs, a name the model does not have, or a weight that was not sent.
        """
        targets = saved_weights(self._model)
        missing = {tensor.data_ptr(): name for name, tensor in targets.items()}  # tied weights may come under one name
        unexpected = []
        for name, weight in weights:
            if name not in targets:
                unexpected.append(name)
                continue
            target = targets[name]
            if target.shape != weight.shape:
                raise ValueError(f"weight {name} has shape {tuple(weight.shape)}; expected {tuple(target.shape)}")
            with torch.no_grad():
                target.copy_(weight)
            missing.pop(target.data_ptr(), None)
        if missing or unexpected:
            raise ValueError(
                f"the weights do not fit the model: {len(missing)} missing {sorted(missing.values())[:_MAX_NAMED]}, "
                f"{len(unexpected)} unexpected {sorted(unexpected)[:_MAX_NAMED]}; "
                "send every weight under the name transformers saves it by"
            )
        self._version = version

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Does nothing: the weights stay where they are."""
        yield

    def close(self) -> None:
        """Does nothing: the engine holds no process, and the model is freed with its last reference."""

    def _sample(self, draws: Sequence[_Draw], sampling: Sampling) -> list[Sample]:
        """One sample per draw, forwarded as one batch."""
        sampler = _Sampler(draws, sampling, sorted(self._renderer.placeholder_token_ids))
        inputs = self._inputs([draw.context for draw in draws])
        context_length = inputs["input_ids"].shape[1]
        config = GenerationConfig(
            max_new_tokens=sampling.max_tokens,
            do_sample=False,  # the sampler draws; generate only takes the largest of what it returns
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=sorted(self._renderer.stop_token_ids),
            pad_token_id=self._renderer.pad_token_id,
        )
        output = self._model.generate(
            **inputs, generation_config=config, logits_processor=LogitsProcessorList([sampler])
        )
        answers = output[:, context_length:].tolist()  # [B, at most max_tokens]
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist()  # [B, as many]
        samples = []
        for answer, answer_logprobs in zip(answers, logprobs, strict=True):
            stops = (index for index, token_id in enumerate(answer) if token_id in self._renderer.stop_token_ids)
            length = next(stops, len(answer) - 1) + 1  # what follows the end of sequence is padding
            samples.append(self._renderer.sample(answer[:length], answer_logprobs[:length], self._version))
        return samples

    def _inputs(self, contexts: Sequence[Rendered]) -> dict[str, Tensor]:
        length = max(len(context.token_ids) for context in contexts)
        padding = [length - len(context.token_ids) for context in contexts]
        pad_token_id = self._renderer.pad_token_id
        ids = [[pad_token_id] * pad + [*context.token_ids] for pad, context in zip(padding, contexts, strict=True)]
        mask = [[0] * pad + [1] * (length - pad) for pad in padding]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}  # [B, L] both
        if self._types_tokens:
            inputs["mm_token_type_ids"] = torch.tensor([self._renderer.media_types(row) for row in ids])  # [B, L]
        for name in dict.fromkeys(name for context in contexts for name in context.vision):
            joined = torch.cat([context.vision[name] for context in contexts if name in context.vision])
            inputs[name] = joined.to(self._model.dtype) if joined.is_floating_point() else joined
        return {name: tensor.to(self._model.device) for name, tensor in inputs.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Draw:
    """One sample to be drawn."""

    context: Rendered
    seed: int


class _Sampler(LogitsProcessor):
    """Draws by the Gumbel-max rule: the largest of log-prob plus Gumbel noise is a sample of the distribution.

    Every row has its own generator, so nothing global is read or moved, and rows do not depend on each other.
    """

    def __init__(self, draws: Sequence[_Draw], sampling: Sampling, banned: list[int]) -> None:
        self.logprobs: list[Tensor] = []  # per token drawn so far: [B]
        self._banned = banned
        self._temperature = sampling.temperature
        self._top_p = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 and sampling.temperature > 0 else None
        self._generators = [torch.Generator().manual_seed(draw.seed) for draw in draws]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores.float().clone()  # [B, V]
        logits[:, self._banned] = -torch.inf
        if self._temperature > 0:
            logits /= self._temperature
        if self._top_p is not None:
            logits = self._top_p(input_ids, logits)
        logprobs = logits.log_softmax(-1)  # [B, V]
        perturbed = logprobs - self._log_exponentials(logprobs) if self._temperature > 0 else logprobs
        chosen = perturbed.argmax(-1, keepdim=True)  # [B, 1], the token generate will take as well
        self.logprobs.append(logprobs.gather(-1, chosen).squeeze(-1))
        return perturbed

    def _log_exponentials(self, like: Tensor) -> Tensor:
        """Logarithms of exponential draws, [B, V]: minus Gumbel noise."""
        rows = [torch.empty(like.shape[1]).exponential_(generator=generator) for generator in self._generators]
        return torch.stack(rows).clamp_min(torch.finfo(torch.float32).tiny).log().to(like.device)


def saved_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The module's own tensors under the names transformers saves them by; copying into them changes the module.

    Raises:
        ValueError: the saved layout merges tensors of the module, so there is nothing to copy into.
    """
    own = model.state_dict()
    storages = {tensor.untyped_storage().data_ptr() for tensor in own.values()}
    saved: dict[str, Tensor] = revert_weight_conversion(model, own)
    merged = [name for name, tensor in saved.items() if tensor.untyped_storage().data_ptr() not in storages]
    if merged:
        raise ValueError(f"{type(model).__name__} saves merged weights {merged[:_MAX_NAMED]}; sample with vLLM instead")
    return saved


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
