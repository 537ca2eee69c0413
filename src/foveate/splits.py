"""Splits: what a recipe trains, validates and tests on, in which order, and how training images are changed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from foveate._torchvision import torchvision
from foveate.batch import Batch
from foveate.data import scenes
from foveate.data.benchmarks import Vision, open_benchmark
from foveate.data.boxes import regions
from foveate.data.folder import Folder, numbered_alike
from foveate.data.images import Preprocess
from foveate.data.labels import has_several
from foveate.data.layout import splits_in
from foveate.errors import FoveateError, SplitWarning, printable
from foveate.recipe import Augment, Data, Recipe


def seed_of(*numbers: int) -> int:
    """A seed from several numbers of any size, the same everywhere."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


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
                f"{str(where.root)!r} gives an image several classes, or none: training takes one class an image"
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


class EpochSampler(Sampler[int]):
    """A random order that depends on the seed and the epoch alone, so that a resumed run sees the same images.

    With several processes each takes every n-th image of that order, so that together they see what one would.

    Args:
        labels: of all images.
        rebalance: draw with replacement, every class equally often; as many draws as there are images.
        numbered: give ``draw * N + image`` with a number for each draw of the run, for :class:`Augmented`.
    """

    def __init__(self, labels: Tensor, seed: int, rebalance: bool = False, numbered: bool = False) -> None:
        if rebalance and labels.ndim != 1:
            raise FoveateError("rebalance draws classes equally often, and these images have several classes each")
        self.labels, self.seed, self.rebalance, self.numbered, self.epoch = labels, seed, rebalance, numbered, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.labels) // processes()[1])

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        if self.rebalance:
            share = 1 / torch.bincount(self.labels).double()[self.labels]
            order = torch.multinomial(share, len(self.labels), replacement=True, generator=generator)
        else:
            order = torch.randperm(len(self.labels), generator=generator)
        if self.numbered:
            draws = self.epoch * len(order) + torch.arange(len(order))
            order = draws * len(order) + order
        rank, count = processes()
        padded = torch.cat([order, order[: len(self) * count - len(order)]])
        return iter(padded[rank::count].tolist())


def processes() -> tuple[int, int]:
    """Which process this is, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def augmenter(augment: Augment) -> Callable[[Batch], Batch] | None:
    """The changes of a recipe as a function of a batch, each image and its mask changed on its own; None for no change."""
    torchvision()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    fill: Any = {tv_tensors.Image: 0.5, tv_tensors.Mask: 0}
    steps: list[nn.Module] = []
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.rotation:
        steps.append(v2.RandomRotation(augment.rotation, v2.InterpolationMode.BILINEAR, fill=fill))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if not steps and not augment.crop_padding and augment.resized_crop == 1:
        return None
    changes: dict[tuple[int, int], Any] = {}

    def change(size: tuple[int, int]) -> Any:
        if size not in changes:
            crop: list[nn.Module] = [v2.RandomCrop(size, augment.crop_padding, fill=fill)] if augment.crop_padding else []
            if augment.resized_crop < 1:
                crop.append(v2.RandomResizedCrop(size, (augment.resized_crop, 1.0), antialias=True))
            changes[size] = v2.Compose([*crop, *steps])
        return changes[size]

    def apply(batch: Batch) -> Batch:
        covered = regions(batch)  # boxes turn with the image as what they cover
        images, masks = [], []
        for index in range(len(batch)):
            image = tv_tensors.Image(batch.x[index])
            with_size = change((batch.x.shape[-2], batch.x.shape[-1]))
            if covered is None:
                image = with_size(image)
            else:
                image, mask = with_size(image, tv_tensors.Mask(covered[index : index + 1].float()))
                masks.append(mask.as_subclass(Tensor) > 0.5)
            images.append(image.as_subclass(Tensor))
        mask = torch.cat(masks) if masks else None
        return replace(batch, x=torch.stack(images), mask=mask, boxes=None)

    return apply


class Augmented(Dataset[Batch]):
    """Images changed anew at every draw, by a change that depends on the seed and the draw alone, in whichever process."""

    def __init__(self, whole: Any, change: Callable[[Batch], Batch], seed: int) -> None:
        self.whole, self.change, self.seed = whole, change, seed

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, number: int) -> Batch:
        draw, index = divmod(number, len(self.whole))
        batch = self.whole[index]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, draw))
            return self.change(batch)


class Kept(Dataset[Batch]):
    """A data set whose images are kept in memory once they have been read."""

    LIMIT = 1 << 30  # bytes

    def __init__(self, whole: Any) -> None:
        self.whole = whole
        self._known: dict[int, Batch] = {}

    @staticmethod
    def of(data: Any) -> Any:
        """The data set itself where it is in memory already, or would not fit."""
        if isinstance(data, scenes.Scenes) or not len(data):
            return data
        x = data[0].x
        return Kept(data) if x.numel() * x.element_size() * len(data) <= Kept.LIMIT else data

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, index: int) -> Batch:
        if index not in self._known:
            self._known[index] = self.whole[index]
        return self._known[index]


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
