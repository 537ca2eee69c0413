"""Loading: in which order images come, what is changed of them, and what is kept of them in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from foveate._torchvision import torchvision
from foveate.batch import Batch
from foveate.data import scenes
from foveate.data.boxes import regions
from foveate.errors import FoveateError
from foveate.training.recipe import Augment


def seed_of(*numbers: int) -> int:
    """A seed from several numbers of any size, the same everywhere."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


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
    if not (augment.flip or augment.rotation or augment.color_jitter or augment.crop_padding or augment.resized_crop < 1):
        return None
    torchvision("augment")
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
    """Images changed again at every draw, by a change that depends on the seed and the draw alone, in whichever process."""

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
