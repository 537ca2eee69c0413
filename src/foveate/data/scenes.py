"""Scenes: orcas on water and leopards on grass, drawn from a seed, with masks; in the test set the backgrounds swap.

The scenario of Setpal's "Interpretability tools as feedback loops": 89 orcas and 188 leopards, each in its habitat, so
that a classifier can score 1.0 by looking at the background, and fails where the background changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from foveate.batch import Batch
from foveate.data.drawing import draw
from foveate.errors import FoveateError

Split = Literal["train", "val", "test"]
CLASSES = ("leopard", "orca")
HABITAT = {"leopard": "grass", "orca": "water"}
COUNTS: dict[str, dict[str, int]] = {
    "train": {"leopard": 188, "orca": 89},  # the talk's numbers
    "val": {"leopard": 60, "orca": 30},
    "test": {"leopard": 60, "orca": 60},
}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Scenes(Dataset[Batch]):
    """One split of the scenes, in memory.

    Attributes:
        images: ``[N,3,H,W]`` uint8.
        masks: ``[N,H,W]`` bool, True on the animal.
        labels: ``[N]`` int64: 0 leopard, 1 orca.
        backgrounds: ``water`` or ``grass``, one per image.
        ids: one name per image.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    backgrounds: tuple[str, ...]
    ids: tuple[str, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in index order."""
        return CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        rows = slice(index, index + 1)
        x, places = self.images[rows].float() / 255, self.backgrounds[rows]
        return Batch(x, self.labels[rows], self.masks[rows], id=self.ids[rows], background=places)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def renumbered(self, order: Mapping[int, int]) -> Scenes:
        """The same images with labels in another numbering, such as that of a model which knows the classes by name."""
        return replace(self, labels=torch.tensor([order[label] for label in self.labels.tolist()]))

    def batch(self) -> Batch:
        """The whole split as one batch."""
        return Batch(self.images.float() / 255, self.labels, self.masks, id=self.ids, background=self.backgrounds)


def make(split: Split, seed: int = 0, size: int = 96, tick: Callable[[], object] = lambda: None) -> Scenes:
    """One split of the scenes; the same seed and size give the same bytes.

    Args:
        split: ``train`` and ``val`` have each animal in its habitat; ``test`` has the backgrounds swapped.
        size: side of the images in pixels.
        tick: called after each image, for a progress bar.

    Raises:
        FoveateError: an unknown split, or a size below 32 pixels, at which nobody can tell the animals apart.
    """
    if split not in COUNTS:
        raise FoveateError(f"split {split!r} is unknown: use {', '.join(map(repr, COUNTS))}")
    if size < 32:
        raise FoveateError(f"size {size} is too small for a scene: use at least 32 pixels")
    images, masks, labels, backgrounds, ids = [], [], [], [], []
    for name, count in COUNTS[split].items():
        ground = HABITAT[name]
        if split == "test":
            ground = "water" if ground == "grass" else "grass"
        for number in range(count):
            rng = np.random.default_rng([seed, SPLITS.index(split), CLASSES.index(name), number])
            image, mask = draw(name, ground, rng, size)
            images.append(torch.from_numpy(image).permute(2, 0, 1))
            masks.append(torch.from_numpy(mask))
            labels.append(CLASSES.index(name))
            backgrounds.append(ground)
            tick()
            ids.append(f"{split}/{name}_on_{ground}_{number:03d}")
    return Scenes(torch.stack(images).contiguous(), torch.stack(masks), torch.tensor(labels), tuple(backgrounds), tuple(ids))
