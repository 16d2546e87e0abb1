"""The nouns of answering: a prompt goes into an engine, a group of samples comes out. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A reference to a picture. Pixels are read where they are needed, so a prompt stays a few hundred bytes.

    >>> Image(path=Path("digits/0007.png"))
    """

    path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation; its images come before its text.

    >>> Message(role="user", text="What color is the digit?", images=(Image(path=Path("0007.png")),))
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A question about pictures, with the answer a verifier compares against.

    >>> Prompt(
    ...     id="color-0007",
    ...     messages=(Message(role="user", text="What color is the seven? (A) red (B) blue"),),
    ...     answer="B",
    ...     kind="multiple_choice",
    ...     choices=("red", "blue"),
    ...     source="data/colored_digits/train.jsonl:8",
    ... )
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | tuple[str, ...]  # several: any of them is right
    kind: str  # names the verifier, see rewards.VERIFIERS
    choices: tuple[str, ...] = ()
    source: str = ""  # file:line, for error messages

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError(f"prompt {self.id!r} has no messages; it needs at least one user message")

    @property
    def images(self) -> tuple[Image, ...]:
        """Every image of the conversation, in the order the chat template places them."""
        return tuple(image for message in self.messages for image in message.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer: its tokens (the end-of-sequence token included when it was produced) and their log-probs.

    >>> Sample(token_ids=(33, 2), logprobs=(-0.11, -0.02), text="blue", finish_reason="stop", policy_version=4)
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # of the distribution sampled from; None if somebody else wrote the answer
    text: str  # without special tokens
    finish_reason: Literal["stop", "length"]
    policy_version: int

    def __post_init__(self) -> None:
        if self.logprobs is not None and len(self.logprobs) != len(self.token_ids):
            raise ValueError(
                f"a sample needs one log-prob per token: {len(self.token_ids)} tokens, {len(self.logprobs)} log-probs"
            )
        if not self.token_ids:
            raise ValueError("a sample needs at least one token; an empty answer is its end-of-sequence token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One prompt, its token ids as the engine saw them (image tokens expanded), and the samples drawn for it."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError(f"the group of prompt {self.prompt.id!r} holds no samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy.

    >>> Sampling(num_samples=8, temperature=1.0, max_tokens=8, seed=17)
    """

    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 64
    seed: int = 0  # the same seed, weights and prompts give the same samples

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.max_tokens < 1:
            raise ValueError(f"num_samples and max_tokens must be at least 1: {self.num_samples}, {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1]: {self.temperature}, {self.top_p}")


class Engine(Protocol):
    """Everything that samples: vLLM, transformers, a script of given answers, or any of them on another machine."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt, in the order of `prompts`."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the policy's weights (names as transformers saves them) and drop every cache of the old ones."""
        ...

    def asleep(self) -> AbstractContextManager[None]:
        """Give the accelerator memory away while the learner works; may do nothing."""
        ...

    def close(self) -> None:
        """Free every process, thread and byte the engine holds; safe to call twice."""
        ...
