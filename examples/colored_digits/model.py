"""A Qwen2.5-VL of about a million random parameters, with its tokenizer and processor, made in code."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from examples.colored_digits.world import COLORS, LETTERS, NAMES

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Every other text is spelled in single bytes.
WORDS = (
    *COLORS,
    *NAMES,
    *("yes", "no", "what", "which", "color", "digit", "number", "is", "the", "this", "it", "in", "of"),
    *("user", "assistant", "system", "answer", "with", "a", "letter", "look", "picture", "image", "shown", "or"),
)
PATCH_SIZE, MERGE_SIZE, HEAD_SIZE = 14, 2, 32

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'text' %}
{{- part['text'] }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def build(
    *, hidden_size: int = 128, text_layers: int = 4, vision_layers: int = 2, seed: int = 0
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """A model with random float32 weights and its processor; `hidden_size` is a multiple of 32.

    `save_pretrained` of both into one folder makes a checkpoint that transformers and vLLM load like any other.

    >>> model, processor = build(hidden_size=64, text_layers=2)
    """
    if hidden_size % HEAD_SIZE or hidden_size < HEAD_SIZE:
        raise ValueError(f"hidden_size is {hidden_size}; it must be a positive multiple of the head size {HEAD_SIZE}")
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_config(tokenizer, hidden_size, text_layers, vision_layers))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), _processor(tokenizer)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, with and without a space before it, and one per byte: any text round-trips."""
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    cased = [*WORDS, *(word.capitalize() for word in WORDS), *LETTERS, "("]
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *byte_tokens, *cased, *(f"Ġ{word}" for word in cased)])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        additional_special_tokens=list(SPECIAL_TOKENS),
        clean_up_tokenization_spaces=False,
    )


def _processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLProcessor:
    patches = {"patch_size": PATCH_SIZE, "merge_size": MERGE_SIZE}
    # The world's 56x56 pictures pass unresized, as 4 image tokens; a picture of any other size becomes 1 to 16.
    size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches, size=size),
        chat_template=CHAT_TEMPLATE,
    )


def _config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, text_layers: int, vision_layers: int
) -> Qwen2_5_VLConfig:
    special = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    num_heads = hidden_size // HEAD_SIZE
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": text_layers,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_heads,
            "max_position_embeddings": 1024,
            "initializer_range": 0.05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": None,
            "eos_token_id": special["<|im_end|>"],
            "pad_token_id": special["<|endoftext|>"],
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_heads": num_heads,
            "out_hidden_size": hidden_size,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "window_size": 112,
            "initializer_range": 0.08,
            "fullatt_block_indexes": list(range(vision_layers)),
        },
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
    )
