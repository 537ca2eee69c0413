"""What each post-hoc method promises beyond its replica: identities, limits, passes, independence, refusals."""

from __future__ import annotations

import itertools
import math
import sys
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from foveate import Capture, FoveateError, explain, maps
from foveate.methods.fullgrad import full_gradients
from foveate.methods.gradient import path_completeness
from foveate.methods.mask import SmoothMask, area_miss, blur_pyramid, through, total_variation
from foveate.methods.opti import optimise
from foveate.methods.perturbation import RiseMasks, rise_maps
from foveate.models.small import small_cnn
from foveate.registry import METHODS
from foveate.runtime.guided import guided
from foveate.runtime.model import modules_of, swapped
from foveate.testing import CLASSES, example, networks


def on(kind: str, seed: int = 0, count: int = 2, **options: object) -> Capture:
    return Capture(networks()[kind], example(seed, count).x, "features", **options)


def run(name: str, capture: Capture, target: object = 1, **own: object) -> torch.Tensor:
    return METHODS.get(name)(capture, "features", capture.target(target), **own)


class Constant(nn.Module):
    """Features that can be set: channels of zeros, of one value, and one that varies; average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 1, bias=True)
        self.classifier = nn.Linear(4, CLASSES)
        with torch.no_grad():
            self.features.weight.zero_()
            self.features.weight[3] = 1
            self.features.bias.copy_(torch.tensor([0.0, 0.5, -0.5, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class TestScoreCam:
    @pytest.mark.parametrize("weighting", ["channel_softmax", "probability", "increase"])
    def test_the_three_definitions_equal_their_replicas(self, weighting: str) -> None:
        for kind in ("gap", "inplace", "tokens"):
            batch, network = example(seed=2), networks()[kind]
            capture = Capture(network, batch.x, "features")
            saliency = METHODS.get("score_cam")(capture, None, capture.target(batch.y), weighting=weighting)
            for i in range(2):
                expected = reference.score_cam(network, batch.x[i], int(batch.y[i]), weighting)
                torch.testing.assert_close(saliency[i], expected, rtol=1e-9, atol=1e-12)

    def test_constant_channels_cost_one_pass_together_and_are_never_nan(self) -> None:
        network = Constant().double().eval()
        capture = Capture(network, example().x, "features")
        before = capture.passes.forward
        saliency = run("score_cam", capture)
        assert torch.isfinite(saliency).all()
        assert capture.passes.forward - before == 2 * (1 + 1)  # one live channel and one black image, for each image
        skipped = run("score_cam", Capture(network, example().x, "features"), constant="skip")
        # One channel is left, with all the weight.
        torch.testing.assert_close(skipped, capture.activations()[:, 3])
        assert not torch.allclose(saliency, skipped)

    def test_an_image_of_dead_features_gives_a_map_of_zeros(self) -> None:
        network = networks()["gap"]
        with torch.no_grad():
            network.features[2].weight.zero_()
            network.features[2].bias.fill_(-1)
        for constant in ("zero", "skip"):
            for weighting in ("channel_softmax", "probability", "increase"):
                saliency = run("score_cam", Capture(network, example().x, "features"), constant=constant, weighting=weighting)
                assert (saliency == 0).all()

    def test_options(self) -> None:
        for own in ({"weighting": "cic"}, {"constant": "one"}):
            with pytest.raises(FoveateError, match="is unknown"):
                run("score_cam", on("gap"), **own)


class TestAblationCam:
    @pytest.mark.parametrize("kind", ["gap", "flat"])
    @pytest.mark.parametrize("score", ["logit", "probability", "loss"])
    def test_the_closed_form_is_what_running_again_gives(self, kind: str, score: str) -> None:
        results = []
        for closed in (True, False):
            capture = on(kind, closed_form=closed)
            capture.linear_head = (lambda layer=None: None) if not closed else capture.linear_head
            results.append(METHODS.get("ablation_cam")(capture, None, capture.target(1, score=score)))
            assert capture.passes.tail == (0 if closed else 2 * 6)
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-12)

    def test_behind_average_pooling_it_is_cam_weighted_by_the_mean_features(self) -> None:
        capture = on("gap")
        A, weight = capture.activations(), capture.model.classifier.weight[1].detach()
        expected = (
            torch.einsum("k,bk,bkhw->bhw", weight, A.mean((2, 3)), A) / capture.logits[:, 1].detach().abs()[:, None, None]
        )
        torch.testing.assert_close(run("ablation_cam", capture), expected.detach())

    def test_a_negative_score_does_not_turn_the_map_over(self) -> None:
        network = networks()["gap"]
        maps_of = []
        for shift in (0.0, -10.0):
            with torch.no_grad():
                network.classifier.bias.add_(shift)
            maps_of.append(maps.scale(run("ablation_cam", Capture(network, example().x, "features"))))
        torch.testing.assert_close(*maps_of)

    def test_a_score_of_zero_is_not_divided_by(self) -> None:
        network = networks()["gap"]
        with torch.no_grad():
            network.classifier.bias -= network(example(count=1).x)[0]
        saliency = run("ablation_cam", Capture(network, example(count=1).x, "features"))
        assert torch.isfinite(saliency).all()
        assert saliency.any()


class TestOptiCam:
    def test_images_do_not_depend_on_each_other(self) -> None:
        """Shuffled and split, also where some stop before others."""
        x = example(seed=1, count=5).x
        network = networks()["inplace"]

        def found(images: torch.Tensor, chunk: int) -> torch.Tensor:
            capture = Capture(network, images, "features", chunk=chunk)
            return optimise(capture, None, capture.target(1), steps=25, patience=3).saliency

        whole = found(x, 5)
        order = torch.tensor([3, 0, 4, 1, 2])
        torch.testing.assert_close(found(x[order], 5), whole[order], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.cat([found(x[:2], 5), found(x[2:], 5)]), whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found(x, 2), whole, rtol=1e-9, atol=1e-12)

    def test_the_first_iterate_is_the_mean_feature_map_and_the_best_is_kept(self) -> None:
        capture = on("inplace", seed=4)
        result = optimise(capture, None, capture.target(1), steps=30)
        A = capture.activations().detach().clamp(min=0)
        mask = maps.prepare(A.mean(1), capture.size)
        first = capture.score(maps.apply_mask(capture.x, mask), capture.target(1))
        torch.testing.assert_close(result.scores[0], first)
        seen = maps.apply_mask(capture.x, result.mask)
        torch.testing.assert_close(capture.score(seen, capture.target(1)), result.scores.amax(0), rtol=1e-9, atol=1e-12)
        assert (result.scores.amax(0) > result.scores[0]).all()
        torch.testing.assert_close(result.weights.sum(1), torch.ones(2, dtype=torch.float64))
        torch.testing.assert_close(torch.einsum("bk,bkhw->bhw", result.weights, A), result.saliency)

    def test_the_last_iterate_is_not_always_the_best(self) -> None:
        """What keeping the best is for: with a large step the objective falls again."""
        capture = on("inplace", seed=4)
        scores = optimise(capture, None, capture.target(1), steps=30, lr=3.0).scores
        assert (scores[-1] < scores.amax(0)).any()

    def test_passes(self) -> None:
        capture = on("inplace")
        before = (capture.passes.forward, capture.passes.backward)
        optimise(capture, None, capture.target(1), steps=10)
        assert (capture.passes.forward - before[0], capture.passes.backward - before[1]) == (2 * 11, 2 * 10)

    def test_an_image_that_stops_costs_nothing_more(self) -> None:
        capture = on("inplace", seed=1, count=5)
        before = capture.passes.backward
        result = optimise(capture, None, capture.target(1), steps=60, patience=2)
        assert 2 <= int(result.steps.min()) < int(result.steps.max())
        # An image stops at the iterate after its last step, whose forward and backward pass has been run.
        assert capture.passes.backward - before == int((result.steps + 1).clamp(max=60).sum())
        assert result.scores.shape == (61, 5)
        early = int(result.steps.argmin())
        assert (result.scores[int(result.steps[early]) :, early] == result.scores[-1, early]).all()

    def test_constant_features_give_zeros_and_do_not_reach_other_images(self) -> None:
        network = networks()["inplace"]
        x = example(count=2).x
        x[0] = 0
        with torch.no_grad():
            network.features[0].bias.zero_()
            network.features[1].running_mean.zero_()
            network.features[1].bias.zero_()
        together = run("opti_cam", Capture(network, x, "features"), steps=5)
        assert torch.isfinite(together).all()
        assert (maps.prepare(together, (17, 23))[0] == 0).all()
        torch.testing.assert_close(together[1:], run("opti_cam", Capture(network, x[1:], "features"), steps=5))

    def test_one_channel_leaves_nothing_to_optimise(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 1, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES)).double().eval()
        x = example().x
        network(x)
        capture = Capture(network, x, "1")
        torch.testing.assert_close(run_at(capture, "opti_cam", "1", steps=4), capture.activations().detach()[:, 0])

    @pytest.mark.parametrize("objective", ["logit", "probability", "margin", "difference"])
    def test_objectives(self, objective: str) -> None:
        capture = on("inplace", seed=5)
        y = torch.tensor([1, 3])
        result = optimise(capture, None, capture.target(y), objective=objective, steps=20)
        logits = capture.score(maps.apply_mask(capture.x, result.mask))
        own = logits.gather(1, y[:, None])[:, 0]
        start = capture.logits.detach().gather(1, y[:, None])[:, 0]
        others = logits.scatter(1, y[:, None], -math.inf).amax(1)
        value = {
            "logit": own,
            "probability": logits.log_softmax(1).gather(1, y[:, None])[:, 0],
            "margin": own - others,
            "difference": -(own - start).abs(),
        }[objective]
        torch.testing.assert_close(result.scores.amax(0), value, rtol=1e-9, atol=1e-12)
        assert (result.scores.amax(0) > result.scores[0]).all()

    @pytest.mark.parametrize(
        ("normaliser", "low", "high"), [("range", 0, 1), ("max", 0, 1), ("sigmoid", 0.5, 1), ("sigmoid_2", 0.5, 1)]
    )
    def test_normalisers(self, normaliser: str, low: float, high: float) -> None:
        capture = on("gap")
        result = optimise(capture, None, capture.target(1), normaliser=normaliser, steps=3)
        assert low <= float(result.mask.min()) <= float(result.mask.max()) <= high
        grown = maps.upsample(result.saliency, capture.size)
        expected = {
            "range": maps.scale(grown),
            "max": grown / grown.amax((1, 2), keepdim=True),
            "sigmoid": 1 / (1 + (-grown).exp()),
            "sigmoid_2": (grown.tanh() + 1) / 2,
        }[normaliser]
        torch.testing.assert_close(result.mask, expected)

    def test_several_layers_share_one_softmax(self) -> None:
        network = networks()["gap"]
        capture = Capture(network, example().x, ["features.1", "features"])
        result = optimise(capture, None, capture.target(1), layers=capture.layers, steps=6)
        assert result.weights.shape == (2, 5 + 6)
        assert result.saliency.shape == (2, 17, 23)
        fused = explain(
            network, example().x, "opti_cam", layer=["features.1", "features"], target=1, settings={"opti_cam": {"steps": 6}}
        )
        torch.testing.assert_close(fused.raw["opti_cam"], result.saliency)

    def test_a_contrast_is_optimised_as_a_contrast(self) -> None:
        capture = on("inplace")
        contrast = capture.target(0, against=2)
        result = optimise(capture, None, contrast, steps=15)
        logits = capture.score(maps.apply_mask(capture.x, result.mask))
        torch.testing.assert_close(logits[:, 0] - logits[:, 2], result.scores.amax(0), rtol=1e-9, atol=1e-12)

    def test_options(self) -> None:
        with pytest.raises(FoveateError, match="a margin is between"):
            METHODS.get("opti_cam")(capture := on("gap"), None, capture.target(1, score="loss"), objective="margin")
        for own in ({"objective": "loss"}, {"normaliser": "tanh"}, {"steps": 0}, {"lr": 0}, {"patience": 0}):
            with pytest.raises(FoveateError):
                run("opti_cam", on("gap"), **own)


def run_at(capture: Capture, name: str, layer: str, **own: object) -> torch.Tensor:
    return METHODS.get(name)(capture, layer, capture.target(1), **own)


class Linear(nn.Module):
    """Logits that are linear in the pixels."""

    def __init__(self, size: tuple[int, int] = (12, 15)) -> None:
        super().__init__()
        self.classifier = nn.Linear(3 * size[0] * size[1], CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x.flatten(1))


class TestPerturbation:
    def test_all_classes_of_rise_from_the_same_passes(self) -> None:
        capture = on("gap")
        every = rise_maps(capture, masks=20, cells=3)
        assert every.shape == (2, CLASSES, 17, 23)
        assert capture.passes.forward == 2 + 2 * 20
        for c in range(CLASSES):
            torch.testing.assert_close(run("rise", capture, c, masks=20, cells=3), every[:, c])
        torch.testing.assert_close(rise_maps(capture, [2, 0], masks=20, cells=3), every[:, [2, 0]])

    @pytest.mark.parametrize("chunk", [1, 3, 100])
    def test_rise_does_not_depend_on_the_chunk(self, chunk: int) -> None:
        whole = run("rise", on("gap", chunk=20), masks=20, cells=3)
        torch.testing.assert_close(run("rise", on("gap", chunk=chunk), masks=20, cells=3), whole, rtol=1e-12, atol=1e-14)

    def test_the_two_classes_of_one_logit(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
        capture = Capture(network.double().eval(), example().x, "1")
        every = rise_maps(capture, masks=20, cells=3)
        assert every.shape[1] == 2
        for c in (0, 1):
            one = METHODS.get("rise")(capture, None, capture.target(c), masks=20, cells=3)
            torch.testing.assert_close(every[:, c], one)
        with pytest.raises(FoveateError, match="class 2 is out of range: the model has 2 classes"):
            rise_maps(capture, [2], masks=2)

    def test_rise_of_a_callable_is_of_its_own_score(self) -> None:
        capture = on("gap")
        score = METHODS.get("rise")(capture, None, capture.target(lambda logits: logits[:, 3]), masks=20, cells=3)
        torch.testing.assert_close(score, run("rise", capture, 3, masks=20, cells=3, score="target"))

    def test_rise_is_seeded_and_leaves_the_global_seed_alone(self) -> None:
        capture, state = on("gap"), torch.random.get_rng_state()
        one, again, other = (run("rise", capture, masks=10, cells=3, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_masks_of_rise_keep_what_they_should(self) -> None:
        masks = RiseMasks((40, 56), 2000, 7, 0.3, 0).part(torch.arange(2000))
        assert masks.shape == (2000, 40, 56)
        assert float(masks.min()) >= 0
        assert float(masks.max()) <= 1 + 1e-6  # interpolation rounds
        each = masks.mean((1, 2))  # independent of each other: their mean is within 4 standard errors of p
        assert abs(float(each.mean()) - 0.3) < 4 * float(each.std()) / math.sqrt(2000)

    def test_rise_of_a_linear_score_is_unbiased(self) -> None:
        """``E[S]`` of a linear score at a pixel, from the second moments of the masks themselves."""
        network = Linear().double().eval()
        x = torch.rand(1, 3, 12, 15, dtype=torch.float64)
        capture = Capture(network, x, "input")
        got = METHODS.get("rise")(capture, None, capture.target(1), masks=4000, cells=4, score="target")[0]
        M = RiseMasks((12, 15), 4000, 4, 0.5, 7).part(torch.arange(4000)).double().flatten(1)  # other draws
        weight = (network.classifier.weight[1].detach().view(3, -1) * x[0].flatten(1)).sum(0)
        values = M @ weight + network.classifier.bias[1].detach()
        each = values[:, None] * M / 0.5
        error = each.std(0) / math.sqrt(4000)
        assert ((got.flatten() - each.mean(0)).abs() < 6 * math.sqrt(2) * error + 1e-9).all()

    def test_occlusion_of_a_linear_model_is_what_each_pixel_adds(self) -> None:
        network = Linear().double().eval()
        x = torch.rand(2, 3, 12, 15, dtype=torch.float64)
        capture = Capture(network, x, "input")
        saliency = METHODS.get("occlusion")(capture, None, capture.target(1), window=1, stride=1)
        expected = (network.classifier.weight[1].detach().view(3, 12, 15) * x).sum(1)
        torch.testing.assert_close(saliency, expected)

    def test_windows_cover_every_pixel(self) -> None:
        for window, stride in ((5, 5), (7, 3), (17, 17), ((4, 9), (3, 2)), (None, None), (6, None)):
            assert torch.isfinite(run("occlusion", on("gap"), window=window, stride=stride)).all()
        for window, stride in ((4, 5), (0, 1), (100, 50)):
            with pytest.raises(FoveateError, match="window"):
                run("occlusion", on("gap"), window=window, stride=stride)

    def test_smooth_masks(self) -> None:
        smooth = SmoothMask((24, 31), 7, 21.0, torch.zeros(1, dtype=torch.float64))
        assert smooth.grid == (4, 5)
        ones, zeros = (smooth(torch.full((1, 4, 5), v, dtype=torch.float64)) for v in (1.0, 0.0))
        assert (zeros == 0).all()
        assert float(ones.min()) > 0.9
        p = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(smooth, (p,))

    def test_area_miss_is_the_sorted_distance(self) -> None:
        m = torch.rand(3, 50, dtype=torch.float64)
        for count in (1, 20, 50):
            wanted = torch.tensor([0.0] * (50 - count) + [1.0] * count, dtype=torch.float64)
            expected = (m.sort(1).values - wanted).square().mean(1)
            torch.testing.assert_close(area_miss(m, [count] * 3), expected)

    def test_extremal_perturbation_reaches_its_areas(self) -> None:
        capture = on("gap", count=1)
        for area in (0.2, 0.6):
            mask = run("extremal_perturbation", capture, areas=[area], steps=150, stride=3, sigma=3.0, blurs=3, weight=3000)
            assert abs(float(mask.mean()) - area) < 0.15

    def test_areas_do_not_depend_on_each_other(self) -> None:
        own = {"steps": 5, "stride": 5, "sigma": 6.0, "blurs": 3, "strongest": 3.0, "start": torch.rand(4, 5).double()}
        capture = on("gap")
        one, two = (run("extremal_perturbation", capture, areas=[a], **own) for a in (0.1, 0.4))
        torch.testing.assert_close(run("extremal_perturbation", capture, areas=[0.1, 0.4], **own), (one + two) / 2)

    def test_extremal_perturbation_on_another_baseline(self) -> None:
        network, x = networks()["gap"], example(count=2, seed=3).x
        capture, own = Capture(network, x, "features"), reference.SETTINGS["extremal_perturbation"]
        target = capture.target(1)
        black, grey, images, blurred = (
            METHODS.get("extremal_perturbation")(capture, None, target, **own, baseline=baseline)
            for baseline in (0.0, 0.4, torch.full_like(x, 0.4), "blur")
        )
        for i, value in itertools.product(range(2), (0.0, 0.4)):
            expected = reference.extremal_perturbation(network, x[i], 1, **own, baseline=value)
            torch.testing.assert_close((grey if value else black)[i], expected, rtol=1e-6, atol=1e-8)
        assert torch.equal(grey, images)
        assert not torch.allclose(black, grey)
        assert not torch.allclose(black, blurred)

    def test_levels_of_blur(self) -> None:
        x = example().x
        pyramid = blur_pyramid(x, 4, 6.0)
        torch.testing.assert_close(pyramid[-1], x)
        torch.testing.assert_close(pyramid[0], maps.blur(x, 6.0))
        torch.testing.assert_close(through(pyramid, torch.ones(2, 17, 23).double()), x)
        torch.testing.assert_close(through(pyramid, torch.zeros(2, 17, 23).double()), pyramid[0])
        torch.testing.assert_close(through(pyramid, torch.full((2, 17, 23), 0.5).double()), (pyramid[1] + pyramid[2]) / 2)

    def test_meaningful_perturbation_hides_the_class(self) -> None:
        capture = on("inplace", seed=2)
        y = capture.pred
        target = capture.target(y)
        own = {"steps": 40, "stride": 3, "smooth": 1.0, "baseline": 0.0, "jitter": 0}
        free = METHODS.get("meaningful_perturbation")(capture, None, target, **own, area=0.0, variation=0.0)

        def p(saliency: torch.Tensor) -> torch.Tensor:
            return capture.score(maps.apply_mask(capture.x, 1 - saliency)).softmax(1).gather(1, y[:, None])[:, 0]

        assert (p(free) < p(torch.ones_like(free))).all()  # less than black: it found what speaks against the class
        assert (p(free) < p(torch.zeros_like(free))).all()
        small = METHODS.get("meaningful_perturbation")(capture, None, target, **own, area=1.0)
        assert (small.sum((1, 2)) < free.sum((1, 2))).all()
        assert total_variation(torch.ones(1, 3, 4), 3.0) == 0

    def test_options(self) -> None:
        for name, own in (
            ("rise", {"masks": 0}),
            ("rise", {"keep": 1.0}),
            ("rise", {"score": "logit"}),
            ("extremal_perturbation", {"areas": [0.0]}),
            ("extremal_perturbation", {"areas": []}),
            ("extremal_perturbation", {"steps": 0}),
            ("extremal_perturbation", {"baseline": "noise"}),
            ("meaningful_perturbation", {"init": "square"}),
            ("occlusion", {"baseline": "noise"}),
            ("occlusion", {"baseline": 5}),
            ("meaningful_perturbation", {"lr": -1}),
            ("meaningful_perturbation", {"exponent": 0.5}),
            ("meaningful_perturbation", {"smooth": -3}),
            ("extremal_perturbation", {"sigma": 0}),
        ):
            with pytest.raises(FoveateError):
                run(name, on("gap"), **own)


class TestGradient:
    def test_a_gradient_is_what_a_pixel_changes(self) -> None:
        network, x = networks()["inplace"], example(count=1).x
        capture = Capture(network, x, "features")
        g = capture.image_gradient(capture.target(1))[0]
        step = 1e-6
        for c, i, j in ((0, 3, 4), (1, 16, 22), (2, 8, 0)):
            moved = x.clone()
            moved[0, c, i, j] += step
            less = x.clone()
            less[0, c, i, j] -= step
            numeric = (network(moved) - network(less))[0, 1].detach() / (2 * step)
            torch.testing.assert_close(g[c, i, j], numeric, rtol=1e-5, atol=1e-9)

    def test_two_methods_share_one_backward(self) -> None:
        capture = on("inplace")
        target = capture.target(1)
        for name in ("gradient", "input_x_gradient"):
            METHODS.get(name)(capture, None, target)
        assert (capture.passes.forward, capture.passes.backward) == (2 + 2, 2)

    @pytest.mark.parametrize("quadrature", ["midpoint", "gauss_legendre", "right"])
    def test_integrated_gradients_of_a_linear_model_are_exact_with_one_step(self, quadrature: str) -> None:
        network = Linear().double().eval()
        x = torch.rand(2, 3, 12, 15, dtype=torch.float64)
        capture = Capture(network, x, "input")
        saliency = METHODS.get("integrated_gradients")(capture, None, capture.target(1), steps=1, quadrature=quadrature)
        expected = (network.classifier.weight[1].detach().view(3, 12, 15) * x).sum(1)
        torch.testing.assert_close(saliency, expected)
        assert path_completeness(capture, None, capture.target(1), saliency).max() < 1e-12

    def test_completeness_is_reported_and_falls_with_the_steps(self) -> None:
        network, x = networks()["inplace"], example(count=2).x
        errors = {}
        for steps in (2, 256):
            own = {"integrated_gradients": {"steps": steps, "baseline": 0.3}}
            explanation = explain(network, x, "integrated_gradients", layer="features", target=1, settings=own)
            errors[steps] = float(explanation.completeness_error["integrated_gradients"].max())
        assert errors[256] < 2e-3 < errors[2]

    def test_baselines(self) -> None:
        capture = on("gap")
        white = run("integrated_gradients", capture, baseline=1.0, steps=4)
        torch.testing.assert_close(run("integrated_gradients", capture, baseline=torch.ones(3, 1, 1), steps=4), white)
        assert run("integrated_gradients", capture, baseline="blur", steps=4).shape == white.shape
        for baseline in ("noise", torch.ones(5)):
            with pytest.raises(FoveateError, match="baseline"):
                run("integrated_gradients", capture, baseline=baseline)

    def test_smooth_grad_without_noise_is_the_gradient(self) -> None:
        capture = on("inplace")
        torch.testing.assert_close(run("smooth_grad", capture, sigma=0.0, samples=3), run("gradient", capture))
        squared = run("smooth_grad", capture, sigma=0.0, samples=3, square=True)
        torch.testing.assert_close(squared, run("gradient", capture) ** 2)

    def test_the_square_equals_its_replica(self) -> None:
        batch, network = example(seed=9), networks()["inplace"]
        capture = Capture(network, batch.x, "features")
        saliency = METHODS.get("smooth_grad")(capture, None, capture.target(batch.y), samples=3, square=True)
        for i in range(2):
            expected = reference.smooth_grad(network, batch.x[i], int(batch.y[i]), 3, square=True)
            torch.testing.assert_close(saliency[i], expected, rtol=1e-9, atol=1e-14)

    def test_colours(self) -> None:
        capture = on("gap")
        g = capture.image_gradient(capture.target(1))
        torch.testing.assert_close(run("gradient", capture, colour="sum_abs"), g.abs().sum(1))
        torch.testing.assert_close(run("gradient", capture, colour="sum"), g.sum(1))
        with pytest.raises(FoveateError, match="colour 'grey'"):
            run("gradient", capture, colour="grey")


class Relus(nn.Module):
    """One ReLU, written as people write it."""

    FORMS: ClassVar = {
        "module": lambda self, x: self.relu(x),
        "in-place module": lambda self, x: self.inplace(x),
        "in-place module without its result": lambda self, x: (self.inplace(x), x)[1],
        "functional": lambda self, x: F.relu(x),
        "functional in-place": lambda self, x: F.relu(x, inplace=True),
        "functional positional": lambda self, x: F.relu(x, True),
        "F.relu_": lambda self, x: F.relu_(x),
        "torch.relu": lambda self, x: torch.relu(x),
        "torch.relu_": lambda self, x: torch.relu_(x),
        "method": lambda self, x: x.relu(),
        "method in-place": lambda self, x: x.relu_(),
        "sequential": lambda self, x: self.sequence(x),
    }
    CLIPPED: ClassVar = {
        "relu6": lambda self, x: self.six(x),
        "F.relu6": lambda self, x: F.relu6(x),
        "hardtanh": lambda self, x: F.hardtanh(x, 0.0, 6.0),
        "hardtanh in-place": lambda self, x: F.hardtanh(x, 0.0, 6.0, True),
        "hardtanh_": lambda self, x: F.hardtanh_(x, 0.0, 6.0),
    }

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)
        self.relu, self.inplace, self.six = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6()
        self.sequence = nn.Sequential(nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        form = {**self.FORMS, **self.CLIPPED}[self.form]
        return self.second(form(self, 20 * self.first(x)).mean((2, 3)))


class TestGuided:
    @pytest.mark.parametrize("form", [*Relus.FORMS, *Relus.CLIPPED])
    def test_every_way_to_write_a_relu(self, form: str) -> None:
        network, x = Relus(form).double().eval(), example().x
        capture = Capture(network, x, "first")
        saliency = METHODS.get("guided_backprop")(capture, None, capture.target(1), colour="sum")
        z = 20 * network.first(x).detach()
        g = network.second.weight[1].detach().clamp(min=0)[None, :, None, None] / (z.shape[2] * z.shape[3]) * (z > 0)
        if form in Relus.CLIPPED:
            assert (z > 6).any()
            g = g * (z < 6)
        expected = F.conv_transpose2d(g, 20 * network.first.weight.detach()).sum(1)
        torch.testing.assert_close(saliency, expected)
        assert not torch.allclose(saliency, run_at(capture, "gradient", "first", colour="sum"))

    def test_where_nothing_is_negative_it_is_the_gradient(self) -> None:
        network = Relus("module").double().eval()
        with torch.no_grad():
            for p in network.parameters():
                p.abs_()
        capture = Capture(network, example().x, "first")
        torch.testing.assert_close(run_at(capture, "guided_backprop", "first"), run_at(capture, "gradient", "first"))

    def test_a_shared_relu_and_a_residual(self) -> None:
        from foveate._torchvision import torchvision

        network = torchvision().models.resnet18(num_classes=CLASSES).eval()
        x = torch.rand(1, 3, 64, 64)
        with guided() as mode:
            network(x)
        assert mode.relus == 17

    def test_a_model_without_relu_is_refused(self) -> None:
        with pytest.raises(FoveateError, match="guided nothing, because no ReLU of this model ran: use 'gradient'"):
            run("guided_backprop", on("tokens"))
        smooth = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
        with pytest.raises(FoveateError, match="it has gelu, for which no such rule exists"):
            explain(smooth.double(), example().x, "guided_backprop", layer="0")

    def test_activations_of_other_kinds_are_named(self) -> None:
        mixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        with pytest.warns(UserWarning, match="guided 1 ReLUs; silu keep their own gradient"):
            explain(mixed.double().eval(), example().x, "guided_backprop", layer="0")

    def test_outside_nothing_is_guided(self) -> None:
        network, x = Relus("functional").double().eval(), example().x.requires_grad_(True)
        plain = torch.autograd.grad(network(x)[:, 1].sum(), x)[0]
        with guided():
            logits = network(x)
            inside = torch.autograd.grad(logits[:, 1].sum(), x, retain_graph=True)[0]
        after = torch.autograd.grad(logits[:, 1].sum(), x)[0]
        torch.testing.assert_close(after, plain)  # one forward pass has both
        assert not torch.allclose(inside, plain)
        torch.testing.assert_close(torch.autograd.grad(network(x)[:, 1].sum(), x)[0], plain)

    def test_it_is_left_also_when_the_model_raises(self) -> None:
        class Broken(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Conv2d(3, 4, 3)
                self.runs = 0

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                self.runs += 1
                if self.runs > 2:  # the capture's own, and its look at what the layer depends on
                    raise ZeroDivisionError
                return F.relu(self.layer(x)).mean((2, 3))

        capture = Capture(Broken().eval(), example().x.float(), "layer")
        with pytest.raises(ZeroDivisionError):
            METHODS.get("guided_backprop")(capture, None, capture.target(1))
        assert F.relu(torch.ones(1, requires_grad=True)).grad_fn.name() == "ReluBackward0"


class TestFullGrad:
    @pytest.mark.parametrize("kind", ["gap", "flat"])
    def test_the_parts_are_the_score(self, kind: str) -> None:
        capture = on(kind)
        target = capture.target(1)
        parts = full_gradients(capture, target)
        total = parts.image.flatten(1).sum(1) + sum(b.flatten(1).sum(1) for b in parts.biases) + parts.scalars
        torch.testing.assert_close(total, capture.logits.detach()[:, 1], rtol=1e-12, atol=1e-12)

    def test_with_batch_norm_pooling_and_a_normalisation_in_front(self) -> None:
        from foveate import normalized
        from foveate._torchvision import torchvision

        torch.manual_seed(0)
        network = torchvision().models.resnet18(num_classes=5).double().eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.bias.data.normal_(0, 0.1)
        capture = Capture(normalized(network), torch.rand(2, 3, 64, 64).double())
        assert full_gradients(capture, capture.target(1)).error.max() < 1e-10

    def test_a_relu6_is_a_bias_where_it_clips(self) -> None:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.Conv2d(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = network.double().eval()
        with torch.no_grad():
            network[0].weight *= 20
        assert (network[:2](example().x) == 6).any()
        capture = Capture(network, example().x, "1")
        assert full_gradients(capture, capture.target(1)).error.max() < 1e-10

    def test_a_layer_can_be_scaled_as_one(self) -> None:
        by_channel, by_layer = (run("full_grad", on("gap"), scaling=scaling) for scaling in ("channel", "layer"))
        assert not torch.allclose(by_channel, by_layer)
        parts = full_gradients(capture := on("gap"), capture.target(1))
        expected = maps.scale(parts.image.abs().flatten(1, 2)).view_as(parts.image).sum(1)
        for bias in parts.biases:
            expected = expected + maps.upsample(maps.scale(bias.abs().flatten(1, 2)).view_as(bias).sum(1), (17, 23))
        torch.testing.assert_close(by_layer, expected)

    def test_chunks_change_nothing(self) -> None:
        torch.testing.assert_close(run("full_grad", on("gap", count=3, chunk=1)), run("full_grad", on("gap", count=3)))

    def test_networks_of_other_parts_are_refused_with_the_error(self) -> None:
        with pytest.raises(FoveateError, match=r"miss the score by \d+ %"):
            run("full_grad", on("inplace"))
        smooth = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.GELU(), nn.Conv2d(6, 4, 3, bias=False), nn.Flatten(2))
        network = nn.Sequential(smooth, nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
        black = Capture(network, torch.zeros(1, 3, 16, 16), "0.1")  # where score and parts are 0: by chance they agree
        assert full_gradients(black, black.target(1)).error.max() < 1e-6
        with pytest.raises(FoveateError, match=r"miss the score by \d+ %"):
            run("full_grad", black)
        assert run("full_grad", on("inplace"), strict=False).shape == (2, 17, 23)


class TestComponents:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 6), st.integers(2, 6), st.booleans())
    def test_both_gram_matrices_give_the_singular_vector(self, K: int, h: int, w: int, centred: bool) -> None:
        from foveate.methods.eigen import first_component

        A = torch.rand(2, K, h, w, dtype=torch.float64) + 0.1
        got = first_component(A, centred)
        for i in range(2):
            matrix = A[i].flatten(1).T
            matrix = matrix - matrix.mean(0) if centred else matrix
            _, values, right = torch.linalg.svd(matrix, full_matrices=False)
            expected = (matrix @ right[0]).view(h, w)
            # Degenerate where the two largest singular values meet: any vector of their plane is right.
            if len(values) < 2 or values[0] > 1.01 * values[1]:
                torch.testing.assert_close(got[i].abs(), expected.abs(), rtol=1e-6, atol=1e-8)

    def test_the_sign_is_that_of_the_evidence(self) -> None:
        capture = on("inplace")
        evidence = run("hires_cam", capture)
        assert ((run("eigen_grad_cam", capture) * evidence).sum((1, 2)) > 0).all()
        assert ((run("eigen_cam", capture) * capture.activations().mean(1)).sum((1, 2)) > 0).all()


class TestFinerCam:
    @pytest.mark.parametrize(("classes", "similar"), [(2, 1), (3, 2), (4, 3), (6, 3)])
    def test_three_classes_or_as_many_as_there_are(self, classes: int, similar: int) -> None:
        capture = Capture(small_cnn(num_classes=classes).eval(), torch.rand(2, 3, 32, 32), head="softmax")
        record = METHODS.get("finer_cam")
        found = record(capture, capture.layer, capture.target())
        assert torch.equal(found, record(capture, capture.layer, capture.target(), similar=similar))

    def test_no_strength_is_grad_cam_and_full_strength_the_contrast(self) -> None:
        capture = on("inplace")
        torch.testing.assert_close(run("finer_cam", capture, strength=0.0), run("grad_cam", capture))
        gap = (capture.logits - capture.logits[:, 1:2]).abs()
        gap[:, 1] = math.inf
        nearest = gap.argmin(1)
        contrast = METHODS.get("grad_cam")(capture, None, capture.target(1, against=nearest))
        torch.testing.assert_close(run("finer_cam", capture, similar=1, strength=1.0), contrast)
        assert run("finer_cam", capture, base="hires_cam").shape == contrast.shape

    def test_refusals(self) -> None:
        capture = on("gap")
        for own in ({"similar": 4}, {"similar": 0}, {"weights": "all"}, {"base": "cam"}):
            with pytest.raises(FoveateError):
                run("finer_cam", capture, **own)
        with pytest.raises(FoveateError, match="tells the logit of a class"):
            METHODS.get("finer_cam")(capture, None, capture.target(1, score="probability"))


class TestRollout:
    @pytest.mark.parametrize("fused", [True, False])
    def test_timms_attention_fused_or_not(self, fused: bool) -> None:
        from foveate._torchvision import timm

        torch.manual_seed(0)
        network = timm().create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2).eval()
        for block in network.blocks:
            block.attn.fused_attn = fused
        x = torch.rand(2, 3, 64, 64)
        saliency = METHODS.get("attention_rollout")(capture := Capture(network, x), None, capture.target(1))
        weights = []
        tokens = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
        for block in network.blocks:
            B, N, C = tokens.shape
            q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(B, N, 3, 3, C // 3).permute(2, 0, 3, 1, 4).unbind(0)
            weights.append((q @ k.transpose(-2, -1) * (C // 3) ** -0.5).softmax(-1).mean(1))
            tokens = block(tokens)
        eye = torch.eye(17)
        rollout = (weights[1] + eye) / 2 @ ((weights[0] + eye) / 2)
        torch.testing.assert_close(saliency, rollout[:, 0, 1:].reshape(2, 4, 4).detach(), rtol=1e-4, atol=1e-6)

    def test_torchvisions_attention(self) -> None:
        from foveate._torchvision import torchvision

        network = torchvision().models.VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=3).eval()
        capture = Capture(network, torch.rand(2, 3, 64, 64))
        saliency = METHODS.get("attention_rollout")(capture, None, capture.target(1))
        assert saliency.shape == (2, 4, 4)
        assert (saliency > 0).all()
        assert (saliency.sum((1, 2)) < 1).all()  # the rest stays with the class token

    def test_heads_and_discarding(self) -> None:
        plain = run("attention_rollout", on("tokens"))
        discarded = run("attention_rollout", on("tokens"), discard=0.9)
        assert (discarded == 0).sum() > (plain == 0).sum()
        for own in ({"heads": "median"}, {"discard": 1.0}):
            with pytest.raises(FoveateError):
                run("attention_rollout", on("tokens"), **own)

    def test_convolutions_are_refused(self) -> None:
        with pytest.raises(FoveateError, match="needs blocks of attention between all tokens, and none of this model's is"):
            run("attention_rollout", on("gap"))

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
            ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
            ("xcit_nano_12_p16_224", {"depth": 2}),
        ],
    )
    def test_windows_fewer_keys_and_channels_are_refused(self, name: str, options: dict[str, object]) -> None:
        from foveate._torchvision import timm

        network = timm().create_model(name, num_classes=3, **options).eval()
        capture = Capture(network, torch.rand(1, 3, 224, 224))
        with pytest.raises(FoveateError, match=r"rollout|grid"):
            METHODS.get("attention_rollout")(capture, None, capture.target(1))


class TestGradientsFromOneRun:
    @pytest.mark.parametrize("name", ["gradient", "input_x_gradient", "guided_backprop"])
    def test_the_image_gradient_takes_one_pass_there_and_back(self, name: str) -> None:
        network, x = networks()["gap"], example().x
        found = explain(network, x, name, layer="features")
        assert (found.capture.passes.forward, found.capture.passes.backward) == (len(x), len(x))
        again = Capture(network, x, "features")
        torch.testing.assert_close(found.raw[name], METHODS.get(name)(again, None, again.target()))
        assert again.passes.forward == 2 * len(x)

    def test_beside_maps_at_a_layer_and_guided_ones(self) -> None:
        network, x = networks()["inplace"], example().x
        names = ["grad_cam", "gradient", "guided_backprop", "guided_grad_cam"]
        together = explain(network, x, names, layer="features")
        for name in names:
            capture = Capture(network, x, "features")
            torch.testing.assert_close(together.raw[name], METHODS.get(name)(capture, None, capture.target()))

    def test_a_large_batch_runs_again_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, x = networks()["gap"], torch.rand(9, *example().x.shape[1:], dtype=torch.float64)
        monkeypatch.setattr(sys.modules["foveate.explanation.explain"], "MOST_FROM_IMAGE", 8 * x.shape[2] * x.shape[3])
        found = explain(network, x, "gradient", layer="features")
        assert not found.capture.from_image and found.capture.passes.forward == 18
        torch.testing.assert_close(
            found.raw["gradient"][:4], explain(network, x[:4], "gradient", layer="features").raw["gradient"]
        )

    def test_a_network_without_relus_is_told_so(self) -> None:
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
        refused: dict[str, str] = {}
        found = explain(network, torch.rand(1, 3, 16, 16), ["gradient", "guided_backprop"], layer="0", refused=refused)
        assert "no ReLU" in refused["guided_backprop"] and list(found.maps) == ["gradient"]


class TestOneWalk:
    def test_modules_in_the_order_of_torch(self) -> None:
        shared = nn.ReLU()
        model = nn.Sequential(nn.Sequential(shared, nn.Conv2d(3, 3, 1)), shared, nn.ModuleDict({"a": nn.Linear(2, 2)}))
        model.empty = None
        assert modules_of(model) == list(model.modules())

    def test_what_is_swapped_in_goes_out_again(self) -> None:
        layer = nn.Linear(2, 2)
        before = dict(layer._parameters)

        def interrupted() -> None:
            with swapped([(layer._parameters, "weight", torch.zeros(2, 2))]):
                assert not layer.weight.any()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert all(layer._parameters[name] is tensor for name, tensor in before.items())
