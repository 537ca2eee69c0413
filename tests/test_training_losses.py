"""Contrastive losses, attention supervision and interpretable gradients: replicas, identities, refusals, architecture."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reference
from foveate import Batch, Capture, FoveateError, contrastive_architecture
from foveate.data.boxes import box_masks
from foveate.losses import contrastive, gradients
from foveate.losses import outside as attention
from foveate.registry import LOSSES
from foveate.runtime.guided import guided
from foveate.testing import assert_untouched, example, fingerprint, networks

MASKED = ("ablated_cross_entropy", "divergence", "sliced_wasserstein")
LINEAR = ("contrastive", *MASKED)


def live(kind: str = "gap", batch: Batch | None = None, **options: object) -> tuple[Capture, Batch]:
    batch = batch or example(count=3)
    return Capture(networks()[kind], batch.x, options.pop("layers", "features"), frozen=False, **options), batch


class TestContrastive:
    @pytest.mark.parametrize("kind", ["gap", "flat"])
    def test_it_is_cross_entropy(self, kind: str) -> None:
        capture, batch = live(kind)
        value = LOSSES.get("contrastive")(capture, batch)
        torch.testing.assert_close(value, F.cross_entropy(capture.logits, batch.y, reduction="none"), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("kind", ["gap", "flat"])
    def test_without_bias_it_is_the_cross_entropy_of_the_bias_free_head(self, kind: str) -> None:
        capture, batch = live(kind)
        value = LOSSES.get("contrastive")(capture, batch, bias=False)
        expected = F.cross_entropy(capture.logits - capture.linear_head().bias, batch.y, reduction="none")
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)

    def test_its_gradient_is_that_of_cross_entropy(self) -> None:
        capture, batch = live()
        ours = torch.autograd.grad(
            LOSSES.get("contrastive")(capture, batch).sum(), capture.model.parameters(), retain_graph=True
        )
        theirs = torch.autograd.grad(F.cross_entropy(capture.logits, batch.y, reduction="sum"), capture.model.parameters())
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_the_drafts_second_line_is_not_cross_entropy(self) -> None:
        K = contrastive_example()[0]
        assert not torch.allclose(K.sum((2, 3)).logsumexp(1), contrastive.contrastive(K), atol=0.1)

    def test_a_shift_of_all_maps_changes_nothing(self) -> None:
        M, y = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.tensor([1, 3])
        shift = torch.randn(2, 1, 3, 5, dtype=torch.float64)
        K, moved = (m[torch.arange(2), y][:, None] - m for m in (M, M + shift))
        torch.testing.assert_close(contrastive.contrastive(K), contrastive.contrastive(moved))


def contrastive_example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(3, 4, 3, 5, generator=generator, dtype=torch.float64)
    mask = (torch.rand(3, 3, 5, generator=generator) > 0.5).double()
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    y = torch.tensor([2, 0, 3])
    return M[torch.arange(3), y][:, None] - M, mask, bias, y, M


class TestReplicas:
    def test_ablated_cross_entropy(self) -> None:
        K, mask, bias, y, M = contrastive_example()
        for background in (1.0, 0.3):
            values = contrastive.ablated_cross_entropy(K, mask, bias - bias[y][:, None], background)
            for i in range(3):
                expected = reference.ablated_cross_entropy(M[i], int(y[i]), bias, mask[i], background)
                assert float(values[i]) == pytest.approx(expected, rel=1e-12)

    def test_contrastive(self) -> None:
        K, _, bias, y, M = contrastive_example()
        values = contrastive.contrastive(K, bias - bias[y][:, None])
        for i in range(3):
            assert float(values[i]) == pytest.approx(reference.contrastive(M[i], int(y[i]), bias), rel=1e-12)

    def test_binary_and_multi_label(self) -> None:
        _, mask, bias, _, M = contrastive_example()
        y = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
        values = contrastive.ablated_binary_cross_entropy(M, y, mask, bias)
        each = contrastive.ablated_binary_cross_entropy(M, y, mask[:, None].expand_as(M), bias)
        torch.testing.assert_close(values, each)
        for i in range(3):
            assert float(values[i]) == pytest.approx(reference.ablated_binary(M[i], y[i].tolist(), bias, mask[i]), rel=1e-12)
        logits = M.sum((2, 3)) + bias
        plain = F.binary_cross_entropy_with_logits(logits, y.double(), reduction="none").sum(1)
        torch.testing.assert_close(contrastive.contrastive_binary(M, y, bias), plain)

    def test_divergence(self) -> None:
        K, mask, _, y, M = contrastive_example()
        for settings in ({}, {"mask_sharpness": 2.0, "map_sharpness": 3.0}):
            values = contrastive.divergence(K, mask, F.one_hot(y, 4) == 0, **settings)
            for i in range(3):
                expected = reference.divergence(M[i], int(y[i]), mask[i], **settings)
                assert float(values[i]) == pytest.approx(expected, rel=1e-9)

    def test_sliced_wasserstein(self) -> None:
        K, mask, _, y, M = contrastive_example()
        values = contrastive.sliced_wasserstein(3 * K, mask, F.one_hot(y, 4) == 0, directions=7)
        for i in range(3):
            expected = reference.sliced_wasserstein(3 * M[i], int(y[i]), mask[i], directions=7)
            assert float(values[i]) == pytest.approx(expected, rel=1e-12)

    def test_mass_outside(self) -> None:
        S, mask = torch.randn(3, 4, 5, dtype=torch.float64), torch.rand(3, 4, 5, dtype=torch.float64)
        values = attention.mass_outside(S, mask)
        for i in range(3):
            assert float(values[i]) == pytest.approx(reference.mass_outside(S[i], mask[i]), rel=1e-12)

    @pytest.mark.parametrize("error", ["cosine", "l1", "l2", "histogram"])
    def test_interpretable_gradients(self, error: str) -> None:
        a, b = (torch.randn(3, 3, 4, 5, dtype=torch.float64) for _ in range(2))
        values = gradients.interpretable_gradients(a, b, error=error)
        for i in range(3):
            assert float(values[i]) == pytest.approx(reference.interpretable_gradients(a[i], b[i], error), rel=1e-9)


class TestMasks:
    def test_ace_is_never_below_cross_entropy_and_equal_where_all_evidence_is_on_the_object(self) -> None:
        K, mask, *_ = contrastive_example()
        assert (contrastive.ablated_cross_entropy(K, mask) > contrastive.contrastive(K)).all()
        everything = torch.ones_like(mask)
        torch.testing.assert_close(contrastive.ablated_cross_entropy(K, everything), contrastive.contrastive(K))
        on_it = K * mask[:, None]
        torch.testing.assert_close(contrastive.ablated_cross_entropy(on_it, mask), contrastive.contrastive(on_it))

    def test_evidence_beyond_the_target_costs_nothing_in_the_transport(self) -> None:
        mask = torch.zeros(1, 4, 4, dtype=torch.float64)
        mask[:, 1:3, 1:3] = 1
        others = torch.tensor([[False, True]])
        K = torch.stack([torch.zeros(1, 4, 4, dtype=torch.float64), 50 * mask], 1)
        assert float(contrastive.sliced_wasserstein(K, mask, others)) == pytest.approx(0, abs=1e-12)
        assert float(contrastive.sliced_wasserstein(-K, mask, others)) > 1

    def test_an_empty_mask_counts_as_everything(self) -> None:
        batch = example(count=3)
        batch = Batch(batch.x, batch.y, torch.zeros_like(batch.mask))
        capture, _ = live(batch=batch)
        value = LOSSES.get("ablated_cross_entropy")(capture, batch)
        torch.testing.assert_close(value, F.cross_entropy(capture.logits, batch.y, reduction="none"))
        assert (LOSSES.get("mass_outside")(capture, batch) == 0).all()

    def test_boxes_stand_in_for_masks_where_a_box_is_enough(self) -> None:
        batch = example(count=2)
        boxes = (torch.tensor([[2.0, 3.0, 9.0, 12.0]]), torch.tensor([[0.0, 0.0, 5.5, 5.0], [10.0, 4.0, 20.0, 16.0]]))
        boxed = Batch(batch.x, batch.y, boxes=boxes)
        masked = Batch(batch.x, batch.y, box_masks(boxes, (17, 23)))
        assert float(masked.mask[1].sum()) == pytest.approx(5.5 * 5 + 10 * 12)
        capture, _ = live(batch=boxed)
        for name in ("mass_outside", "ablated_cross_entropy"):
            settings = {"resize": "area"} if name != "mass_outside" else {}
            torch.testing.assert_close(
                LOSSES.get(name)(capture, boxed, **settings), LOSSES.get(name)(capture, masked, **settings)
            )
        with pytest.raises(FoveateError, match="a box is not enough"):
            LOSSES.get("divergence")(capture, boxed)


class TestHeads:
    def test_one_logit_is_two_classes(self) -> None:
        """The binary head z and a softmax head (0, z) have the same contrastive losses."""
        one, two = networks()["gap"], networks()["gap"]
        one.classifier, two.classifier = nn.Linear(6, 1).double(), nn.Linear(6, 2).double()
        with torch.no_grad():
            two.classifier.weight[0], two.classifier.bias[0] = 0, 0
            two.classifier.weight[1], two.classifier.bias[1] = one.classifier.weight[0], one.classifier.bias[0]
        batch = example(count=3)
        batch = Batch(batch.x, torch.tensor([0, 1, 1]), batch.mask)
        first, second = (Capture(network, batch.x, "features", frozen=False) for network in (one, two))
        for name in LINEAR:
            torch.testing.assert_close(LOSSES.get(name)(first, batch), LOSSES.get(name)(second, batch), rtol=1e-9, atol=1e-10)
        plain = F.binary_cross_entropy_with_logits(first.logits[:, 0], batch.y.double(), reduction="none")
        torch.testing.assert_close(LOSSES.get("contrastive")(first, batch), plain)

    def test_multi_label(self) -> None:
        batch = example(count=3)
        y = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
        batch = Batch(batch.x, y, batch.mask)
        capture, _ = live(batch=batch, head="multilabel")
        expected = F.binary_cross_entropy_with_logits(capture.logits, y.double(), reduction="none").sum(1)
        torch.testing.assert_close(LOSSES.get("contrastive")(capture, batch), expected)
        held = LOSSES.get("ablated_cross_entropy")(capture, batch)
        assert (held[:2] > expected[:2]).all()
        torch.testing.assert_close(held[2], expected[2])
        with pytest.raises(FoveateError, match=r"needs labels \[B,C\], and they are \[3\]"):
            LOSSES.get("contrastive")(capture, Batch(batch.x, y[:, 0], batch.mask))

    @pytest.mark.parametrize("name", LINEAR)
    def test_a_head_without_a_closed_form_is_refused(self, name: str) -> None:
        capture, batch = live("inplace")
        with pytest.raises(FoveateError, match=f"{name} needs a head that is linear in layer 'features'"):
            LOSSES.get(name)(capture, batch)

    @pytest.mark.parametrize("name", [*MASKED, "mass_outside"])
    def test_data_without_masks_is_refused(self, name: str) -> None:
        capture, batch = live()
        with pytest.raises(FoveateError, match=f"{name} needs masks"):
            LOSSES.get(name)(capture, Batch(batch.x, batch.y))

    @pytest.mark.parametrize("name", sorted(LOSSES.all()))
    def test_labels_are_needed(self, name: str) -> None:
        capture, batch = live()
        with pytest.raises(FoveateError, match="needs labels"):
            LOSSES.get(name)(capture, Batch(batch.x, mask=batch.mask))


@pytest.mark.parametrize("name", sorted(LOSSES.all()))
def test_every_loss_is_an_image_s_own_and_its_gradient_agrees_with_differences(name: str) -> None:
    """One value an image that does not depend on the batch; the gradient in the parameters by central differences."""
    batch, record = example(count=3), LOSSES.get(name)
    network = networks()["gap"]
    before = fingerprint(network)

    def value(images: Batch) -> torch.Tensor:
        layers = ("features", "input") if "guided" in record.needs else "features"
        capture = Capture(network, images.x, layers, frozen=False, guided="guided" in record.needs)
        return record(capture, images)

    together = value(batch)
    assert together.shape == (3,)
    assert torch.isfinite(together).all()
    alone = value(Batch(batch.x[1:2], batch.y[1:2], batch.mask[1:2]))
    torch.testing.assert_close(alone[0], together[1], rtol=1e-9, atol=1e-12)
    assert_untouched(before, network)
    parameters = list(network.parameters())
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slopes = torch.autograd.grad(together.sum(), parameters, allow_unused=True)
    exact = sum(float((g * d).sum()) for g, d in zip(slopes, directions, strict=True) if g is not None)
    if name == "interpretable_gradients":  # the target is a constant to the gradient, so it is one here
        held = Capture(network, batch.x, ("features", "input"), frozen=False, guided=True)
        goal = held.guided_gradient("input", held.target(batch.y, score="loss"))

    def moved(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.add_(d, alpha=step)
        if name == "interpretable_gradients":
            capture = Capture(network, batch.x, "input", frozen=False)
            slope = capture.grad("input", capture.target(batch.y, score="loss"))
            result = float(gradients.interpretable_gradients(slope, goal).sum().detach())
        else:
            result = float(value(batch).sum().detach())
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p.sub_(d, alpha=step)
        return result

    # A smaller step where a ReLU or an absolute value has its kink within the larger one.
    numeric = [(moved(step) - moved(-step)) / (2 * step) for step in (1e-6, 1e-7, 1e-8)]
    assert any(exact == pytest.approx(slope, rel=1e-4, abs=1e-6) for slope in numeric), (exact, numeric)
    assert abs(exact) > 1e-6


class TestInterpretableGradients:
    def make(self, network: nn.Module, batch: Batch) -> Capture:
        return Capture(network, batch.x, ("features", "input"), frozen=False, guided=True)

    def test_one_run_gives_both_gradients(self) -> None:
        network, batch = networks()["gap"], example(count=3)
        capture = self.make(network, batch)
        target = capture.target(batch.y, score="loss")
        x = batch.x.clone().requires_grad_(True)
        (plain,) = torch.autograd.grad(F.cross_entropy(network(x), batch.y, reduction="sum"), x)
        torch.testing.assert_close(capture.grad("input", target), plain, rtol=1e-10, atol=1e-12)
        with guided():
            (held,) = torch.autograd.grad(F.cross_entropy(network(x), batch.y, reduction="sum"), x)
        ours = capture.guided_gradient("input", target)
        torch.testing.assert_close(ours, held, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(ours, plain, rtol=0.1, atol=1e-8)
        assert not ours.requires_grad
        assert (capture.passes.forward, capture.passes.backward) == (3, 6)

    def test_relu6(self) -> None:
        network, batch = networks()["gap"], example(count=3)
        for index in (1, 3):
            network.features[index] = nn.ReLU6(inplace=True)
        with torch.no_grad():
            network.features[0].weight *= 100
        capture = self.make(network, batch)
        assert bool((capture.activations() == 6).any())
        value = gradients.interpretable_gradients_of(capture, batch)
        (slope,) = torch.autograd.grad(value.sum(), network.features[2].weight)
        assert torch.isfinite(slope).all()
        assert slope.abs().max() > 0

    def test_a_certain_image_has_no_loss_and_no_nan(self) -> None:
        network, batch = networks()["gap"], example(count=3)
        with torch.no_grad():
            network.classifier.bias += torch.tensor([1e4, 0, 0, 0])
        batch = Batch(batch.x, torch.tensor([0, 0, 1]))
        value = gradients.interpretable_gradients_of(self.make(network, batch), batch)
        slopes = torch.autograd.grad(value.sum(), list(network.parameters()), allow_unused=True)
        assert value[0] == value[1] == 0
        assert all(bool(torch.isfinite(s).all()) for s in slopes if s is not None)

    def test_the_scalar_matters_and_can_be_chosen(self) -> None:
        network, batch = networks()["gap"], example(count=3)
        values = [gradients.interpretable_gradients_of(self.make(network, batch), batch, of=of) for of in ("loss", "logit")]
        assert not torch.allclose(*values, atol=1e-3)

    def test_batch_norm_is_a_choice(self) -> None:
        network, batch = networks()["inplace"].train(), example(count=3)
        alone = Batch(batch.x[:1], batch.y[:1])
        capture, single = self.make(network, batch), self.make(network, alone)  # each moves the running statistics
        held = gradients.interpretable_gradients_of(capture, batch, batch_norm="eval")
        one = gradients.interpretable_gradients_of(single, alone, batch_norm="eval")
        assert all(module.training for module in network.modules())
        torch.testing.assert_close(held[:1], one)
        coupled = gradients.interpretable_gradients_of(capture, batch)
        assert not torch.allclose(held, coupled, atol=1e-3)

    def test_a_plain_capture_is_run_again(self) -> None:
        capture, batch = live()
        guided_one = self.make(capture.model, batch)
        torch.testing.assert_close(
            gradients.interpretable_gradients_of(capture, batch), gradients.interpretable_gradients_of(guided_one, batch)
        )

    def test_refusals(self) -> None:
        capture, batch = live()
        with pytest.raises(FoveateError, match="error 'median' is unknown"):
            gradients.interpretable_gradients_of(capture, batch, error="median")
        with pytest.raises(FoveateError, match="batch_norm 'frozen' is unknown"):
            gradients.interpretable_gradients_of(capture, batch, batch_norm="frozen")
        with pytest.raises(FoveateError, match="not made for guided"):
            capture.guided_gradient(None, capture.target(batch.y))
        tokens, other = live("tokens")
        with pytest.raises(FoveateError, match="guided nothing"):
            gradients.interpretable_gradients_of(tokens, other)


class TestArchitecture:
    @pytest.mark.parametrize(
        "name",
        ["torchvision:resnet18", "timm:resnet26d", "timm:resnetblur18", "timm:convnext_atto", "torchvision:convnext_tiny"],
    )
    def test_finer_maps_and_a_linear_head_without_bias(self, name: str) -> None:
        import foveate

        model = foveate.load(name, num_classes=5)
        before, x = fingerprint(model), torch.rand(2, 3, 64, 64)
        changed = contrastive_architecture(model)
        assert_untouched(before, model)
        plain, capture = Capture(model, x), Capture(changed, x, frozen=False)
        assert tuple(plain.activations().shape[2:]) == (2, 2)
        assert tuple(capture.activations().shape[2:]) == (4, 4)
        assert (capture.linear_head().bias == 0).all()
        torch.testing.assert_close(capture.class_maps().sum((2, 3)), capture.logits, rtol=1e-4, atol=1e-4)
        y = torch.tensor([1, 4])
        value = LOSSES.get("contrastive")(capture, Batch(x, y))
        torch.testing.assert_close(value, F.cross_entropy(capture.logits, y, reduction="none"), rtol=1e-4, atol=1e-4)

    def test_a_head_is_known_also_where_a_logit_is_near_0(self) -> None:
        network, batch = networks()["gap"].float(), example(count=3)
        network.classifier = nn.Linear(6, 1)
        x = batch.x.float()
        with torch.no_grad():  # the first image's logit is 0 up to rounding
            network.classifier.bias -= network(x)[0]
        for precision in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
                assert Capture(network, x, "features", frozen=False).linear_head() is not None

    def test_refusals(self) -> None:
        with pytest.raises(FoveateError, match="architecture of a _GapNet is not known"):
            contrastive_architecture(networks()["gap"])
        with pytest.raises(FoveateError, match="last_stride 3 is not 1 or 2"):
            contrastive_architecture(networks()["gap"], last_stride=3)

    def test_the_copy_is_a_model_of_its_own(self) -> None:
        import foveate

        model = foveate.load("timm:resnet18", num_classes=3)
        changed = contrastive_architecture(model, last_stride=2)
        with torch.no_grad():
            next(changed.parameters()).zero_()
        assert next(model.parameters()).abs().sum() > 0
        assert copy.deepcopy(changed).model.fc.bias is None
