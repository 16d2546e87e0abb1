"""Hard negatives by attack: change a picture until the model no longer believes the right answer.

    x <- clip_[0, 1]( clip_[x0 - eps, x0 + eps]( x - step * sign(grad_x  mean_t log pi(y_t | x, question, y_<t)) ) )

Projected gradient descent (arXiv 1706.06083) on pixels, against the mean log-prob of the chosen answer. What the model
answers from such a picture is its language prior. The constants are our own: MBPO (arXiv 2506.08022) publishes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torchattacks.attack import Attack

from rl.batch import Rows
from rl.loss import Score
from rl.policy import Policy

Show = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]  # one prompt's pictures -> its vision tensors
Pictures = tuple[Tensor, ...]  # of one prompt, each [3, H, W] in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class PGD:
    """How far and how fast a picture may change, in parts of the full brightness range."""

    name: Literal["pgd"] = "pgd"
    eps: float = 8 / 255  # the largest change of a pixel
    step_size: float = 2 / 255
    steps: int = 10
    random_start: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= self.eps <= 1 or self.steps < 1:
            raise ValueError(
                f"attack has eps {self.eps:.4g}, step_size {self.step_size:.4g}, steps {self.steps}; "
                "expected 0 < step_size <= eps <= 1 and steps >= 1"
            )


class AnswerAttack(Attack):
    """PGD on the pictures of several prompts at once, one packed forward per step.

    Untargeted, it lowers the log-prob of the answers it is given; after `set_mode_targeted_by_label` it raises it.

    >>> attack = AnswerAttack(policy, PixelPath(renderer), PGD(steps=20))
    >>> attack([(picture,)], rows)  # rows: the prompt's context and the chosen answer as its one branch
    """

    def __init__(self, policy: Policy, show: Show, config: PGD) -> None:
        super().__init__("AnswerAttack", policy)
        self.supported_mode = ["default", "targeted"]
        self.show = show
        self.eps, self.alpha, self.steps = config.eps, config.step_size, config.steps
        self.random_start = config.random_start

    def forward(self, images: Sequence[Pictures], rows: Rows, seeds: Sequence[int] = ()) -> list[Pictures]:
        """The changed pictures, rounded to whole grey levels, so that a PNG holds exactly what was measured.

        Args:
            images: per row its clean pictures.
            rows: one answer each; their vision tensors are replaced.
            seeds: one per row, for `random_start`.
        """
        clean = [tuple(picture.detach().float().to(self.device) for picture in pictures) for pictures in images]
        current = clean
        if self.random_start:
            current = [self.started(pictures, seed) for pictures, seed in zip(clean, seeds, strict=True)]
        for _ in range(self.steps):
            current = self.stepped(current, clean, rows)
        return [
            tuple(quantised(picture, start) for picture, start in zip(pictures, starts, strict=True))
            for pictures, starts in zip(current, clean, strict=True)
        ]

    def stepped(self, current: Sequence[Pictures], clean: Sequence[Pictures], rows: Rows) -> list[Pictures]:
        """One signed step per picture, projected. Rows do not depend on each other: the cost is their sum."""
        leaves = [tuple(picture.detach().requires_grad_() for picture in pictures) for pictures in current]
        shown = replace(rows, vision=tuple(self.show(pictures) for pictures in leaves))
        cost = mean_logprobs(self.model, shown).sum() * (1 if self.targeted else -1)
        gradients = iter(torch.autograd.grad(cost, [picture for pictures in leaves for picture in pictures]))
        return [
            tuple(
                self.projected(picture.detach() + self.alpha * next(gradients).sign(), start)
                for picture, start in zip(pictures, starts, strict=True)
            )
            for pictures, starts in zip(leaves, clean, strict=True)
        ]

    def started(self, pictures: Pictures, seed: int) -> Pictures:
        """A uniformly random point of the ball around each picture."""
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.rand(picture.shape, generator=generator).to(self.device) * 2 - 1 for picture in pictures)
        return tuple(self.projected(p + self.eps * n, p) for p, n in zip(pictures, noise, strict=True))

    def projected(self, picture: Tensor, clean: Tensor) -> Tensor:
        """Into the ball around the clean picture, then into [0, 1]."""
        delta = torch.clamp(picture - clean, min=-self.eps, max=self.eps)
        return torch.clamp(clean + delta, min=0, max=1)


def quantised(picture: Tensor, clean: Tensor) -> Tensor:
    """The picture in whole grey levels, k / 255, rounded towards the clean one: rounding never leaves the ball."""
    change = (picture - clean) * 255
    levels = torch.where((change - change.round()).abs() < 1e-3, change.round(), change.trunc())
    return ((clean * 255).round() + levels) / 255


def mean_logprobs(score: Score, rows: Rows) -> Tensor:
    """Mean log-prob per token of every answer, [N]."""
    table = score(rows)  # [N, L]
    return table.sum(-1) / rows.lengths.to(table.device)


@torch.no_grad()
def image_information_gain(score: Score, with_image: Rows, without_image: Rows) -> Tensor:
    """How much the picture raises the mean log-prob of every answer, [N]; negative where it misleads.

    Args:
        with_image: contexts with their pictures, and the answers.
        without_image: the same answers behind contexts without pictures, or with black ones.
    """
    return mean_logprobs(score, with_image) - mean_logprobs(score, without_image)
