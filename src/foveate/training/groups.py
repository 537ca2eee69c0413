"""Groups: accuracy by class and background, and the worst of them, which is what a shortcut costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import FoveateError
from foveate.targets import Head
from foveate.targets import predicted as predicted_class


@dataclass(frozen=True)
class Group:
    """Images of one class on one kind of background.

    Attributes:
        name: ``class on background``, or the class alone where no background is known.
        count: how many images.
        accuracy: share that is classified right, in [0, 1].
    """

    name: str
    count: int
    accuracy: float


def group_accuracy(
    predicted: Tensor, labels: Tensor, backgrounds: Sequence[str] | None = None, class_names: Sequence[str] | None = None
) -> list[Group]:
    """Accuracy of every group of images with one class and one background, in the order of classes and backgrounds.

    Args:
        predicted, labels: classes, ``[N]``.
        backgrounds: one per image: what a shortcut could be, by any name; classes alone make the groups where it is None.

    Raises:
        FoveateError: not one label and background an image.

    Source: Sagawa et al., Distributionally robust neural networks for group shifts, ICLR 2020.
    """
    if len(predicted) != len(labels) or (backgrounds is not None and len(backgrounds) != len(labels)):
        counts = [len(predicted), len(labels), *([] if backgrounds is None else [len(backgrounds)])]
        raise FoveateError(f"predictions, labels and backgrounds must be one per image, and there are {counts}")
    places = [""] * len(labels) if backgrounds is None else list(backgrounds)
    right = (predicted == labels).tolist()
    found: dict[tuple[int, str], list[bool]] = {}
    for label, place, hit in zip(labels.tolist(), places, right, strict=True):
        found.setdefault((int(label), place), []).append(hit)
    groups = []
    for (label, place), hits in sorted(found.items()):
        name = class_names[label] if class_names is not None else f"class {label}"
        groups.append(Group(f"{name} on {place}" if place else name, len(hits), sum(hits) / len(hits)))
    return groups


def worst(groups: Sequence[Group]) -> Group:
    """The group with the lowest accuracy, the first of several.

    Raises:
        FoveateError: there is no group.
    """
    if not groups:
        raise FoveateError("there is no group of images to take the worst of")
    return min(groups, key=lambda group: group.accuracy)


def merged(parts: Sequence[Sequence[Group]]) -> list[Group]:
    """Groups of several data sets as one, those of one name together."""
    found: dict[str, tuple[int, float]] = {}
    for group in (group for part in parts for group in part):
        count, right = found.get(group.name, (0, 0.0))
        found[group.name] = (count + group.count, right + group.count * group.accuracy)
    return [Group(name, count, right / count) for name, (count, right) in found.items()]


def decided(logits: Tensor, head: Head) -> Tensor:
    """What a classifier says: one class per image, ``[N]``, or of a multi-label head every class, ``[N,C]`` of 0 and 1.

    -1, which is never right, where the logits hold NaN or infinity.
    """
    said = (logits > 0).long() if head == "multilabel" else predicted_class(logits, head)
    finite = torch.isfinite(logits).all(1)
    return torch.where(finite if said.ndim == 1 else finite[:, None], said, -1)


def correct(predicted: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified right, ``[N]`` bool; with several classes per image, those where all are right."""
    return predicted == labels if labels.ndim == 1 else torch.as_tensor((predicted == labels).all(1))
