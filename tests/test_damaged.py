"""Every file of a training run, damaged in every way: one sentence that names it, never a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from foveate import cli
from foveate.batch import Batch
from foveate.cli import options
from foveate.data import scenes
from foveate.errors import FoveateError
from foveate.models.small import small_cnn
from foveate.report import training
from foveate.training import saved as trained
from foveate.training.compare import compare
from foveate.training.film import Film
from foveate.training.recipe import read_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a finished run leaves it, without the training."""
    folder = tmp_path_factory.mktemp("run")
    recipe = read_recipe("scenes_cam_loss", {"model": "foveate:small_cnn"})
    model = small_cnn(2).eval()
    history = [{"epoch": e, "train_loss": 0.5, "val_accuracy": 0.5, "cam_loss": 0.1, "train_accuracy": 0.5} for e in (1, 2)]
    group = {"count": 2, "accuracy": 0.5}
    cell = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 2.0}
    record = {"name": "run", "seed": 0, "epoch": 2, "seconds": 1.0, "outputs": 2, "class_names": ["leopard", "orca"]}
    record |= {"accuracy": {"train": 0.9, "val": 0.5, "test": 0.2}, "groups": {"test": {"orca on grass": group}}}
    record |= {"maps": {"val": {"mass_inside": cell, "AD": cell}}, "worst_group": {"name": "orca on grass", **group}}
    film = Film(Batch(torch.rand(2, 3, 48, 48), torch.tensor([0, 1]), torch.ones(2, 48, 48)), class_names=("leopard", "orca"))
    film.shoot(model, 1)
    film.shoot(model, 2)
    film.save(folder / "film.npz")
    trained.save(folder, model, recipe.model_dump(mode="json"), history, record)
    return folder


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(500))


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(0, len(content), 7):
        content[place] ^= 0x15
    path.write_bytes(bytes(content))


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": text(""),
    "half": half,
    "noise": noise,
    "flipped": flipped,
    "a folder": folder_instead,
    "null": text("null"),
    "a list": text("[1, 2]"),
    "a number": text("9" * 5000),
    "nested": text("[" * 100_000),
    "nan": text('{"kind": "training", "accuracy": NaN}'),
    "of another kind": text("a: 1\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "history.csv", "film.npz"])
def test_a_damaged_file_is_named(run: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    DAMAGES[damage](folder / name)
    for reading in (trained.read, training.write, lambda one: compare([run, one])):
        with pytest.raises(FoveateError, match=name):
            reading(folder)


def test_whole_it_is_read_and_its_page_is_written(run: Path) -> None:
    read = trained.read(run)
    assert read.film is not None and [frame.epoch for frame in read.film.frames] == [1, 2]
    assert len(read.history) == 2 and training.write(run).is_file()


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("run.json", '"accuracy": {\n', '"accuracy": {"x": "y",\n'),
        ("run.json", '"epoch": 2', '"epoch": null'),
        ("run.json", '"groups": {', '"groups": {"test": 3, "val": {'),
        ("run.json", '"mean": 0.5', '"mean": [1]'),
        ("run.json", '"kind": "training"', '"kind": "evaluation"'),
        ("recipe.yaml", "epochs: ", "epochs: -"),
        ("recipe.yaml", "losses:", "losses: 3\nx:"),
        ("recipe.yaml", "name: ", "name: [\n"),
        ("recipe.yaml", "seed: 0", "seed: 0\nseed: 0"),
        ("history.csv", "0.5", "half"),
        ("history.csv", "train_loss", "loss"),
        ("history.csv", ",0.5\n", "\n"),
    ],
)
def test_one_value_of_the_wrong_kind(run: Path, tmp_path: Path, name: str, old: str, new: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    path = folder / name
    content = path.read_bytes().decode().replace("\r\n", "\n")
    assert old in content
    path.write_text(content.replace(old, new, 1))
    with pytest.raises(FoveateError, match=name):
        training.write(folder)


LIKEWISE = {("names", 0), ("epoch", 0)}  # numbers are names too


@pytest.mark.parametrize("key", ["images", "labels", "ids", "names", "method", "maps", "predicted", "inside", "mask", "epoch"])
def test_a_film_whose_parts_do_not_fit(run: Path, tmp_path: Path, key: str) -> None:
    with np.load(run / "film.npz") as file:
        known = dict(file)
    for number, value in enumerate((np.zeros((5, 1)), np.zeros(0), np.array("x"))):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **{**known, key: value})
        if key in ("names", "epoch", "ids") and number == 1:  # names, ids and epochs may be missing
            assert len(Film.load(path).batch) == 2
        elif (key, number) not in LIKEWISE:
            with pytest.raises(FoveateError, match=rf"{number}\.npz' is not a film"):
                Film.load(path)
        no = {name: value for name, value in known.items() if name != key}
        np.savez(path, **no)
        if key not in ("epoch", "mask"):
            with pytest.raises(FoveateError, match="is not a film"):
                Film.load(path)


@pytest.mark.parametrize("damage", ["empty", "half", "noise", "null", "a list", "nested", "a folder"])
@pytest.mark.parametrize("name", ["net.json", "net.csv"])
def test_a_damaged_study_of_confidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str) -> None:
    monkeypatch.setattr(options, "NET", False)
    monkeypatch.setitem(scenes.COUNTS, "test", {"leopard": 1, "orca": 1})  # it is the files that are tested
    words = ["confidence", "scenes", "-m", "foveate:small_cnn", "--name", "net", "--limit", "1", "-o", str(tmp_path)]

    def study() -> Result:
        torch.manual_seed(0)  # the same weights
        return CliRunner().invoke(cli.app, words)

    assert study().exit_code == 0
    DAMAGES[damage](tmp_path / name)
    done = study()
    if name == "net.csv" and damage in ("empty", "half"):  # as a kill leaves it: what is lost is measured again
        assert done.exit_code == 0, (done.output, done.exception)
        return
    assert done.exit_code == 2, (done.output, done.exception)
    assert name in done.stderr
