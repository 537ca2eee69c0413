"""Demo: the whole loop on the drawn scenes, from two training runs to one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from foveate import maps
from foveate.batch import Batch
from foveate.data import scenes
from foveate.disk.files import locked, replacing
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import evaluate
from foveate.explanation.explain import Explanation, explain
from foveate.overlay import overlay
from foveate.registry import METHODS
from foveate.report import pictures, tables
from foveate.report.page import ShownImage, render
from foveate.training import train
from foveate.training.recipe import Recipe, read_recipe
from foveate.training.saved import is_trained, name_of

if TYPE_CHECKING:
    import pandas as pd
    from lightning.pytorch.callbacks import Callback

METHOD = "contrastive_cam"
METHOD_NAMES = (METHOD, "grad_cam", "layer_cam", "fake_cam", "random", "centre")
COLUMNS = ("mass_inside", "AD", "AG", "AI")
RUNS = {
    "plain": ("scenes_plain", "Plain", "cross-entropy"),
    "cam_loss": ("scenes_cam_loss", "With the CAM loss", "cross-entropy + CAM loss"),
}
WALL = 30
PICTURES = sum(sum(counts.values()) for counts in scenes.COUNTS.values())


@dataclass(frozen=True)
class DemoRun:
    """One trained model and what was measured on it."""

    run: train.Run
    accuracy: dict[str, float]
    table: pd.DataFrame
    test: Explanation
    val: Explanation
    inside_test: Tensor
    inside_val: Tensor
    masked: tuple[float, str]


def demo(
    out: str | Path,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    callbacks: Callable[[str], list[Callback]] = lambda name: [],
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Train with and without the CAM loss, explain both, measure both, and write ``report.html``.

    Args:
        out: folder for the page and both runs.
        seed: of the scenes, the initial weights and the order of the images.
        say: called with a line at each step.
        callbacks: Lightning callbacks for the run of a name, such as a progress bar.
        tick: called after each of the :data:`PICTURES` that are drawn.

    Returns:
        The document of ``foveate demo --json``.

    Raises:
        FoveateError: another process writes there, or the folder holds runs that are not the demo's.
    """
    out = Path(out)
    recipes = {key: read_recipe(source, {"seed": seed, "measure.images": 0}) for key, (source, *_) in RUNS.items()}
    with locked(out):
        _check_own(out, recipes)
        return _demo(out, seed, recipes, say, callbacks, tick)


def _check_own(out: Path, recipes: Mapping[str, Recipe]) -> None:
    """The demo replaces its own runs without a question, and no others."""
    for key, recipe in recipes.items():
        if is_trained(out / key) and (name := name_of(out / key)) not in (None, recipe.name):
            raise FoveateError(f"{str(out / key)!r} holds the run {name!r}, which is not the demo's: name another --out")


def _demo(
    out: Path,
    seed: int,
    recipes: Mapping[str, Recipe],
    say: Callable[[str], None],
    callbacks: Callable[[str], list[Callback]],
    tick: Callable[[], object],
) -> dict[str, Any]:
    say("drawing the scenes")
    size = recipes["plain"].size or 96
    data: dict[str, scenes.Scenes] = {split: scenes.make(split, seed, size, tick) for split in scenes.SPLITS}
    measured: dict[str, DemoRun] = {}
    for key, recipe in recipes.items():
        say(f"training {RUNS[key][1].lower()}")
        run = train.train(recipe, out / key, data=data, callbacks=callbacks(key), overwrite=True)
        say(f"explaining and measuring {RUNS[key][1].lower()}")
        measured[key] = measure(run)
        with replacing(out / key / "table.csv") as waiting:
            measured[key].table.to_csv(waiting)
    page = _page(out, seed, data, measured)
    document: dict[str, Any] = {"runs": {}, "report": str(page), "seed": seed}
    for key, one in measured.items():
        table = one.table
        document["runs"][key] = {
            "accuracy": one.accuracy,
            "mass_inside": float(one.inside_val.mean()),
            "mass_inside_test": float(one.inside_test.mean()),
            **{column: float(table.loc[(METHOD, column), "mean"]) for column in ("AD", "AG", "AI")},
            "seconds": one.run.seconds,
            "weights": str(out / key / "model.safetensors"),
        }
    return document


def measure(run: train.Run) -> DemoRun:
    """Accuracy on every split, maps of validation and swapped test, and the table of methods and controls."""
    test, val = run.data["test"], run.data["val"]
    assert isinstance(test, scenes.Scenes) and isinstance(val, scenes.Scenes)
    on_test, on_val = (explain(run.classifier, split.batch().x, METHOD) for split in (test, val))
    table = evaluate(run.classifier, [test.batch()], METHOD_NAMES, COLUMNS, target="pred")
    accuracy = {split: run.accuracy(split) for split in run.data}
    through = on_test.capture.score(maps.apply_mask(test.batch().x, on_test[METHOD])).argmax(1)
    counts = torch.bincount(through, minlength=len(scenes.CLASSES))
    masked = (float(counts.max()) / len(test), scenes.CLASSES[int(counts.argmax())])
    return DemoRun(
        run=run,
        accuracy=accuracy,
        table=table,
        test=on_test,
        val=on_val,
        inside_test=maps.mass_inside(on_test[METHOD], test.masks),
        inside_val=maps.mass_inside(on_val[METHOD], val.masks),
        masked=masked,
    )


def _look(explanation: Explanation, batch: Batch, inside: Tensor, index: int) -> ShownImage:
    capture = explanation.capture
    said = int(capture.pred[index])
    assert batch.y is not None
    return ShownImage(
        image=pictures.data_uri(pictures.enlarge(batch.x[index], 2)),
        overlay=pictures.data_uri(pictures.enlarge(overlay(batch.x[index], explanation[METHOD][index]), 2)),
        said=scenes.CLASSES[said],
        probability=float(capture.logits[index].detach().softmax(0)[said]),
        right=said == int(batch.y[index]),
        inside=float(inside[index]),
    )


def _page(out: Path, seed: int, data: dict[str, scenes.Scenes], measured: dict[str, DemoRun]) -> Path:
    plain, cam = measured["plain"], measured["cam_loss"]
    test, val = data["test"], data["val"]
    content = {
        "headline": _headline(plain, cam),
        "epochs": plain.run.recipe.epochs,
        "seed": seed,
        "animals": ", ".join(f"{count} {name}s" for name, count in _animals(data["train"])),
        "counts": {split: len(scenes_) for split, scenes_ in data.items()},
        "runs": [
            {
                "name": key,
                "title": RUNS[key][1],
                "subtitle": RUNS[key][2],
                "accuracy": one.accuracy,
                "mass_inside_val": float(one.inside_val.mean()),
            }
            for key, one in measured.items()
        ],
        "samples": {split: [_thumbnail(data[split], i) for i in _spread(data[split], 8)] for split in ("train", "test")},
        "method_title": METHODS.get(METHOD).title,
        "groups": [
            _group("Validation, backgrounds as in training", val, plain.val, cam.val, plain.inside_val, cam.inside_val, 1),
            _group("Test, backgrounds swapped", test, plain.test, cam.test, plain.inside_test, cam.inside_test, 3),
        ],
        "changed": _changed(test, plain.test, cam.test),
        "columns": [_heading(column) for column in COLUMNS],
        "tables": [{"name": key, "title": RUNS[key][1], "lines": _lines(one.table)} for key, one in measured.items()],
        "area": float(test.masks.float().mean()),
        "findings": _findings(measured),
        "curves": pictures.curves(
            {RUNS[key][1]: one.run.history for key, one in measured.items()},
            [
                ("train_loss", "cross-entropy, training"),
                ("val_accuracy", "accuracy, validation"),
                ("cam_loss", "CAM loss, training"),
            ],
        ),
        "protocol": (
            f"Seed {seed}; {plain.run.recipe.epochs} epochs of {plain.run.recipe.batch_size} images, SGD with momentum; "
            f"{plain.run.seconds:.0f} and {cam.run.seconds:.0f} seconds of training. The network is the talk's small CNN with "
            "average pooling and one linear layer, so that a map and the bias add up to the logit. Maps: ReLU, bilinear, "
            "scaled to [0, 1]; masked in pixel space, black outside; predicted class."
        ),
        "recipes": "\n".join(
            yaml.safe_dump(one.run.recipe.model_dump(mode="json"), sort_keys=False) for one in measured.values()
        )
        + f"torch {torch.__version__}",
    }
    return render("demo.html.j2", out / "report.html", content)


def _headline(plain: DemoRun, cam: DemoRun) -> str:
    if cam.accuracy["test"] - plain.accuracy["test"] > 0.05:
        return "Both score the same in validation. One of them looks at the animal."
    if cam.accuracy["test"] < plain.accuracy["test"]:
        return "With this seed the CAM loss did not help."
    return "With this seed the two networks hardly differ."


def _spread(split: scenes.Scenes, count: int) -> list[int]:
    """The first pictures of each class in turn."""
    orders = [(split.labels == label).nonzero()[:, 0].tolist() for label in range(len(scenes.CLASSES))]
    return [orders[i % len(orders)][i // len(orders)] for i in range(count)]


def _animals(split: scenes.Scenes) -> list[tuple[str, int]]:
    return list(zip(scenes.CLASSES, torch.bincount(split.labels, minlength=len(scenes.CLASSES)).tolist(), strict=True))


def _truth(split: scenes.Scenes, index: int) -> str:
    return f"{scenes.CLASSES[int(split.labels[index])]} on {split.backgrounds[index]}"


def _thumbnail(split: scenes.Scenes, index: int) -> tuple[str, str]:
    """A picture, and what is on it."""
    return pictures.data_uri(pictures.enlarge(split.images[index].float() / 255, 1), 82), _truth(split, index)


def _group(
    title: str, split: scenes.Scenes, plain: Explanation, cam: Explanation, inside_plain: Tensor, inside_cam: Tensor, each: int
) -> dict[str, Any]:
    batch = split.batch()
    rows = []
    for index in _spread(split, 2 * each):
        looks = _look(plain, batch, inside_plain, index), _look(cam, batch, inside_cam, index)
        rows.append((*looks, _truth(split, index)))
    return {"title": title, "rows": rows}


def _changed(test: scenes.Scenes, plain: Explanation, cam: Explanation) -> dict[str, Any]:
    before, after = plain.capture.pred == test.labels, cam.capture.pred == test.labels
    fixed, broken = (~before & after).nonzero()[:, 0].tolist(), (before & ~after).nonzero()[:, 0].tolist()
    return {
        "fixed": [_thumbnail(test, i) for i in fixed[:: -(-len(fixed) // WALL) or 1]],
        "broken": [_thumbnail(test, i) for i in broken[:WALL]],
        "fixed_count": len(fixed),
        "broken_count": len(broken),
        "both_right": int((before & after).sum()),
        "both_wrong": int((~before & ~after).sum()),
    }


def _heading(column: str) -> tables.Heading:
    known = tables.heading(column)
    return replace(known, title="Map on the animal") if column == "mass_inside" else known


def _lines(table: pd.DataFrame) -> list[dict[str, Any]]:
    lines = []
    for record in map(METHODS.get, METHOD_NAMES):
        cells = [dict(zip(("mean", "low", "high"), tables.cell(table, record.name, column), strict=True)) for column in COLUMNS]
        lines.append({"name": record.name, "title": record.title, "control": record.control, "cells": cells})
    return lines


def _findings(measured: dict[str, DemoRun]) -> list[str]:
    """What the table shows that a reader might pass over, in plain sentences."""
    sentences = []
    for key, one in measured.items():
        title, table = RUNS[key][1], one.table["mean"]
        own, prior = (float(table[(name, "mass_inside")]) for name in (METHOD, "centre"))
        if own < prior:
            sentences.append(f"{title}: less of its map lies on the animal than of a blob in the middle that knows nothing.")
        said = one.table.attrs["findings"]
        sentences += [f"{title}: {sentence}" for sentence in said]
        share, name = one.masked
        if share > 0.9:
            sentences.append(
                f"{title}: through its maps, with black around them, the network calls {100 * share:.0f} % of the "
                f"pictures {name}. Black is no neutral background for it, and AD, AG and AI say little here."
            )
    return sentences
