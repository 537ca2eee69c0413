"""The classes of ILSVRC-2012: their names, and their WordNet ids, by which its folders and annotations call them."""

from __future__ import annotations

import re

from foveate._torchvision import timm, torchvision

WORDNET_ID = re.compile(r"n\d{8}")
LINE = re.compile(rf"({WORDNET_ID.pattern})\s+(\S.*)")


def imagenet_names() -> list[str]:
    """The 1000 class names of ILSVRC-2012, in index order, as torchvision ships them."""
    names: list[str] = torchvision().models.ResNet18_Weights.DEFAULT.meta["categories"]
    return names


def wordnet_ids() -> list[str]:
    """The ids of the same 1000 classes, in the same order."""
    return list(timm().data.ImageNetInfo("imagenet-1k").label_names())


def without_ids(names: list[str]) -> tuple[list[str], list[str] | None]:
    """Names and ids of a list such as ``n01440764 tench, Tinca tinca``; None where not every name begins with an id."""
    lines = [LINE.fullmatch(name) for name in names]
    if not names or None in lines:
        return names, None
    ids, rest = zip(*(line.groups() for line in lines if line), strict=True)
    return list(rest), list(ids)
