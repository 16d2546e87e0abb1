"""Pixels -> the vision tensors of a model, differentiably: what an attack on the picture needs and a renderer hides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import PIL.Image
import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend

from rollout.render import Renderer
from rollout.types import Image, Message, Prompt

LARGEST_ERROR = 1e-5  # between these vision tensors and the renderer's


class PixelPath:
    """Pictures as float pixels in [0, 1], already of the size the image processor resizes to -> its vision tensors.

    The path *is* the model's image processor: built on torchvision, it lets gradients through, and on a picture of its
    own output size its resizing does nothing. A still image that Qwen2-VL repeats in time stays one leaf that way.

    Args:
        renderer: of the model; the path is compared with what it renders once, here.

    Raises:
        ValueError: the image processor is not differentiable, or cuts a picture into crops of several sizes.
    """

    def __init__(self, renderer: Renderer) -> None:
        self._processor = renderer.processor.image_processor
        if not isinstance(self._processor, TorchvisionBackend):
            raise ValueError(self._unsupported("it does not run on torchvision, so no gradient reaches the picture"))
        picture = _noise(width=75, height=50)
        expected = renderer.render(_PROBE, images=[picture]).vision
        vision = self([self.resized(picture).float() / 255])
        if vision.keys() != expected.keys():
            raise ValueError(self._unsupported(f"it makes {sorted(expected)} of a picture, not {sorted(vision)}"))
        for name, tensor in expected.items():
            same_shape = vision[name].shape == tensor.shape
            if not same_shape or (vision[name] - tensor).abs().max() > LARGEST_ERROR:
                raise ValueError(self._unsupported(f"its {name} of a resized picture differs from the original's"))

    def __call__(self, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
        """The vision tensors of one prompt's pictures, each float [3, H, W] in [0, 1]; gradients flow back to them."""
        return dict(self._processor(images=[picture * 255 for picture in pictures], return_tensors="pt"))

    def resized(self, picture: PIL.Image.Image) -> Tensor:
        """The picture as the model sees it, padded, resized and cropped: uint8 [3, H, W].

        Saved without loss and rendered again, it gives the very same vision tensors.
        """
        raw = self._processor(images=[picture], do_rescale=False, do_normalize=False, return_tensors="pt")
        values: Tensor = raw["pixel_values"]
        if "image_grid_thw" in raw:
            return self._unpatchified(values, raw["image_grid_thw"][0])
        if values.ndim != 4 or len(values) != 1:
            raise ValueError(self._unsupported(f"it makes {list(values.shape)} of a picture, not [1, 3, H, W]"))
        return values[0]

    def _unpatchified(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Qwen2-VL's patches [h * w, 3 * times * size * size] -> the picture [3, H, W] they were cut from."""
        size, merge, times = self._processor.patch_size, self._processor.merge_size, self._processor.temporal_patch_size
        _, high, wide = grid.tolist()
        blocks = patches.reshape(high // merge, wide // merge, merge, merge, 3, times, size, size)[:, :, :, :, :, 0]
        return blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, high * size, wide * size)

    def _unsupported(self, reason: str) -> str:
        return f"mining does not support {type(self._processor).__name__}: {reason}; use Qwen2-VL, Qwen2.5-VL or LLaVA"


def to_picture(pixels: Tensor) -> PIL.Image.Image:
    """uint8 [3, H, W] -> the picture."""
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


_PROBE = Prompt(
    id="pixel-path",
    messages=(Message(role="user", text="", images=(Image(path=Path("noise.png")),)),),
    answer="",
    kind="exact",
)


def _noise(*, width: int, height: int) -> PIL.Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return PIL.Image.fromarray(values.numpy().astype(numpy.uint8))
