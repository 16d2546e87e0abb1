"""Where the randomness of a sample comes from: the call's seed, the prompt's place in it and the sample's number."""

from __future__ import annotations

import hashlib


def prompt_seed(seed: int, prompt_index: int) -> int:
    """A seed in [0, 2**48) for one prompt of a call; its sample `i` uses this number plus `i`.

    Prompts' seeds are hashed far apart, so that no two samples of a call share one.
    """
    digest = hashlib.sha256(f"{seed}/{prompt_index}".encode()).digest()
    return int.from_bytes(digest[:6], "big")
