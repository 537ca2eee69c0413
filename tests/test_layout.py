"""Folders with splits: train, val and test below one folder, by any name, in every command that takes a folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.cli import app
from foveate.data.folder import open_folder
from foveate.data.images import Preprocess
from foveate.data.layout import splits_in
from foveate.errors import FoveateError, SplitWarning
from foveate.training.recipe import Data, Recipe
from foveate.training.splits import labels_of, open_splits

PREPROCESS = Preprocess((16, 16), (16, 16))


def paint(path: Path, count: int = 1, seed: int = 0) -> None:
    """Images ``0.png``, ``1.png`` ... in a folder."""
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), np.uint8)).save(path / f"{number}.png")


def tree(root: Path, layout: dict[str, int]) -> Path:
    for number, (name, count) in enumerate(layout.items()):
        paint(root / name, count, number)
    return root


WHOLE = {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 1, "test/cat": 1, "test/dog": 3}


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [("train", "val", "test"), ("Training", "VALID", "Testing"), ("TRAIN", "validation", "Test"), ("train", "Dev", "test")],
)
def test_a_recipe_takes_the_splits_of_a_folder_by_any_of_their_names(tmp_path, train, val, test):
    names = {"train": train, "val": val, "test": test}
    root = tree(tmp_path / "mine", {f"{names[a]}/{b}": n for key, n in WHOLE.items() for a, b in [key.split("/")]})
    with pytest.warns(SplitWarning, match=f"trains on {train}/, validates on {val}/, tests on {test}/"):
        splits = open_splits(Recipe(data=Data(train=str(root))), PREPROCESS)
    assert {name: labels_of(split).tolist() for name, split in splits.items()} == {
        "train": [0] * 4 + [1] * 4,
        "val": [0, 0, 1],
        "test": [0, 1, 1, 1],
    }
    assert splits["train"].class_names == ("cat", "dog")


def test_what_a_recipe_names_goes_before_what_the_folder_has(tmp_path):
    root = tree(tmp_path / "mine", WHOLE)
    other = tree(tmp_path / "other", {"cat": 5, "dog": 5})
    with pytest.warns(SplitWarning, match="trains on train/, tests on test/"):
        splits = open_splits(Recipe(data=Data(train=str(root), val=str(other))), PREPROCESS)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 10, "test": 4}
    with pytest.warns(SplitWarning, match="leaves test/ alone"):
        splits = open_splits(Recipe(data=Data(train=str(root), folds=4)), PREPROCESS)
    assert {name: len(split) for name, split in splits.items()} == {"train": 6, "val": 3, "test": 2}
    plain = open_splits(Recipe(data=Data(train=str(root / "train"), val=str(root), test=str(root))), PREPROCESS)
    assert {name: len(split) for name, split in plain.items()} == {"train": 8, "val": 3, "test": 4}


def test_without_validation_a_part_of_train_is_held_out_and_said(tmp_path):
    root = tree(tmp_path / "mine", {"train/cat": 5, "train/dog": 5})
    with pytest.warns(SplitWarning, match="trains on train/, holds 20% of train/ out"):
        splits = open_splits(Recipe(data=Data(train=str(root))), PREPROCESS)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 2}


@pytest.mark.parametrize(
    ("has", "taken", "count"),
    [(WHOLE, "test", 4), ({k: n for k, n in WHOLE.items() if "test" not in k}, "val", 3), ({"train/cat": 2}, "train", 2)],
)
def test_test_is_measured_or_else_val_and_it_is_said(tmp_path, has, taken, count):
    root = tree(tmp_path / "mine", has)
    with pytest.warns(SplitWarning, match=f"and {taken}/ is taken"):
        assert len(open_folder(root, PREPROCESS)) == count
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_folder(root / taken.upper(), PREPROCESS)) == count  # by its name, in any case


def test_a_class_has_one_number_in_all_splits(tmp_path):
    root = tree(tmp_path / "mine", {"train/ant": 1, "train/cat": 1, "train/dog": 1, "test/cat": 1, "test/dog": 2})
    with pytest.warns(SplitWarning):
        whole = open_folder(root, PREPROCESS)
    assert whole.class_names == ("ant", "cat", "dog")
    assert [entry.label for entry in whole.entries] == [1, 2, 2]
    assert [entry.label for entry in open_folder(root / "test", PREPROCESS).entries] == [1, 2, 2]


def test_a_table_in_each_split_is_read(tmp_path):
    for split, lines in {"train": ("0.png,dog", "1.png,cat"), "val": ("0.png,dog",)}.items():
        paint(tmp_path / split, len(lines))
        (tmp_path / split / "labels.csv").write_text("\n".join(("file,name", *lines)))
    with pytest.warns(SplitWarning, match="val/ is taken"):
        assert [entry.label for entry in open_folder(tmp_path, PREPROCESS).entries] == [1]
    with pytest.warns(SplitWarning, match="validates on val/"):
        splits = open_splits(Recipe(data=Data(train=str(tmp_path))), PREPROCESS)
    assert labels_of(splits["train"]).tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore::foveate.errors.SplitWarning")
@pytest.mark.parametrize(
    ("has", "sentence"),
    [
        ({"train/cat": 1, "train/dog": 1, "cat": 1, "dog": 1}, "has train/ as splits, and cat/, dog/ beside"),
        ({"train/cat": 1, "val/cat": 1, "valid/cat": 1}, "val/, valid/, which are both its val split"),
        ({"train": 2, "val": 1}, "train/, val/ of .* hold images of no class"),
        ({"train/cat": 1, "test/cat": 1, "test/emu": 1}, "has the class 'emu', and the training data has not"),
    ],
)
def test_what_is_neither_splits_nor_classes_is_refused(tmp_path, has, sentence):
    with pytest.raises(FoveateError, match=sentence):
        open_splits(Recipe(data=Data(train=str(tree(tmp_path, has)))), PREPROCESS)
    with pytest.raises(FoveateError, match=sentence):
        open_folder(tmp_path, PREPROCESS)


def test_a_class_may_be_called_train_and_a_table_goes_first(tmp_path):
    assert splits_in(tree(tmp_path / "vehicles", {"bus": 2, "train": 2})) == {}
    assert open_folder(tmp_path / "vehicles", PREPROCESS).class_names == ("bus", "train")
    root = tree(tmp_path / "mine", WHOLE)
    (root / "labels.csv").write_text("file,name\ntrain/cat/0.png,cat\n")
    assert splits_in(root) == {} and len(open_folder(root, PREPROCESS)) == 1


def test_test_images_without_classes_are_passed_over_and_named(tmp_path):
    root = tree(tmp_path / "mine", {"train/cat": 2, "train/dog": 2, "test": 3})
    with pytest.warns(SplitWarning, match="test/ holds images of no class, and is passed over"):
        assert set(splits_in(root)) == {"train"}


def test_commands_say_which_split_they_take(tmp_path):
    root = tree(tmp_path / "mine", WHOLE)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    model = [
        "--model",
        "foveate:small_cnn",
        "--num-classes",
        "2",
        "--classes",
        str(tmp_path / "names.txt"),
        "--size",
        "16",
        "--json",
    ]
    more = ["--metrics", "AD", "--methods", "grad_cam", "--out", str(tmp_path / "run")]
    found = CliRunner().invoke(app, ["evaluate", str(root), *model, *more])
    assert found.exit_code == 0 and "test/ is taken; another is named by its folder" in " ".join(found.stderr.split())
    assert json.loads(found.stdout)["table"]["grad_cam"]["AD"]["n"] == 4
    found = CliRunner().invoke(app, ["explain", str(root), *model, "--target", "label", "--out", str(tmp_path / "maps")])
    assert found.exit_code == 0 and "test/ is taken" in found.stderr
    images = json.loads(found.stdout)["images"]
    assert [(Path(image["file"]).parts[-3:-1], image["target"]) for image in images] == [
        (("test", "cat"), 0),
        *[(("test", "dog"), 1)] * 3,
    ]
