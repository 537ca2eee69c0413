"""CIFAR: torchvision's ResNet-18 and MobileNet-V2 for images of 32 pixels, whose first layers do not shrink them."""

from __future__ import annotations

from torch import nn

from foveate._torchvision import torchvision
from foveate.data.images import Preprocess

PREPROCESS = Preprocess((32, 32), 32, "bilinear", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def cifar_resnet18(num_classes: int = 100) -> nn.Module:
    """ResNet-18 with a first convolution of 3 x 3, stride 1, and no max-pool: 4 x 4 cells at 32 pixels."""
    model = torchvision().models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model.eval()  # type: ignore[no-any-return]


def cifar_mobilenet_v2(num_classes: int = 100) -> nn.Module:
    """MobileNet-V2 whose first two strides are 1: 4 x 4 cells at 32 pixels."""
    model = torchvision().models.mobilenet_v2(num_classes=num_classes)
    model.features[0][0].stride = (1, 1)
    model.features[2].conv[1][0].stride = (1, 1)
    return model.eval()  # type: ignore[no-any-return]
