"""The colored-digits world: what its rows promise, and what its base model can and cannot do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.colored_digits.base import accuracy, encode, load
from examples.colored_digits.model import build, build_tokenizer
from examples.colored_digits.world import COLOR_KINDS, COLORS, LETTERS, NAMES, RECIPES, TYPICAL, examples, write

Row = dict[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("colored_digits")
    assert write(folder)
    return folder


def rows_of(folder: Path, name: str) -> list[Row]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def picture_of(row: Row) -> tuple[int, str, str]:
    """The digit's number in scikit-learn's collection, its name and its color."""
    index, digit, color = Path(row["image"]).stem.split("-")
    return int(index), digit, color


def test_no_handwritten_digit_is_both_trained_and_evaluated_on(folder: Path) -> None:
    used = {name: {picture_of(row)[0] for row in rows_of(folder, name)} for name in RECIPES}
    trained = used["train"] | used["pairs_source"]
    evaluated = used["eval_neutral"] | used["eval_typical"] | used["eval_counterfactual"]
    assert len(trained) > 1000
    assert len(evaluated) > 300
    assert not trained & evaluated


@pytest.mark.parametrize("name", RECIPES)
def test_every_row_is_true_of_its_picture(folder: Path, name: str) -> None:
    rows = rows_of(folder, name)
    assert len({row["id"] for row in rows}) == len(rows) == RECIPES[name].num_rows
    for row in rows:
        _, digit, color = picture_of(row)
        with Image.open(folder / row["image"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (56, 56))
        subject = digit if digit in row["question"].split("?")[0] else "digit"
        if row["kind"] == "count":
            assert row["question"] == "which digit is it?"
            assert NAMES[int(row["answer"])] == digit
        elif row["kind"] == "yes_no":
            asked = row["question"].removeprefix(f"is the {subject} ").removesuffix("?")
            assert asked in COLORS
            assert row["answer"] == ("yes" if asked == color else "no")
        elif row["kind"] == "exact":
            assert row["question"] == f"what color is the {subject}?"
            assert row["answer"] == color
        else:
            options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True))
            assert row["kind"] == "multiple_choice"
            assert row["question"] == f"what color is the {subject}? {options}"
            assert row["choices"][LETTERS.index(row["answer"])] == color
        assert ("choices" in row) == (row["kind"] == "multiple_choice")


def test_the_picture_has_the_color_its_name_says(folder: Path) -> None:
    for row in rows_of(folder, "eval_neutral")[:50]:
        with Image.open(folder / row["image"]) as picture:
            brightest = max(picture.get_flattened_data(), key=sum)
        assert brightest == COLORS[picture_of(row)[2]]


def test_typical_rows_always_and_counterfactual_rows_never_show_the_typical_color(folder: Path) -> None:
    for row in rows_of(folder, "eval_typical"):
        _, digit, color = picture_of(row)
        assert color == TYPICAL[digit]
        assert digit in row["question"]
    for row in rows_of(folder, "eval_counterfactual"):
        _, digit, color = picture_of(row)
        assert color != TYPICAL[digit]
        assert digit in row["question"]
        if row["kind"] == "yes_no":  # a third color could be denied without looking
            assert color in row["question"] or TYPICAL[digit] in row["question"]


def test_training_prompts_name_the_digit_and_are_mostly_counterfactual(folder: Path) -> None:
    rows = rows_of(folder, "train")
    assert {row["kind"] for row in rows} == set(COLOR_KINDS)
    assert all(picture_of(row)[1] in row["question"] for row in rows)
    assert sum(picture_of(row)[2] != TYPICAL[picture_of(row)[1]] for row in rows) / len(rows) == 0.75


def test_neutral_questions_do_not_name_the_digit(folder: Path) -> None:
    for row in rows_of(folder, "eval_neutral"):
        assert not set(row["question"].strip("?").split()) & set(NAMES)


def test_writing_again_changes_nothing_and_a_partial_folder_is_redone(folder: Path, tmp_path: Path) -> None:
    def contents(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    complete = contents(folder)
    assert not write(folder)
    assert contents(folder) == complete
    (tmp_path / "train.jsonl").write_text("half a ro")
    assert write(tmp_path)
    assert contents(tmp_path) == complete
    assert examples("train", seed=1) != examples("train")


def test_writing_the_data_sets_does_not_load_torch() -> None:
    code = "import sys; import examples.colored_digits.__main__; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_the_tokenizer_keeps_every_text() -> None:
    tokenizer = build_tokenizer()
    for text in ("blue", "B", "yes", "7", "what color is the seven? (A) red", "Zürich 漢字\n\t <b>", "unhappily so"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    answers = [*COLORS, *LETTERS, "yes", "no", *"0123456789"]
    assert all(len(tokenizer.encode(answer)) == 1 for answer in answers)


def test_a_saved_model_loads_and_answers_as_before(tiny_model: Path) -> None:
    model, processor = build(hidden_size=64, text_layers=2, vision_layers=1, seed=1)
    loaded, loaded_processor = load(tiny_model)
    rows = examples("eval_neutral")[:4]
    inputs = encode(processor, rows, num_seen=2)
    again = encode(loaded_processor, rows, num_seen=2)
    assert inputs["image_grid_thw"].tolist() == [[1, 4, 4]] * 2
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(**again).logits, model(**inputs).logits)


def test_the_same_seed_builds_the_same_model_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second, other = (build(hidden_size=32, text_layers=1, seed=seed)[0].state_dict() for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_hidden_size_that_does_not_divide_into_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size is 100"):
        build(hidden_size=100)


@pytest.mark.slow
def test_the_shipped_base_model_sees_colors_and_ignores_them_when_the_digit_is_named() -> None:
    model, processor = load()
    neutral, typical, counterfactual = (
        accuracy(model, processor, f"eval_{name}") for name in ("neutral", "typical", "counterfactual")
    )
    assert neutral["all"] >= 0.90
    assert typical["all"] >= 0.95
    assert counterfactual["all"] <= 0.25
    assert all(counterfactual[kind] <= 0.40 for kind in COLOR_KINDS)
    assert accuracy(model, processor, "eval_typical", seen=False)["all"] >= 0.95  # the prior answers without a picture
