"""Wrappers and adapters: noise, augmentation, several layers; other people's attributions in our tables."""

from __future__ import annotations

import importlib
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reference
from foveate import Capture, FoveateError, evaluate, explain, explain_each, maps, saliency
from foveate.methods.adapt import adapt
from foveate.methods.wrappers import FLIP_AND_LIGHT, Transform, augmented, fused, smooth
from foveate.models.small import small_cnn
from foveate.registry import METHODS, Method
from foveate.runtime.noise import gaussian
from foveate.testing import Batch, check_method, example, networks


def run(method: str | Method, kind: str = "inplace", seed: int = 0, **own: object) -> torch.Tensor:
    capture = Capture(networks()[kind], example(seed).x, "features")
    return METHODS.get(method)(capture, "features", capture.target(1), **own)


class TestSmooth:
    @pytest.mark.parametrize("name", ["grad_cam", "contrastive_cam", "score_cam", "gradient", "centre"])
    def test_the_contract(self, name: str) -> None:
        check_method(f"{name}:smooth", copies=3)
        check_method(f"{name}:augmented")

    def test_it_is_the_mean_over_noisy_copies(self) -> None:
        x = example().x
        total = 0
        for i in range(3):
            noisy = x + 0.15 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))[:, None, None, None] * gaussian(0, [i], x.shape[1:], x)
            capture = Capture(networks()["inplace"], noisy, "features")
            total = total + METHODS.get("layer_cam")(capture, None, capture.target(1))
        torch.testing.assert_close(run("layer_cam:smooth", copies=3), total / 3)

    def test_no_noise_is_the_method(self) -> None:
        torch.testing.assert_close(run("grad_cam:smooth", noise=0.0, copies=2), run("grad_cam"))

    def test_the_gradients_mean_before_its_absolute_value_is_another_thing(self) -> None:
        assert not torch.allclose(run("gradient:smooth", copies=4), run("smooth_grad", samples=4))
        torch.testing.assert_close(
            run("gradient:smooth", copies=4, colour="sum"), run("smooth_grad", samples=4, colour="sum"), rtol=1e-8, atol=1e-10
        )

    def test_settings_are_the_methods_and_the_wrappers(self) -> None:
        own = {"score_cam:smooth": {"copies": 2, "weighting": "increase"}}
        explanation = explain(networks()["gap"], example().x, "score_cam:smooth", layer="features", settings=own)
        assert list(explanation.maps) == ["score_cam:smooth"]
        with pytest.raises(
            FoveateError, match="has no setting 'sample': it has weighting, constant, copies, noise, noise_seed"
        ):
            explain(
                networks()["gap"],
                example().x,
                "score_cam:smooth",
                layer="features",
                settings={"score_cam:smooth": {"sample": 2}},
            )
        with pytest.raises(FoveateError, match="copies 0"):
            run("grad_cam:smooth", copies=0)

    def test_a_methods_own_settings_of_such_names_stay_settable(self) -> None:
        x = example().x
        own = {"smooth_grad:smooth": {"samples": 1, "sigma": 0.0, "copies": 2, "noise": 0.0}}
        explanation = explain(networks()["inplace"], x, ["smooth_grad:smooth", "gradient"], layer="features", settings=own)
        torch.testing.assert_close(explanation.raw["smooth_grad:smooth"], explanation.raw["gradient"])

    def test_two_of_one_name_are_refused(self) -> None:
        two = [smooth("grad_cam", copies=2), smooth("grad_cam", copies=4)]
        with pytest.raises(FoveateError, match="two methods are called 'grad_cam:smooth': give one of them a name"):
            explain(networks()["gap"], example().x, two, layer="features")
        named = [two[0], smooth("grad_cam", copies=4, name="smoother")]
        assert list(explain(networks()["gap"], example().x, named, layer="features").maps) == ["grad_cam:smooth", "smoother"]

    def test_an_unknown_wrapper_is_named(self) -> None:
        with pytest.raises(FoveateError, match="asks for a wrapper 'sharp', and there are smooth, augmented, fused"):
            METHODS.get("grad_cam:sharp")
        with pytest.raises(FoveateError, match="'grad_cma' is unknown: did you mean grad_cam"):
            METHODS.get("grad_cma:smooth")

    def test_wrappers_can_be_nested_and_made_by_hand(self) -> None:
        assert torch.isfinite(run("grad_cam:augmented:smooth", copies=2)).all()
        torch.testing.assert_close(run(smooth("grad_cam", copies=2, noise=0.3)), run("grad_cam:smooth", copies=2, noise=0.3))


class TestAugmented:
    def test_maps_are_brought_back(self) -> None:
        """A network that sums the pixels' own maps does not care how the image lies: the mean over flips is its own map."""
        flip = Transform(lambda x: x.flip(-1), lambda S: S.flip(-1))
        same = Transform(lambda x: x, lambda S: S)
        direct = run("input_x_gradient", "gap")
        x = example().x
        capture = Capture(networks()["gap"], x.flip(-1), "features")
        mirrored = METHODS.get("input_x_gradient")(capture, None, capture.target(1)).flip(-1)
        torch.testing.assert_close(run(augmented("input_x_gradient", transforms=[same, flip]), "gap"), (direct + mirrored) / 2)

    def test_six_copies_by_default(self) -> None:
        assert len(FLIP_AND_LIGHT) == 6
        capture = Capture(networks()["gap"], example().x, "features")
        METHODS.get("grad_cam:augmented")(capture, None, capture.target(1))
        assert capture.passes.forward == 2 + 6 * 2
        with pytest.raises(FoveateError, match="over no copies"):
            run(augmented("grad_cam", transforms=[]))


class TestFused:
    LAYERS = ("features.1", "features")

    def several(self) -> Capture:
        return Capture(networks()["gap"], example().x, list(self.LAYERS))

    def each(self, capture: Capture, name: str) -> list[torch.Tensor]:
        result = []
        for layer in self.LAYERS:
            S = METHODS.get(name)(capture, layer, capture.target(1)).clamp(min=0)
            grown = maps.upsample(S, (17, 23))
            result.append(grown / grown.amax((1, 2), keepdim=True))
        return result

    @pytest.mark.parametrize("how", ["mean", "max", "product", "tanh_max"])
    def test_ways(self, how: str) -> None:
        capture = self.several()
        a, b = self.each(capture, "layer_cam")
        expected = {
            "mean": (a + b) / 2,
            "max": torch.maximum(a, b),
            "product": (a * b).sqrt(),
            "tanh_max": torch.maximum((2 * a).tanh(), (2 * b).tanh()),
        }[how]
        torch.testing.assert_close(METHODS.get("layer_cam:fused")(capture, None, capture.target(1), how=how), expected)
        explanation = explain(networks()["gap"], example().x, "layer_cam", layer=self.LAYERS, target=1, fuse=how)
        torch.testing.assert_close(explanation.raw["layer_cam"], expected)
        assert explanation.layer == "features.1, features"

    def test_one_backward_for_all_layers(self) -> None:
        capture = Capture(networks()["inplace"], example().x, ["features.0", "features"])
        METHODS.get("grad_cam:fused")(capture, None, capture.target(1))
        assert capture.passes.backward == 2

    def test_methods_that_look_at_the_image_run_once(self) -> None:
        one = explain(networks()["inplace"], example().x, "integrated_gradients", layer="features", target=1)
        several = explain(
            networks()["inplace"], example().x, "integrated_gradients", layer=["features.0", "features"], target=1
        )
        torch.testing.assert_close(several.raw["integrated_gradients"], one.raw["integrated_gradients"])
        assert several.completeness_error["integrated_gradients"] is not None
        assert several.capture.passes.backward == one.capture.passes.backward

    def test_an_unknown_way(self) -> None:
        with pytest.raises(FoveateError, match="fusion 'sum'"):
            run(fused("grad_cam", how="sum"))
        with pytest.raises(FoveateError, match="fusion 'sum'"):
            explain(networks()["gap"], example().x, "grad_cam", layer="features", fuse="sum")

    def test_by_name_it_is_what_several_layers_are_anyway(self) -> None:
        def of(method: str | Method, **options: object) -> torch.Tensor:
            found = explain(networks()["gap"], example().x, method, layer=self.LAYERS, target=1, **options)
            return next(iter(found.raw.values()))

        torch.testing.assert_close(of("layer_cam:fused"), of("layer_cam"))
        torch.testing.assert_close(of("layer_cam:fused", fuse="max"), of("layer_cam", fuse="max"))
        torch.testing.assert_close(of(fused("layer_cam", how="max")), of("layer_cam", fuse="max"))
        assert not torch.allclose(of("layer_cam", fuse="max"), of("layer_cam"))
        assert not torch.allclose(of("layer_cam:smooth:fused"), of("layer_cam:fused"))
        with pytest.raises(FoveateError, match="has the setting 'over' already"):
            METHODS.get("layer_cam:fused:fused")

    def test_a_fusion_of_opti_cams_is_not_the_opti_cam_of_all_layers(self) -> None:
        network, x, own = networks()["gap"], example().x, {"steps": 3}
        both = explain(network, x, "opti_cam", layer=self.LAYERS, target=1, settings={"opti_cam": own})
        found = explain(network, x, "opti_cam:fused", layer=self.LAYERS, target=1, settings={"opti_cam:fused": own})
        assert not torch.allclose(found.raw["opti_cam:fused"], both.raw["opti_cam"], rtol=1e-3)
        each = []
        for layer in self.LAYERS:
            one = explain(network, x, "opti_cam", layer=layer, target=1, settings={"opti_cam": own}).raw["opti_cam"]
            each.append(maps.scale(maps.upsample(one.clamp(min=0), (17, 23)), "max"))
        torch.testing.assert_close(found.raw["opti_cam:fused"], torch.stack(each).mean(0))

    @pytest.mark.parametrize("wrapper", ["smooth", "augmented"])
    def test_copies_run_once_for_all_layers(self, wrapper: str) -> None:
        counts = []
        for layer in ("features", ("features.0", "features")):
            found = explain(networks()["inplace"], example().x, f"grad_cam:{wrapper}", layer=layer, target=1)
            counts.append((found.capture.passes.forward, found.capture.passes.backward))
        copies = {"smooth": 16, "augmented": 6}[wrapper]
        assert counts[0] == counts[1] == (2 * (1 + copies), 2 * copies)


IGNORE_THE_CLASS = {"attention_rollout", "ca_stream", "centre", "eigen_cam", "fake_cam", "random"}


class TestEach:
    @pytest.mark.parametrize("name", [name for name in METHODS.all() if name not in IGNORE_THE_CLASS])
    def test_a_contrast_is_another_answer_or_none(self, name: str) -> None:
        kind = "tokens" if name not in reference.DEFINED_ON else reference.DEFINED_ON[name][0]
        refused: dict[str, str] = {}
        own = {name: reference.SETTINGS[name]} if name in reference.SETTINGS else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"targets": ["pred", "second"], "layer": "features", "settings": own, "refused": refused}
            answers = explain_each(networks()[kind], example(seed=2).x, name, **options)
        if name == "finer_cam":
            assert not refused
            assert list(answers["pred-second"].left_out) == ["finer_cam"]
        elif name != "contrastive_cam":  # whose answer for the prediction is that contrast already
            assert not refused
            assert not torch.equal(answers["pred"].raw[name], answers["pred-second"].raw[name])

    def test_prediction_label_runner_up_and_their_contrasts_in_one_run(self) -> None:
        network, x = networks()["gap"], example(count=3).x
        logits = network(x).detach()
        pred, second = logits.argmax(1), logits.topk(2, 1).indices[:, 1]
        labels = torch.stack([pred[0], logits[1].argmin(), second[2]])
        answers = explain_each(network, x, ["grad_cam", "hires_cam"], layer="features", labels=labels)
        assert list(answers) == ["pred", "label", "second", "pred-label", "pred-second"]
        assert len({id(answer.capture) for answer in answers.values()}) == 1
        assert answers["pred"].capture.passes.forward == 3
        assert torch.equal(answers["label"].target.y, labels)
        for key, other in (("pred-label", torch.stack([second[0], labels[1], second[2]])), ("pred-second", second)):
            assert torch.equal(answers[key].target.y, pred)
            assert torch.equal(answers[key].target.other, other)
        difference = answers["pred"].raw["hires_cam"] - answers["second"].raw["hires_cam"]
        torch.testing.assert_close(answers["pred-second"].raw["hires_cam"], difference)

    def test_a_callable_has_no_contrasts(self) -> None:
        with pytest.raises(FoveateError, match="a callable target has no class to be asked against"):
            explain_each(networks()["gap"], example().x, layer="features", targets=["pred", lambda logits: logits[:, 0]])

    def test_without_contrasts_and_with_other_targets(self) -> None:
        network, x = networks()["gap"], example().x
        answers = explain_each(network, x, layer="features", targets=[0, "second"], contrasts=False)
        assert list(answers) == ["0", "second"]
        with pytest.raises(FoveateError, match="the images have no labels"):
            explain_each(network, x, layer="features")
        with pytest.raises(FoveateError, match="are a list of classes"):
            explain_each(network, x, layer="features", targets="pred,label")
        with pytest.raises(FoveateError, match="targets pred, 1, pred hold one of them twice"):
            explain_each(network, x, layer="features", targets=["pred", 1, None])
        found = explain_each(network, x, layer="features", targets=["pred", torch.tensor([0, 1])], contrasts=False)
        assert list(found) == ["pred", "given"]


@pytest.mark.filterwarnings("ignore::foveate.errors.DegenerateMapWarning")
class TestGroups:
    def test_what_the_model_cannot_have_is_left_out_with_the_reason(self) -> None:
        model, x = small_cnn(num_classes=3).eval(), torch.rand(1, 3, 32, 32)
        found = explain(model, x, ["all-fast", "rise"], settings={"rise": {"masks": 4}})
        assert {"grad_cam", "gradient", "fake_cam", "rise"} <= set(found.maps)
        assert not {"opti_cam", "score_cam"} & set(found.maps)
        assert "attention" in found.left_out["attention_rollout"]
        with pytest.raises(FoveateError, match=r"there is no map of 'attention_rollout': .*needs blocks of attention"):
            found["attention_rollout"]
        with pytest.raises(FoveateError, match="there is no map of 'opti_cam': there are"):
            found["opti_cam"]

    def test_what_was_asked_by_name_is_not(self) -> None:
        model, x = small_cnn(num_classes=3).eval(), torch.rand(1, 3, 32, 32)
        with pytest.raises(FoveateError, match="attention_rollout needs"):
            explain(model, x, ["all-fast", "attention_rollout"])

    def test_one_map_is_not_a_group(self) -> None:
        model, x = small_cnn(num_classes=3).eval(), torch.rand(1, 3, 32, 32)
        with pytest.raises(FoveateError, match="'all-fast' is unknown: there are"):
            saliency(model, x, "all-fast")
        with pytest.raises(FoveateError, match="saliency takes one method"):
            saliency(model, x, ["grad_cam"])  # type: ignore[arg-type]

    def test_every_answer_has_its_own(self) -> None:
        model, x = small_cnn(num_classes=3).eval(), torch.rand(1, 3, 32, 32)
        found = explain_each(model, x, "all-fast", targets=["pred", "second"])
        assert {key for key, answer in found.items() if "finer_cam" in answer.left_out} == {"pred-second"}


class TestAdapted:
    def test_captum_classes_are_built_for_the_model_and_its_layer(self) -> None:
        attr = pytest.importorskip("captum.attr")
        network, x = networks()["gap"], example().x
        own = adapt(attr.LayerGradCam)
        torch.testing.assert_close(run(own, "gap"), run("grad_cam", "gap"))
        assert own.name == "captum.LayerGradCam"
        theirs = attr.Saliency(network).attribute(x.clone(), target=1, abs=False)
        torch.testing.assert_close(run(adapt(attr.Saliency, abs=False), "gap"), theirs.sum(1))
        torch.testing.assert_close(run(adapt(attr.Saliency, colour="max_abs"), "gap"), run("gradient", "gap"))

    def test_an_object_is_used_as_it_is_and_only_for_its_own_model(self) -> None:
        attr = pytest.importorskip("captum.attr")
        network = networks()["gap"]
        method = adapt(attr.InputXGradient(network), "theirs")
        capture = Capture(network, example().x, "features")
        torch.testing.assert_close(
            method(capture, None, capture.target(1)), METHODS.get("input_x_gradient")(capture, None, capture.target(1))
        )
        with pytest.raises(FoveateError, match="was built for another model"):
            run(method, "flat")

    @pytest.mark.parametrize("name", ["Lime", "KernelShap", "FeatureAblation", "Occlusion", "DeepLift", "GuidedGradCam"])
    def test_attributions_that_need_more_than_a_class_get_it(self, name: str) -> None:
        pytest.importorskip("captum.attr")
        state = torch.random.get_rng_state()
        first, again = (run(f"captum.{name}", "gap") for _ in range(2))
        assert first.shape == (2, 17, 23)
        assert torch.isfinite(first).all()
        assert first.std() > 0
        torch.testing.assert_close(first, again)
        assert torch.equal(state, torch.random.get_rng_state())

    def test_lime_recovers_a_model_that_adds_its_segments_up(self) -> None:
        attr = pytest.importorskip("captum.attr")
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3)).double().eval()
        x = torch.rand(1, 3, 8, 8).double()
        capture = Capture(network, x, "input")
        saliency = adapt(attr.KernelShap, cells=4, n_samples=400)(capture, None, capture.target(1))
        adds = (network[1].weight[1].detach().view(3, 8, 8) * x[0]).sum(0)
        blocks = adds.view(4, 2, 4, 2).sum((1, 3)).repeat_interleave(2, 0).repeat_interleave(2, 1)
        # Captum attributes a segment's value to each of its pixels, of each colour.
        torch.testing.assert_close(saliency[0] / 3, blocks, rtol=1e-3, atol=1e-3)

    def test_segments_of_ones_own(self) -> None:
        attr = pytest.importorskip("captum.attr")
        halves = adapt(attr.FeatureAblation, segments=lambda x: (torch.arange(x.shape[-1]) > 10).long().expand(len(x), 17, -1))
        saliency = run(halves, "gap")
        assert len(saliency[0].unique()) == 2

    @pytest.mark.parametrize("name", ["GradCAM", "EigenCAM", "ScoreCAM", "AblationCAM", "FullGrad", "FinerCAM", "LayerCAM"])
    def test_pytorch_grad_cam_classes(self, name: str) -> None:
        pytest.importorskip("pytorch_grad_cam")
        network, x = networks()["gap"].float(), example().x.float()
        capture = Capture(network, x, "features")
        saliency = METHODS.get(f"pytorch_grad_cam.{name}")(capture, None, capture.target(1))
        assert saliency.shape == (2, 17, 23)
        assert saliency.dtype == torch.float32
        assert 0 <= float(saliency.min()) <= float(saliency.max()) <= 1

    def test_tokens_are_read_as_a_grid(self) -> None:
        pytest.importorskip("pytorch_grad_cam")
        capture = Capture(networks()["tokens"].float(), example().x.float(), "features")
        theirs = METHODS.get("pytorch_grad_cam.GradCAM")(capture, None, capture.target(1))
        ours = maps.prepare(METHODS.get("grad_cam")(capture, None, capture.target(1)).detach(), capture.size)
        for a, b in zip(theirs, ours, strict=True):
            assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.99 or b.std() == 0

    def test_they_can_stand_in_a_table(self) -> None:
        attr = pytest.importorskip("captum.attr")
        network, batch = networks()["gap"], example(count=3)
        methods = ["grad_cam", "captum.Saliency", adapt(attr.InputXGradient, "mine"), "grad_cam:smooth"]
        table = evaluate(network, [Batch(batch.x, batch.y)], methods, ["AD", "AI"], layer="features")
        assert set(table.index.get_level_values("method")) == {"grad_cam", "captum.Saliency", "mine", "grad_cam:smooth"}

    def test_what_cannot_be_adapted_says_why(self) -> None:
        attr = pytest.importorskip("captum.attr")
        with pytest.raises(FoveateError, match="dict is neither from"):
            adapt({})
        with pytest.raises(FoveateError, match="has no class 'Nothing'"):
            METHODS.get("captum.Nothing")
        with pytest.raises(FoveateError, match="needs more than a model to be built"):
            run(adapt(attr.NoiseTunnel))
        network = networks()["gap"]
        capture = Capture(network, example().x, "features")
        with pytest.raises(FoveateError, match=r"an object of Captum explains one output .* give the class Saliency"):
            adapt(attr.Saliency(network))(capture, None, capture.target(1, score="probability"))
        with pytest.raises(FoveateError, match="mixes the images of a batch"):
            run("captum.FeaturePermutation")

    @pytest.mark.parametrize("score", ["logit", "probability", "contrast"])
    @pytest.mark.parametrize("name", ["InputXGradient", "Occlusion", "IntegratedGradients", "DeepLift"])
    def test_captum_explains_any_score(self, name: str, score: str) -> None:
        pytest.importorskip("captum.attr")
        network, x = networks()["gap"], example(count=3).x
        capture = Capture(network, x, "features")
        wanted = {"logit": {}, "probability": {"score": "probability"}, "contrast": {"against": 2}}[score]
        target = capture.target(torch.tensor([0, 1, 3]), **wanted)
        found = METHODS.get(f"captum.{name}")(capture, None, target)
        alone = []
        for i in range(3):
            one = Capture(network, x[i : i + 1], "features")
            alone.append(METHODS.get(f"captum.{name}")(one, None, one.target([0, 1, 3][i], **wanted)))
        torch.testing.assert_close(found, torch.cat(alone))
        if name == "InputXGradient":
            torch.testing.assert_close(found, METHODS.get("input_x_gradient")(capture, None, target))
        if name == "Occlusion":
            window, stride = (2, 3), (1, 1)
            own = {"sliding_window_shapes": (3, *window), "strides": (3, *stride)}
            ours = METHODS.get("occlusion")(capture, None, target, window=window, stride=stride)
            theirs = METHODS.get("captum.Occlusion")(capture, None, target, **own)
            assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.99

    def test_captum_explains_one_logit(self) -> None:
        pytest.importorskip("captum.attr")
        network, x = small_cnn(num_classes=1).eval(), torch.rand(2, 3, 32, 32)
        capture = Capture(network, x)
        for y in (0, 1):
            target = capture.target(y)
            found = METHODS.get("captum.InputXGradient")(capture, None, target)
            torch.testing.assert_close(found, METHODS.get("input_x_gradient")(capture, None, target))

    @pytest.mark.parametrize("form", ["tuple", "dict", "object"])
    @pytest.mark.parametrize(
        "name", ["captum.Saliency", "captum.Lime", "pytorch_grad_cam.GradCAM", "pytorch_grad_cam.AblationCAM"]
    )
    def test_models_that_return_more_than_a_tensor(self, name: str, form: str) -> None:
        pytest.importorskip(name.split(".")[0])
        plain, x = networks()["gap"], example().x

        class Wrapped(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = plain

            def forward(self, x: torch.Tensor) -> object:
                logits = self.inner(x)
                forms = {"tuple": (logits, x), "dict": {"logits": logits}, "object": SimpleNamespace(logits=logits)}
                return forms[form]

        own = {"n_samples": 20} if "Lime" in name else {}
        capture = Capture(Wrapped().eval(), x, "inner.features")
        torch.testing.assert_close(METHODS.get(name)(capture, None, capture.target(1), **own), run(name, "gap", **own))

    @pytest.mark.parametrize("name", ["GradientShap", "DeepLiftShap", "ShapleyValueSampling", "ShapleyValues"])
    def test_shapley_values(self, name: str) -> None:
        """Repeatable, of a batch as of single images, and no generator of the caller's is moved."""
        pytest.importorskip("captum.attr")
        own = {"cells": 2} if name.startswith("Shapley") else {}
        method = METHODS.get(f"captum.{name}")
        network, x = networks()["gap"], example().x
        capture = Capture(network, x, "features")
        np.random.seed(3)
        before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
        found = method(capture, None, capture.target(1), **own)
        assert (np.random.get_state()[1] == before[0]).all()
        assert random.getstate() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
        torch.testing.assert_close(method(capture, None, capture.target(1), **own), found)
        one = Capture(network, x[1:], "features")
        torch.testing.assert_close(method(one, None, one.target(1), **own), found[1:])

    @pytest.mark.parametrize("name", ["KernelShap", "ShapleyValueSampling", "IntegratedGradients"])
    def test_a_baseline_an_image_goes_with_its_image(self, name: str) -> None:
        attr = pytest.importorskip("captum.attr")
        network, x = networks()["gap"], example(count=3).x
        own = {"n_samples": 4, "cells": 2} if "Sha" in name else {}
        method, baselines = adapt(getattr(attr, name)), x.flip(0) / 2
        capture = Capture(network, x, "features")
        found = method(capture, None, capture.target(1), baselines=baselines, **own)
        one = Capture(network, x[1:2], "features")
        torch.testing.assert_close(
            method(one, None, one.target(1), baselines=baselines[1:2], **own), found[1:2], rtol=1e-6, atol=1e-9
        )

    def test_maps_of_chance_are_of_a_seed(self) -> None:
        pytest.importorskip("pytorch_grad_cam")
        before = np.random.get_state()[1].copy()
        first, same = run("pytorch_grad_cam.RandomCAM", "gap"), run("pytorch_grad_cam.RandomCAM", "gap")
        other = saliency(networks()["gap"], example().x, adapt(importlib.import_module("pytorch_grad_cam").RandomCAM, seed=1))
        assert torch.equal(first, same)
        assert not torch.allclose(maps.prepare(first, other.shape[-2:]), other, atol=1e-3)
        assert (np.random.get_state()[1] == before).all()

    def test_settings_by_name(self) -> None:
        attr = pytest.importorskip("captum.attr")
        network, x = networks()["gap"], example().x
        few = {"captum.Lime": {"n_samples": 30, "cells": 3, "seed": 5}}
        found = saliency(network, x, "captum.Lime", layer="features", settings=few)
        same = adapt(attr.Lime, n_samples=30, cells=3, seed=5)
        torch.testing.assert_close(found, saliency(network, x, same, layer="features"))
        assert not torch.allclose(found, saliency(network, x, adapt(attr.Lime, n_samples=30, cells=3), layer="features"))
        with pytest.raises(FoveateError, match=r"captum.Lime has no setting 'samples': it has seed, colour, cells.* n_samples"):
            saliency(network, x, "captum.Lime", layer="features", settings={"captum.Lime": {"samples": 3}})

    def test_a_library_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "captum.attr", None)
        with pytest.raises(FoveateError, match=r"captum, which is not installed: pip install 'foveate\[captum\]'"):
            METHODS.get("captum.Lime")
