"""Normalisation: whether what was assumed of a model's input holds, by its accuracy on a few images."""

from __future__ import annotations

from collections.abc import Iterable
from math import comb

import torch

from foveate.batch import Batch
from foveate.models.classifier import Classifier
from foveate.runtime.model import IMAGENET_MEAN, IMAGENET_STD, eager, lock_of, modules_of, read_logits, swapped
from foveate.targets import Head, head_of, num_classes, predicted

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
CANDIDATES: dict[str, Statistics] = {
    "none": ((0.0,) * 3, (1.0,) * 3),
    "[-1, 1]": ((0.5,) * 3, (0.5,) * 3),
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
}
IMAGES = 32
CHANCE = 0.01  # that as many images speak for another normalisation where both are as good


def better_normalisation(classifier: Classifier, batches: Iterable[Batch], head: Head | None = None) -> str | None:
    """A sentence that names another normalisation which the model clearly wants; None where there is none.

    Only where the normalisation was assumed. At most :data:`IMAGES` labelled images run once for each candidate: none,
    [-1, 1] and ImageNet's. Clearly is by a sign test on the images that one classifies rightly and the other does not.

    Args:
        batches: the first of the data; those without labels are passed over.
    """
    if not classifier.assumed or len(classifier.preprocess.mean) != 3:
        return None
    given = (tuple(classifier.preprocess.mean), tuple(classifier.preprocess.std))
    ways = {"assumed": given, **{name: way for name, way in CANDIDATES.items() if way != given}}
    right: dict[str, list[bool]] = {name: [] for name in ways}
    for batch in batches:
        for name, way in ways.items() if batch.y is not None else ():
            right[name] += _right(classifier, batch, way, head)
        if len(right["assumed"]) >= IMAGES:
            break
    best = max(ways, key=lambda name: sum(right[name]))
    more = [a and not b for a, b in zip(right[best], right["assumed"], strict=True)]
    less = [b and not a for a, b in zip(right[best], right["assumed"], strict=True)]
    if not any(more) or _sign_test(sum(more), sum(less)) > CHANCE:
        return None
    mean, std = (" ".join(f"{value:g}" for value in dict.fromkeys(values)) for values in ways[best])
    return (
        f"the normalisation that was assumed seems to be wrong: of {len(more)} images {sum(right['assumed'])} are "
        f"classified rightly with it, and {sum(right[best])} with {best} (--mean {mean} --std {std})"
    )


def _right(classifier: Classifier, batch: Batch, way: Statistics, head: Head | None) -> list[bool]:
    """Which images of a batch are classified rightly under a normalisation; the classifier is as before afterwards."""
    assert batch.y is not None
    first = next(classifier.parameters(), classifier.mean)
    own = classifier._buffers
    places = [
        (own, name, torch.tensor(v).view(1, -1, 1, 1).to(classifier.mean)) for name, v in zip(("mean", "std"), way, strict=True)
    ]
    with torch.inference_mode(), lock_of(classifier), swapped(places), eager(modules_of(classifier)):
        logits = read_logits(classifier(batch.x[:IMAGES].to(first.device, first.dtype)))
        kind = head_of(logits, head)
        y = batch.y[:IMAGES].to(logits.device)
        known = (y >= 0) & (y < num_classes(logits, kind))
        return ((predicted(logits, kind) == y) & known).tolist()


def _sign_test(more: int, less: int) -> float:
    """The chance of ``more`` heads or more in ``more + less`` throws."""
    count = more + less
    result: float = sum(comb(count, k) for k in range(more, count + 1)) / 2**count
    return result


def about_input(classifier: Classifier) -> list[str]:
    """What stands with a table: how images went in, and what was assumed of it."""
    way = classifier.preprocess
    size = f"{way.crop[0]}x{way.crop[1]}"
    resized = f"squashed to {size}" if way.resize is None else f"shorter side {way.resize}, centre crop {size}"
    mean, std = (" ".join(f"{value:g}" for value in dict.fromkeys(values)) for values in (way.mean, way.std))
    said = [f"Images: {resized}, {way.interpolation}; mean {mean}, std {std}{' (assumed)' if classifier.assumed else ''}."]
    return said + [note[0].upper() + note[1:] + "." for note in classifier.notes if "assumed" in note]
