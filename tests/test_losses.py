"""Losses: the CAM loss and its forms, its kernel, its gradient, and the schedules."""

from __future__ import annotations

import math

import pytest
import torch

import reference
from foveate import Capture, FoveateError, cam_loss
from foveate.batch import Batch
from foveate.losses.centre import cam_loss_of, gaussian, inverted_gaussian
from foveate.registry import LOSSES
from foveate.testing import example, networks
from foveate.training.schedules import constant, get, three_phase

FORMS = ("mass", "abs", "raw", "square")


def test_every_loss_has_a_replica() -> None:
    assert set(reference.LOSSES) == set(LOSSES.all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sigma", [0.1, 0.25])
def test_equals_its_replica(form: str, sigma: float) -> None:
    S = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = cam_loss(S, form=form, sigma=sigma)
    for i in range(3):
        assert float(values[i]) == pytest.approx(reference.cam_loss(S[i], form, sigma), rel=1e-9)


def test_mass_at_the_centre_is_free_and_at_a_corner_it_is_not() -> None:
    centre, corner = torch.zeros(2, 1, 9, 9)
    centre[0, 4, 4] = 3
    corner[0, 0, 0] = 3
    assert float(cam_loss(centre)) == 0
    assert float(cam_loss(corner)) == pytest.approx(1 - math.exp(-2 * (4 / 9) ** 2 / (2 * 0.25**2)))
    assert float(cam_loss(corner, centre=(0.5 / 9, 0.5 / 9))) == pytest.approx(0, abs=1e-7)


def test_the_mass_form_does_not_see_the_scale_of_the_map_nor_its_size() -> None:
    S = torch.rand(2, 6, 8)
    torch.testing.assert_close(cam_loss(S), cam_loss(1000 * S))
    coarse, fine = cam_loss(torch.ones(1, 16, 16)), cam_loss(torch.ones(1, 64, 64))
    torch.testing.assert_close(coarse, fine, rtol=0.01, atol=0)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_a_map_without_mass_has_no_loss_and_no_nan(value: float) -> None:
    S = torch.full((1, 5, 5), value, requires_grad=True)
    loss = cam_loss(S)
    loss.sum().backward()
    assert float(loss.detach()) == 0
    assert (S.grad == 0).all()


def test_gradcheck() -> None:
    S = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        assert torch.autograd.gradcheck(lambda S, form=form: cam_loss(S, form=form), S)


def test_the_historical_kernel_has_the_numbers_of_the_slide() -> None:
    """The paper figure's colour bar ends at 5.46e-5: max G - min G at 224 pixels with a standard deviation of 56."""
    kernel = gaussian(224, 224, 0.25)
    kernel = kernel / kernel.sum()
    assert float(kernel.max() - kernel.min()) == pytest.approx(5.46e-5, rel=0.01)


def test_the_kernel_lies_between_the_middle_cells_of_an_even_map() -> None:
    kernel = inverted_gaussian(6, 8)
    torch.testing.assert_close(kernel, kernel.flip(0))
    torch.testing.assert_close(kernel, kernel.flip(1))
    assert kernel.max() < 1
    assert kernel.min() == kernel[2, 3] > 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"form": "median"}, "form 'median' is unknown"),
        ({"sigma": 0.0}, "sigma 0.0 is not above 0"),
        ({"centre": (0.5, 2.0)}, "outside of the map"),
    ],
)
def test_refusals(options: dict[str, object], match: str) -> None:
    with pytest.raises(FoveateError, match=match):
        cam_loss(torch.rand(1, 5, 6), **options)


class TestRegistered:
    @pytest.mark.parametrize("kind", ["gap", "flat", "inplace", "tokens"])
    @pytest.mark.parametrize("method", ["contrastive_cam", "hires_cam", "grad_cam"])
    def test_gradient_in_the_parameters(self, kind: str, method: str) -> None:
        network, batch = networks()[kind], example()
        parameters = list(network.parameters())
        generator = torch.Generator().manual_seed(0)
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

        def value(frozen: bool) -> torch.Tensor:
            capture = Capture(network, batch.x, "features", frozen=frozen)
            return cam_loss_of(capture, batch, method=method).sum()

        gradients = torch.autograd.grad(value(False), parameters, allow_unused=True)
        exact = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True) if g is not None)
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, d in zip(parameters, directions, strict=True):
                    p.add_(d, alpha=step)
            values.append(float(value(True).detach()))
        assert exact == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)

    def test_the_default_map_cannot_be_escaped_by_negative_maps(self) -> None:
        """Pulling every class's map down changes no probability and empties the class's own map, but not the contrast."""
        network, batch = networks()["flat"], example()
        pred = network(batch.x).argmax(1)
        batch = Batch(batch.x, pred)
        with torch.no_grad():
            network.classifier.weight -= 10
        capture = Capture(network, batch.x, "features", frozen=False)
        assert torch.equal(capture.pred, pred)
        assert (cam_loss_of(capture, batch, method="hires_cam") == 0).all()
        assert (cam_loss_of(capture, batch) > 0.1).all()

    def test_a_method_without_gradient_is_refused(self) -> None:
        capture = Capture(networks()["gap"], example().x, "features", frozen=False)
        with pytest.raises(FoveateError, match="'random' cannot be trained through"):
            cam_loss_of(capture, example(), method="random")
        with pytest.raises(FoveateError, match="needs labels"):
            cam_loss_of(capture, Batch(example().x))


def test_schedules() -> None:
    assert {constant(p).added for p in (0.0, 0.5, 0.99)} == {1.0}
    phases = [three_phase(epoch / 15) for epoch in range(15)]
    assert [(w.cross_entropy, w.added) for w in phases] == [(1, 0)] * 5 + [(0, 1)] * 5 + [(1, 0)] * 5
    assert [w.learning_rate for w in phases] == [1.0] * 10 + [0.1] * 5
    with pytest.raises(FoveateError, match="schedule 'square' is unknown"):
        get("square")
