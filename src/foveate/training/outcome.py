"""Outcome: what a trained model is worth: accuracy of every split and group, the worst of them, and its maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.evaluation.evaluate import batches, measure
from foveate.models.classifier import Classifier
from foveate.runtime.model import evaluating, read_logits
from foveate.targets import Head, head_of
from foveate.training import groups
from foveate.training.recipe import Recipe
from foveate.training.splits import Part

COLUMNS = ("AD", "AG", "AI")
OUTCOME = ("accuracy", "groups", "worst_group", "maps", "maps_error")  # what :func:`outcome` says


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of a batch in evaluation mode, ``[B,C]``; the mode is put back."""
    first = next(model.parameters(), None)
    with evaluating(model):
        return read_logits(model(x if first is None else x.to(first.device))).cpu()


def predictions(model: nn.Module, data: Any, head: Head | None = None) -> tuple[Tensor, Tensor, list[str] | None]:
    """Predicted classes, labels and backgrounds of all images of a data set."""
    found, labels, places = [], [], list[str]()
    known = True
    for batch in batches(data, 128):
        assert batch.y is not None  # open_splits gives labels
        logits = predict(model, batch.x)
        found.append(groups.decided(logits, head_of(logits, head)))
        labels.append(batch.y)
        known = known and batch.background is not None
        places += batch.background or ()
    return torch.cat(found), torch.cat(labels), places if known else None


def outcome(classifier: Classifier, data: Mapping[str, Dataset[Batch]], recipe: Recipe) -> dict[str, Any]:
    """Accuracies in [0, 1], groups of class and background, and measures of the maps, for ``run.json``.

    Returns:
        ``accuracy`` by split; ``groups`` by split and name with ``count`` and ``accuracy``; ``worst_group`` of the
        validation and test images together, ``{"name", "count", "accuracy"}``; ``maps`` by split (validation, test) and
        column: ``mean``, ``low``, ``high``, ``n``; or ``maps_error``, a sentence that says why there are none.
    """
    found: dict[str, Any] = {"accuracy": {}, "groups": {}, "maps": {}}
    held: list[list[groups.Group]] = []
    for split, images in data.items():
        predicted, labels, places = predictions(classifier, images, recipe.head)
        found["accuracy"][split] = float(groups.correct(predicted, labels).double().mean())
        if labels.ndim > 1:
            continue
        parts = groups.group_accuracy(predicted, labels, places, classifier.class_names)
        found["groups"][split] = {g.name: {"count": g.count, "accuracy": g.accuracy} for g in parts}
        if split != "train":
            held.append(parts)
    if held:
        worst = groups.worst(groups.merged(held))
        found["worst_group"] = {"name": worst.name, "count": worst.count, "accuracy": worst.accuracy}
    if recipe.measure.images and recipe.head != "multilabel":
        try:
            found["maps"] = {split: _maps(classifier, data[split], recipe) for split in data if split != "train"}
        except FoveateError as error:  # hours of training are not lost to a map
            found["maps_error"] = str(error)
    return found


def _maps(classifier: Classifier, data: Any, recipe: Recipe) -> dict[str, dict[str, float]]:
    step = -(-len(data) // recipe.measure.images)
    part = Part(data, tuple(range(0, len(data), step)))
    columns = [*COLUMNS, "mass_inside"] if part[0].mask is not None else list(COLUMNS)
    results = measure(classifier, part, recipe.measure.method, columns, layer=recipe.layer, target="pred", head=recipe.head)
    frame = results.table(None)
    return {
        str(column): {key: float(line[key]) for key in ("mean", "low", "high", "n")} for (_, column), line in frame.iterrows()
    }
