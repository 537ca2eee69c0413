"""Splits: what a recipe trains, validates and tests on, in which order, and how training images are changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from foveate.batch import Batch
from foveate.data import scenes
from foveate.data.benchmarks import Vision, open_benchmark
from foveate.data.folder import Folder, numbered_alike
from foveate.data.images import Preprocess
from foveate.data.labels import has_several
from foveate.data.layout import splits_in
from foveate.errors import FoveateError, SplitWarning, printable
from foveate.training.recipe import Data, Recipe


@dataclass(frozen=True)
class Part(Dataset[Batch]):
    """Some images of a data set, by number."""

    whole: Any
    chosen: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Batch:
        return self.whole[self.chosen[index]]  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Those of the whole."""
        return getattr(self.whole, "class_names", None)


def open_splits(recipe: Recipe, preprocess: Preprocess) -> dict[str, Dataset[Batch]]:
    """The splits that a recipe names: ``train``, ``val`` and, where there is one, ``test``.

    Raises:
        FoveateError: data that is not there, has no labels, or is too little to be divided.
    """
    if recipe.data == "scenes":
        size = recipe.size or preprocess.crop[0]
        return {split: scenes.make(split, recipe.seed, size) for split in scenes.SPLITS}
    data = recipe.data
    assert isinstance(data, Data)
    train: Any = open_benchmark(data.train, preprocess, train=True, encoding=data.encoding)
    found: dict[str, Any] = {}
    for split, where in _named_splits(data, train).items():
        opened = open_benchmark(where, preprocess, encoding=data.encoding, split=split)
        known = getattr(train, "class_names", None)
        if isinstance(opened, Folder) and opened.class_names is not None and known is not None:
            opened = numbered_alike(opened, known, where)
        found[split] = opened
    for where in (train, *found.values()):
        if has_several(where):
            raise FoveateError(
                f"{str(where.root)!r} gives an image several classes, or none: training takes one class per image"
            )
    labels = labels_of(train)
    rest = list(range(len(train)))
    if data.folds is not None:
        test = held_out(labels, 1 / data.folds, data.split_seed, data.fold, data.folds)
        found["test"] = Part(train, tuple(test))
        rest = sorted(set(rest) - set(test))
    if "val" not in found:
        chosen = held_out(labels[rest], data.hold_out, data.split_seed + 1)
        found["val"] = Part(train, tuple(rest[i] for i in chosen))
        rest = sorted(set(rest) - {rest[i] for i in chosen})
    found["train"] = train if len(rest) == len(train) else Part(train, tuple(rest))
    return {split: found[split] for split in scenes.SPLITS if split in found}


def held_out(labels: Tensor, share: float, seed: int, fold: int = 0, folds: int | None = None) -> list[int]:
    """The images to hold out, the same share of every class: drawn from the seed, or the ``fold`` of ``folds`` equal parts.

    Classes with too few images for that are divided together, as one.

    Raises:
        FoveateError: there are too few images to give one away.
    """
    least = folds if folds is not None else 2
    generator = torch.Generator().manual_seed(seed)
    keys = labels.clone() if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.long)
    classes, counts = keys.unique(return_counts=True)
    rare = classes[counts < least]
    if len(rare) > 1:
        keys[torch.isin(keys, rare)] = -1
    chosen: list[int] = []
    for label in keys.unique().tolist():
        images = (keys == label).nonzero()[:, 0]
        images = images[torch.randperm(len(images), generator=generator)].tolist()
        part = images[fold::folds] if folds is not None else images[: max(1, round(share * len(images)))]
        if len(images) < least or len(part) == len(images):
            name = f"class {label} has" if label >= 0 else "classes of a single image have"
            raise FoveateError(
                f"{name} {len(images)} image(s), too few to hold {share:.2g} of them out: give more, or name val and test data"
            )
        chosen += part
    return sorted(chosen)


def _named_splits(data: Data, train: Any) -> dict[str, str]:
    """Where validation and test data are: as the recipe names them, or beside the training split of one folder (it is said)."""
    named = {split: where for split, where in (("val", data.val), ("test", data.test)) if where is not None}
    root = Path(data.train)
    if not isinstance(train, Folder) or not train.root.is_relative_to(root) or train.root == root:
        return named
    below = {split: folder for split, folder in splits_in(root).items() if split != "train" and split not in named}
    left = below.pop("test", None) if data.folds is not None else None
    does = {"val": "validates on", "test": "tests on"}
    said = [f"trains on {train.root.name}/", *(f"{does[split]} {folder.name}/" for split, folder in below.items())]
    if left is not None:
        said.append(f"leaves {left.name}/ alone, for folds takes the test data from {train.root.name}/")
    elif "val" not in {*below, *named}:
        said.append(f"holds {data.hold_out:.0%} of {train.root.name}/ out for validation")
    warnings.warn(f"{printable(root)} has splits: this run {', '.join(said)}", SplitWarning, stacklevel=2)
    return {**named, **{split: str(folder) for split, folder in below.items()}}


def labels_of(data: Any) -> Tensor:
    """The labels of all images, ``[N]``, or ``[N,C]`` where an image can have several classes; no image is read if possible.

    Raises:
        FoveateError: an image has no label.
    """
    if isinstance(data, Part):
        return labels_of(data.whole)[list(data.chosen)]
    if isinstance(data, scenes.Scenes):
        return data.labels
    labels: Sequence[Any]
    if isinstance(data, Folder):
        labels = [entry.label for entry in data.entries]
    elif isinstance(data, Vision) and (known := data.labels()) is not None:
        labels = known
    else:
        labels = [None if data[i].y is None else data[i].y[0] for i in range(len(data))]
    if any(label is None for label in labels):
        raise FoveateError("training needs a label for every image")
    return torch.stack([torch.as_tensor(label) for label in labels])


def film_images(splits: dict[str, Any], count: int) -> Batch:
    """A few images to follow through training: of validation, and as many of the test data, the classes in turn."""
    names = [split for split in ("val", "test") if split in splits]
    chosen = []
    for number, split in enumerate(names):
        share = count // len(names) + (number < count % len(names))
        labels = labels_of(splits[split])
        orders = [(labels == label).nonzero()[:, 0].tolist() for label in labels.unique()]
        turns = [order[turn] for turn in range(max(map(len, orders))) for order in orders if turn < len(order)]
        chosen += [splits[split][index] for index in turns[:share]]
    return Batch.collate(chosen)
