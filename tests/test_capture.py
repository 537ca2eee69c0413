"""Capture: what it gives, what it costs, and that nothing is left on the model."""

from __future__ import annotations

import copy
import gc
import warnings
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import Capture, FoveateError, LayerError, SlowPathWarning, explain, maps, normalized
from foveate._torchvision import timm
from foveate.registry import METHODS
from foveate.runtime.chunks import in_chunks
from foveate.testing import CLASSES, SHAPE, assert_untouched, example, fingerprint, networks

KINDS = ("gap", "flat", "inplace", "tokens")


class Wrapped(nn.Module):
    """A network with another form of output."""

    def __init__(self, network: nn.Module, form: str) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x: Tensor) -> object:
        logits = self.network(x)
        if self.form == "tuple":
            return logits, "more"
        if self.form == "dict":
            return OrderedDict(loss=None, logits=logits)
        if self.form == "object":
            return SimpleNamespace(logits=logits)
        if self.form == "trailing":
            return logits[:, :, None, None]
        return logits


def grad_cam(model: nn.Module, x: Tensor, layer: str = "features", **options: object) -> Tensor:
    capture = Capture(model, x, layer, **options)
    return METHODS.get("grad_cam")(capture, None, capture.target(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_left_on_the_model(kind: str, frozen: bool) -> None:
    network, batch = networks()[kind], example()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = fingerprint(network)
    capture = Capture(network, batch.x, "features", frozen=frozen)
    capture.grad(None, capture.target(1))
    capture.class_maps()
    capture.tail(capture.activations().detach())
    capture.score(batch.x)
    assert_untouched(before, network)
    assert not batch.x.requires_grad


@pytest.mark.parametrize("where", ["layer", "behind", "target"])
def test_nothing_is_left_after_a_crash(where: str) -> None:
    network, batch = networks()["inplace"], example()

    class Crash(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    if where == "layer":
        network.features.append(Crash().eval())
    elif where == "behind":
        network.more = Crash().eval()
    before = fingerprint(network)

    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("on purpose")

    with pytest.raises((RuntimeError, FoveateError), match="on purpose"):
        explain(network, batch.x, "grad_cam", layer="features", target=broken if where == "target" else None)
    assert_untouched(before, network)


def test_finding_a_layer_leaves_a_model_in_training_as_it_is() -> None:
    network = networks()["inplace"].train()
    before = fingerprint(network)
    state = {name: buffer.clone() for name, buffer in network.named_buffers()}
    from foveate.runtime.layers import find

    find(network, example().x)
    assert_untouched(before, network)
    assert all(torch.equal(state[name], buffer) for name, buffer in network.named_buffers())


def test_a_thousand_calls_keep_no_memory() -> None:
    network, x = networks()["gap"], example().x
    grad_cam(network, x)
    gc.collect()
    before = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
    for _ in range(1000):
        grad_cam(network, x)
    gc.collect()
    assert sum(isinstance(thing, Tensor) for thing in gc.get_objects()) <= before + 2


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_equals_autograd_in_value_and_gradient(kind: str) -> None:
    network, batch = networks()[kind], example()
    results = []
    for closed in (True, False):
        capture = Capture(network, batch.x, "features", frozen=False, closed_form=closed)
        for score in ("logit", "probability", "loss"):
            target = capture.target(batch.y, score=score)
            G = capture.grad(None, target)
            parameters = [p for p in network.parameters() if p.requires_grad]
            weight = torch.linspace(-1, 1, G.numel(), dtype=G.dtype).view_as(G)
            scalar = (capture.activations() * G * weight).sum()
            gradients = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
            results.append([G.detach(), *(g if g is not None else torch.zeros(()) for g in gradients)])
        results.append([capture.class_maps().detach()])
    half = len(results) // 2
    for one, other in zip(results[:half], results[half:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b.expand_as(a), rtol=1e-8, atol=1e-12)


def test_the_closed_form_needs_no_backward_and_no_double_backward() -> None:
    capture = Capture(networks()["gap"], example().x, "features", frozen=False)
    assert capture.linear_head() is not None
    capture.grad(None, capture.target(0))
    assert capture.passes.backward == 0


def test_a_head_that_pools_something_else_is_not_taken_for_linear() -> None:
    network = nn.Sequential(OrderedDict(features=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1)))
    network.add_module("flatten", nn.Flatten())
    network.add_module("classifier", nn.Linear(4, 3))
    network.eval()
    assert Capture(network, torch.rand(2, 3, 9, 9), "features").linear_head() is None
    assert Capture(network, torch.rand(2, 3, 9, 9), "relu").linear_head().pooled


class Cosine(nn.Linear):
    """A linear layer by name, a cosine classifier by nature."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Adapted(nn.Linear):
    """A linear layer with a low-rank adapter, as fine-tuning libraries make them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.down, self.up = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


class Head(nn.Module):
    """Average pooling and one linear layer, with something in between or behind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.features, self.kind = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU()), kind
        self.scale = nn.Parameter(torch.ones(1))
        self.classifier = {"cosine": Cosine, "adapter": Adapted}.get(kind, nn.Linear)(6, CLASSES)
        if kind == "hook":
            self.classifier.register_forward_hook(lambda module, inputs, output: output * 3)

    def forward(self, x: Tensor) -> Tensor:
        A = self.features(x)
        if self.kind == "relu":
            A = nn.functional.relu(A)
        pooled = A.mean((2, 3))
        if self.kind == "scale":
            pooled = pooled * self.scale
        logits = self.classifier(pooled)
        if self.kind == "inplace":
            logits.mul_(10)
        return logits * 1.0 if self.kind == "behind" else logits


@pytest.mark.parametrize("kind", ["cosine", "adapter", "hook", "inplace", "relu", "scale", "behind", "linear"])
def test_a_linear_head_is_what_the_graph_says_and_not_what_it_looks_like(kind: str) -> None:
    torch.manual_seed(0)
    network, x = Head(kind).double().eval(), example().x
    capture = Capture(network, x, "features")
    assert (capture.linear_head() is not None) == (kind == "linear")
    target = capture.target(1)
    without = Capture(network, x, "features", closed_form=False)
    torch.testing.assert_close(capture.grad(None, target), without.grad(None, without.target(1)))


def test_a_second_head_does_not_hide_the_first() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier, self.other = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            pooled = self.features(x).mean((2, 3))
            return self.classifier(pooled), self.other(pooled)

    model = TwoHeads().double().eval()
    head = Capture(model, example().x, "features").linear_head()
    torch.testing.assert_close(head.bias, model.classifier.bias.detach())


def test_dead_features_do_not_make_a_head_linear() -> None:
    network = Head("relu").double().eval()
    with torch.no_grad():
        network.features[0].bias.fill_(-100)
    assert Capture(network, example().x, "features").linear_head() is None


def test_dropout_in_training_is_not_taken_for_a_linear_head() -> None:
    network = networks()["gap"].float()
    network.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, CLASSES))
    network.train()
    assert Capture(network, torch.rand(4, 3, 17, 23), "features", frozen=False).linear_head() is None
    network.eval()
    assert Capture(network, torch.rand(4, 3, 17, 23), "features").linear_head() is not None


def test_the_body_in_front_of_the_layer_has_no_graph() -> None:
    network = networks()["inplace"]
    capture = Capture(network, example().x, "features")
    assert capture._feature(None).raw.is_leaf
    live = Capture(network, example().x, "features", frozen=False)
    assert not live._feature(None).raw.is_leaf


def test_a_live_capture_of_a_frozen_body_still_has_gradients_at_its_layer() -> None:
    network, x = networks()["inplace"], example().x
    network.features.requires_grad_(False)
    torch.testing.assert_close(grad_cam(network, x, frozen=False).detach(), grad_cam(network, x))


def test_an_inplace_relu_behind_the_layer_does_not_reach_the_features() -> None:
    network, x = networks()["inplace"], example().x
    expected = network.features(x).detach()
    assert (expected < 0).any()
    torch.testing.assert_close(Capture(network, x, "features").activations().detach(), expected)


def test_images_that_need_a_gradient_do_not_thaw_the_body() -> None:
    network, x = networks()["inplace"], example().x.requires_grad_(True)
    assert Capture(network, x, "features")._feature(None).raw.is_leaf


def test_outputs_that_are_probabilities_are_noticed() -> None:
    model = nn.Sequential(OrderedDict(network=networks()["gap"], softmax=nn.Softmax(1))).eval()
    with pytest.warns(UserWarning, match="add up to 1"):
        Capture(model, example().x, "network.features")


def test_several_layers_share_one_backward_and_agree_with_single_ones() -> None:
    network, x = networks()["inplace"], example().x
    both = Capture(network, x, ["features.0", "more"])
    target = both.target(1)
    for layer in both.layers:
        alone = Capture(network, x, layer)
        torch.testing.assert_close(both.grad(layer, target), alone.grad(layer, alone.target(1)))
    assert both.passes.backward == len(x)


def test_gradients_at_the_input_are_the_plain_ones() -> None:
    network, x = networks()["inplace"], example().x
    capture = Capture(network, x, "input")
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(network(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(capture.grad("input", capture.target(1)), expected)


@pytest.mark.parametrize("form", ["tuple", "dict", "object", "trailing"])
def test_outputs_of_every_form(form: str) -> None:
    network, x = networks()["gap"], example().x
    torch.testing.assert_close(grad_cam(Wrapped(network, form).eval(), x, "network.features"), grad_cam(network, x))


def test_outputs_without_logits_are_refused() -> None:
    class Strange(nn.Module):
        def __init__(self, value: object) -> None:
            super().__init__()
            self.value, self.features = value, nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> object:
            self.features(x)
            return self.value

    for value, match in (
        ({"loss": 1}, "dict without a tensor"),
        ("logits", "returned a str"),
        (torch.rand(2, 3, 4), "shape \\[2, 3, 4\\]"),
    ):
        with pytest.raises(FoveateError, match=match):
            Capture(Strange(value).eval(), torch.rand(2, 3, 9, 9), "features")


class TestModelsPeopleHave:
    """Frozen, without gradients, wrapped, compiled, in half precision: the same map."""

    def setup_method(self) -> None:
        self.network, self.x = networks()["inplace"].float(), example().x.float()
        self.expected = grad_cam(self.network, self.x)

    def test_frozen_parameters(self) -> None:
        self.network.requires_grad_(False)
        torch.testing.assert_close(grad_cam(self.network, self.x), self.expected)

    def test_under_no_grad(self) -> None:
        with torch.no_grad():
            torch.testing.assert_close(grad_cam(self.network, self.x), self.expected)

    def test_under_inference_mode(self) -> None:
        with torch.inference_mode():
            torch.testing.assert_close(grad_cam(self.network, self.x.clone()), self.expected)

    def test_parameters_made_in_inference_mode(self) -> None:
        with torch.inference_mode():
            network = copy.deepcopy(self.network)
            torch.testing.assert_close(grad_cam(network, self.x), self.expected)

    def test_data_parallel(self) -> None:
        torch.testing.assert_close(grad_cam(nn.DataParallel(self.network), self.x), self.expected)

    def test_compiled(self) -> None:
        torch.testing.assert_close(grad_cam(torch.compile(self.network), self.x), self.expected)

    def test_compiled_in_place(self) -> None:
        self.network.compile()
        torch.testing.assert_close(grad_cam(self.network, self.x), self.expected)

    def test_compiled_scores(self) -> None:
        model = torch.compile(self.network, backend="eager")
        capture = Capture(model, self.x, "features")
        torch.testing.assert_close(capture.score(self.x), self.network(self.x))

    def test_inference_mode_from_end_to_end(self) -> None:
        with torch.inference_mode():
            methods = ["grad_cam", "contrastive_cam"]
            explanation = explain(self.network, self.x.clone(), methods, layer="features", target=torch.tensor([1, 1]))
        torch.testing.assert_close(explanation.raw["grad_cam"], self.expected)

    def test_compiled_part(self) -> None:
        self.network.features = torch.compile(self.network.features)
        torch.testing.assert_close(grad_cam(self.network, self.x), self.expected)

    def test_double_precision_images(self) -> None:
        torch.testing.assert_close(grad_cam(self.network, self.x.double()), self.expected)

    def test_bfloat16(self) -> None:
        saliency = grad_cam(self.network.bfloat16(), self.x)
        assert saliency.dtype == torch.float32
        assert torch.corrcoef(torch.stack([saliency.flatten(), self.expected.flatten()]))[0, 1] > 0.99

    def test_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            saliency = grad_cam(self.network, self.x)
        assert torch.corrcoef(torch.stack([saliency.flatten(), self.expected.flatten()]))[0, 1] > 0.99

    def test_channels_last(self) -> None:
        model = self.network.to(memory_format=torch.channels_last)
        saliency = grad_cam(model, self.x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(saliency, self.expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("count", "side", "groups", "precision", "last"),
        [
            (1, 224, 1, "fp32", False),
            (3, 64, 1, "fp32", False),
            (4, 64, 1, "fp32", True),
            (2, 224, 1, "fp32", True),
            (1, 320, 1, "fp32", True),
            (1, 224, 6, "fp32", True),
            (1, 224, 2, "fp32", False),
            (1, 64, 1, "bf16", True),
        ],
    )
    def test_pixels_and_depthwise_convolutions_choose_the_layout(
        self, count: int, side: int, groups: int, precision: Literal["fp32", "bf16"], last: bool
    ) -> None:
        seen: list[bool] = []

        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))

        first = nn.Conv2d(3, 6, 3, stride=16)
        first.register_forward_pre_hook(see)
        features = [first, nn.Conv2d(6, 6, 1, groups=groups), nn.ReLU()]
        model = nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).eval()
        capture = Capture(model, torch.rand(1, 3, 32, 32), "2", precision=precision)
        seen.clear()
        capture.score(torch.rand(count, 3, side, side))
        assert seen[0] == last

    def test_normalized(self) -> None:
        model = normalized(self.network, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        mean, std = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
        torch.testing.assert_close(grad_cam(model, self.x * std + mean), self.expected, rtol=1e-4, atol=1e-6)

    def test_torchscript_is_refused_with_advice(self) -> None:
        with pytest.raises(FoveateError, match="TorchScript"):
            Capture(torch.jit.trace(self.network, self.x), self.x, "features")


class TestBinaryHead:
    def setup_method(self) -> None:
        self.network, self.batch = networks()["gap"], example()
        self.network.classifier = nn.Linear(6, 1).double().eval()

    def test_it_has_two_classes_with_opposite_maps(self) -> None:
        capture = Capture(self.network, self.batch.x, "features")
        assert (capture.head, capture.classes) == ("binary", 2)
        assert torch.equal(capture.pred, (self.network(self.batch.x)[:, 0] > 0).long())
        method = METHODS.get("hires_cam")
        one, zero = (method(capture, None, capture.target(y)) for y in (1, 0))
        torch.testing.assert_close(one, -zero)
        torch.testing.assert_close(one.sum((1, 2)) + self.network.classifier.bias, capture.logits[:, 0])

    def test_a_flat_output_is_one_logit(self) -> None:
        class Squeezed(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, x: Tensor) -> Tensor:
                return self.network(x)[:, 0]

        model = Squeezed(self.network).eval()
        torch.testing.assert_close(grad_cam(model, self.batch.x, "network.features"), grad_cam(self.network, self.batch.x))

    def test_a_contrast_is_the_log_odds(self) -> None:
        explanation = explain(self.network, self.batch.x, ("hires_cam", "contrastive_cam"), layer="features", target=1)
        torch.testing.assert_close(explanation.raw["hires_cam"], explanation.raw["contrastive_cam"])
        assert explanation.completeness_error["contrastive_cam"].max() < 1e-12


class TestScoreAndTail:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_tail_is_the_rest_of_the_model(self, kind: str) -> None:
        network, batch = networks()[kind], example()
        capture = Capture(network, batch.x, "features")
        A = capture.activations().detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPathWarning)
            torch.testing.assert_close(capture.tail(A), network(batch.x))
            if kind != "tokens":
                torch.testing.assert_close(capture.tail(0.5 * A), network.tail(0.5 * network.features(batch.x)))
        assert capture.passes.forward == len(batch)

    def test_the_tail_reads_what_went_around_the_layer(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.stem, self.features, self.classifier = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                x = self.stem(x)
                return self.classifier((x + self.features(x)).mean((2, 3)))

        model, x = Residual().double().eval(), example().x
        capture = Capture(model, x, "features")
        A = torch.rand_like(capture.activations()).repeat(3, 1, 1, 1)
        rows = torch.tensor([0, 1, 0, 1, 0, 1])
        stem = model.stem(x)
        torch.testing.assert_close(capture.tail(A, rows=rows), model.classifier((stem[rows] + A).mean((2, 3))))

    @pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto"])
    def test_the_tail_of_timms_models_is_cut(self, name: str) -> None:
        model, x = timm().create_model(name).eval(), torch.rand(2, 3, 224, 224)
        capture = Capture(model, x)
        A = capture.activations().detach()
        rows = torch.tensor([1, 0, 1])
        with warnings.catch_warnings():
            warnings.simplefilter("error", SlowPathWarning)
            torch.testing.assert_close(capture.tail(A[rows], rows=rows), model(x[rows]), rtol=1e-3, atol=1e-5)
        assert capture.passes.forward == 2

    def test_a_model_that_cannot_be_traced_runs_whole_and_says_so(self) -> None:
        class Branching(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network = network

            def forward(self, x: Tensor) -> Tensor:
                return self.network(x) if x.sum() > 0 else -self.network(x)

        model, x = Branching(networks()["gap"]).eval(), example().x
        capture = Capture(model, x, "network.features")
        with pytest.warns(SlowPathWarning, match="could not be cut off"):
            logits = capture.tail(0.5 * capture.activations().detach())
        torch.testing.assert_close(logits, model.network.tail(0.5 * model.network.features(x)))

    def test_the_tail_is_differentiable_where_it_should_be(self) -> None:
        network, batch = networks()["inplace"], example()
        capture = Capture(network, batch.x, "features")
        A = capture.activations().detach().requires_grad_(True)
        target = capture.target(batch.y)
        (gradient,) = torch.autograd.grad(capture.tail(A, target=target).sum(), A)
        torch.testing.assert_close(gradient, capture.grad(None, target))
        assert not capture.tail(A.detach()).requires_grad

    @pytest.mark.parametrize("chunk", [1, 2, 3, 7])
    def test_results_do_not_depend_on_the_chunk(self, chunk: int) -> None:
        network, x = networks()["inplace"], torch.rand(7, *SHAPE[1:], dtype=torch.float64)
        capture, small = Capture(network, x, "features"), Capture(network, x, "features", chunk=chunk)
        torch.testing.assert_close(small.score(x), capture.score(x))
        A = capture.activations().detach()
        torch.testing.assert_close(small.tail(A), capture.tail(A))
        assert small.score(iter([x[:3], x[3:]])).shape == (7, CLASSES)

    def test_rows_say_which_image_is_scored(self) -> None:
        network, batch = networks()["gap"], example()
        capture = Capture(network, batch.x, "features")
        rows = torch.tensor([1, 0, 1])
        scores = capture.score(batch.x[rows], capture.target(batch.y), rows)
        torch.testing.assert_close(scores, network(batch.x[rows]).gather(1, batch.y[rows][:, None])[:, 0])
        contrast = capture.target(0, against=[1, 2])
        logits = network(batch.x[rows])
        torch.testing.assert_close(capture.score(batch.x[rows], contrast, rows), logits[:, 0] - logits[[0, 1, 2], [2, 1, 2]])

    def test_the_number_of_scores_is_the_number_of_images(self) -> None:
        capture = Capture(networks()["gap"], example().x, "features")
        six = example(count=6).x
        for rows in (None, torch.tensor([0, 1])):
            with pytest.raises(FoveateError, match=r"6 image\(s\) cannot be scored with a target of 2"):
                capture.score(six, capture.target(), rows)
        assert capture.score(six[:0]).shape == (0, CLASSES)
        assert capture.score([]).shape == (0, CLASSES)

    def test_another_classifier_is_cut_again(self) -> None:
        network, x = networks()["gap"], example().x
        for _ in range(2):
            capture = Capture(network, x, "features")
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowPathWarning)
                torch.testing.assert_close(capture.tail(capture.activations().detach()), network(x))
            network.classifier = nn.Linear(6, CLASSES).double().eval()

    def test_a_chunk_that_does_not_fit_is_halved(self) -> None:
        network, x = networks()["gap"], torch.rand(8, *SHAPE[1:], dtype=torch.float64)
        sizes = []

        def small(images: Tensor) -> Tensor:
            if len(images) > 3:
                raise torch.OutOfMemoryError("too much")
            sizes.append(len(images))
            return network(images)

        result = torch.cat(list(in_chunks(small, 8, x)))
        torch.testing.assert_close(result, network(x))
        assert sizes == [2, 2, 2, 2]

    def test_bf16_is_near_and_float32(self) -> None:
        network, x = networks()["gap"].float(), example().x.float()
        logits = Capture(network, x, "features", precision="bf16").score(x)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, network(x), rtol=0.05, atol=0.02)

    def test_a_search_by_gradients_may_run_in_bf16(self) -> None:
        network, x = networks()["gap"].float(), example().x.float()
        capture, leaf = Capture(network, x, "features", precision="bf16"), x.clone().requires_grad_(True)
        exact, rough = capture.differentiable(leaf), capture.differentiable(leaf, cast=True)
        assert rough.dtype == torch.float32 and 0 < (rough - exact).abs().max() < 0.05
        gradients = [torch.autograd.grad(logits[:, 1].sum(), leaf)[0] for logits in (exact, rough)]
        assert torch.cosine_similarity(*(g.flatten(1) for g in gradients)).min() > 0.99
        torch.testing.assert_close(exact, network(x))

    def test_attention_in_bf16_is_written_out_and_as_near(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from foveate.runtime import attention, runner

        torch.manual_seed(0)
        model = timm().create_model("vit_tiny_patch16_224", num_classes=3, img_size=64, depth=2).eval()
        x = torch.rand(2, 3, 64, 64)
        exact, calls, weights = model(x).detach(), [], attention.attention_weights

        def counted(*args: torch.Tensor, **settings: Any) -> torch.Tensor:
            calls.append(args[0].dtype)
            return weights(*args, **settings)

        far: dict[str, float] = {}
        monkeypatch.setattr(attention, "attention_weights", counted)
        for name, limit in (("written", 2**25), ("torch", 1)):
            monkeypatch.setattr(attention, "WEIGHTS", limit)
            far[name] = float((Capture(model, x, precision="bf16").score(x) - exact).abs().max())
        assert calls == [torch.bfloat16] * 2 and 0 < far["written"] < 2 * far["torch"] < 0.1
        plain, known = networks()["gap"].float(), runner._formats
        Capture(plain, example().x.float(), "features", precision="bf16").score(example().x.float())
        assert known.of(model)["attends"] and not known.of(plain)["attends"]

    @pytest.mark.parametrize(
        "options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(5, 5).tril().bool()}, {"scale": 0.3}]
    )
    def test_written_attention_is_attention(self, options: dict[str, Any]) -> None:
        from foveate.runtime.attention import WrittenAttention, attention_weights

        q, k, v = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(i)).double() for i in range(3))
        whole = F.scaled_dot_product_attention(q, k, v, **options)
        torch.testing.assert_close(attention_weights(q, k, **options) @ v, whole)
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        same = F.scaled_dot_product_attention(q, k, v, **options)
        with WrittenAttention() as mode:
            written = F.scaled_dot_product_attention(q, k, v, **options)
        assert mode.seen and torch.equal(written, same) == bool({"is_causal", "attn_mask"} & set(options))
        torch.testing.assert_close(written.double(), whole, rtol=0.05, atol=0.02)

    def test_scores_can_take_part_in_a_graph(self) -> None:
        network, x = networks()["gap"], example().x
        weight = torch.ones(CLASSES, dtype=torch.float64, requires_grad=True)
        (Capture(network, x, "features").score(x) * weight).sum().backward()
        assert weight.grad is not None


class TestRefusals:
    def setup_method(self) -> None:
        self.network, self.x = networks()["gap"], example().x

    def test_training_mode(self) -> None:
        self.network.features.train()
        with pytest.raises(FoveateError, match=r"training mode \('features' is\): call model.eval"):
            Capture(self.network, self.x, "features")

    def test_an_unknown_layer_lists_near_ones(self) -> None:
        with pytest.raises(LayerError, match=r"'feature' is not in the model: did you mean features"):
            Capture(self.network, self.x, "feature")

    def test_a_layer_without_a_grid_names_one_that_has(self) -> None:
        with pytest.raises(LayerError, match=r"'classifier' has no spatial grid.*\[2, 4\]: try 'features'"):
            Capture(self.network, self.x, "classifier")

    def test_a_module_of_another_model(self) -> None:
        with pytest.raises(LayerError, match="not a module of this model"):
            Capture(self.network, self.x, nn.Conv2d(3, 3, 1))

    def test_a_layer_that_does_not_run(self) -> None:
        self.network.spare = nn.Conv2d(3, 3, 1).eval()
        with pytest.raises(LayerError, match="'spare' did not run"):
            Capture(self.network, self.x, "spare")

    def test_a_layer_that_the_score_does_not_depend_on(self) -> None:
        class Aside(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network, self.aside = network, nn.Conv2d(3, 4, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                self.aside(x)
                return self.network(x)

        capture = Capture(Aside(self.network).eval(), self.x, "aside")
        with pytest.raises(LayerError, match=r"do(es)? not depend on layer 'aside': try 'network.features'"):
            capture.grad(None, capture.target(0))

    def test_patches_behind_the_last_attention(self) -> None:
        class Late(nn.Module):
            def __init__(self, network: nn.Module) -> None:
                super().__init__()
                self.network, self.late = network, nn.LayerNorm(8).double()
                self.num_prefix_tokens = 1

            def forward(self, x: Tensor) -> Tensor:
                network = self.network
                patches = network.patch(x).flatten(2).transpose(1, 2)
                tokens = network.features(torch.cat([network.token.expand(len(x), -1, -1), patches], 1))
                attention = (network.query(tokens) @ network.key(tokens).transpose(1, 2)).softmax(-1)
                return network.classifier(self.late(attention @ network.value(tokens))[:, 0])

        model = Late(networks()["tokens"]).eval()
        capture = Capture(model, self.x, "late")
        with pytest.raises(LayerError, match=r"exactly 0 on every patch.*try 'network.features'"):
            capture.grad(None, capture.target(0))

    def test_nan_weights(self) -> None:
        with torch.no_grad():
            self.network.classifier.weight[0, 0] = float("nan")
        with pytest.raises(FoveateError, match="NaN or infinity for image 0"):
            Capture(self.network, self.x, "features")

    @pytest.mark.parametrize(
        ("x", "match"),
        [
            (torch.rand(3, 17, 23), r"shape \[3, 17, 23\]"),
            (torch.zeros(1, 3, 17, 23, dtype=torch.uint8), "divide by 255"),
            (torch.rand(0, 3, 17, 23), "no image"),
            (torch.rand(2, 3, 0, 23), r"images of shape \[3, 0, 23\] have no pixels"),
            ("image.jpg", "this is a str"),
        ],
    )
    def test_images(self, x: object, match: str) -> None:
        with pytest.raises(FoveateError, match=match):
            Capture(self.network, x, "features")

    def test_images_out_of_range_are_warned_of_once_a_model(self) -> None:
        for x, match in ((self.x * 255, r"these are in \[0.\d\d, 25\d.\d\d\]"), (self.x * 4 - 2, r"in \[-[12].\d\d, ")):
            network = copy.deepcopy(self.network)
            with pytest.warns(UserWarning, match=match):
                Capture(network, x, "features")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                Capture(network, x, "features")  # it has been said
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            capture = Capture(self.network, self.x, "features")
            capture.again(self.x - 0.5)  # a noisy copy is no mistake
            Capture(self.network, self.x * 3, "features", any_range=True)

    def test_grey_images_are_no_colour_images(self) -> None:
        with pytest.raises(FoveateError, match=r"takes images of 3 channels, and these have 1: .*expand"):
            Capture(normalized(self.network), self.x[:, :1], "features")
        with pytest.raises(FoveateError, match=r"images of 3 channels, and these have 4$"):
            Capture(normalized(self.network), torch.rand(1, 4, 17, 23), "features")
        one = normalized(nn.Conv2d(3, 2, 3).double())
        assert one(self.x[0]).shape == (1, 2, 15, 21)  # a single image without a batch is its own business

    def test_options(self) -> None:
        for options, match in (
            ({"chunk": 0}, "chunk 0"),
            ({"precision": "fp8"}, "precision 'fp8'"),
            ({"head": "sigmoid"}, "head 'sigmoid'"),
        ):
            with pytest.raises(FoveateError, match=match):
                Capture(self.network, self.x, "features", **options)

    def test_class_maps_notice_what_gradients_notice(self) -> None:
        model = timm().create_model("vit_tiny_patch16_224").eval()
        with pytest.raises(LayerError, match=r"exactly 0 on every patch.*try 'blocks.11.norm1'"):
            Capture(model, torch.rand(1, 3, 224, 224), "blocks.11").class_maps(classes=[0])

    def test_windows_are_not_images(self) -> None:
        model = timm().create_model("swin_tiny_patch4_window7_224").eval()
        with pytest.raises(LayerError, match=r"gives 64 rows for 1 image"):
            Capture(model, torch.rand(1, 3, 224, 224), "layers.0.blocks.0.attn")

    def test_a_size_that_the_model_cannot_take(self) -> None:
        model = timm().create_model("vit_tiny_patch16_224").eval()
        with pytest.raises(FoveateError, match=r"cannot take images of shape \[1, 3, 160, 160\]"):
            Capture(model, torch.rand(1, 3, 160, 160))
        with pytest.raises(FoveateError, match=r"cannot take images of shape \[1, 4, 32, 32\]"):
            Capture(self.network, torch.rand(1, 4, 32, 32), "features")

    def test_the_tail_of_a_model_in_training(self) -> None:
        network = networks()["inplace"].train()
        capture = Capture(network, self.x, "features", frozen=False)
        with pytest.raises(FoveateError, match="training mode"):
            capture.tail(capture.activations().detach())

    def test_a_layer_that_was_not_captured(self) -> None:
        capture = Capture(self.network, self.x, "features")
        with pytest.raises(LayerError, match=r"'features.0' was not captured: this run has features"):
            capture.activations("features.0")

    def test_a_layer_that_runs_twice_says_which_run_is_used(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()
                self.second, self.classifier = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.classifier(self.relu(self.second(self.relu(self.first(x)))).mean((2, 3)))

        model = Twice().double().eval()
        with pytest.warns(UserWarning, match="runs 2 times"):
            capture = Capture(model, self.x, "relu")
        torch.testing.assert_close(
            capture.activations().detach(), model.relu(model.second(model.relu(model.first(self.x)))).detach()
        )


def test_a_map_is_prepared_without_nan_where_it_says_nothing() -> None:
    network, x = networks()["gap"], example().x
    with torch.no_grad():
        network.classifier.weight.copy_(-network.classifier.weight.abs())
    with pytest.warns(UserWarning, match="2 of 2 maps are constant"):
        explanation = explain(network, x, "hires_cam", layer="features", target=0)
    assert explanation.degenerate["hires_cam"].all()
    assert torch.equal(explanation["hires_cam"], torch.zeros(2, 17, 23, dtype=torch.float64))
    assert maps.is_constant(explanation["hires_cam"]).all()
