"""Every method: nothing is left on the model or in memory, whatever happens; and models as people have them."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import reference
from foveate import Capture, FoveateError
from foveate.registry import METHODS
from foveate.testing import assert_untouched, example, fingerprint, networks

NAMES = [name for name in METHODS.all() if name != "random"]
WRAPPED = [
    *("grad_cam:smooth", "score_cam:augmented", "layer_cam:fused"),
    *("captum.IntegratedGradients", "captum.DeepLift", "captum.GuidedBackprop", "captum.Occlusion", "captum.Deconvolution"),
    *("pytorch_grad_cam.GradCAM", "pytorch_grad_cam.AblationCAM", "pytorch_grad_cam.ScoreCAM", "pytorch_grad_cam.FullGrad"),
]


def kind_of(name: str) -> str:
    kinds = reference.DEFINED_ON.get(name, ("inplace",))
    return "inplace" if "inplace" in kinds else kinds[0]


def run(name: str, network: nn.Module, x: Tensor, layer: str = "features") -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capture = Capture(network, x, layer)
        own = reference.SETTINGS.get(name, {})
        return METHODS.get(name)(capture, None, capture.target(torch.tensor([1, 2])), **own)


def interrupting(network: nn.Module, at: int, error: type[BaseException]) -> Callable[[], None]:
    """Make a network raise in its ``at``-th forward pass; what it returns takes that away again."""
    plain, runs = network.tail, itertools.count(1)

    def tail(activations: Tensor) -> Tensor:
        if next(runs) == at:
            raise error("on purpose")
        return plain(activations)

    network.tail = tail
    return lambda: network.__dict__.pop("tail")


@pytest.mark.parametrize("name", [*NAMES, *WRAPPED])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_when_the_model_raises_midway(name: str, error: type[BaseException]) -> None:
    if "." in name:
        pytest.importorskip(name.split(".")[0])
    raised = 0
    for at in (1, 2, 3):
        network, x = networks()[kind_of(name)], example().x
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        next(iter(network.parameters())).requires_grad_(False)
        undo = interrupting(network, at, error)
        before, pixels = fingerprint(network), x.clone()
        try:
            run(name, network, x)
        except (error, FoveateError):
            raised += 1
        assert_untouched(before, network)
        assert torch.equal(pixels, x)
        assert not x.requires_grad
        undo()
        run(name, network, x)  # and it works again
    assert raised >= 1


class Contexts:
    """Models as people have them; each gives the model and images to run, inside what it sets up."""

    @staticmethod
    def second_call(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        run(name, network, x.flip(0))
        yield network, x

    @staticmethod
    def frozen(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        yield network.requires_grad_(False), x

    @staticmethod
    def no_grad(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        with torch.no_grad():
            yield network, x

    @staticmethod
    def inference_mode(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        with torch.inference_mode():
            yield network, x.clone()

    @staticmethod
    def made_in_inference_mode(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        with torch.inference_mode():
            network = copy.deepcopy(network)
        yield network, x

    @staticmethod
    def under_autocast(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        """A network in float64 is none of autocast's business; what methods compute themselves is not either."""
        with torch.autocast("cpu", torch.bfloat16):
            yield network, x

    @staticmethod
    def compiled(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        yield torch.compile(network, backend="eager"), x

    @staticmethod
    def data_parallel(network: nn.Module, x: Tensor, name: str) -> Iterator[tuple[nn.Module, Tensor]]:
        yield nn.DataParallel(network), x


@pytest.mark.parametrize("context", [name for name in vars(Contexts) if not name.startswith("_")])
@pytest.mark.parametrize("name", [*NAMES, *WRAPPED[:3]])
def test_models_as_people_have_them_give_the_same_map(name: str, context: str) -> None:
    x = example(seed=6).x
    expected = run(name, networks()[kind_of(name)], x)
    for network, images in getattr(Contexts, context)(networks()[kind_of(name)], x, name):
        before = fingerprint(network)
        torch.testing.assert_close(run(name, network, images), expected, rtol=1e-9, atol=1e-12)
        assert_untouched(before, network)


# Their maps are not continuous in the features: one pixel more or less, one channel more or less, and they jump.
JUMPING = {"extremal_perturbation", "meaningful_perturbation", "opti_cam", "full_grad"}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_half_precision_gives_a_finite_float32_map(name: str) -> None:
    network, x = networks()[kind_of(name)], example(seed=6).x
    expected = run(name, network, x).float()
    saliency = run(name, network.bfloat16(), x)
    assert saliency.dtype == torch.float32
    assert torch.isfinite(saliency).all()
    if name not in JUMPING and expected.std() > 0:
        assert torch.corrcoef(torch.stack([saliency.flatten(), expected.flatten()]))[0, 1] > 0.9


@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_the_models_and_not_the_methods(name: str) -> None:
    network, x = networks()[kind_of(name)].float(), example(seed=6).x.float()
    expected = run(name, network, x)
    with torch.autocast("cpu", torch.bfloat16):
        saliency = run(name, network, x)
    assert saliency.dtype == torch.float32
    assert torch.isfinite(saliency).all()
    if name not in JUMPING and expected.std() > 0:
        # Windows change these logits by little more than bf16 resolves.
        least = 0.8 if name == "occlusion" else 0.9
        assert torch.corrcoef(torch.stack([saliency.flatten(), expected.flatten()]))[0, 1] > least


@pytest.mark.parametrize("name", ["score_cam", "opti_cam", "full_grad", "ablation_cam", *WRAPPED[:2], *WRAPPED[3:5]])
def test_the_model_runs_in_the_callers_autocast_whoever_runs_it(name: str) -> None:
    if "." in name:
        pytest.importorskip(name.split(".")[0])
    network, x = networks()[kind_of(name)].float(), example(seed=6).x.float()
    seen = set()
    handle = network.classifier.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        saliency = run(name, network, x)
    handle.remove()
    assert seen == {True}
    assert saliency.dtype == torch.float32


class Pair(nn.Module):
    """The same network twice: signed features with an in-place ReLU after them, or one that is not in place, or functional."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.form = form
        self.features = nn.Conv2d(3, 6, 3, 2, 1)
        self.relu = nn.ReLU(inplace=form == "in-place")
        self.more, self.classifier = nn.Conv2d(6, 5, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        seen = torch.relu_(features) if self.form == "functional" else self.relu(features)
        return self.classifier(torch.tanh(self.more(seen)).mean((2, 3)))


@pytest.mark.parametrize("form", ["in-place", "functional"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in reference.DEFINED_ON or "guided" in name])
def test_an_inplace_relu_behind_the_layer_changes_nothing(name: str, form: str) -> None:
    x = example(seed=2).x
    if name == "full_grad":
        pytest.skip("tanh: FullGrad does not hold here")
    plain, other = (run(name, Pair(kind).double().eval(), x) for kind in ("module", form))
    torch.testing.assert_close(other, plain, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_calls_keep_no_memory(name: str) -> None:
    network, x = networks()[kind_of(name)], example().x

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, Tensor) for thing in gc.get_objects())

    for _ in range(2):
        run(name, network, x)
    before = tensors()
    for _ in range(4):
        run(name, network, x)
    assert tensors() <= before


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *WRAPPED])
def test_a_thousand_calls_leave_memory_where_it_was(name: str) -> None:
    """Of the process: what it had after 200 calls it has after 1200, to 3 MB, of about 300."""
    if "." in name:
        pytest.importorskip(name.split(".")[0])
    network, x = networks()[kind_of(name)], example().x

    def resident() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc here")
    for _ in range(200):
        run(name, network, x)
    before = resident()
    for _ in range(1000):
        run(name, network, x)
    assert resident() - before < 3


@pytest.mark.parametrize(
    "name",
    ["score_cam", "rise", "occlusion", "ablation_cam", "smooth_grad", "integrated_gradients", "extremal_perturbation"],
)
def test_memory_does_not_grow_with_masks_or_channels(name: str) -> None:
    """No forward pass sees more images than the chunk, however many there are to run."""
    network = networks()["inplace"]
    largest: list[int] = []
    plain = network.more.forward
    network.more.forward = lambda z: (largest.append(len(z)), plain(z))[1]
    capture = Capture(network, example(count=2).x, "features", chunk=3)
    largest.clear()
    many = {"rise": {"masks": 50, "cells": 3}, "smooth_grad": {"samples": 20}, "occlusion": {"window": 3, "stride": 2}}
    many["extremal_perturbation"] = {"areas": [(i + 1) / 9 for i in range(8)], "steps": 2, "stride": 4}
    METHODS.get(name)(capture, None, capture.target(1), **many.get(name, {}))
    assert len(largest) > 3
    assert max(largest) <= 3
