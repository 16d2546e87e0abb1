"""Mine hard-negative pairs: attack each picture, and reject what the model itself then answers from its prior (MBPO).

Prompts with right answers go in. One that the picture helps to answer (image information gain) has its picture
attacked until the right answer becomes unlikely; the model's greedy answer from that picture is the rejected one, the
right answer is the chosen one, and both are stored with the clean picture.

A batch of prompts is the unit of work and is always made of the same prompts, so rounding does not depend on where a
killed job was taken up again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from offline.config import MineConfig
from offline.journal import Journal, write_atomically
from offline.negatives import AnswerAttack, Pictures, image_information_gain, mean_logprobs
from offline.preferences import Preference, preference_row, write_preferences
from rewards.text import normalised
from rewards.verifiers import gold_problem, question_of, verify
from rl.batch import Rows
from rl.config import plain
from rl.policy import Policy
from rollout.hf_engine import HFEngine
from rollout.pixels import PixelPath, to_picture
from rollout.prompts import fingerprint, load_prompts
from rollout.render import Rendered, Renderer
from rollout.types import Image, Prompt, Sample, Sampling

KEPT = "kept"
LONGEST_RATIO = 3.0  # of the lengths of a pair's answers, in tokens, either way round
REFUSAL = re.compile(  # how a normalised answer begins
    r"(i'm |i am )?(very |so |really )?(sorry|unable to|not able to)\b"
    r"|i (can't|cannot|can not|won't|will not|don't know)\b|i apologi[sz]e\b|as an ai\b"
    r"|(it is|it's) (impossible|not possible) to\b"
)
DOES_NOT_CHANGE_RECORDS = {"name", "output_dir", "prepare", "max_pairs"}  # keys of the config

Record = dict[str, Any]  # a line of the journal


@dataclass(frozen=True, slots=True, kw_only=True)
class Mined:
    """What a job made of its prompts; also written to mined_summary.json."""

    pairs: int
    dropped: Mapping[str, int]  # reason -> prompts
    mean_information_gain: float  # nats per answer token, over every prompt with a picture
    wrong_before: float  # share of attacked prompts that the model answered wrongly from the clean picture already
    attack_success: float  # of those it had answered rightly, the share it answers wrongly from the attacked picture
    seconds: float  # of this process


def mine(config: MineConfig) -> Mined:
    """Run the job, or continue it: what the journal of its folder holds is not done again.

    Raises:
        ValueError: unusable prompts, a model whose pictures cannot be attacked, or a folder that was begun with
            another configuration, other prompts or other weights.
    """
    start = time.perf_counter()
    miner = Miner(config)
    prompts = load_prompts(config.source, check=miner.problem, on_bad_rows=config.on_bad_rows, limits=config.pixels)
    header = {
        "config": {key: value for key, value in plain(config).items() if key not in DOES_NOT_CHANGE_RECORDS},
        "model": miner.fingerprint,
        "prompts": fingerprint(prompts),
    }
    with Journal(config.folder / "journal.jsonl", header) as journal:
        examine(miner, prompts, journal, config)
        records = [journal.records[prompt.id] for prompt in prompts if prompt.id in journal.records]
    pairs = list(islice((record["pair"] for record in records if record["outcome"] == KEPT), config.max_pairs))
    write_preferences(config.folder / "data.jsonl", pairs)
    mined = summarise(records, len(pairs), time.perf_counter() - start)
    summary = json.dumps(asdict(mined), indent=2)
    write_atomically(config.folder / "mined_summary.json", summary.encode())
    Console(soft_wrap=True).print(f"{summary}\nwritten to {config.folder.resolve()}", highlight=False)
    return mined


def examine(miner: Miner, prompts: Sequence[Prompt], journal: Journal, config: MineConfig) -> None:
    """Put a record of every prompt into the journal, batch by batch, until there are enough pairs."""
    columns = TextColumn("mining"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[kept]} kept")
    console = Console()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(prompts), kept=0)
        for first in range(0, len(prompts), config.batch_size):
            batch = prompts[first : first + config.batch_size]
            kept = sum(record["outcome"] == KEPT for record in journal.records.values())
            progress.update(task, completed=first, kept=kept)
            if config.max_pairs is not None and kept >= config.max_pairs:
                return
            missing = {prompt.id for prompt in batch} - journal.records.keys()
            if missing:
                journal.append([record for record in miner.examine(batch) if record["id"] in missing])
        progress.update(task, completed=len(prompts))


class Miner:
    """The model that is asked, attacked and asked again, with everything it needs."""

    def __init__(self, config: MineConfig) -> None:
        self.config = config
        self.renderer = Renderer.load(config.model.path, revision=config.model.revision, limits=config.pixels)
        policy = Policy(config.model.load(), config.model, sorted(self.renderer.placeholder_token_ids))
        self.policy = policy.to("cuda" if torch.cuda.is_available() else "cpu").eval().requires_grad_(False)
        self.fingerprint = weights_fingerprint(policy)
        self.pixels = PixelPath(self.renderer)
        self.attack = AnswerAttack(self.policy, self.pixels, config.attack)
        self.engine = HFEngine(policy.model, self.renderer, config.batch_size)
        # An attacked picture has the size the model sees; it is shown as it is.
        as_it_is = replace(config.pixels, min_pixels=1, max_pixels=config.pixels.max_source_pixels)
        shown_as_it_is = Renderer.load(config.model.path, revision=config.model.revision, limits=as_it_is)
        self.engine_of_attacked = HFEngine(policy.model, shown_as_it_is, config.batch_size)

    def problem(self, prompt: Prompt) -> str | None:
        """Why nothing can be mined from `prompt`."""
        return gold_problem(prompt) or self.renderer.problem(prompt)

    def examine(self, prompts: Sequence[Prompt]) -> list[Record]:
        """One record per prompt, in their order: what was measured, and the pair or the reason there is none."""
        seen = [prompt for prompt in prompts if prompt.images]
        gains = dict(zip([prompt.id for prompt in seen], self.information_gains(seen), strict=True))
        useful = [prompt for prompt in seen if gains[prompt.id] >= self.config.min_information_gain]
        records: dict[str, Record] = {
            prompt.id: {"id": prompt.id, "outcome": "no_picture", "information_gain": None} for prompt in prompts
        }
        for name, gain in gains.items():
            records[name] |= {"outcome": "low_information_gain", "information_gain": gain}
        for record in self.attacked(useful, gains):
            records[record["id"]] = record
        return list(records.values())

    def information_gains(self, prompts: Sequence[Prompt]) -> list[float]:
        """What the picture is worth to the right answer, in nats per token."""
        if not prompts:
            return []
        without = [self.rendered_without_image(prompt) for prompt in prompts]
        return image_information_gain(self.policy, self.rows(prompts), self.rows(prompts, without)).tolist()

    def attacked(self, prompts: Sequence[Prompt], gains: Mapping[str, float]) -> list[Record]:
        """Attack, let the model answer, and judge its answers."""
        if not prompts:
            return []
        rows = self.rows(prompts)
        clean = [tuple(self.pixels.resized(p).float() / 255 for p in self.renderer.pictures(q)) for q in prompts]
        changed: list[Pictures] = self.attack(clean, rows, [self.seed(prompt) for prompt in prompts])
        names = [[self.stored(png(picture), ".png") for picture in pictures] for pictures in changed]
        greedy = Sampling(temperature=0.0, max_tokens=self.config.max_tokens)
        clean_groups = self.engine.generate(prompts, greedy)
        groups = self.engine_of_attacked.generate(
            [with_images(prompt, self.config.folder, shown) for prompt, shown in zip(prompts, names, strict=True)],
            greedy,
        )
        with torch.no_grad():
            before = mean_logprobs(self.policy, rows).tolist()
            vision = tuple(self.pixels(pictures) for pictures in changed)
            after = mean_logprobs(self.policy, replace(rows, vision=vision)).tolist()
        records = []
        for prompt, group, clean_group, shown, b, a in zip(
            prompts, groups, clean_groups, names, before, after, strict=True
        ):
            measured = {
                "information_gain": gains[prompt.id],
                "chosen_logprob": {"clean": b, "attacked": a},
                "clean_answer": clean_group.samples[0].text,
                "clean_correct": is_correct(prompt, clean_group.samples[0].text),
            }
            records.append(self.judged(prompt, group.samples[0], shown, measured))
        return records

    def judged(self, prompt: Prompt, sample: Sample, shown: Sequence[str], measured: Mapping[str, object]) -> Record:
        """The record of one attacked prompt."""
        chosen = chosen_answer(prompt)
        reason = rejection_problem(prompt, sample, num_chosen_tokens=len(self.renderer.encode_answer(chosen)))
        record: Record = {
            "id": prompt.id,
            "outcome": reason or KEPT,
            "answer": sample.text,
            "correct": is_correct(prompt, sample.text),
            **measured,
        }
        if reason is not None:
            return record
        provenance = {
            "source": prompt.source,
            "model": self.fingerprint,
            "attack": asdict(self.config.attack),
            "attacked_images": list(shown),
            "seed": self.seed(prompt),
            "without_image": self.config.without_image,
            **measured,
            "rejected_by": {
                "temperature": 0.0,
                "max_tokens": self.config.max_tokens,
                "finish_reason": sample.finish_reason,
            },
        }
        images = [self.stored(image.path.read_bytes(), image.path.suffix) for image in prompt.images]
        preference = Preference(prompt=prompt, chosen=chosen, rejected={"answer": sample.text})
        return record | {"pair": preference_row(preference, images, provenance)}

    def rows(self, prompts: Sequence[Prompt], contexts: Sequence[Rendered] | None = None) -> Rows:
        """One row per prompt with the chosen answer as its branch."""
        contexts = contexts or [self.renderer.render(prompt) for prompt in prompts]
        answers = [self.renderer.encode_answer(chosen_answer(prompt)) for prompt in prompts]
        return Rows(
            context_ids=tuple(torch.tensor(context.token_ids) for context in contexts),
            vision=tuple(context.vision for context in contexts),
            branch_ids=tuple((torch.tensor(answer),) for answer in answers),
        )

    def rendered_without_image(self, prompt: Prompt) -> Rendered:
        """The same question behind no picture at all, or behind a black one."""
        if self.config.without_image == "black":
            black = [PIL.Image.new("RGB", picture.size) for picture in self.renderer.pictures(prompt)]
            return self.renderer.render(prompt, images=black)
        messages = tuple(replace(message, images=()) for message in prompt.messages)
        return self.renderer.render(replace(prompt, messages=messages))

    def stored(self, content: bytes, suffix: str) -> str:
        """Keep a picture in the data set, named by its content: storing it again changes nothing."""
        name = f"images/{hashlib.sha256(content).hexdigest()[:24]}{suffix}"
        path = self.config.folder / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
        return name

    def seed(self, prompt: Prompt) -> int:
        """Of a random start: the prompt's own, wherever it stands."""
        digest = hashlib.sha256(f"{self.config.seed}/{prompt.id}".encode()).digest()
        return int.from_bytes(digest[:6], "big")


def rejection_problem(prompt: Prompt, sample: Sample, *, num_chosen_tokens: int) -> str | None:
    """Why a model's answer cannot be the rejected one; None if it can."""
    text = normalised(sample.text)
    ratio = len(sample.token_ids) / num_chosen_tokens
    checks = {
        "empty": not text,
        "refusal": REFUSAL.match(text) is not None,
        "same_as_chosen": text == normalised(chosen_answer(prompt)),
        "still_correct": is_correct(prompt, sample.text),
        "length_ratio": not 1 / LONGEST_RATIO <= ratio <= LONGEST_RATIO,
    }
    return next((reason for reason, holds in checks.items() if holds), None)


def is_correct(prompt: Prompt, answer: str) -> bool:
    verdict = verify(prompt.kind, answer, prompt.answer, choices=prompt.choices, question=question_of(prompt))
    return verdict.score > 0


def chosen_answer(prompt: Prompt) -> str:
    """The right answer; the first where several are right."""
    return prompt.answer if isinstance(prompt.answer, str) else prompt.answer[0]


def with_images(prompt: Prompt, folder: Path, names: Sequence[str]) -> Prompt:
    """The same conversation about other pictures, as many as it had."""
    left = iter(names)
    messages = tuple(
        replace(message, images=tuple(Image(path=folder / next(left)) for _ in message.images))
        for message in prompt.messages
    )
    return replace(prompt, messages=messages)


def png(picture: Tensor) -> bytes:
    """A picture of whole grey levels in [0, 1], [3, H, W], without loss."""
    content = io.BytesIO()
    to_picture((picture * 255).round().to(torch.uint8)).save(content, format="PNG")
    return content.getvalue()


def weights_fingerprint(policy: Policy) -> str:
    """SHA-256 over the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(policy.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def summarise(records: Sequence[Record], num_pairs: int, seconds: float) -> Mined:
    gains = [record["information_gain"] for record in records if record["information_gain"] is not None]
    attacked = [record for record in records if "correct" in record]
    right_before = [record for record in attacked if record["clean_correct"]]
    return Mined(
        pairs=num_pairs,
        dropped=dict(Counter(record["outcome"] for record in records if record["outcome"] != KEPT)),
        mean_information_gain=sum(gains) / max(1, len(gains)),
        wrong_before=1 - len(right_before) / max(1, len(attacked)),
        attack_success=sum(not record["correct"] for record in right_before) / max(1, len(right_before)),
        seconds=round(seconds, 1),
    )
