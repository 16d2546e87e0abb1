"""The one place where chat template and processor run: prompt -> token ids and vision tensors, for engines and learner.

Engine and learner ask the same renderer, so the tokens a sample was drawn after are the tokens it is scored after.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor
from transformers import AutoProcessor, GenerationConfig, PreTrainedTokenizerBase, ProcessorMixin

from rollout.images import PixelLimits, load
from rollout.types import Prompt, Sample

# Tokens with one of these in their name stand for media: <|image_pad|>, <|vision_start|>, <image>, [IMG_BREAK], ...
_MEDIUM = re.compile(r"(?<![a-z])(image|img|vision|video|audio)", re.IGNORECASE)
# Of the processor's output, what has one entry per token; everything else describes the pictures.
_PER_TOKEN = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """A prompt as the model reads it, ending where the answer begins.

    For Qwen2.5-VL and one 56 x 56 picture (16 patches, 4 image tokens):

    >>> Rendered(
    ...     token_ids=(258, 117, 259, 261, 261, 261, 261, 260, 104),
    ...     compact_ids=(258, 117, 259, 261, 260, 104),
    ...     vision={"pixel_values": torch.zeros(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])},
    ... )
    """

    token_ids: tuple[int, ...]  # every image expanded to as many placeholders as the model has features for it
    compact_ids: tuple[int, ...]  # one placeholder per image, which vLLM expands itself
    vision: Mapping[str, Tensor]  # the processor's tensors, opaque, joined along the first axis; {} without images


class Renderer:
    """Chat template, tokenizer and image processor of one model.

    Args:
        processor: the model's transformers processor; its tokenizer needs a chat template and an end of sequence.
        limits: how large a picture may be.
        stop_token_ids: tokens that end an answer besides the tokenizer's end of sequence.
        cache_bytes: how much is kept of what was rendered; the learner renders what the engine has just rendered.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        limits: PixelLimits | None = None,
        *,
        stop_token_ids: Sequence[int] = (),
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self.limits = limits or PixelLimits()
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.end_token_id: int = self.tokenizer.eos_token_id
        self.stop_token_ids: frozenset[int] = frozenset({self.end_token_id, *stop_token_ids})
        self.placeholder_token_ids: frozenset[int] = _placeholders(processor, self.tokenizer)
        special = {*self.tokenizer.all_special_ids, *self.placeholder_token_ids}
        self._control_tokens = [self.tokenizer.convert_ids_to_tokens(token_id) for token_id in sorted(special)]
        self._cache: OrderedDict[object, Rendered] = OrderedDict()
        self._cache_room = cache_bytes

    @classmethod
    def load(cls, path: str | Path, *, revision: str | None = None, limits: PixelLimits | None = None) -> Renderer:
        """Load the processor saved beside a model, from a folder or the hub; code in the repository never runs."""
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(f"{path} has a {type(processor).__name__}; expected a vision-language model's processor")
        try:
            stop = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
        except OSError:  # the file is optional; the tokenizer's end of sequence then stands alone
            stop = None
        stop_token_ids = [stop] if isinstance(stop, int) else stop or []
        return cls(processor, limits, stop_token_ids=stop_token_ids)

    @property
    def pad_token_id(self) -> int:
        """What fills unused positions; masks come from lengths, so any valid id serves."""
        return self.end_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    def pictures(self, prompt: Prompt) -> list[PIL.Image.Image]:
        """The prompt's images, decoded and within the limits, in the order the template places them."""
        return [load(image, self.limits) for image in prompt.images]

    def render(self, prompt: Prompt, *, images: Sequence[PIL.Image.Image] | None = None) -> Rendered:
        """Token ids and vision tensors of `prompt`, up to where the answer begins.

        Args:
            images: shown in place of the prompt's own pictures, one for each (attacked, noisy or blank ones).

        Raises:
            ValueError: an unreadable image, a wrong number of `images`, or control tokens inside the text.
        """
        if images is not None:
            return self._render(prompt, images)
        key = (prompt.messages, *(_identity(image.path) for image in prompt.images))
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        rendered = self._render(prompt, self.pictures(prompt))
        self._cache[key] = rendered
        self._cache_room -= _num_bytes(rendered)
        while self._cache_room < 0:
            self._cache_room += _num_bytes(self._cache.popitem(last=False)[1])
        return rendered

    def problem(self, prompt: Prompt) -> str | None:
        """Why `prompt` cannot be rendered, as far as its text tells: a literal control token would change its turns."""
        for message in prompt.messages:
            for token in self._control_tokens:
                if token in message.text:
                    return f"the {message.role} text contains the control token {token!r}; remove or rephrase it"
        return None

    def encode_answer(self, text: str) -> tuple[int, ...]:
        """Token ids of an answer written by somebody else, the end of sequence included.

        Raises:
            ValueError: the text contains a control token, which no policy can be asked to learn.
        """
        if (token := next((token for token in self._control_tokens if token in text), None)) is not None:
            raise ValueError(f"the answer {text!r} contains the control token {token!r}; remove it from the data")
        return (*self.tokenizer.encode(text, add_special_tokens=False), self.end_token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens and surrounding white space."""
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def sample(self, token_ids: Sequence[int], logprobs: Sequence[float] | None, policy_version: int) -> Sample:
        """What an engine returns for one answer; it was cut off unless its last token ends an answer."""
        return Sample(
            token_ids=tuple(token_ids),
            logprobs=None if logprobs is None else tuple(logprobs),
            text=self.decode(token_ids),
            finish_reason="stop" if token_ids[-1] in self.stop_token_ids else "length",
            policy_version=policy_version,
        )

    def media_types(self, token_ids: Sequence[int]) -> list[int]:
        """Per token, what `mm_token_type_ids` expects: 0 text, 1 image, 2 video, 3 audio."""
        return self.processor.create_mm_token_type_ids([list(token_ids)])[0]

    def _render(self, prompt: Prompt, pictures: Sequence[PIL.Image.Image]) -> Rendered:
        if (reason := self.problem(prompt)) is not None:
            raise ValueError(f"{prompt.source or prompt.id}: {reason}")
        if len(pictures) != len(prompt.images):
            raise ValueError(f"prompt {prompt.id!r} shows {len(prompt.images)} images, {len(pictures)} were given")
        text = self.processor.apply_chat_template(_conversation(prompt), add_generation_prompt=True)
        # Many templates write the beginning-of-sequence token themselves; it must not appear twice.
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        compact = self.tokenizer(text, add_special_tokens=not begins)["input_ids"]
        output = self.processor(
            text=[text], images=list(pictures) or None, add_special_tokens=not begins, return_tensors="pt"
        )
        return Rendered(
            token_ids=tuple(output["input_ids"][0].tolist()),
            compact_ids=tuple(compact),
            vision={name: tensor for name, tensor in output.items() if name not in _PER_TOKEN},
        )


def _conversation(prompt: Prompt) -> list[dict[str, Any]]:
    """The messages as chat templates read them: a message's images come before its text."""
    return [
        {
            "role": message.role,
            "content": [*({"type": "image"} for _ in message.images), {"type": "text", "text": message.text}],
        }
        for message in prompt.messages
    ]


def _identity(path: Path) -> tuple[Path, int, int]:
    """Changes when the file's content may have changed."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"image {path}: the file cannot be read ({error}); check the path") from error
    return path, status.st_mtime_ns, status.st_size


def _num_bytes(rendered: Rendered) -> int:
    num_tokens = len(rendered.token_ids) + len(rendered.compact_ids)
    return 8 * num_tokens + sum(tensor.nbytes for tensor in rendered.vision.values())


def _placeholders(processor: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that stand for media and may never be sampled: a sampled one would ask for features nobody computed."""
    declared = (*processor.image_token_ids, *processor.video_token_ids, *processor.audio_token_ids)
    named = (id for id, token in tokenizer.added_tokens_decoder.items() if _MEDIUM.search(str(token)))
    return frozenset({*(id for id in declared if id is not None), *named})
