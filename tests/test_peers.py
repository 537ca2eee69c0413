"""Second opinions of Captum, pytorch-grad-cam and torch-cam where they are right, and a pin for each place where not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from foveate import Batch, Capture, maps, normalized
from foveate.registry import METHODS, METRICS
from foveate.testing import CLASSES, example, networks

library = pytest.importorskip("pytorch_grad_cam")
targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
attr = pytest.importorskip("captum.attr")


def ours(name: str, network: nn.Module, x: Tensor, y: object, **own: object) -> Tensor:
    capture = Capture(network, x, "features")
    return METHODS.get(name)(capture, "features", capture.target(y), **own).detach()


def their_weights(cam: Any, network: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of pytorch-grad-cam for each channel, and the features that they stand before."""
    output = cam.activations_and_grads(x)
    chosen = [targets.ClassifierOutputTarget(int(one)) for one in y]
    sum(target(row) for target, row in zip(chosen, output, strict=True)).backward()
    A, G = (v[0].detach().numpy() for v in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients))
    weights = cam.get_cam_weights(x, network.features, chosen, A, G)
    cam.activations_and_grads.release()
    network.zero_grad()
    return torch.as_tensor(weights), torch.from_numpy(A)


# Not their Grad-CAM++ on signed features: it uses alpha where 2 + G sum A is negative, where it has no meaning.
THEIRS = {"grad_cam": "GradCAM", "hires_cam": "HiResCAM", "xgrad_cam": "XGradCAM", "layer_cam": "LayerCAM"}
PEERS = [(name, theirs, kind) for name, theirs in THEIRS.items() for kind in ("gap", "inplace")]


@pytest.mark.parametrize(("name", "theirs", "kind"), [*PEERS, ("grad_cam_pp", "GradCAMPlusPlus", "gap")])
def test_pytorch_grad_cam_agrees(name: str, theirs: str, kind: str) -> None:
    """Before ReLU and scaling. An in-place ReLU after the layer overwrites what their hook keeps, so theirs runs without."""
    network, batch = networks()[kind].float(), example(seed=7)
    if kind == "inplace":
        network.relu.inplace = False
    if name == "grad_cam_pp":
        # They add 1e-6 to a denominator of the size of G^2, which changes their map wherever G is below 0.01.
        network.classifier.weight.data *= 1000
    x = batch.x.float()
    cam = getattr(library, theirs)(network, [network.features])
    output = cam.activations_and_grads(x)
    sum(targets.ClassifierOutputTarget(int(y))(row) for y, row in zip(batch.y, output, strict=True)).backward()
    A, G = (
        values[0].detach().numpy() for values in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients)
    )
    expected = torch.from_numpy(cam.get_cam_image(x, network.features, None, A, G, False))
    cam.activations_and_grads.release()
    network.zero_grad()
    saliency = ours(name, network, x, batch.y)
    torch.testing.assert_close(saliency, expected, rtol=2e-4, atol=1e-5 * float(saliency.detach().abs().max()))


def test_captum_agrees() -> None:
    network, batch = networks()["gap"], example(seed=8)
    expected = attr.LayerGradCam(network, network.features).attribute(batch.x, target=batch.y)[:, 0]
    torch.testing.assert_close(ours("grad_cam", network, batch.x, batch.y), expected.detach(), rtol=1e-9, atol=1e-12)


# -- Captum, where it is right ---------------------------------------------------------------------------------------

CAPTUM = {
    "gradient": lambda n, x, y: attr.Saliency(n).attribute(x, target=y).amax(1),
    "input_x_gradient": lambda n, x, y: attr.InputXGradient(n).attribute(x, target=y).sum(1),
    "integrated_gradients": lambda n, x, y: attr.IntegratedGradients(n).attribute(x, target=y, n_steps=20).sum(1),
    "guided_backprop": lambda n, x, y: attr.GuidedBackprop(n).attribute(x, target=y).abs().amax(1),
    "guided_grad_cam": lambda n, x, y: (
        attr.GuidedGradCam(n, n.features).attribute(x, target=y, interpolate_mode="bilinear").abs().amax(1)
    ),
    "occlusion": lambda n, x, y: (
        attr.Occlusion(n).attribute(x, target=y, sliding_window_shapes=(3, 6, 5), strides=(3, 4, 3)).mean(1)
    ),
}
OWN = {
    "integrated_gradients": {"steps": 20, "quadrature": "gauss_legendre"},
    "occlusion": {"window": (6, 5), "stride": (4, 3)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gap", "flat"])
@pytest.mark.parametrize("name", CAPTUM)
def test_captum_agrees_on_pixels(name: str, kind: str) -> None:
    network, batch = networks()[kind], example(seed=11)
    expected = CAPTUM[name](network, batch.x.clone().requires_grad_(True), batch.y).detach().double()
    # Their integrated gradients and occlusion go through float32.
    near = {"rtol": 1e-5, "atol": 1e-6} if name in OWN else {"rtol": 1e-8, "atol": 1e-12}
    torch.testing.assert_close(ours(name, network, batch.x, batch.y, **OWN.get(name, {})), expected, **near)


@pytest.mark.filterwarnings("ignore")
def test_captum_guides_modules_only_and_we_guide_functions_too() -> None:
    """A network whose second ReLU is ``F.relu``: theirs is guided at the first alone."""
    network, batch = networks()["inplace"], example(seed=11)
    network.relu.inplace = False
    theirs = CAPTUM["guided_backprop"](network, batch.x.clone().requires_grad_(True), batch.y).detach()
    mine = ours("guided_backprop", network, batch.x, batch.y)
    for i in range(2):
        torch.testing.assert_close(
            mine[i], reference.guided_backprop(network, batch.x[i], int(batch.y[i])), rtol=1e-8, atol=1e-12
        )
    assert not torch.allclose(mine, theirs, rtol=1e-2)


# -- pytorch-grad-cam ------------------------------------------------------------------------------------------------


def scored(network: nn.Module, images: Tensor, y: Tensor, masks: Tensor, A: Tensor) -> Tensor:
    """Score-CAM with given masks ``[B,K,H,W]``, by a loop over images."""
    rows = []
    for b in range(len(images)):
        with torch.no_grad():
            weights = network(images[b] * masks[b][:, None])[:, y[b]].softmax(0)
        rows.append(torch.einsum("k,khw->hw", weights, A[b]))
    return torch.stack(rows)


def their_masks(A: Tensor) -> Tensor:
    """They upsample with aligned corners, where pixel centres of the two grids do not lie on each other."""
    grown = F.interpolate(A, size=(17, 23), mode="bilinear", align_corners=True)
    low, high = grown.amin((2, 3), keepdim=True), grown.amax((2, 3), keepdim=True)
    return (grown - low) / (high - low + 1e-8)


@pytest.mark.parametrize("kind", ["gap", "flat"])
def test_pytorch_grad_cams_score_cam_agrees_but_for_its_aligned_corners(kind: str) -> None:
    network, batch = networks()[kind].float(), example(seed=7)
    network.classifier.weight.data *= 100  # scores that differ, so that the softmax over channels does something
    x = batch.x.float()
    weights, A = their_weights(library.ScoreCAM(network, [network.features]), network, x, batch.y)
    theirs = torch.einsum("bk,bkhw->bhw", weights, A)
    torch.testing.assert_close(theirs, scored(network, x, batch.y, their_masks(A), A), rtol=1e-3, atol=1e-5)
    own = maps.scale(maps.upsample(A.flatten(0, 1), (17, 23))).view(2, 6, 17, 23)
    torch.testing.assert_close(
        ours("score_cam", network, x, batch.y), scored(network, x, batch.y, own, A), rtol=1e-3, atol=1e-5
    )


def test_their_score_cam_masks_with_grey_and_ours_with_black() -> None:
    """They multiply the normalised tensor, where 0 is the mean colour. With the normalisation inside, 0 is black."""
    inner, batch = networks()["gap"].float(), example(seed=7)
    inner.classifier.weight.data *= 100
    x, mean, std = batch.x.float(), (0.5, 0.4, 0.6), (0.1, 0.2, 0.1)
    model = normalized(inner, mean, std)
    shift, width = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
    z = (x - shift) / width
    weights, A = their_weights(library.ScoreCAM(inner, [inner.features]), inner, z, batch.y)
    grey = torch.einsum("bk,bkhw->bhw", weights, A)
    black = ours("score_cam", model, x, batch.y)
    assert not torch.allclose(black, grey, rtol=0.05)
    torch.testing.assert_close(grey, scored(inner, z, batch.y, their_masks(A), A), rtol=1e-3, atol=1e-5)
    own = maps.scale(maps.upsample(A.flatten(0, 1), (17, 23))).view(2, 6, 17, 23)
    torch.testing.assert_close(black, scored(model, x, batch.y, own, A), rtol=1e-3, atol=1e-5)


def test_pytorch_grad_cams_ablation_cam_agrees_on_features_behind_a_relu() -> None:
    network, batch = networks()["flat"].float(), example(seed=7)
    with torch.no_grad():
        network.classifier.bias += 5  # positive scores: they divide by the signed one
    x = batch.x.float()
    weights, A = their_weights(library.AblationCAM(network, [network.features]), network, x, batch.y)
    assert A.min() == 0
    expected = torch.einsum("bk,bkhw->bhw", weights, A)
    for variant in ("paper", "pytorch_grad_cam"):
        saliency = ours("ablation_cam", network, x, batch.y, variant=variant)
        torch.testing.assert_close(saliency, expected, rtol=1e-3, atol=1e-5)


class Signed(nn.Module):
    """Signed features with no ReLU right behind them, as in ConvNeXt or a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.more, self.classifier = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 5, 3), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.more(self.features(x))).mean((2, 3)))


def test_their_ablation_of_signed_features_is_a_value_of_minus_ten_million() -> None:
    """The paper puts 0 there. Each image for itself, as their loop over images has it."""
    network, batch = Signed().eval(), example(seed=7)
    for i in range(2):
        x, y = batch.x[i : i + 1].float(), batch.y[i : i + 1]
        weights, A = their_weights(library.AblationCAM(network, [network.features]), network, x, y)
        assert A.min() < 0
        theirs = torch.einsum("bk,bkhw->bhw", weights, A)
        variant = ours("ablation_cam", network, x, y, variant="pytorch_grad_cam")
        torch.testing.assert_close(variant, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
        assert not torch.allclose(ours("ablation_cam", network, x, y), theirs, rtol=0.1)


@pytest.mark.parametrize(("name", "theirs"), [("eigen_cam", "EigenCAM"), ("eigen_grad_cam", "EigenGradCAM")])
def test_their_components_agree_up_to_the_sign_that_they_leave_to_chance(name: str, theirs: str) -> None:
    network, batch = networks()["flat"].float(), example(seed=7)
    x = batch.x.float()
    cam = getattr(library, theirs)(network, [network.features])
    output = cam.activations_and_grads(x)
    sum(row[int(y)] for y, row in zip(batch.y, output, strict=True)).backward()
    A, G = (v[0].detach().numpy() for v in (cam.activations_and_grads.activations, cam.activations_and_grads.gradients))
    expected = torch.as_tensor(cam.get_cam_image(x, network.features, None, A, G, False))
    cam.activations_and_grads.release()
    saliency = ours(name, network, x, batch.y, centred=True)
    for i in range(2):
        sign = torch.sign((saliency[i] * expected[i]).sum())
        torch.testing.assert_close(saliency[i], sign * expected[i], rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_their_finer_cam_agrees() -> None:
    """Weighted by probability, at full strength, against the three nearest classes: their defaults."""
    network, batch = networks()["flat"].float(), example(seed=7)
    x = batch.x.float()
    logits = network(x)
    chosen = [
        library.utils.model_targets.FinerWeightedTarget(int(y), [int(c) for c in (row - row[y]).abs().argsort()[1:4]], 1.0)
        for y, row in zip(batch.y, logits, strict=True)
    ]
    cam = library.GradCAM(network, [network.features])
    expected = torch.as_tensor(cam(x, chosen))
    cam.activations_and_grads.release()
    saliency = ours("finer_cam", network, x, batch.y, strength=1.0, weights="probability")
    mine = maps.upsample(maps.scale(maps.relu(saliency)), (17, 23))  # they scale before they upsample
    for i in range(2):
        # Theirs differentiates through the probabilities that weigh the classes, ours holds them: near, not equal.
        assert torch.corrcoef(torch.stack([mine[i].flatten(), expected[i].flatten()]))[0, 1] > 0.9


# -- torch-cam -------------------------------------------------------------------------------------------------------


def test_torch_cams_grad_cam_pp_is_another_formula() -> None:
    """Its alpha is never divided by the denominator (in place, on a copy): the weights are ``sum G^2 relu(G)``."""
    methods = pytest.importorskip("torchcam.methods")
    network, batch = networks()["flat"], example(seed=7)
    with torch.no_grad():
        network.classifier.weight *= 100  # gradients of a size at which the denominator matters
    for i in range(2):
        x, y = batch.x[i : i + 1], int(batch.y[i])
        with methods.GradCAMpp(network, "features") as extractor:
            theirs = extractor(y, network(x), normalized=False)[0][0].detach()
        A, G, _ = reference.run(network, x[0], y)
        scaled = torch.einsum("k,khw->hw", (G**2 * G.clamp(min=0)).sum((1, 2)), A).clamp(min=0)
        torch.testing.assert_close(theirs / theirs.max(), scaled / scaled.max(), rtol=1e-2, atol=1e-3)
        mine = ours("grad_cam_pp", network, x, y)[0]
        torch.testing.assert_close(mine, reference.grad_cam_pp(network, x[0], y), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(mine / mine.max(), theirs / theirs.max(), atol=0.05)


class TestQuantus:
    """Where Quantus has the same metric it gives the same number; the extra ``quantus`` installs it."""

    @staticmethod
    def maps_and_masks() -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        M = torch.rand(4, 17, 23, generator=generator, dtype=torch.float64)
        mask = torch.rand(4, 17, 23, generator=generator) > 0.6
        return M, mask

    def measured(self, name: str, M: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch = Batch(torch.rand(4, 3, 17, 23, dtype=torch.float64), torch.zeros(4).long(), mask)
        return METRICS.get(name)(Capture(networks()["gap"], batch.x, "features"), M, batch)[name]

    def theirs(self, metric: object, M: torch.Tensor, mask: torch.Tensor) -> list[float]:
        x = torch.rand(4, 3, 17, 23).numpy()
        return metric(  # type: ignore[operator]
            model=networks()["gap"].float(),
            x_batch=x,
            y_batch=np.zeros(4, int),
            a_batch=M[:, None].numpy(),
            s_batch=mask[:, None].numpy(),
            device="cpu",
        )

    def test_mass_and_energy(self) -> None:
        quantus = pytest.importorskip("quantus")
        M, mask = self.maps_and_masks()
        metric = quantus.RelevanceMassAccuracy(abs=False, normalise=False, disable_warnings=True)
        theirs = self.theirs(metric, M, mask)
        assert self.measured("mass_inside", M, mask).tolist() == pytest.approx(theirs)
        assert self.measured("EP", M, mask).tolist() == pytest.approx([100 * value for value in theirs])

    def test_the_pointing_game(self) -> None:
        quantus = pytest.importorskip("quantus")
        M, mask = self.maps_and_masks()
        theirs = self.theirs(quantus.PointingGame(abs=False, normalise=False, disable_warnings=True), M, mask)
        assert self.measured("SP", M, mask).tolist() == pytest.approx([100.0 * bool(value) for value in theirs])

    def test_the_gini_index(self) -> None:
        quantus = pytest.importorskip("quantus")
        M, mask = self.maps_and_masks()
        theirs = self.theirs(quantus.Sparseness(abs=True, normalise=False, disable_warnings=True), M, mask)
        assert self.measured("gini", M, mask).tolist() == pytest.approx(theirs, rel=1e-6)
