"""The talk's small CNN, with a head that has a true class activation map."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import FoveateError


class SmallCNN(nn.Module):
    """Three stages of convolution, batch norm and max-pooling after a stem, then average pooling and one linear layer.

    ``Conv 16 -> [Conv c, BN, max-pool 2] for c in (16, 64, 32) -> ReLU -> global average pooling -> linear``: at
    192 pixels the last features are 32 x 24 x 24. Input of any size from 8 pixels, in [0, 1] behind its normalisation.

    Deviations from Setpal's "Interpretability tools as feedback loops": the talk flattens and puts four dense layers
    before the logit, and multiplies features by the weights of the last of them, which is not a class activation map
    of that network (its dimensions agree by coincidence); the head here is average pooling and one linear layer, so
    that CAM is exact. Kernels are 3 x 3 by default: the talk's 2 x 2 with one-sided padding shift the map by half a
    pixel in each layer; ``kernel=2`` gives them.
    """

    def __init__(self, num_classes: int = 2, channels: Sequence[int] = (16, 64, 32), stem: int = 16, kernel: int = 3) -> None:
        super().__init__()
        if num_classes < 1 or kernel < 1 or not channels:
            raise FoveateError(f"a small CNN needs classes, channels and a kernel, not {num_classes}, {channels}, {kernel}")
        self.stem = nn.Conv2d(3, stem, kernel, padding="same")
        stages: list[nn.Module] = []
        width = stem
        for channel in channels:
            stages.append(
                nn.Sequential(
                    nn.Conv2d(width, channel, kernel, padding="same", bias=False), nn.BatchNorm2d(channel), nn.MaxPool2d(2)
                )
            )
            width = channel
        self.stages = nn.Sequential(*stages)
        self.features = nn.ReLU()
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(self.stages(F.relu(self.stem(x))))  # [B,32,H/8,W/8]
        result: Tensor = self.classifier(features.mean((2, 3)))
        return result


def small_cnn(num_classes: int = 2, kernel: int = 3) -> SmallCNN:
    """The talk's network for ``num_classes`` classes; see :class:`SmallCNN`."""
    return SmallCNN(num_classes, kernel=kernel)
