"""Gradient methods: the gradient, SmoothGrad, integrated gradients, guided backprop."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import captum.attr
import numpy as np
import pytorch_grad_cam
import torch
from benchmarks.peers.agreement import maps_agree, ranks_agree
from benchmarks.peers.cams import of_foveate
from benchmarks.peers.networks import Network
from benchmarks.peers.row import Row
from torch import Tensor, nn

SAMPLES = 50


def rows(networks: dict[str, Network]) -> Iterator[Row]:
    for network in networks.values():
        x, y = network.x[:8], network.y[:8]
        yield Row(
            "gradient",
            f"Gradient, {network.name}, batch 8",
            of_foveate(network, ["gradient"], 8, raw=True),
            {"Captum": lambda n=network, x=x, y=y: captum.attr.Saliency(n.model).attribute(x, target=y).amax(1)},
            network.model,
            network.passes.limit("backward", 8, most=8),
            "8 forward and backward",
            maps_agree,
        )
        one, first = x[:1], y[:1]

        def smooth(at_once: int | None, network: Network = network, one: Tensor = one, first: Tensor = first) -> Tensor:
            spread = 0.15 * float(one.max() - one.min())
            tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(network.model))
            given = {"nt_samples": SAMPLES, "nt_samples_batch_size": at_once, "stdevs": spread}
            return tunnel.attribute(one, target=first, abs=False, **given).abs().amax(1)

        yield Row(
            "smooth",
            f"SmoothGrad, {network.name}, one image, {SAMPLES} samples",
            of_foveate(network, ["smooth_grad"], 1, raw=True, settings={"smooth_grad": {"samples": SAMPLES}}),
            {"Captum": partial(smooth, None), "Captum, 8 at once": partial(smooth, 8)},
            network.model,
            network.passes.limit("backward", SAMPLES),
            f"{SAMPLES} forward and backward",
            ranks_agree,
            "each draws its own noise (two seeds of foveate agree as well); Captum runs all copies at once unless told",
        )

        def path(at_once: int | None, network: Network = network, one: Tensor = one, first: Tensor = first) -> Tensor:
            integrated = captum.attr.IntegratedGradients(network.model)
            given = {"n_steps": SAMPLES, "method": "riemann_middle", "internal_batch_size": at_once}
            return integrated.attribute(one, target=first, **given).sum(1)

        yield Row(
            "path",
            f"Integrated gradients, {network.name}, one image, {SAMPLES} steps",
            of_foveate(network, ["integrated_gradients"], 1, raw=True, settings={"integrated_gradients": {"steps": SAMPLES}}),
            {"Captum": partial(path, None), "Captum, 8 at once": partial(path, 8)},
            network.model,
            network.passes.limit("backward", SAMPLES),
            f"{SAMPLES} forward and backward",
            maps_agree,
        )

        def guided(network: Network = network, one: Tensor = one, first: Tensor = first) -> Tensor:
            return captum.attr.GuidedBackprop(network.model).attribute(one, target=first).abs().amax(1)

        copied = copy.deepcopy(network.model)

        def other(model: nn.Module = copied, one: Tensor = one, first: Tensor = first) -> Tensor:
            found = pytorch_grad_cam.GuidedBackpropReLUModel(model.eval(), one.device)(one, target_category=int(first[0]))
            return torch.from_numpy(np.abs(found).max(-1))[None]

        yield Row(
            "guided",
            f"Guided backprop, {network.name}, one image",
            of_foveate(network, ["guided_backprop"], 1, raw=True),
            {"Captum": guided, "pytorch-grad-cam": other},
            network.model,
            network.passes.limit("backward", 1, most=1),
            "1 forward and backward",
            maps_agree,
            "pytorch-grad-cam has a copy, not counted: it leaves ReLUs in training mode behind; neither guides ReLU6",
        )
