"""Crops: one image seen in several, each also mirrored, and their maps put back together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from foveate import maps
from foveate.targets import Head


@dataclass(frozen=True)
class Crops:
    """The ten crops of an image: its four corners and its centre, and the same mirrored.

    As of Krizhevsky et al. (2012), section 4.1, whose image is little larger than a crop. Where a side is more than twice as
    long as the crop's, further crops stand evenly between the corners, so that every pixel is in one; where a side is as long
    as the crop's, crops that are the same are taken once.

    Attributes:
        size: height and width of the image.
        crop: height and width of a crop, no larger.

    >>> len(Crops((256, 341), (224, 224))), len(Crops((256, 960), (224, 224)))
    (10, 22)
    """

    size: tuple[int, int]
    crop: tuple[int, int]

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Top and left edge of each crop, without its mirror image."""
        down, across = (_starts(side, crop) for side, crop in zip(self.size, self.crop, strict=True))
        centre = tuple(round((side - crop) / 2) for side, crop in zip(self.size, self.crop, strict=True))
        return list(dict.fromkeys([*((top, left) for top in down for left in across), (centre[0], centre[1])]))

    def __len__(self) -> int:
        return 2 * len(self.places)

    def cut(self, x: Tensor) -> Tensor:
        """The crops of one image ``[C,H,W]``, ``[N,C,h,w]``: all as they are, then all mirrored."""
        height, width = self.crop
        upright = torch.stack([x[:, top : top + height, left : left + width] for top, left in self.places])  # [N/2,C,h,w]
        return torch.cat([upright, upright.flip(-1)])

    def join(self, saliency: Tensor) -> Tensor:
        """Maps of all crops ``[N,h',w']`` on the image, ``[H,W]``: grown, turned back, and averaged where they meet."""
        grown = maps.upsample(saliency, self.crop)
        upright = (grown[: len(self.places)] + grown[len(self.places) :].flip(-1)) / 2  # [N/2,h,w]
        whole, times = grown.new_zeros(self.size), grown.new_zeros(self.size)
        height, width = self.crop
        for own, (top, left) in zip(upright, self.places, strict=True):
            whole[top : top + height, left : left + width] += own
            times[top : top + height, left : left + width] += 1
        return whole / times


def _starts(side: int, crop: int) -> list[int]:
    """Where crops begin that cover a side: at both ends, and evenly between where two are not enough."""
    count = max(2, math.ceil(side / crop))
    return [round(i * (side - crop) / (count - 1)) for i in range(count)]


def mean_logits(logits: Tensor, head: Head) -> Tensor:
    """Logits ``[1,C]`` whose probabilities are the means of those of ``logits [N,C]``, float64."""
    logits = logits.double()
    if head == "softmax":
        return (logits.log_softmax(1).logsumexp(0) - math.log(len(logits)))[None]
    yes, no = (torch.nn.functional.logsigmoid(way).logsumexp(0) for way in (logits, -logits))
    return (yes - no)[None]
