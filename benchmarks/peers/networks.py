"""The networks and images of the benchmark: ResNet-50 with random weights, MobileNet-V2 with real ones where there are data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.peers.passes import Passes
from torch import Tensor, nn

import foveate
from foveate._torchvision import timm
from foveate.data.folder import open_folder


@dataclass
class Network:
    """A classifier of images in [0, 1], the layer that all contestants explain, its passes, and images with classes."""

    name: str
    model: nn.Module
    layer: str
    x: Tensor  # [50,3,224,224] in [0, 1]
    y: Tensor  # [50], the predicted classes
    passes: Passes

    @property
    def inner(self) -> nn.Module:
        return self.model.get_submodule(self.layer)


def networks(data: Path | None, device: torch.device) -> dict[str, Network]:
    """ResNet-50 (timm, random weights) and MobileNet-V2, whose batch norm is folded, with its weights under ``data``.

    Without data, MobileNet-V2 has random weights and the images are noise at several scales.
    """
    torch.manual_seed(0)
    resnet = foveate.normalized(timm().create_model("resnet50"))
    if data is None:
        mobilenet, layer = foveate.load("torchvision:mobilenet_v2"), "model.features"
        x = noise(50)
    else:
        mobilenet, layer = foveate.load(f"{data / 'zoo.py'}:mobilenet_v2_folded", mean=(0.5,), std=(0.5,)), "model.features"
        source = open_folder(data / "imagenet", mobilenet.preprocess)
        x = torch.cat([source[i].x for i in range(50)])
    made = {}
    for name, model, where in (("ResNet-50", resnet, "model.layer4"), ("MobileNet-V2", mobilenet, layer)):
        model = model.eval().to(device)
        with torch.inference_mode():
            y = torch.cat([model(part.to(device)).argmax(1) for part in x.split(8)])
        made[name] = Network(name, model, where, x.to(device), y.clone(), Passes(model, device))
    return made


def noise(count: int) -> Tensor:
    """Images of noise at several scales, ``[B,3,224,224]`` in [0, 1]: plain noise looks the same to every layer."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(count, 3, side, side, generator=generator) for side in (4, 14, 56, 224)]
    return torch.stack([nn.functional.interpolate(one, (224, 224), mode="bilinear") for one in layers]).mean(0)
