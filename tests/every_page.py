"""Every page that foveate makes, from small runs: for the tests, and for the eyes of whoever changes a page.

``python tests/every_page.py FOLDER`` writes them with a contact sheet of screenshots; ``make pages`` calls it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate.cli import app
from foveate.data import scenes
from foveate.disk.files import locked
from foveate.errors import FoveateError
from foveate.report import film as film_page
from foveate.training.film import Film
from foveate.training.recipe import read_recipe

HOSTILE = ("</style><script>window.hostile = 1</script>", "\"quoted\" 'twice' & {{7*7}}", '=cmd("calc")|A0')
FILES = ("<img src=x onerror='window.hostile=1'>.png", "\"{{7*7}}\" & 'more'.png", '=cmd("calc")|A0.png')
METHODS = ("grad_cam", "layer_cam", "gradient", "fake_cam", "random", "centre")
COUNTS = {"train": {"leopard": 24, "orca": 12}, "val": {"leopard": 6, "orca": 4}, "test": {"leopard": 6, "orca": 6}}
NETWORK = '''
"""A small network whose classes have hostile names."""
import torch
from foveate.models.small import small_cnn


def build():
    torch.manual_seed(0)
    model = small_cnn(3).eval()
    model.mean, model.std, model.input_size, model.class_names = 0.5, 0.25, (3, 48, 48), %s
    return model
'''
RECIPE = """
name: {name}
model: foveate:small_cnn
data: scenes
size: 48
epochs: 10
batch_size: 16
seed: 1
losses: {losses}
measure: {{images: 8}}
film: {{images: 4}}
"""


def call(*arguments: object) -> None:
    """One call of the command line, which has to succeed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + "".join(map(str, [result.exception or ""]))


def build(folder: Path) -> dict[str, Path]:
    """The pages by name; those that are there already are not made anew."""
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        known = folder / "pages.json"
        if not known.exists():
            with mock.patch.dict(scenes.COUNTS, COUNTS):
                pages = _build(folder)
            known.write_text(json.dumps({name: str(path) for name, path in pages.items()}))
        return {name: Path(path) for name, path in json.loads(known.read_text()).items()}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder once no other process does: who comes second waits, and then finds what the first has made."""
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(locked(folder))
            except FoveateError:
                time.sleep(0.2)
                continue
            yield
            return


def _build(folder: Path) -> dict[str, Path]:
    pages: dict[str, Path] = {}
    with short_demo():
        call("demo", "--out", folder / "demo", "--seed", 3)
    pages["demo"] = folder / "demo" / "report.html"
    photos, network = photographs(folder / "photos"), folder / "network.py"
    network.write_text(NETWORK % (HOSTILE,), encoding="utf-8")
    model = ("--model", f"{network}:build")
    for name, methods in (("evaluation", ",".join(METHODS)), ("short", "grad_cam,centre")):
        out = folder / name
        call("evaluate", photos, *model, "--methods", methods, "--metrics", "all,randomisation", "--out", out)
        pages[name] = out / "report.html"
    call("compare", folder / "evaluation", folder / "short", "--out", folder / "comparison.html")
    pages["comparison"] = folder / "comparison.html"
    for name, losses in (("plain", "[]"), ("cam_loss", "[{name: cam_loss, weight: 1}]")):
        (folder / f"{name}.yaml").write_text(RECIPE.format(name=name, losses=losses), encoding="utf-8")
        call("train", folder / f"{name}.yaml", "--out", folder / name)
    pages["training"] = folder / "cam_loss" / "report.html"
    call("compare", folder / "plain", folder / "cam_loss", "--out", folder / "trainings.html")
    pages["trainings"] = folder / "trainings.html"
    film = Film.load(folder / "cam_loss" / "film.npz")
    pages["film"] = film_page.write(film, folder / "film.html", title=HOSTILE[0])
    call("confidence", "scenes", "--model", "foveate:small_cnn", "--size", 48, "--limit", 12, "--out", folder / "confidence")
    pages["confidence"] = folder / "confidence" / "confidence.html"
    call("explain", photos, *model, "--method", ",".join(METHODS), "--out", folder / "explained")
    pages["explained"] = folder / "explained" / "index.html"
    return {name: path for name, path in pages.items() if path.exists()}


def short_demo() -> Any:
    """The demo with small pictures and few epochs, within this context."""
    return mock.patch(
        "foveate.report.demo.read_recipe", lambda source, changes: read_recipe(source, {**changes, "epochs": 3, "size": 48})
    )


def photographs(folder: Path) -> Path:
    """Six images with masks and boxes, some with hostile names, and their classes."""
    folder.mkdir()
    (folder / "masks").mkdir()
    generator = np.random.default_rng(0)
    lines = ["file,class_index,boxes_xyxy,mask"]
    for number, name in enumerate((*FILES, "tall.png", "wide.png", "plain.png")):
        height, width = (160, 60) if name == "tall.png" else (60, 200) if name == "wide.png" else (64, 64)
        image = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = 255
        image[mask > 0] //= 3
        Image.fromarray(image).save(folder / name)
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        quoted = '"' + name.replace('"', '""') + '"'
        lines.append(f"{quoted},{number % 3},{width // 4} {height // 4} {3 * width // 4} {3 * height // 4},masks/{number}.png")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def main(folder: Path) -> None:
    """Every page and a contact sheet."""
    import browser

    if folder.exists() and not (folder / "pages.json").exists() and any(folder.iterdir()):
        sys.exit(f"{str(folder)!r} holds something else: name an empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(2)
    pages = build(folder.resolve())
    for name, path in pages.items():
        print(f"{name}: {path}")
    print(f"contact sheet: {browser.contact_sheet(pages, folder / 'contact_sheet.png')}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pages"))
