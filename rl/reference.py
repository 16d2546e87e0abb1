"""The frozen policy that KL and preferences compare against: a copy of the start, or the model without its adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from torch import nn

from rl.policy import Policy


class Reference(Protocol):
    """Lends a module that scores rows as the frozen policy does."""

    def module(self) -> AbstractContextManager[nn.Module]: ...


class FrozenCopy:
    """A second copy of the weights, made before training."""

    def __init__(self, policy: Policy) -> None:
        self.policy = copy.deepcopy(policy).requires_grad_(False).eval()

    @contextmanager
    def module(self) -> Iterator[nn.Module]:
        yield self.policy


class AdapterOff:
    """With LoRA the start is still there: the same weights with the adapter switched off, at no memory."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @contextmanager
    def module(self) -> Iterator[nn.Module]:
        self.policy.eval()
        with self.policy.without_adapter():
            yield self.policy
        self.policy.train()


def reference_for(policy: Policy) -> Reference:
    """The cheapest frozen copy of `policy` as it is now."""
    return AdapterOff(policy) if policy.adapted is not None else FrozenCopy(policy)
