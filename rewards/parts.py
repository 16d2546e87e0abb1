"""The parts a reward can be made of, as a configuration names them."""

from __future__ import annotations

from typing import Annotated

import pydantic

from rewards.shape import Format
from rewards.verifiers import Verify

RewardPart = Annotated[Verify | Format, pydantic.Field(discriminator="name")]
