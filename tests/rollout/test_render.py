"""One renderer gives engines and learner the same tokens, and keeps control tokens out of texts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from rollout.images import PixelLimits
from rollout.render import Renderer
from rollout.types import Image, Message, Prompt


def tokens(renderer: Renderer, token_ids: tuple[int, ...]) -> list[str]:
    return renderer.tokenizer.convert_ids_to_tokens(list(token_ids))


def asking(text: str, *paths: Path) -> Prompt:
    images = tuple(Image(path=path) for path in paths)
    return Prompt(id="p", messages=(Message(role="user", text=text, images=images),), answer="a", kind="exact")


def test_images_expand_and_the_context_ends_where_the_answer_begins(renderer: Renderer, prompts: list[Prompt]) -> None:
    for prompt, num_image_tokens in zip(prompts, (4, 6, 6, 4, 16, 0), strict=True):
        rendered = renderer.render(prompt)
        expanded, compact = tokens(renderer, rendered.token_ids), tokens(renderer, rendered.compact_ids)
        assert expanded.count("<|image_pad|>") == num_image_tokens
        assert compact.count("<|image_pad|>") == bool(num_image_tokens)
        assert [t for t in expanded if t != "<|image_pad|>"] == [t for t in compact if t != "<|image_pad|>"]
        assert expanded[-3:] == ["<|im_start|>", "assistant", "Ċ"]
        types = renderer.media_types(rendered.token_ids)
        assert [token == "<|image_pad|>" for token in expanded] == [kind == 1 for kind in types]
        if num_image_tokens:
            assert rendered.vision["pixel_values"].shape == (4 * num_image_tokens, 1176)
            assert rendered.vision["image_grid_thw"].prod() == 4 * num_image_tokens
        else:
            assert rendered.vision == {}


def test_images_come_before_the_text_of_their_message(renderer: Renderer, prompts: list[Prompt]) -> None:
    (image,) = prompts[0].images
    turns = (
        Message(role="system", text="look"),
        Message(role="user", text="which?", images=(image, image)),
        Message(role="assistant", text="two"),
        Message(role="user", text="color?", images=(image,)),
    )
    conversation = Prompt(id="p", messages=turns, answer="a", kind="exact")
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    assert renderer.tokenizer.decode(list(renderer.render(conversation).compact_ids)) == (
        "<|im_start|>system\nlook<|im_end|>\n"
        f"<|im_start|>user\n{shown}{shown}which?<|im_end|>\n"
        "<|im_start|>assistant\ntwo<|im_end|>\n"
        f"<|im_start|>user\n{shown}color?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_other_pictures_can_be_shown(renderer: Renderer, prompts: list[Prompt]) -> None:
    (picture,) = renderer.pictures(prompts[1])
    negative = PIL.Image.eval(picture, lambda value: 255 - value)
    original, attacked = renderer.render(prompts[1]), renderer.render(prompts[1], images=[negative])
    assert attacked.token_ids == original.token_ids
    assert not torch.equal(attacked.vision["pixel_values"], original.vision["pixel_values"])
    assert torch.equal(
        renderer.render(prompts[1], images=[picture]).vision["pixel_values"], original.vision["pixel_values"]
    )
    with pytest.raises(ValueError, match="prompt 'picture-1' shows 1 images, 2 were given"):
        renderer.render(prompts[1], images=[picture, picture])


def test_pictures_are_within_the_limits(tiny_model: Path, prompts: list[Prompt]) -> None:
    small = Renderer.load(tiny_model, limits=PixelLimits(min_pixels=56 * 56, max_pixels=56 * 56))
    (picture,) = small.pictures(prompts[4])
    assert picture.size == (56, 56)
    assert tokens(small, small.render(prompts[4]).token_ids).count("<|image_pad|>") == 4


def test_what_was_rendered_is_kept_until_its_file_changes(tiny_model: Path, tmp_path: Path) -> None:
    renderer = Renderer.load(tiny_model)
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (56, 56), "red").save(path)
    first = renderer.render(asking("color?", path))
    assert renderer.render(replace(asking("color?", path), id="other", answer="b")) is first
    PIL.Image.new("RGB", (84, 84), "red").save(path)
    os.utime(path, ns=(1, 1))
    assert len(renderer.render(asking("color?", path)).token_ids) == len(first.token_ids) + 5  # 9 image tokens, not 4


def test_the_cache_forgets_what_was_used_longest_ago(renderer: Renderer) -> None:
    one = renderer.render(asking("one?"))
    room = 8 * (len(one.token_ids) + len(one.compact_ids))
    small = Renderer(renderer.processor, cache_bytes=2 * room)
    one, two = small.render(asking("one?")), small.render(asking("two?"))
    assert small.render(asking("one?")) is one
    small.render(asking("six?"))
    assert small.render(asking("one?")) is one
    assert small.render(asking("two?")) is not two


def test_a_missing_picture_is_named(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none.png: the file cannot be read .* check the path"):
        renderer.render(asking("color?", tmp_path / "none.png"))


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
def test_control_tokens_in_texts_are_refused(renderer: Renderer, token: str) -> None:
    prompt = asking(f"what{token} now?")
    assert renderer.problem(prompt) == f"the user text contains the control token '{token}'; remove or rephrase it"
    assert renderer.problem(asking("what now?")) is None
    with pytest.raises(ValueError, match=r"p: the user text contains the control token"):
        renderer.render(prompt)
    with pytest.raises(ValueError, match=r"the answer 'red.*' contains the control token"):
        renderer.encode_answer(f"red{token}")


def test_answers_round_trip(renderer: Renderer) -> None:
    token_ids = renderer.encode_answer("The digit is blue")
    assert token_ids[-1] == renderer.end_token_id
    assert renderer.end_token_id not in token_ids[:-1]
    assert renderer.decode(token_ids) == "The digit is blue"
    assert renderer.decode((renderer.end_token_id,)) == ""


def test_a_sample_stopped_if_its_last_token_ends_an_answer(renderer: Renderer) -> None:
    token_ids = renderer.encode_answer("red")
    stopped = renderer.sample(token_ids, [-0.5] * len(token_ids), policy_version=3)
    assert (stopped.text, stopped.finish_reason, stopped.policy_version) == ("red", "stop", 3)
    assert renderer.sample(token_ids[:-1], None, policy_version=3).finish_reason == "length"


def test_the_placeholders_of_qwen(renderer: Renderer) -> None:
    banned = tokens(renderer, tuple(renderer.placeholder_token_ids))
    assert sorted(banned) == ["<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|vision_start|>"]
    assert tokens(renderer, tuple(renderer.stop_token_ids)) == ["<|im_end|>"]
    assert tokens(renderer, (renderer.pad_token_id,)) == ["<|endoftext|>"]


def test_the_end_of_turn_in_the_generation_config_stops_too(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert Renderer.load(tmp_path).stop_token_ids == {0, 2}


@pytest.fixture
def llava() -> LlavaProcessor:
    """A processor of another family: `<image>` in the text, one grid of pixels per picture, a leading `<s>`."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:", "color", "red", "imagine"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.add_tokens(["<image>"], special_tokens=True)
    fast.add_tokens(["imagine"])
    template = (
        "{{ bos_token }}{% for message in messages %}USER: {% for part in message.content %}"
        "{{ '<image> ' if part.type == 'image' else part.text + ' ' }}{% endfor %}{% endfor %}ASSISTANT:"
    )
    size = {"height": 28, "width": 28}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size)
    return LlavaProcessor(pictures, fast, patch_size=14, vision_feature_select_strategy="full", chat_template=template)


def test_a_llava_processor_renders_the_same_way(llava: LlavaProcessor, prompts: list[Prompt]) -> None:
    renderer = Renderer(llava)
    (path,) = (image.path for image in prompts[0].images)
    rendered = renderer.render(asking("color", path, path))
    assert tokens(renderer, rendered.compact_ids) == ["<s>", "USER:", "<image>", "<image>", "color", "ASSISTANT:"]
    assert tokens(renderer, rendered.token_ids) == ["<s>", "USER:", *["<image>"] * 8, "color", "ASSISTANT:"]
    assert {name: tuple(tensor.shape) for name, tensor in rendered.vision.items()} == {"pixel_values": (2, 3, 28, 28)}
    assert tokens(renderer, tuple(renderer.placeholder_token_ids)) == ["<image>"]
    assert renderer.media_types(rendered.token_ids) == [0, 0, *[1] * 8, 0, 0]
