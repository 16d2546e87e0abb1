"""Engine that returns given answers: for tests, and for seeing what a reward makes of an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from rollout.render import Renderer
from rollout.types import Group, Prompt, Sampling


class ScriptedEngine:
    """Answers a prompt with the first `num_samples` of the texts given for its id; samples carry no log-probs.

    >>> ScriptedEngine({"color-0007": ["blue", "red"]}, renderer)
    """

    def __init__(self, answers: Mapping[str, Sequence[str]], renderer: Renderer) -> None:
        self._answers = answers
        self._renderer = renderer
        self._version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One group per prompt.

        Raises:
            ValueError: fewer texts are given for a prompt than samples are asked for.
        """
        return [self._group(prompt, sampling.num_samples) for prompt in prompts]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Drain `weights`, which other ranks may be gathering together with us, and remember the version."""
        deque(weights, maxlen=0)
        self._version = version

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Does nothing: a script needs no memory."""
        yield

    def close(self) -> None:
        """Does nothing: a script holds nothing."""

    def _group(self, prompt: Prompt, num_samples: int) -> Group:
        texts = self._answers.get(prompt.id, ())
        if len(texts) < num_samples:
            raise ValueError(
                f"the script has {len(texts)} answers for prompt {prompt.id!r}; expected {num_samples}; add them"
            )
        return Group(
            prompt=prompt,
            prompt_ids=self._renderer.render(prompt).token_ids,
            samples=tuple(
                self._renderer.sample(self._renderer.encode_answer(text), None, self._version)
                for text in texts[:num_samples]
            ),
        )
