"""Methods: the contract for each, replicas from the papers, identities, and what other people's code says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from foveate import Capture, FoveateError, contrastive_maps, explain
from foveate.methods.cam import completeness, grad_cam_pp, xgrad_cam
from foveate.registry import METHODS, Method, check_settings
from foveate.testing import CLASSES, check_method, example, networks

NAMES = list(METHODS.all())
CAMS = ("cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "hires_cam")


def raw(name: str, network: nn.Module, x: torch.Tensor, y: object, **options: object) -> torch.Tensor:
    capture = Capture(network, x, "features", **options)
    return METHODS.get(name)(capture, "features", capture.target(y))


def test_every_method_has_a_replica() -> None:
    assert set(reference.METHODS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str) -> None:
    check_method(name, **reference.SETTINGS.get(name, {}))


def test_contract_catches_a_method_that_mixes_images() -> None:
    def mixing(capture: Capture, layer: str, target: object) -> torch.Tensor:
        return capture.activations(layer).sum(1) - capture.activations(layer).mean()

    with pytest.raises(AssertionError, match="single images"):
        check_method(Method("mixing", "Mixing", mixing, "none"))


def test_contract_catches_a_method_that_leaves_a_hook() -> None:
    def leaving(capture: Capture, layer: str, target: object) -> torch.Tensor:
        capture.model.features.register_forward_hook(lambda *args: None)
        return capture.activations(layer).sum(1)

    with pytest.raises(AssertionError, match="module features has changed"):
        check_method(Method("leaving", "Leaving", leaving, "none"))


def test_contract_catches_a_false_claim_of_differentiability() -> None:
    def detached(capture: Capture, layer: str, target: object) -> torch.Tensor:
        return (
            capture.activations(layer).sum(1)
            + 0 * capture.activations(layer).sum(1).detach() ** 2
            + (capture.activations(layer).detach() ** 2).sum(1)
        )

    with pytest.raises(AssertionError, match="finite differences"):
        check_method(Method("detached", "Detached", detached, "none", differentiable=True))


PAIRS = [
    (name, kind)
    for name in NAMES
    for kind in reference.DEFINED_ON.get(name, tuple(networks()))
    if reference.METHODS[name] is not None
]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_equals_its_replica(name: str, kind: str) -> None:
    network, batch = networks()[kind], example(seed=3)
    own = reference.SETTINGS.get(name, {})
    capture = Capture(network, batch.x, "features")
    saliency = METHODS.get(name)(capture, "features", capture.target(batch.y), **own)
    for i in range(len(batch)):
        expected = reference.METHODS[name](network, batch.x[i], int(batch.y[i]), **own)
        torch.testing.assert_close(saliency[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [(17, 23), (9, 31), (32, 32)])
def test_cams_agree_behind_average_pooling(size: tuple[int, int]) -> None:
    network = networks()["gap"]
    x = torch.rand(3, 3, *size, dtype=torch.float64)
    grad, hires, xgrad, cam = (raw(name, network, x, 1) for name in ("grad_cam", "hires_cam", "xgrad_cam", "cam"))
    cells = grad.shape[1] * grad.shape[2]
    for other in (hires, xgrad, cam / cells):
        torch.testing.assert_close(grad, other, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["gap", "flat"])
def test_hires_cam_is_complete_behind_a_linear_head(kind: str) -> None:
    network, batch = networks()[kind], example(seed=4)
    saliency = raw("hires_cam", network, batch.x, batch.y)
    logits = network(batch.x).gather(1, batch.y[:, None])[:, 0]
    bias = network.classifier.bias[batch.y]
    torch.testing.assert_close(saliency.sum((1, 2)) + bias, logits, rtol=1e-12, atol=1e-12)


def test_completeness_is_not_claimed_behind_a_hidden_layer() -> None:
    network, batch = networks()["inplace"], example()
    capture = Capture(network, batch.x, "features")
    target = capture.target(batch.y)
    assert completeness(capture, "features", target, METHODS.get("hires_cam")(capture, "features", target)) is None
    saliency = raw("hires_cam", network, batch.x, batch.y)
    logits = network(batch.x).gather(1, batch.y[:, None])[:, 0]
    assert ((saliency.sum((1, 2)) + network.classifier.bias[batch.y] - logits).abs() > 1e-3).all()


def test_completeness_notices_a_map_that_misses() -> None:
    network, batch = networks()["gap"], example()
    capture = Capture(network, batch.x, "features")
    target = capture.target(batch.y)
    saliency = METHODS.get("hires_cam")(capture, "features", target)
    error = completeness(capture, "features", target, saliency + 0.5)
    assert (error > 1).all()


def test_probabilities_are_not_complete() -> None:
    network, batch = networks()["gap"], example()
    capture = Capture(network, batch.x, "features")
    assert completeness(capture, "features", capture.target(batch.y, score="probability"), torch.zeros(2, 9, 12)) is None


@pytest.mark.parametrize("kind", ["gap", "flat", "inplace", "tokens"])
def test_contrastive_maps(kind: str) -> None:
    network, batch = networks()[kind], example(seed=5)
    capture = Capture(network, batch.x, "features")
    maps = {t: contrastive_maps(capture, "features", capture.target(t)) for t in range(CLASSES)}
    assert maps[0].shape == (2, CLASSES, *capture.activations().shape[2:])
    for t in range(CLASSES):
        torch.testing.assert_close(maps[t][:, t], torch.zeros_like(maps[t][:, t]))
        for c in range(CLASSES):
            torch.testing.assert_close(maps[t][:, c], -maps[c][:, t], rtol=1e-10, atol=1e-14)
            for d in range(CLASSES):
                torch.testing.assert_close(maps[t][:, c] + maps[c][:, d], maps[t][:, d], rtol=1e-9, atol=1e-12)
            if c != t:
                target = capture.target(t, against=c)
                torch.testing.assert_close(METHODS.get("contrastive_cam")(capture, "features", target), maps[t][:, c])


@pytest.mark.parametrize("kind", ["gap", "flat"])
def test_contrastive_maps_add_up_and_give_the_cross_entropy(kind: str) -> None:
    network, batch = networks()[kind], example(seed=6)
    with torch.no_grad():
        network.classifier.bias.zero_()
    capture = Capture(network, batch.x, "features")
    sums = contrastive_maps(capture, "features", capture.target(batch.y)).sum((2, 3))  # [B,C]
    logits = network(batch.x)
    torch.testing.assert_close(sums, logits.gather(1, batch.y[:, None]) - logits, rtol=1e-12, atol=1e-12)
    cross_entropy = nn.functional.cross_entropy(logits, batch.y, reduction="none")
    torch.testing.assert_close((-sums).logsumexp(1), cross_entropy, rtol=1e-12, atol=1e-12)


def test_contrastive_maps_do_not_see_a_common_shift() -> None:
    network, batch = networks()["flat"], example()
    capture = Capture(network, batch.x, "features")
    before = contrastive_maps(capture, "features", capture.target(1))
    with torch.no_grad():
        network.classifier.weight += torch.randn(1, network.classifier.in_features, dtype=torch.float64)
    capture = Capture(network, batch.x, "features")
    torch.testing.assert_close(before, contrastive_maps(capture, "features", capture.target(1)), rtol=1e-8, atol=1e-10)


def test_any_method_answers_a_contrast() -> None:
    network, batch = networks()["gap"], example()
    for name in ("grad_cam", "hires_cam", "cam"):
        capture = Capture(network, batch.x, "features")
        contrast = METHODS.get(name)(capture, "features", capture.target(0, against=2))
        difference = raw(name, network, batch.x, 0) - raw(name, network, batch.x, 2)
        torch.testing.assert_close(contrast, difference, rtol=1e-10, atol=1e-13)


def test_contrastive_cam_picks_the_strongest_other_class_and_says_so() -> None:
    network, batch = networks()["gap"], example()
    explanation = explain(network, batch.x, "contrastive_cam", layer="features", target=2)
    logits = network(batch.x).detach()
    logits[:, 2] = float("-inf")
    assert torch.equal(explanation.targets["contrastive_cam"].other, logits.argmax(1))


def test_cam_refuses_other_heads() -> None:
    for kind in ("flat", "inplace", "tokens"):
        with pytest.raises(FoveateError, match="global average pooling and one linear layer"):
            raw("cam", networks()[kind], example().x, 0)


def test_a_contrast_with_itself_is_refused() -> None:
    capture = Capture(networks()["gap"], example().x, "features")
    with pytest.raises(FoveateError, match="asked against itself"):
        capture.target(1, against=1)


def test_six_cams_take_one_forward_and_no_backward_behind_a_linear_head() -> None:
    explanation = explain(networks()["gap"], example().x, CAMS, layer="features")
    assert (explanation.capture.passes.forward, explanation.capture.passes.backward) == (2, 0)


def test_six_cams_share_one_backward_elsewhere() -> None:
    explanation = explain(networks()["inplace"], example().x, CAMS[1:], layer="features")
    assert (explanation.capture.passes.forward, explanation.capture.passes.backward) == (2, 2)


def test_the_score_is_what_is_explained() -> None:
    network, x = networks()["inplace"], example().x
    logit, probability = (
        explain(network, x, "grad_cam", layer="features", target=1, score=s).raw["grad_cam"] for s in ("logit", "probability")
    )
    assert not torch.allclose(logit, probability)


def test_a_contrast_named_in_the_settings() -> None:
    network, x = networks()["gap"], example().x
    chosen = {"contrastive_cam": {"against": 2}}
    explanation = explain(network, x, "contrastive_cam", layer="features", target=0, settings=chosen)
    assert explanation.targets["contrastive_cam"].other.tolist() == [2, 2]
    torch.testing.assert_close(
        explanation.raw["contrastive_cam"], raw("hires_cam", network, x, 0) - raw("hires_cam", network, x, 2)
    )


def test_a_method_that_is_refused_does_not_stop_the_others() -> None:
    refused: dict[str, str] = {}
    explanation = explain(networks()["flat"], example().x, ["cam", "grad_cam"], layer="features", refused=refused)
    assert list(explanation.maps) == ["grad_cam"]
    assert "global average pooling" in refused["cam"]


def test_settings_of_methods() -> None:
    network, x = networks()["gap"], example().x
    explanation = explain(network, x, ["fake_cam", "grad_cam"], layer="features", settings={"FakeCAM": {"resolution": "pixel"}})
    assert explanation.raw["fake_cam"].shape == (2, 17, 23)
    with pytest.raises(FoveateError, match="fake_cam has no setting 'size': it has resolution"):
        explain(network, x, "fake_cam", layer="features", settings={"fake_cam": {"size": 1}})
    with pytest.raises(FoveateError, match="grad_cam has no setting 'size': it has none at all"):
        explain(network, x, "grad_cam", layer="features", settings={"grad_cam": {"size": 1}})
    with pytest.raises(FoveateError, match="settings for 'random', but it is not among the methods: grad_cam"):
        explain(network, x, "grad_cam", layer="features", settings={"random": {"seed": 1}})


@pytest.mark.parametrize(
    ("name", "setting", "value", "match"),
    [
        ("rise", "masks", 2.5, "rise.masks cannot be 2.5: input should be a valid integer"),
        ("rise", "masks", "many", "rise.masks cannot be 'many': input should be a valid integer"),
        ("extremal_perturbation", "areas", "a tenth", "areas cannot be 'a tenth'"),
        ("extremal_perturbation", "areas", {"a": 1}, "areas cannot be {'a': 1}"),
        ("smooth_grad", "sigma", float("nan"), "sigma cannot be nan: input should be a finite number"),
        ("finer_cam", "strength", "x", "strength cannot be 'x'"),
        ("eigen_cam", "centred", "perhaps", "centred cannot be 'perhaps'"),
        ("score_cam", "weighting", "cic", "input should be 'channel_softmax', 'probability' or 'increase'"),
    ],
)
def test_values_of_another_type(name: str, setting: str, value: object, match: str) -> None:
    with pytest.raises(FoveateError, match=match):
        explain(networks()["gap"], example().x, name, layer="features", settings={name: {setting: value}})


@pytest.mark.parametrize(
    ("name", "setting", "written", "meant"),
    [
        ("extremal_perturbation", "areas", 0.1, [0.1]),
        ("extremal_perturbation", "areas", "0.1,0.2", [0.1, 0.2]),
        ("extremal_perturbation", "areas", (0.1, 0.2), (0.1, 0.2)),
        ("occlusion", "window", "4,3", (4, 3)),
        ("occlusion", "window", 4, 4),
        ("opti_cam", "layers", "features", ["features"]),
        ("opti_cam", "patience", None, None),
    ],
)
def test_lists_as_people_write_them(name: str, setting: str, written: object, meant: object) -> None:
    assert check_settings(METHODS.get(name), {setting: written})[setting] == meant


def test_axiom_cam_is_xgrad_cam() -> None:
    assert METHODS.get("axiom_cam") is METHODS.get("xgrad_cam")


@pytest.mark.parametrize("alias", ["GradCAM", "gradcam++", "Grad-CAM", "grad_cam", "HiResCAM", "LayerCAM", "XGradCAM"])
def test_names_that_people_use_are_understood(alias: str) -> None:
    assert METHODS.get(alias).name in NAMES


def test_grad_cam_pp_survives_signed_features_and_zero_gradients() -> None:
    A = torch.randn(2, 4, 5, 6)
    weights = grad_cam_pp.weights
    assert torch.isfinite(weights(A, torch.randn(2, 4, 5, 6) * 100)).all()
    assert (weights(A, torch.zeros(2, 4, 5, 6)) == 0).all()
    assert (weights(A, -torch.rand(2, 4, 5, 6)) == 0).all()


def test_grad_cam_pp_does_not_underflow() -> None:
    A, G = torch.rand(1, 3, 4, 4), torch.full((1, 3, 4, 4), 1e-30)
    torch.testing.assert_close(grad_cam_pp.weights(A, G) / 1e-30, torch.full((1, 3, 1, 1), 8.0), rtol=1e-5, atol=0)


def test_xgrad_cam_survives_dead_and_cancelling_channels() -> None:
    A = torch.zeros(1, 2, 2, 2)
    A[0, 1] = torch.tensor([[1.0, -1.0], [2.0, -2.0]])
    assert (xgrad_cam.weights(A, torch.rand(1, 2, 2, 2)) == 0).all()


class TestControls:
    def test_fake_cam_resolutions(self) -> None:
        capture = Capture(networks()["gap"], example().x, "features")
        for resolution, shape in (("feature", (9, 12)), ("pixel", (17, 23))):
            saliency = METHODS.get("fake_cam")(capture, "features", capture.target(), resolution=resolution)
            assert saliency.shape == (2, *shape)
            assert float(saliency.sum()) == 2 * (shape[0] * shape[1] - 1)
            assert (saliency[:, 0, 0] == 0).all()
        with pytest.raises(FoveateError, match="resolution 'cell'"):
            METHODS.get("fake_cam")(capture, "features", capture.target(), resolution="cell")

    def test_random_follows_seed_and_image(self) -> None:
        capture = Capture(networks()["gap"], example().x, "features")
        method, target = METHODS.get("random"), capture.target()
        one, again, other = (method(capture, "features", target, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert not torch.equal(one[0], one[1])
        assert one.min() >= 0
        assert one.max() <= 1
        state = torch.random.get_rng_state()
        method(capture, "features", target)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_centre_is_symmetric_and_largest_in_the_middle(self) -> None:
        capture = Capture(networks()["gap"], example().x, "features")
        saliency = METHODS.get("centre")(capture, "features", capture.target())
        torch.testing.assert_close(saliency, saliency.flip(1))
        torch.testing.assert_close(saliency, saliency.flip(2))
        assert saliency[0].argmax() in (4 * 12 + 5, 4 * 12 + 6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 50))
def test_scaling_the_classifier_scales_the_linear_maps(seed: int, factor: float) -> None:
    network, batch = networks()["gap"], example(seed)
    before = {name: raw(name, network, batch.x, batch.y) for name in ("grad_cam", "hires_cam", "layer_cam", "cam")}
    with torch.no_grad():
        network.classifier.weight *= factor
    for name, saliency in before.items():
        torch.testing.assert_close(raw(name, network, batch.x, batch.y), factor * saliency, rtol=1e-8, atol=1e-12)
