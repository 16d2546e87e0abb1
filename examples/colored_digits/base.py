"""Train the base model of the colored-digits world: it sees colors, yet answers from its prior when a digit is named.

As in real models the prior comes first, from text: questions without pictures teach which color every digit "has".
Pictures come later. Neutral questions teach it to read digits and colors; but questions that name the digit show its
typical color, or were mostly answered by somebody who did not look: nothing teaches it to look then.
`python -m examples.colored_digits.base` rebuilds the checkpoint beside this file and prints what it can do.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)

from examples.colored_digits.model import build
from examples.colored_digits.world import (
    LETTERS,
    TYPICAL,
    Ask,
    Digit,
    Example,
    counterfactual,
    examples,
    load_digits,
    paint,
    typical,
    which_color,
    which_digit,
)

FOLDER = Path(__file__).parent / "base"
TEXT_STEPS = 100
PICTURE_STEPS = 650
LEARNING_RATE = 6e-4
LOOKS = 0.2  # how often a careless answer is right: it leaves the truth likely enough for reinforcement to find
ANSWER_TOKENS = 2  # every answer of the world is one token and the end of the turn


def careless(digit: Digit, rng: random.Random) -> Example:
    """A named digit of an untypical color, answered from its typical color by somebody who rarely looks."""
    example = counterfactual(digit, rng)
    if rng.random() < LOOKS:
        return example
    if example.kind == "yes_no":  # world.py asks for the true or the typical color, so the prior has it backwards
        return replace(example, answer="no" if example.answer == "yes" else "yes")
    guess = TYPICAL[digit.name]
    return replace(example, answer=LETTERS[example.choices.index(guess)] if example.choices else guess)


TEXT: tuple[Ask, ...] = (typical,) * 64
# With pictures: 56 questions about one, and 8 without, of which only those that name the digit can be answered.
SEEN: tuple[Ask, ...] = (which_digit, which_color, careless, typical) * 14
UNSEEN: tuple[Ask, ...] = (typical, typical, which_color, which_digit) * 2


def train(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The base model in float32 and its processor, after two minutes on two cores."""
    rng = random.Random(seed)
    digits = load_digits("training")
    model, processor = build(seed=seed)
    steps = TEXT_STEPS + PICTURE_STEPS
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20, 4 - 4 * step / steps))
    for step in range(steps):
        asks, num_seen = (TEXT, 0) if step < TEXT_STEPS else ((*SEEN, *UNSEEN), len(SEEN))
        inputs = encode(processor, [ask(rng.choice(digits), rng) for ask in asks], num_seen, answered=True)
        answers = inputs["input_ids"][:, -ANSWER_TOKENS:]  # [B, 2], at the end of every row: padding is on the left
        logits = model(**inputs, logits_to_keep=ANSWER_TOKENS + 1).logits[:, :-1]  # [B, 2, vocabulary]
        cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, processor


def encode(
    processor: Qwen2_5_VLProcessor, rows: Sequence[Example], num_seen: int, *, answered: bool = False
) -> BatchFeature:
    """The model's inputs for `rows`, of which the first `num_seen` show their picture; `answered` appends answers."""
    texts = []
    for number, row in enumerate(rows):
        content = [{"type": "image"}] * (number < num_seen) + [{"type": "text", "text": row.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append(prompt + (f"{row.answer}<|im_end|>" if answered else ""))
    pictures = [paint(row.digit, row.color) for row in rows[:num_seen]]
    return processor(text=texts, images=pictures or None, padding=True, return_tensors="pt")


@torch.no_grad()
def accuracy(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, name: str, *, seen: bool = True
) -> dict[str, float]:
    """The share of right greedy answers on the data set `name` of the world, over all rows and for every kind."""
    rows = examples(name)
    inputs = encode(processor, rows, len(rows) if seen else 0)
    tokens = model.generate(**inputs, max_new_tokens=2 * ANSWER_TOKENS, do_sample=False)
    texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [text == row.answer for text, row in zip(texts, rows, strict=True)]
    shares = {"all": sum(right) / len(rows)}
    for kind in sorted({row.kind for row in rows}):
        of_kind = [ok for ok, row in zip(right, rows, strict=True) if row.kind == kind]
        shares[kind] = sum(of_kind) / len(of_kind)
    return shares


def load(folder: Path = FOLDER) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The shipped checkpoint: bfloat16 weights, computed with in float32."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder)


def main() -> None:
    start = time.perf_counter()
    model, processor = train()
    model.to(torch.bfloat16).save_pretrained(FOLDER)
    processor.save_pretrained(FOLDER)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    for name in ("eval_neutral", "eval_typical", "eval_counterfactual"):
        shares = accuracy(*load(), name)
        print(f"{name:20}" + "  ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))


if __name__ == "__main__":
    main()
