"""The differentiable pixel path makes what the renderer makes, to the bit where it can be asked to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Idefics3ImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from examples.colored_digits.model import build_tokenizer
from rollout.images import PixelLimits
from rollout.pixels import PixelPath, to_picture
from rollout.render import Renderer
from rollout.types import Image, Message, Prompt

SQUARE = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
CLIP_PROCESSORS = {
    "clip": CLIPImageProcessor(**SQUARE),
    "llava padding to a square": LlavaImageProcessor(**SQUARE, do_pad=True),
}


def llava(image_processor: object) -> Renderer:
    """LLaVA-1.5's processor around `image_processor`: 4 x 4 patches of 14 pixels and a class token that is dropped."""
    tokenizer: PreTrainedTokenizerFast = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = (
        "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "assistant: "
    )
    return Renderer(
        LlavaProcessor(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
            image_token="<image>",
        )
    )


def about(*paths: Path) -> Prompt:
    images = tuple(Image(path=path) for path in paths)
    return Prompt(id="p", messages=(Message(role="user", text="what is it?", images=images),), answer="", kind="exact")


def noise(width: int, height: int) -> PIL.Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


@pytest.fixture(params=["qwen", *CLIP_PROCESSORS])
def any_renderer(request: pytest.FixtureRequest, renderer: Renderer) -> Renderer:
    return renderer if request.param == "qwen" else llava(CLIP_PROCESSORS[request.param])


@pytest.mark.parametrize("size", [(56, 56), (75, 50), (150, 61), (112, 112)])
def test_a_resized_picture_gives_what_the_renderer_makes_of_the_original(
    any_renderer: Renderer, size: tuple[int, int], tmp_path: Path
) -> None:
    path = tmp_path / "noise.png"
    noise(*size).save(path)
    expected = any_renderer.render(about(path)).vision
    pixels = PixelPath(any_renderer)
    vision = pixels([pixels.resized(noise(*size)).float() / 255])
    assert vision.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(vision[name], tensor), name


def test_a_changed_picture_survives_a_png(any_renderer: Renderer, tmp_path: Path) -> None:
    pixels = PixelPath(any_renderer)
    clean = pixels.resized(noise(75, 50))
    changed = torch.randint(0, 256, clean.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    to_picture(changed).save(tmp_path / "changed.png")
    assert torch.equal(pixels.resized(PIL.Image.open(tmp_path / "changed.png")), changed)
    rendered = any_renderer.render(about(tmp_path / "changed.png")).vision
    for name, tensor in pixels([changed.float() / 255]).items():
        assert torch.equal(rendered[name], tensor), name


def test_several_pictures_of_a_prompt_are_joined_as_the_renderer_joins_them(renderer: Renderer, tmp_path: Path) -> None:
    pictures = [noise(75, 50), noise(56, 84), noise(75, 50)]
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    pixels = PixelPath(renderer)
    vision = pixels([pixels.resized(picture).float() / 255 for picture in pictures])
    for name, tensor in renderer.render(about(*paths)).vision.items():
        assert torch.equal(vision[name], tensor), name


def test_both_copies_of_a_still_image_are_one_leaf(renderer: Renderer) -> None:
    """Qwen repeats a still image in time: each pixel feeds two patch entries, and its gradient is their sum."""
    picture = torch.rand(3, 56, 56, generator=torch.Generator().manual_seed(0)).requires_grad_()
    patches = PixelPath(renderer)([picture])["pixel_values"]  # [16, 3 * 2 * 14 * 14]
    copies = patches.reshape(16, 3, 2, 14, 14)
    assert torch.equal(copies[:, :, 0], copies[:, :, 1])
    (gradient,) = torch.autograd.grad(patches.sum(), picture)
    per_copy = 1 / torch.tensor(renderer.processor.image_processor.image_std)
    assert torch.allclose(gradient, (2 * per_copy)[:, None, None].expand_as(gradient), rtol=1e-5)


def test_eps_and_box_in_normalised_space() -> None:
    """Adding eps to a pixel moves its normalised value by eps / std, and [0, 1] becomes the vector's box."""
    (vector,) = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())["mbpo_normalised_space"]
    given, expected = vector["inputs"], vector["expected"]
    image_processor = CLIPImageProcessor(**SQUARE, image_mean=given["mean"], image_std=given["std"])
    pixels = PixelPath(llava(image_processor))

    def normalised(value: float) -> Tensor:
        return pixels([torch.full((3, 56, 56), value)])["pixel_values"][0, :, 0, 0]  # [3]

    torch.testing.assert_close(normalised(0.0), torch.tensor(expected["low"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(normalised(1.0), torch.tensor(expected["high"]), rtol=0, atol=1e-6)
    eps = normalised(0.5 + given["eps_pixel"]) - normalised(0.5)
    torch.testing.assert_close(eps, torch.tensor(expected["eps_per_channel"]), rtol=0, atol=1e-6)


def test_the_gradient_of_a_llava_reaches_the_picture() -> None:
    renderer = llava(CLIP_PROCESSORS["clip"])
    text = LlamaConfig(
        vocab_size=len(renderer.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    token = renderer.tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_id=token))
    picture = torch.rand(3, 56, 56).requires_grad_()
    context = renderer.render(about(Path("any.png")), images=[noise(56, 56)])
    logits = model(input_ids=torch.tensor([context.token_ids]), **PixelPath(renderer)([picture])).logits
    (gradient,) = torch.autograd.grad(logits[0, -1].log_softmax(-1)[7], picture)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("image_processor", "reason"),
    [
        (LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=[[56, 112], [112, 56]]), "LlavaNextImageProcessor"),
        (Idefics3ImageProcessor(), "Idefics3ImageProcessor"),
        (CLIPImageProcessorPil(**SQUARE), "CLIPImageProcessorPil.*torchvision"),
    ],
)
def test_other_processors_are_refused_by_name(image_processor: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"mining does not support {reason}"):
        PixelPath(llava(image_processor))


def test_a_picture_beyond_the_limits_is_shrunk_before_it_is_resized(tiny_model: Path, tmp_path: Path) -> None:
    """The path starts from the renderer's own pictures, so limits apply once, and the same to both."""
    renderer = Renderer.load(tiny_model, limits=PixelLimits(max_pixels=80 * 80))
    path = tmp_path / "large.png"
    noise(200, 120).save(path)
    pixels = PixelPath(renderer)
    (picture,) = renderer.pictures(about(path))
    vision = pixels([pixels.resized(picture).float() / 255])
    assert torch.equal(vision["pixel_values"], renderer.render(about(path)).vision["pixel_values"])
