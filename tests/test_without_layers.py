"""Models that cannot be looked into, or have no gradient: methods that need neither run, the others say what would."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from foveate import Capture, Explanation, FoveateError, LayerError, explain, measure, normalized
from foveate._torchvision import timm, torchvision

SETTINGS = {"rise": {"masks": 16}, "occlusion": {"window": 8, "stride": 8}, "meaningful_perturbation": {"steps": 3}}
FORWARD = ("rise", "occlusion")
BACKWARD = ("gradient", "input_x_gradient", "integrated_gradients", "smooth_grad", "meaningful_perturbation")
WITHOUT = "'rise' and 'occlusion' need neither a layer nor a gradient"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = network()
        self.backbone, self.head = inner[:-1], inner[-1]

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)  # type: ignore[no-any-return]


def exported(model: nn.Module, x: Tensor, **options: object) -> nn.Module:
    return torch.export.export(model, (x,), **options).module()  # type: ignore[arg-type]


def made(kind: str, x: Tensor) -> nn.Module:
    model = network()
    if kind == "scripted":
        return torch.jit.script(model)
    if kind == "traced":
        return normalized(torch.jit.trace(model, x), (0.0,) * 3, (1.0,) * 3)
    if kind == "exported":
        return exported(model, x[:1])  # for one image at a time, as it is by default
    if kind == "exported for batches":
        return exported(model, torch.cat([x, x]), dynamic_shapes=({0: torch.export.Dim("batch")},))
    if kind == "int8":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).eval()
    return FrozenBackbone().eval()


def asked(method: str) -> dict[str, dict[str, int]] | None:
    return {method: SETTINGS[method]} if method in SETTINGS else None


KINDS = ("scripted", "traced", "exported", "exported for batches", "int8", "frozen backbone")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", FORWARD)
def test_methods_that_run_the_model_alone_run_any(kind: str, method: str) -> None:
    x = torch.rand(1, 3, 32, 32)
    found = explain(made(kind, x), x, method, settings=asked(method))
    expected = explain(network(), x, method, settings=asked(method))
    assert found.layer == "" == expected.layer
    torch.testing.assert_close(found.raw[method], expected.raw[method], rtol=0.05 if kind == "int8" else 1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("method", BACKWARD)
def test_methods_of_the_images_gradient_need_no_layer(kind: str, method: str) -> None:
    x = torch.rand(1, 3, 32, 32)
    found, expected = (explain(model, x, method, settings=asked(method)) for model in (made(kind, x), network()))
    torch.testing.assert_close(found.raw[method], expected.raw[method], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS[4:])
@pytest.mark.parametrize("method", [*BACKWARD, "guided_backprop", "extremal_perturbation", "grad_cam", "layer_cam"])
def test_without_a_gradient_they_say_what_works(kind: str, method: str) -> None:
    """Also those whose mask would have moved by its own penalty alone."""
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(FoveateError, match=WITHOUT):
        explain(made(kind, x), x, method, settings=asked(method))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_of_compiled_code_is_refused_with_what_works() -> None:
    x = torch.rand(1, 3, 32, 32)
    with pytest.raises(LayerError, match=r"a TorchScript model cannot be looked into.*'integrated_gradients' need no layer"):
        explain(made("scripted", x), x, "grad_cam")


def test_no_layer_helps_is_said() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)).eval(), torch.rand(2, 3, 8, 8)
    with pytest.raises(LayerError, match="'gradient' and 'integrated_gradients' need no layer") as error:
        Capture(model, x)
    assert "name" not in str(error.value)
    with pytest.raises(LayerError, match="no other layer will do; 'gradient' and 'integrated_gradients' need no layer"):
        Capture(model, x, "1")
    assert explain(model, x, "gradient").raw["gradient"].shape == (2, 8, 8)
    capture = Capture(model, x, None)
    assert capture.layers == ()
    with pytest.raises(LayerError, match="this run looked at no layer"):
        capture.activations()


def test_a_program_exported_in_training_mode_is_refused() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(3 * 64, 4)).train()
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(FoveateError, match="was exported in training mode"):
        Capture(exported(model, x), x, None)
    Capture(exported(model.eval(), x), x, None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_table_of_a_model_without_layers() -> None:
    """Its controls have a grid of their own."""
    x = torch.rand(3, 3, 64, 64)
    scripted = torch.jit.script(network())
    results = measure(scripted, [(x, torch.tensor([0, 1, 2]))], ["rise", "centre"], ["AD", "accuracy"], settings=asked("rise"))
    plain = measure(network(), [(x, torch.tensor([0, 1, 2]))], ["rise"], ["AD"], settings=asked("rise"))
    torch.testing.assert_close(results.values["rise", "AD"], plain.values["rise", "AD"], rtol=1e-3, atol=1e-2)
    assert ("centre", "AD") in results.values
    assert explain(scripted, x, "centre").raw["centre"].shape == (3, 7, 7)


# -- checkpointed activations --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant, self.runs = network(), reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        def body(x: Tensor) -> Tensor:
            self.runs += 1
            return self.inner[:5](x)  # type: ignore[no-any-return]

        if self.reentrant is None:
            return self.inner[5:](body(x))  # type: ignore[no-any-return]
        return self.inner[5:](torch.utils.checkpoint.checkpoint(body, x, use_reentrant=self.reentrant))  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_checkpoints_change_nothing(reentrant: bool, frozen: bool) -> None:
    x = torch.rand(2, 3, 24, 24)
    plain, model = Checkpointed(None).eval(), Checkpointed(reentrant).eval()
    found, expected = (Capture(m, x, "inner.3", frozen=frozen) for m in (model, plain))
    assert torch.equal(found.grad(None, found.target()), expected.grad(None, expected.target()))
    assert torch.equal(found.image_gradient(found.target()), expected.image_gradient(expected.target()))


def test_checkpoints_are_the_callers_own_again_afterwards() -> None:
    """Outside, and on the way there in other threads, the activations are computed anew on the way back."""
    before = copy.copy(vars(torch.utils.checkpoint))
    model, x = Checkpointed(False).eval(), torch.rand(2, 3, 24, 24)
    Capture(model, x, "inner.3")
    model.inner[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(ValueError("stop")))
    with pytest.raises(FoveateError, match="stop"):
        Capture(model, x, "inner.3")
    assert vars(torch.utils.checkpoint) == before
    model = Checkpointed(False).eval()
    model(x).sum().backward()
    assert model.runs == 2


def test_timms_checkpoints() -> None:
    model = timm().create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
    x = torch.rand(2, 3, 64, 64)
    plain = explain(model, x, ["grad_cam", "gradient"])
    model.set_grad_checkpointing(True)
    found = explain(model, x, ["grad_cam", "gradient"])
    assert all(torch.equal(found.raw[name], plain.raw[name]) for name in plain.raw)


# -- one map in any batch ------------------------------------------------------------------------------------------


def test_opti_cam_alone_is_one_map_in_any_batch() -> None:
    torch.manual_seed(0)
    model = torchvision().models.squeezenet1_1(weights=None).eval()
    x = torch.rand(3, 3, 96, 96)

    def asked(images: Tensor, alone: bool) -> Explanation:
        own = {"opti_cam": {"steps": 8, "alone": alone}}
        return explain(model, images, "opti_cam", target=[1, 2, 3][: len(images)], settings=own)

    together = asked(x, alone=True)
    assert torch.equal(together.maps["opti_cam"][:1], asked(x[:1], alone=True).maps["opti_cam"])
    assert torch.equal(together.maps["opti_cam"][:2], asked(x[:2], alone=True).maps["opti_cam"])
    torch.testing.assert_close(together.raw["opti_cam"], asked(x, alone=False).raw["opti_cam"], rtol=0.1, atol=0.01)
    assert not together.remarks["opti_cam"]
    assert not asked(x[:1], alone=False).remarks["opti_cam"]
    assert all("alone=true" in remark for remark in asked(x, alone=False).remarks["opti_cam"])
