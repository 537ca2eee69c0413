"""Class activation maps: one method in batches of 1, 8 and 32, six methods at once, Ablation-CAM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import captum.attr
import pytorch_grad_cam
import torch
import torchcam.methods
from benchmarks.peers.agreement import each_agrees, maps_agree
from benchmarks.peers.networks import Network
from benchmarks.peers.row import Row
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor

import foveate
from foveate import maps

SIX = {
    "grad_cam": "GradCAM",
    "grad_cam_pp": "GradCAMPlusPlus",
    "hires_cam": "HiResCAM",
    "xgrad_cam": "XGradCAM",
    "layer_cam": "LayerCAM",
    "eigen_cam": "EigenCAM",
}


def of_foveate(network: Network, methods: list[str], count: int, raw: bool = False, **options: Any) -> Callable[[], Tensor]:
    """foveate's maps, ``[methods B,H,W]``: as they are drawn, or ``raw`` as the paper defines them."""
    x, y = network.x[:count], network.y[:count].tolist()

    def run() -> Tensor:
        found = foveate.explain(network.model, x, methods, layer=network.layer, target=y, **options)
        return torch.cat([(found.raw if raw else found.maps)[name] for name in methods])

    return run


def of_pytorch_grad_cam(
    network: Network, methods: list[str], count: int, half: bool = False, at_once: int | None = None
) -> Callable[[], Tensor]:
    """Its maps; in autocast its activations are widened by its own hook for them, since numpy has no bf16."""
    targets = [ClassifierOutputTarget(c) for c in network.y[:count].tolist()]

    def run() -> Tensor:
        found = []
        for name in methods:
            options = {"reshape_transform": Tensor.float} if half else {}
            with (
                torch.autocast(network.x.device.type, torch.bfloat16, enabled=half),
                getattr(pytorch_grad_cam, name)(network.model, [network.inner], **options) as cam,
            ):
                if at_once is not None:
                    cam.batch_size = at_once
                found.append(torch.from_numpy(cam(input_tensor=network.x[:count], targets=targets)))
        return torch.cat(found)

    return run


def of_torch_cam(network: Network, name: str, count: int, half: bool = False) -> Callable[[], Tensor]:
    x, y = network.x[:count], network.y[:count].tolist()

    def run() -> Tensor:
        with (
            torch.autocast(x.device.type, torch.bfloat16, enabled=half),
            getattr(torchcam.methods, name)(network.model, network.inner) as extractor,
        ):
            found = extractor(y, network.model(x))[0]
        return maps.upsample(found.float(), (x.shape[-2], x.shape[-1]))

    return run


def of_captum(network: Network, count: int) -> Callable[[], Tensor]:
    x, y = network.x[:count], network.y[:count]

    def run() -> Tensor:
        found = captum.attr.LayerGradCam(network.model, network.inner).attribute(x, target=y, relu_attributions=True)
        return captum.attr.LayerAttribution.interpolate(found, x.shape[-2:], "bilinear")

    return run


def rows(networks: dict[str, Network]) -> Iterator[Row]:
    for network in networks.values():
        for count in (1, 8, 32):
            yield Row(
                "cam",
                f"Grad-CAM, {network.name}, batch {count}",
                of_foveate(network, ["grad_cam"], count),
                {
                    "pytorch-grad-cam": of_pytorch_grad_cam(network, ["GradCAM"], count),
                    "Captum": of_captum(network, count),
                    "torch-cam": of_torch_cam(network, "GradCAM", count),
                },
                network.model,
                network.passes.limit("forward", count, most=count),
                f"{count} forward",
                maps_agree,
            )
        for count in (1, 8):
            yield Row(
                "six",
                f"Six CAM methods together, {network.name}, batch {count}",
                of_foveate(network, list(SIX), count),
                {"pytorch-grad-cam": of_pytorch_grad_cam(network, list(SIX.values()), count)},
                network.model,
                network.passes.limit("forward", count, most=count),
                f"{count} forward",
                each_agrees(list(SIX)),
                "pytorch-grad-cam adds 1e-6 to a denominator of Grad-CAM++ that is as small; Eigen-CAM's sign is chance there",
            )


def ablation(networks: dict[str, Network]) -> Iterator[Row]:
    for network in networks.values():
        yield Row(
            "ablation",
            f"Ablation-CAM, {network.name}, one image",
            of_foveate(network, ["ablation_cam"], 1),
            {"pytorch-grad-cam": of_pytorch_grad_cam(network, ["AblationCAM"], 1)},
            network.model,
            network.passes.limit("forward", 1, most=1),
            "1 forward: behind the layer lies a linear head, whose drop has a closed form",
            maps_agree,
            "pytorch-grad-cam runs all but the layer for each channel; in MobileNet-V2 the layer is nearly everything",
        )
