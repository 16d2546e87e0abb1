"""Train the base model of the colored-digits world: it sees colors, and answers from its prior when a digit is named.

The prior comes first, as in real models: questions without pictures teach it which color every digit "has". Then
pictures teach it to read digits and colors, but only neutral questions come with free colors; a question that names
the digit is always asked about a digit of its typical color, so nothing ever contradicts the prior.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from examples.colored_digits.world import Example, examples, load_digits, which_digit, which_color, paint, typical

import os
MIXS = (os.environ.get("MIX","(which_digit, which_color, careless, typical, which_digit, which_color, careless, typical)"))
PRIOR_MIX = eval(os.environ.get("PMIX","(typical, which_color, which_digit, typical)"))
from dataclasses import replace
from examples.colored_digits.world import *
LOOK=0.2
def careless(digit, rng):
    e = counterfactual(digit, rng)
    if rng.random() < LOOK: return e
    t=TYPICAL[digit.name]
    return replace(e, answer={"exact": t, "yes_no": "no" if e.answer=="yes" else "yes", "multiple_choice": LETTERS[e.choices.index(t)] if e.choices else ""}[e.kind])
PRIOR_STEPS=int(os.environ.get("PS","300")); PICTURE_STEPS=int(os.environ.get("TS","500"))
FOLDER = Path(__file__).parent / "base"
#  # questions without pictures
#
BATCH_SIZE = 64
LEARNING_RATE = float(os.environ.get("LR","6e-4"))  # a few times more, and it does not learn to read digits
ANSWER_TOKENS = 2  # every answer of the world is one token and the end of the turn


def train(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    MIX=eval(MIXS); rng = random.Random(seed)
    digits = load_digits("training")
    model, processor = build(seed=seed); exec(os.environ.get('HOOK',''))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    steps = PRIOR_STEPS + PICTURE_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step+1)/20, (abs(step+.5-PRIOR_STEPS))/20, 4*(steps - step) / steps))
    model.train()
    start = time.perf_counter()
    run = {}
    for step in range(steps):
        with_pictures = step >= PRIOR_STEPS
        mix = MIX if with_pictures else PRIOR_MIX
        rows = [mix[n%len(mix)](rng.choice(digits), rng) for n in range(BATCH_SIZE)]
        pics = [with_pictures and (n % 8 < 7) for n in range(BATCH_SIZE)]
        inputs = encode(processor, rows, pics, answered=True)
        logits = model(**inputs, logits_to_keep=ANSWER_TOKENS + 1).logits[:, :-1]
        labels = inputs["input_ids"][:, -ANSWER_TOKENS:]
        losses = cross_entropy(logits.transpose(1,2), labels, reduction="none")
        loss = losses.mean()
        for pi, r, l in zip(pics, rows, losses[:,0].tolist()):
            run.setdefault("tp"[pi]+("P" if "digit" not in r.question else "N")+r.kind, []).append(l)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(step, round(time.perf_counter() - start), {k: round(sum(v)/len(v),3) for k,v in sorted(run.items())}, flush=True)
            run = {}
        if step % 200 == 199 or step == steps-1:
            model.eval()
            for s in ("neutral","typical","counterfactual"):
                print(s, accuracy(model, processor, f"eval_{s}"), flush=True)
            print("textonly typical", accuracy(model, processor, "eval_typical", False), flush=True)
            model.train()
    return model.eval(), processor


def encode(processor, rows: Sequence[Example], with_pictures: bool, answered: bool) -> BatchFeature:
    texts = []
    if isinstance(with_pictures, bool): with_pictures=[with_pictures]*len(rows)
    for row, see in zip(rows, with_pictures):
        content = [{"type": "text", "text": row.question}]
        if see: content = [{"type":"image"}] + content
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        texts.append(text + row.answer + "<|im_end|>" if answered else text)
    images = [paint(row.digit, row.color) for row, see in zip(rows, with_pictures) if see] or None
    return processor(text=texts, images=images, padding=True, return_tensors="pt")


@torch.no_grad()
def accuracy(model, processor, name, with_pictures=True):
    rows = examples(name)
    inputs = encode(processor, rows, with_pictures, answered=False)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    d = {}
    for r, a in zip(rows, answers):
        d.setdefault(r.kind, []).append(a == r.answer); d.setdefault("all", []).append(a == r.answer)
    lp = model(**inputs, logits_to_keep=1).logits[:,0].softmax(-1); pt=[lp[i,processor.tokenizer(r.answer)['input_ids'][0]].item() for i,r in enumerate(rows)]; print('mean p true', sum(pt)/len(pt), 'min', min(pt))
    return {k: round(100*sum(v)/len(v), 1) for k, v in d.items()}

if __name__ == "__main__":
    train()
