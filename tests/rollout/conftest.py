"""The reference both engines are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration as Qwen

from rollout.render import Renderer
from rollout.types import Group

LogitsUnder = Callable[[Qwen, Group, Sequence[int]], Tensor]


@pytest.fixture(scope="session")
def logits_under(renderer: Renderer) -> LogitsUnder:
    """Logits of one teacher-forced forward over an answer to a group's prompt, placeholders banned: [L, V]."""

    def forward(model: Qwen, group: Group, answer: Sequence[int]) -> Tensor:
        token_ids = torch.tensor([[*group.prompt_ids, *answer]])
        types = torch.tensor([renderer.media_types(token_ids[0].tolist())])
        vision = renderer.render(group.prompt).vision
        with torch.no_grad():
            logits = model(input_ids=token_ids, mm_token_type_ids=types, **vision).logits[0]
        logits[:, sorted(renderer.placeholder_token_ids)] = -torch.inf
        return logits[len(group.prompt_ids) - 1 : -1]

    return forward
