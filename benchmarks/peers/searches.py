"""Methods of many passes: Score-CAM, RISE, Opti-CAM, extremal perturbation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from benchmarks.peers import plain
from benchmarks.peers.agreement import ranks_agree
from benchmarks.peers.cams import of_foveate, of_pytorch_grad_cam, of_torch_cam
from benchmarks.peers.networks import Network
from benchmarks.peers.passes import Kind
from benchmarks.peers.row import Row
from torch import Tensor

import foveate
from foveate import maps
from foveate.precision import has_bf16
from foveate.runtime import memory

PRECISIONS: tuple[tuple[str, Kind], ...] = (("fp32", "folded"), ("bf16", "bf16"))


def halves(network: Network) -> bool:
    """Whether rows in bf16 are measured: not on a device without instructions for it.

    A processor with AVX2 alone is six (ResNet-50) to fifteen times (MobileNet-V2) slower in it than in fp32.
    """
    return has_bf16(network.x.device) is not False


def score_cam(networks: dict[str, Network]) -> Iterator[Row]:
    for network in networks.values():
        peers = {
            "pytorch-grad-cam": of_pytorch_grad_cam(network, ["ScoreCAM"], 1),
            "torch-cam": of_torch_cam(network, "ScoreCAM", 1),
        }
        if not memory.kept():  # then small batches are faster, its too
            peers["pytorch-grad-cam, 4 at once"] = of_pytorch_grad_cam(network, ["ScoreCAM"], 1, at_once=4)
        activations = foveate.Capture(network.model, network.x[:1], network.layer).activations().detach()[0]
        live = int((~maps.is_constant(activations)).sum())
        full = of_foveate(network, ["score_cam"], 1)
        yield Row(
            "score",
            f"Score-CAM, {network.name}, one image",
            full,
            peers,
            network.model,
            network.passes.limit("folded", live),
            f"{live} forward, batch norms folded: a channel that is not constant each",
            ranks_agree,
            "pytorch-grad-cam runs constant channels too; torch-cam weighs by the increase over the image",
        )
        if not halves(network):
            continue
        yield Row(
            "score",
            f"Score-CAM, {network.name}, one image, in bf16",
            of_foveate(network, ["score_cam"], 1, precision="bf16"),
            {
                "foveate in fp32": full,
                "pytorch-grad-cam in fp32": peers["pytorch-grad-cam"],
                "pytorch-grad-cam in autocast": of_pytorch_grad_cam(network, ["ScoreCAM"], 1, half=True),
                "torch-cam in autocast": of_torch_cam(network, "ScoreCAM", 1, half=True),
            },
            network.model,
            network.passes.limit("bf16", live),
            f"{live} forward in bf16, batch norms folded, weights cast beforehand",
            ranks_agree,
            "foveate casts a chunk's weights each time, as a module may need them whole; "
            "pytorch-grad-cam needs reshape_transform=torch.Tensor.float in autocast",
        )


def rise(networks: dict[str, Network], masks: int = 500) -> Iterator[Row]:
    for network in networks.values():
        x, y = network.x[:1], int(network.y[0])
        for precision, kind in PRECISIONS if halves(network) else PRECISIONS[:1]:
            ours, theirs = (", in bf16", ", in fp32") if precision == "bf16" else ("", "")
            yield Row(
                "rise",
                f"RISE, {network.name}, one image, {masks} masks{ours}",
                of_foveate(network, ["rise"], 1, settings={"rise": {"masks": masks}}, precision=precision),
                {f"after the paper{theirs}": lambda x=x, y=y, model=network.model: plain.rise(model, x, y, masks)[None]},
                network.model,
                network.passes.limit(kind, masks),
                f"{masks} forward in {precision}, batch norms folded",
                ranks_agree,
                "none of the four has RISE; each draws its own masks, of which this is the noise",
            )


def opti_cam(networks: dict[str, Network], steps: int = 100) -> Iterator[Row]:
    for network in networks.values():
        for count in (1, 8):
            few = steps if network.name != "ResNet-50" else 20
            yield Row(
                "opti",
                f"Opti-CAM, {network.name}, batch {count}, {few} steps",
                of_foveate(network, ["opti_cam"], count, settings={"opti_cam": {"steps": few}}),
                {},
                network.model,
                network.passes.limit("backward", few * count, most=count),
                f"{few * count} forward and backward",
                remark="no peer has it",
            )


def extremal(networks: dict[str, Network], steps: int = 40) -> Iterator[Row]:
    for network in networks.values():
        count = 4
        x, y = network.x[:count], network.y[:count].tolist()

        def theirs(x: Tensor = x, y: list[int] = y, network: Network = network) -> Tensor:
            return torch.stack([plain.extremal(network.model, x[i : i + 1], y[i], 0.1, steps) for i in range(len(x))])

        yield Row(
            "extremal",
            f"Extremal perturbation, {network.name}, batch {count}, {steps} steps",
            of_foveate(network, ["extremal_perturbation"], count, settings={"extremal_perturbation": {"steps": steps}}),
            {"after the paper": theirs},
            network.model,
            network.passes.limit("backward", steps * count, most=count),
            f"{steps * count} forward and backward of the network; the smooth mask is not in it",
            ranks_agree,
            "none of the four has it. Each pixel of the mask is a smooth maximum over 81 cells, as dear as part of a network",
        )
