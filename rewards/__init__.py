"""Judging: a prompt and a sample go in, a verdict comes out."""

from __future__ import annotations

from rewards.base import Verdict
from rewards.verifiers import VERIFIERS, verify

__all__ = ["VERIFIERS", "Verdict", "verify"]
