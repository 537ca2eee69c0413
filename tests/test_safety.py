"""Safety: code runs only where it is asked for, whatever a folder, a recipe, a checkpoint or weights hold."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import foveate
from foveate import FoveateError
from foveate.cli import app
from foveate.data import scenes
from foveate.data.benchmarks import open_benchmark
from foveate.models.load import load
from foveate.models.small import small_cnn
from foveate.models.weights import read_weights
from foveate.training import saved as trained
from foveate.training.recipe import Recipe, read_recipe
from foveate.training.train import train

NET = """
from pathlib import Path
Path({mark!r}).write_text("code ran")
from foveate.models.small import small_cnn
def net():
    return small_cnn().eval()
"""


class Hostile:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "code ran")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once code has run."""
    return tmp_path / "ran"


@pytest.fixture(params=["net.py:net", "ca_stream:net.py:net", "inner"])
def downloaded(request: pytest.FixtureRequest, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose recipe names a Python file, by itself or through another run's folder."""
    monkeypatch.setattr(scenes, "COUNTS", {split: {"leopard": 3, "orca": 3} for split in scenes.SPLITS})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET.format(mark=str(mark)))
    Image.new("RGB", (32, 32), "red").save("photo.png")
    for name, model in (("inner", "net.py:net"), ("run", request.param)):
        folder = tmp_path / name
        folder.mkdir()
        nothing = {"images": 0}
        recipe = Recipe(name=name, model=model, size=32, epochs=1, film=nothing, measure=nothing)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        save_file(small_cnn().state_dict(), folder / "model.safetensors")
        record = {"kind": "training", "name": name, "seed": 0, "epoch": 1, "seconds": 1.0, "outputs": 2, "class_names": None}
        (folder / "run.json").write_text(json.dumps({**record, "accuracy": {"train": 1.0}, "maps": {}}))
        (folder / "history.csv").write_text("epoch,train_loss\n1,0.5\n")
    return tmp_path / "run"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


REFUSAL = "names the Python file 'net.py' as its model, and it is not run unasked: read it, then allow it with --trust-code"
COMMANDS = [
    ("explain", "photo.png", "--model", "{run}", "--method", "grad_cam", "--pictures", "none"),
    ("evaluate", "scenes", "--model", "{run}", "--methods", "grad_cam", "--metrics", "AD", "--limit", "2"),
    ("confidence", "scenes", "--model", "{run}", "--limit", "1"),
    ("train", "{run}/recipe.yaml"),
    ("train", "{run}/recipe.yaml", "--resume"),
    ("train", "scenes_plain", "--set", "model={run}", "--set", "epochs=1"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:4:3]))
def test_a_downloaded_folder_runs_no_code(downloaded: Path, mark: Path, command: tuple[str, ...], tmp_path: Path) -> None:
    if "--resume" in command:
        settings = Recipe.model_validate(yaml.safe_load((downloaded / "recipe.yaml").read_text()))
        trained.begin(tmp_path / "out", settings.model_dump(mode="json"))
    result = call(*(part.format(run=downloaded) for part in command), "--out", tmp_path / "out")
    assert not mark.exists()
    assert result.exit_code == 2, result.output
    assert REFUSAL in " ".join(result.stderr.split()), result.stderr


@pytest.mark.parametrize("downloaded", ["net.py:net"], indirect=True)
@pytest.mark.parametrize(
    "command", [COMMANDS[0], COMMANDS[1], COMMANDS[2], COMMANDS[3], COMMANDS[5]], ids=lambda c: " ".join(c[:4:3])
)
def test_it_does_where_that_is_asked_for(downloaded: Path, mark: Path, command: tuple[str, ...], tmp_path: Path) -> None:
    result = call(*(part.format(run=downloaded) for part in command), "--out", tmp_path / "out", "--trust-code")
    assert result.exit_code == 0, result.output
    assert mark.exists()


@pytest.mark.parametrize("downloaded", ["net.py:net"], indirect=True)
def test_compare_runs_no_code(downloaded: Path, mark: Path) -> None:
    result = call("compare", downloaded, downloaded.parent / "inner")
    assert result.exit_code in (0, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert not mark.exists()


@pytest.mark.parametrize("downloaded", ["net.py:net"], indirect=True)
def test_from_python(downloaded: Path, mark: Path) -> None:
    for given in (downloaded, f"ca_stream:{downloaded}"):
        with pytest.raises(FoveateError, match="not run unasked"):
            load(str(given))
    with pytest.raises(FoveateError, match="not run unasked"):
        read_recipe(downloaded / "recipe.yaml")
    with pytest.raises(FoveateError, match="not run unasked"):
        train(Recipe(model=str(downloaded)))
    assert not mark.exists()
    assert load(str(downloaded), trust_code=True).name == str(downloaded)
    assert mark.exists()


@pytest.mark.parametrize("downloaded", ["net.py:net"], indirect=True)
def test_a_file_that_the_user_names_is_run(downloaded: Path, mark: Path, tmp_path: Path) -> None:
    change = ("--set", "model=net.py:net", "--set", "epochs=1", "--out", tmp_path / "out")
    result = call("train", downloaded / "recipe.yaml", *change)
    assert result.exit_code == 0, result.output
    mark.unlink()
    assert load("net.py:net").name == "net.py:net"
    assert mark.exists()


def test_weights_and_checkpoints_are_never_unpickled(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = tmp_path / "weights.pt"
    torch.save({"a": Hostile(mark)}, hostile)
    with pytest.raises(FoveateError, match="holds more than tensors, and code in it is not run"):
        read_weights(hostile)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    hostile.rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    result = call("train", "scenes_plain", "--resume", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "is damaged and cannot be read" in result.stderr
    np.savez(tmp_path / "film.npz", images=np.array([Hostile(mark)], dtype=object))
    with pytest.raises(FoveateError, match="is not a film"):
        foveate.training.film.Film.load(tmp_path / "film.npz")
    assert not mark.exists()
    with pytest.raises(AttributeError):  # the bait bites where code is run
        pickle.loads(pickle.dumps(Hostile(mark))).then  # noqa: B018
    assert mark.exists()


def test_what_a_library_has_downloaded_is_not_unpickled(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision asks for it; a file in the folder of downloads is read without looking at its digest."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({"a": Hostile(mark)}, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    with pytest.raises(FoveateError, match="the pretrained weights of 'resnet18' could not be downloaded"):
        load("torchvision:resnet18", pretrained=True)
    assert not mark.exists()


def test_a_data_set_with_pickles_is_refused() -> None:
    with pytest.raises(FoveateError, match="torchvision keeps an index of LSUN as a pickle"):
        open_benchmark("torchvision:LSUN:somewhere", load("foveate:small_cnn").preprocess)


def test_every_read_says_that_it_runs_no_code() -> None:
    """torch.load with weights_only, numpy.load without pickles, YAML by the safe loader, no pickle, eval or exec."""
    source = Path(foveate.__file__).parent
    for path in sorted(source.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            place = f"{path.name}:{node.lineno}"
            if name == "torch.load":
                assert keywords.get("weights_only") == "True", place
            if name in ("np.load", "numpy.load"):
                assert keywords.get("allow_pickle") == "False", place
            assert name not in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "pd.read_pickle"), place
            assert not name.startswith(("pickle.load", "marshal.", "shelve.", "joblib.", "os.system")), place
            if name.endswith("exec_module"):
                assert path.name == "sources.py", place
