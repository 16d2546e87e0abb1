"""Shared by every test: one tiny model on disk, its renderer, a few real pictures; and no leaks between tests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2  # noqa: F401  transformers' processors import it, which sets LD_LIBRARY_PATH: before any test looks
import numpy as np
import PIL.Image
import psutil
import pytest
import torch
from torch import distributed

from examples.colored_digits.model import build
from rl.batch import Rows
from rl.policy import Model, Policy
from rollout.render import Renderer
from rollout.types import Image, Message, Prompt

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen2.5-VL of 0.4 M parameters as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("tiny_model")
    model, processor = build(hidden_size=64, text_layers=2, vision_layers=1, seed=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer.load(tiny_model)


@pytest.fixture
def policy(tiny_model: Path, renderer: Renderer) -> Policy:
    config = Model(path=str(tiny_model), dtype="float32")
    return Policy(config.load(), config, renderer.placeholder_token_ids)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Six prompts: pictures of three sizes, and one without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    made = []
    for index, (width, height) in enumerate([(56, 56), (84, 56), (56, 84), (56, 56), (112, 112)]):
        path = folder / f"{index}.png"
        PIL.Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
        made.append(question(f"picture-{index}", "what color is the " + "very " * index + "digit?", path))
    return [*made, question("text", "what color is the seven?", None)]


def question(name: str, text: str, picture: Path | None, answer: str = "red") -> Prompt:
    images = (Image(path=picture),) if picture else ()
    return Prompt(id=name, messages=(Message(role="user", text=text, images=images),), answer=answer, kind="exact")


@pytest.fixture(scope="session")
def rows(prompts: list[Prompt], renderer: Renderer) -> Rows:
    """Six contexts with 1 to 5 answers of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(0)
    contexts = [renderer.render(prompt) for prompt in prompts]
    branches = []
    for index in range(len(prompts)):
        lengths = torch.randint(1, 8, (1 + index % 5,), generator=generator).tolist()
        branches.append(tuple(torch.randint(10, 200, (length,), generator=generator) for length in lengths))
    return Rows(
        context_ids=tuple(torch.tensor(context.token_ids) for context in contexts),
        vision=tuple(context.vision for context in contexts),
        branch_ids=tuple(branches),
    )


@pytest.fixture
def data(tmp_path: Path, prompts: list[Prompt]) -> Path:
    """Prompts and pairs about the shared pictures, in one folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for prompt in prompts:
        row: dict[str, object] = {"id": prompt.id, "question": prompt.messages[-1].text}
        if prompt.images:
            shutil.copy(prompt.images[0].path, folder)
            row["image"] = prompt.images[0].path.name
        rows.append(row)
    pairs = [{**row, "chosen": "red", "rejected": "blue"} for row in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    closed = [{**row, "kind": "exact", "answer": "red"} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in closed))
    return folder


MEASURED = pytest.StashKey[list[str]]()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Note a number that a test checks; the run ends with a list of them."""
    notes = request.config.stash.setdefault(MEASURED, [])
    return lambda what, value: notes.append(f"{what}: {value:.1e}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if notes := config.stash.get(MEASURED, []):
        terminalreporter.section("measured: largest differences")
        for note in notes:
            terminalreporter.line(note)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """A test that leaves an environment variable, a process group or a child process behind fails.

    What a fixture of the whole file holds is there before the test and not looked into: its Ray may start workers.
    """
    environment, group_was_open = dict(os.environ), distributed.is_initialized()
    children = set(psutil.Process().children())
    yield
    changed = {key for key in {**environment, **os.environ} if environment.get(key) != os.environ.get(key)}
    changed -= {"PYTEST_CURRENT_TEST"}
    assert not changed, f"environment variables changed: {sorted(changed)}"
    assert group_was_open or not distributed.is_initialized(), "a process group was left open"
    left = set(psutil.Process().children()) - children
    assert not left, f"child processes were left running: {left}"
