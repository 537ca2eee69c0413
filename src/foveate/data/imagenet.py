"""The classes of ILSVRC-2012: their names, and their WordNet ids, by which its folders and annotations call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from foveate._torchvision import timm, torchvision

WORDNET_ID = re.compile(r"n\d{8}")
LINE = re.compile(rf"({WORDNET_ID.pattern})\s+(\S.*)")


def imagenet_names() -> list[str]:
    """The 1000 class names of ILSVRC-2012, in index order, as torchvision ships them."""
    names: list[str] = torchvision("the list of ImageNet's classes").models.ResNet18_Weights.DEFAULT.meta["categories"]
    return names


@cache
def wordnet_ids() -> tuple[str, ...]:
    """The ids of the same 1000 classes, in the same order."""
    return tuple(timm("the list of ImageNet's ids").data.ImageNetInfo("imagenet-1k").label_names())


def without_ids(names: Sequence[str]) -> tuple[list[str], list[str | None]]:
    """Names and ids of a list such as ``n01440764 tench, Tinca tinca``; None for a name without an id."""
    lines = [LINE.fullmatch(name.strip()) for name in names]
    ids = [line and line[1] for line in lines]
    return [line[2] if line else name for line, name in zip(lines, names, strict=True)], ids
