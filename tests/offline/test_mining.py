"""Mining: the attack follows its formula, the filters do what they are called, no kill loses or repeats work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor, nn

from offline.config import MineConfig
from offline.journal import Journal
from offline.mine import mine, rejection_problem, summarise
from offline.negatives import PGD, AnswerAttack, Pictures, image_information_gain, mean_logprobs
from offline.preferences import load_preferences
from rl.batch import Rows
from rl.policy import Model, Policy
from rollout.pixels import PixelPath
from rollout.render import Renderer
from rollout.types import Image, Message, Prompt, Sample

VECTORS = json.loads((Path(__file__).parents[1] / "vectors.json").read_text())
EPS = 8 / 255


# --- the attack


class Linear(nn.Module):
    """A policy whose log-prob is linear in the pixels, so that its gradient is known."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.gradient = nn.Parameter(gradient)

    def forward(self, rows: Rows) -> Tensor:
        scores = [(self.gradient * vision["pixels"]).sum() for vision in rows.vision]
        return torch.stack(scores)[:, None]  # [N, 1]


def as_it_is(pictures: Sequence[Tensor]) -> Mapping[str, Tensor]:
    (picture,) = pictures
    return {"pixels": picture}


def one_token_rows(num_rows: int) -> Rows:
    ids = torch.tensor([1])
    return Rows(context_ids=(ids,) * num_rows, vision=({},) * num_rows, branch_ids=((ids,),) * num_rows)


def test_steps_follow_the_vector() -> None:
    (vector,) = VECTORS["mbpo_pgd"]
    given = vector["inputs"]
    gradient, clean = torch.tensor(given["grad_logp"]), torch.tensor(given["x"])
    attack = AnswerAttack(Linear(gradient), as_it_is, PGD(eps=given["eps"], step_size=given["step"]))
    current: list[Pictures] = [(clean,)]
    for expected in vector["expected"]["x_after_each_step"]:
        current = attack.stepped(current, [(clean,)], one_token_rows(1))
        torch.testing.assert_close(current[0][0], torch.tensor(expected), rtol=0, atol=1e-7)


def test_a_targeted_attack_climbs() -> None:
    gradient = torch.tensor([1.0, -1.0, 0.0])
    attack = AnswerAttack(Linear(gradient), as_it_is, PGD())
    attack.set_mode_targeted_by_label(quiet=True)
    ((picture,),) = attack([(torch.full((3,), 51 / 255),)], one_token_rows(1))
    torch.testing.assert_close(picture * 255, torch.tensor([59.0, 43.0, 51.0]))


def test_a_random_start_is_the_samples_own() -> None:
    attack = AnswerAttack(Linear(torch.zeros(3, 8, 8)), as_it_is, PGD(steps=1, random_start=True))
    clean = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    (a,), (b,) = attack([(clean,), (clean,)], one_token_rows(2), [5, 6])
    ((again,),) = attack([(clean,)], one_token_rows(1), [6])
    assert torch.equal(b, again)
    assert not torch.equal(a, b)
    assert (a - clean).abs().max() <= EPS + 1e-6


@pytest.fixture
def frozen(policy: Policy) -> Policy:
    return policy.requires_grad_(False)


@pytest.fixture
def answered(rows: Rows) -> Rows:
    """The five contexts with pictures, of three sizes, with one answer of 1 to 7 tokens each."""
    return replace(rows.select(range(5)), branch_ids=tuple(branches[:1] for branches in rows.branch_ids[:5]))


@pytest.fixture
def pictures(prompts: list[Prompt], renderer: Renderer) -> list[Pictures]:
    pixels = PixelPath(renderer)
    return [(pixels.resized(renderer.pictures(prompt)[0]).float() / 255,) for prompt in prompts[:5]]


def test_an_attack_lowers_the_log_prob_and_stays_in_the_ball(
    frozen: Policy, renderer: Renderer, answered: Rows, pictures: list[Pictures]
) -> None:
    pixels = PixelPath(renderer)
    frozen.train()
    changed = AnswerAttack(frozen, pixels, PGD())(pictures, answered)
    assert frozen.training  # eval mode was for the attack only
    with torch.no_grad():
        before = mean_logprobs(frozen, answered)
        after = mean_logprobs(frozen, replace(answered, vision=tuple(pixels(each) for each in changed)))
    assert (after < before - 1e-3).all(), (before, after)
    for (clean,), (picture,) in zip(pictures, changed, strict=True):
        assert torch.equal((picture * 255).round() / 255, picture)
        assert (picture - clean).abs().max() <= EPS + 1e-6
        assert 0 <= picture.min() <= picture.max() <= 1


def test_a_batch_equals_one_by_one(
    frozen: Policy, renderer: Renderer, answered: Rows, pictures: list[Pictures]
) -> None:
    """Log-probs and their gradients; a sign of a gradient within rounding of zero may differ, so pixels need not."""
    pixels = PixelPath(renderer)

    def scores_and_gradients(which: Sequence[int]) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [pictures[index][0].clone().requires_grad_() for index in which]
        rows = replace(answered.select(which), vision=tuple(pixels([leaf]) for leaf in leaves))
        scores = mean_logprobs(frozen, rows)
        return scores.detach(), torch.autograd.grad(scores.sum(), leaves)

    together, gradients = scores_and_gradients(range(5))
    for index in range(5):
        alone, (gradient,) = scores_and_gradients([index])
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-5)
        assert (gradient - gradients[index]).abs().max() < 1e-5 * gradient.abs().max()

    attack = AnswerAttack(frozen, pixels, PGD(steps=3))
    for index, (expected,) in enumerate(attack(pictures, answered)):
        ((alone_picture,),) = attack([pictures[index]], answered.select([index]))
        assert (alone_picture != expected).float().mean() < 1e-3


def test_the_gradient_is_that_of_finite_differences(
    frozen: Policy, renderer: Renderer, answered: Rows, pictures: list[Pictures]
) -> None:
    pixels = PixelPath(renderer)
    (picture,) = pictures[1]
    rows = answered.select([1])

    def score(image: Tensor) -> Tensor:
        return mean_logprobs(frozen, replace(rows, vision=(pixels([image]),)))[0]

    leaf = picture.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf), leaf)
    generator = torch.Generator().manual_seed(0)
    for direction in (gradient.sign(), torch.randn(picture.shape, generator=generator) + 0.2 * gradient.sign()):
        step = 2e-3
        with torch.no_grad():
            slope = (score(picture + step * direction) - score(picture - step * direction)) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("change", [{"eps": 0.0}, {"step_size": 0.5}, {"steps": 0}, {"step_size": -0.1}])
def test_an_attack_that_cannot_move_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected 0 < step_size <= eps <= 1 and steps >= 1"):
        PGD(**change)


# --- information gain


@pytest.mark.parametrize("vector", VECTORS["mbpo_iig"], ids=lambda vector: vector["id"])
def test_information_gain_is_the_vectors(vector: dict[str, dict[str, Any]]) -> None:
    seen, blind = (torch.tensor(vector["inputs"][f"logp_tokens_{name}_image"]) for name in ("with", "without"))
    ids = torch.arange(len(seen))
    with_image = Rows(context_ids=(ids,), vision=({"seen": ids},), branch_ids=((ids,),))
    gain = image_information_gain(
        lambda rows: (seen if rows.vision[0] else blind)[None], with_image, replace(with_image, vision=({},))
    )
    assert gain.item() == pytest.approx(vector["expected"]["iig_mean"], abs=1e-6)


# --- the filters


def sample(text: str, num_tokens: int = 2) -> Sample:
    return Sample(token_ids=(1,) * num_tokens, logprobs=None, text=text, finish_reason="stop", policy_version=0)


@pytest.mark.parametrize(
    ("kind", "gold", "text", "num_tokens", "expected"),
    [
        ("multiple_choice", "B", "A", 2, None),
        ("multiple_choice", "B", "The answer is A", 6, None),
        ("multiple_choice", "B", "", 1, "empty"),
        ("multiple_choice", "B", " . ", 2, "empty"),
        ("multiple_choice", "B", "b.", 2, "same_as_chosen"),
        ("multiple_choice", "B", "(B) red", 4, "still_correct"),
        ("multiple_choice", "B", "I\u2019m sorry, I cannot see it", 6, "refusal"),
        ("multiple_choice", "B", "It must be A, I would say", 7, "length_ratio"),
        ("yes_no", "yes", "no", 2, None),
        ("yes_no", "yes", "Yes, it is.", 5, "still_correct"),
        ("yes_no", "no", "I can't help with that.", 5, "refusal"),
        ("count", "7", "8", 2, None),
        ("count", "7", "seven", 2, "still_correct"),
        ("exact", "red", "blue", 2, None),
        ("exact", "red", "**Red**", 4, "same_as_chosen"),
        ("exact", ("red", "crimson"), "crimson", 2, "still_correct"),
        ("exact", "a sorry sight", "sorry sights", 3, "refusal"),
        ("exact", "a red seven on a dark ground", "red", 2, "length_ratio"),
    ],
)
def test_filters(kind: str, gold: str | tuple[str, ...], text: str, num_tokens: int, expected: str | None) -> None:
    choices = ("blue", "red") if kind == "multiple_choice" else ()
    message = Message(role="user", text="what is it?")
    prompt = Prompt(id="p", messages=(message,), answer=gold, kind=kind, choices=choices)
    num_chosen_tokens = 8 if "ground" in gold else 2
    assert rejection_problem(prompt, sample(text, num_tokens), num_chosen_tokens=num_chosen_tokens) == expected


# --- the job


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions about pictures of several sizes, one of them about two pictures, and one about none."""
    folder = tmp_path_factory.mktemp("source")
    random = np.random.default_rng(1)
    rows: list[dict[str, Any]] = []
    for index in range(10):
        size = [(56, 56), (70, 50), (112, 84)][index % 3]
        PIL.Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            folder / f"{index}.png"
        )
        rows.append(
            {"id": f"q/{index}", "image": f"{index}.png", "question": "what color is it?", "kind": "exact"}
            | {"answer": ["red", "green", "blue"][index % 3]}
        )
    rows[4] |= {"images": [rows[4].pop("image"), "3.png"]}
    rows.append({"id": "text", "question": "what color is the seven?", "kind": "exact", "answer": "red"})
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tiny_model: Path, source: Path, tmp_path: Path) -> MineConfig:
    return MineConfig(
        name="pairs",
        model=Model(path=str(tiny_model), dtype="float32"),
        source=source,
        output_dir=tmp_path,
        attack=PGD(steps=2),
        min_information_gain=-100.0,  # a random model learns nothing from a picture
        batch_size=3,
        max_tokens=4,
    )


def journaled(config: MineConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.folder / "journal.jsonl").read_text().splitlines()[1:]]


def test_a_job_writes_pairs_that_load(config: MineConfig, renderer: Renderer) -> None:
    mined = mine(config)
    records = {record["id"]: record for record in journaled(config)}
    assert len(records) == 11
    assert records["text"]["outcome"] == "no_picture"
    pairs = load_preferences(config.folder / "data.jsonl")
    assert mined.pairs == len(pairs) == sum(record["outcome"] == "kept" for record in records.values()) > 2
    assert mined.pairs + sum(mined.dropped.values()) == 11
    assert json.loads((config.folder / "mined_summary.json").read_text())["pairs"] == mined.pairs
    lines = [json.loads(line) for line in (config.folder / "data.jsonl").read_text().splitlines()]
    pixels = PixelPath(renderer)
    for pair, line in zip(pairs, lines, strict=True):
        provenance = line["provenance"]
        assert pair.chosen == pair.prompt.answer
        assert pair.rejected["answer"] == records[pair.prompt.id]["answer"]
        assert provenance["attack"] == {
            "name": "pgd",
            "eps": EPS,
            "step_size": 2 / 255,
            "steps": 2,
            "random_start": False,
        }
        assert provenance["chosen_logprob"]["attacked"] < provenance["chosen_logprob"]["clean"]
        assert len(provenance["model"]) == 64
        assert provenance["clean_answer"] == records[pair.prompt.id]["clean_answer"]
        for image, name in zip(pair.prompt.images, provenance["attacked_images"], strict=True):
            clean = pixels.resized(PIL.Image.open(image.path)).float()
            attacked = torch.tensor(np.asarray(PIL.Image.open(config.folder / name))).permute(2, 0, 1).float()
            assert 0 < (attacked - clean).abs().max() <= 4  # two steps of 2 / 255


def test_the_rejected_answer_is_the_models_own_about_the_attacked_picture(
    config: MineConfig, tiny_model: Path, tmp_path: Path
) -> None:
    """Asked again by stock transformers about the stored PNG, the model gives the stored answer."""
    mine(config)
    policy = config.model.load()
    renderer = Renderer.load(tiny_model)
    for line in map(json.loads, (config.folder / "data.jsonl").read_text().splitlines()):
        names = line["provenance"]["attacked_images"]
        images = tuple(Image(path=config.folder / name) for name in names)
        message = Message(role="user", text=line["question"], images=images)
        context = renderer.render(Prompt(id="again", messages=(message,), answer="red", kind="exact"))
        ids = torch.tensor([context.token_ids])
        output = policy.generate(
            input_ids=ids,
            mm_token_type_ids=torch.tensor([renderer.media_types(context.token_ids)]),
            max_new_tokens=config.max_tokens,
            do_sample=False,
            bad_words_ids=[[token] for token in renderer.placeholder_token_ids],
            **context.vision,
        )
        assert renderer.decode(output[0, ids.shape[1] :].tolist()) == line["rejected"]


def test_success_is_not_what_the_model_got_wrong_anyway() -> None:
    """Four attacked prompts: two were wrong on the clean picture already; of the other two the attack turned one."""
    answers = [(False, False), (False, True), (True, True), (True, False)]
    records = [
        {"id": str(i), "outcome": "kept", "information_gain": 1.0, "clean_correct": before, "correct": after}
        for i, (before, after) in enumerate(answers)
    ]
    unattacked = {"id": "low", "outcome": "low_information_gain", "information_gain": 0.0}
    mined = summarise([*records, unattacked], num_pairs=4, seconds=1.0)
    assert (mined.wrong_before, mined.attack_success, mined.mean_information_gain) == (0.5, 0.5, 0.8)


def test_a_cut_off_keeps_what_gains_enough(config: MineConfig) -> None:
    mine(config)
    gains = sorted(record["information_gain"] for record in journaled(config) if record["id"] != "text")
    threshold = (gains[4] + gains[5]) / 2
    strict = replace(config, name="strict", min_information_gain=threshold)
    assert mine(strict).dropped["low_information_gain"] == 5
    blacks = replace(config, name="black", without_image="black")
    mine(blacks)
    assert sorted(r["information_gain"] for r in journaled(blacks) if r["id"] != "text") != gains


def test_enough_pairs_are_enough_and_more_can_follow(config: MineConfig) -> None:
    few = replace(config, max_pairs=2)
    assert mine(few).pairs == len(load_preferences(few.folder / "data.jsonl")) == 2
    assert len(journaled(few)) < 11
    everything = mine(replace(config, max_pairs=None))
    assert everything == replace(mine(replace(config, name="whole")), seconds=everything.seconds)


def test_a_journal_cut_anywhere_is_continued_to_the_same_data(config: MineConfig) -> None:
    """Inside the header, inside a line, between batches; the first two leave a batch half finished."""
    mine(config)
    journal, data = config.folder / "journal.jsonl", config.folder / "data.jsonl"
    whole, pairs = journal.read_bytes(), data.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (20, ends[1] + 30, ends[3]):
        journal.write_bytes(whole[:cut])
        data.unlink()
        mine(config)
        assert data.read_bytes() == pairs, cut
        assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines()), cut


def test_what_is_finished_is_not_done_again(config: MineConfig) -> None:
    """A record that only the journal knows stays: nothing looked at that prompt again."""
    mine(config)
    journal = config.folder / "journal.jsonl"
    marked = journal.read_text().replace('"outcome": "no_picture"', '"outcome": "marked"')
    journal.write_text(marked)
    assert mine(config).dropped["marked"] == 1
    assert journal.read_text() == marked


def test_another_config_model_or_data_does_not_continue(config: MineConfig, source: Path, tmp_path: Path) -> None:
    mine(config)
    with pytest.raises(ValueError, match=r"journal.jsonl was started with something else:\n  config.seed: was 0, is 1"):
        mine(replace(config, seed=1))
    with pytest.raises(ValueError, match=r"config.attack.steps: was 2, is 3"):
        mine(replace(config, attack=PGD(steps=3)))
    other = config.model.load()
    other.lm_head.weight.data[0, 0] += 1
    changed = tmp_path / "changed"
    shutil.copytree(config.model.path, changed)
    other.save_pretrained(changed)
    with pytest.raises(ValueError, match=r"\n  model: was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        mine(replace(config, model=Model(path=str(changed), dtype="float32")))
    fewer = tmp_path / "fewer"
    shutil.copytree(source.parent, fewer)
    (fewer / source.name).write_text("".join(source.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=r"\n  prompts: was '[0-9a-f]{64}', is '[0-9a-f]{64}'"):
        mine(replace(config, source=fewer / source.name))


def test_two_processes_cannot_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl", {"seed": 0}) as journal:
        journal.append([{"id": "a"}])
        with pytest.raises(ValueError, match="in use by another process"):
            Journal(tmp_path / "journal.jsonl", {"seed": 0})
    with Journal(tmp_path / "journal.jsonl", {"seed": 0}) as journal:
        assert journal.records == {"a": {"id": "a"}}


@pytest.mark.slow
def test_a_killed_job_continues_to_what_an_undisturbed_one_writes(config: MineConfig, tmp_path: Path) -> None:
    """SIGKILL at three moments of a real process, then one run to the end."""
    whole = replace(config, name="whole", attack=PGD(steps=20), batch_size=1)
    mine(whole)
    killed = replace(whole, name="killed")
    settings = tmp_path / "mine.yaml"
    settings.write_text(
        json.dumps(
            {
                "job": "mine",
                "name": "killed",
                "model": {"path": killed.model.path, "dtype": "float32"},
                "source": str(killed.source),
                "output_dir": str(killed.output_dir),
                "attack": {"steps": 20},
                "min_information_gain": -100.0,
                "batch_size": 1,
                "max_tokens": 4,
            }
        )
    )
    command = [sys.executable, "equipoise.py", "mine", str(settings)]
    root = Path(__file__).parents[2]
    journal = killed.folder / "journal.jsonl"
    for num_lines in (1, 4, 8):
        process = subprocess.Popen(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < num_lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (killed.folder / "data.jsonl").exists()
    finished_before = journal.read_bytes()[: journal.read_bytes().rfind(b"\n") + 1]
    subprocess.run(command, cwd=root, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert journal.read_bytes().startswith(finished_before)
    assert (killed.folder / "data.jsonl").read_bytes() == (whole.folder / "data.jsonl").read_bytes()
    assert journal.read_bytes() == (whole.folder / "journal.jsonl").read_bytes()
    images = {path.name for path in (whole.folder / "images").iterdir()}
    assert images <= {path.name for path in (killed.folder / "images").iterdir()}
