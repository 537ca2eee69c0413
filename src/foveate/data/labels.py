"""Labels: images of several classes, with a row for each of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foveate.batch import Batch
from foveate.errors import FoveateError

BETWEEN = " # "  # in the name of a row: the image's name, and its label


def has_several(data: Any) -> bool:
    """Whether images of a data set, or of what a loader reads, may have several labels each."""
    return bool(getattr(getattr(data, "dataset", data), "several", False))


def label_by_label(batch: Batch, head: str | None) -> Batch:
    """A batch of multi-hot labels ``y [B,C]`` with a row for each image and each label of it: ``photo.jpg # 3``.

    An image without a label has no row. Another head than ``multilabel`` takes such labels where each image has one.

    Raises:
        FoveateError: values other than 0 and 1; several labels of an image, or none, and another head than ``multilabel``.
    """
    y = batch.y
    if y is None or y.ndim != 2:
        return batch
    if bool(((y != 0) & (y != 1)).any()):
        raise FoveateError(
            f"labels of shape {list(y.shape)} are 0 or 1 for each class, and there is {y[(y != 0) & (y != 1)][0]:g}"
        )
    if y.shape[1] == 1:  # one output, of which each image is or is not
        return replace(batch, y=y[:, 0].long())
    hot = y.bool()
    if head == "multilabel":
        rows, classes = (index.tolist() for index in hot.nonzero(as_tuple=True))
        names = tuple(f"{batch.id[row]}{BETWEEN}{label}" for row, label in zip(rows, classes, strict=True))
        return replace(batch.only(rows), y=hot.nonzero()[:, 1], id=names)
    if bool((hot.sum(1) == 1).all()):
        return replace(batch, y=hot.int().argmax(1))
    raise FoveateError(several_labels("labels of shape [B,C]"))


def several_labels(what: str) -> str:
    """That labels of several classes per image need a head for them."""
    return f"{what} give an image several classes, or none: head 'multilabel' (--head multilabel) measures it label by label"


def images_of(ids: list[str]) -> int | None:
    """How many images the rows of several labels are of; None of ordinary rows, one per image."""
    if not ids or not all(BETWEEN in name for name in ids):
        return None
    count = len({name.rpartition(BETWEEN)[0] for name in ids})
    return count if count < len(ids) else None
