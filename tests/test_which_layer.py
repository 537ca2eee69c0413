"""Which layer: decided by what flows from the image to the logits, and not by where parameters are."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import Capture, LayerError
from foveate._torchvision import timm, torchvision
from foveate.runtime.layers import find

# One small network of each family of timm, that a CPU builds in seconds. For a distilled or token-labelled transformer
# (volo) a network without a head is another one, which reads other tokens.
FAMILIES = (
    "beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny convformer_s18 convit_tiny convnext_atto "
    "crossvit_tiny_240 cspnext_tiny darknet17 davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla34 dpn48b "
    "edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientvit_b0 efficientvit_m0 "
    "eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 gmlp_ti16_224 hardcorenas_a "
    "hgnetv2_b0 hiera_tiny_224 hrnet_w18_small inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnet_050 "
    "legacy_seresnet18 legacy_xception levit_128 mambaout_femto maxvit_pico_rw_256 mixer_s32_224 mobilenetv3_small_050 "
    "mobilenetv4_conv_small_050 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny nextvit_small nfnet_f0 pit_ti_224 "
    "poolformer_s12 pvt_v2_b0 rdnet_tiny regnetx_002 repghostnet_050 repvgg_a0 repvit_m1 res2net50d resmlp_12_224 "
    "resnest14d resnet18 resnetv2_18 rexnet_100 selecsls42 sequencer2d_s skresnet18 starnet_s050 swiftformer_xs "
    "swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 tiny_vit_5m_224 tinynet_e tnt_s_patch16_224 "
    "tresnet_m twins_svt_small vgg11 vgg11_bn visformer_tiny vit_relpos_small_patch16_224 vit_tiny_patch16_224 "
    "vit_tiny_r_s16_p8_224 vitamin_small_224 vovnet39a xception41 xcit_nano_12_p8_224"
)
QUICK = [("resnet50", "layer4"), ("repvgg_a0", "stages"), ("legacy_seresnet18", "layer4"), ("mobilenetv3_small_050", "blocks")]


def chosen(name: str, **options: object) -> str:
    model = timm().create_model(name, **options).eval()
    for size in (128, model.pretrained_cfg["input_size"][-1]):
        try:
            return find(model, torch.rand(1, 3, size, size))
        except (RuntimeError, AssertionError):  # this one takes its own size alone
            continue
    raise AssertionError(name)


@pytest.mark.parametrize(("name", "layer"), QUICK)
def test_a_network_without_its_head_has_the_layer_that_it_has_with_it(name: str, layer: str) -> None:
    assert chosen(name, num_classes=0) == chosen(name) == layer


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES.split(" "))
def test_every_family_of_timm_without_its_head(name: str) -> None:
    assert chosen(name, num_classes=0) == chosen(name)


class Folded(nn.Module):
    """Convolutions with their norms folded in, and a head of one's own making."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU6()))
        self.head = head
        self.register_buffer("table", torch.randn(4, 6))
        self.classifier = nn.Linear(6, 4) if head == "linear" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x).mean((2, 3))
        table: Tensor = self.table
        if self.head == "buffer":
            return F.linear(pooled, table)
        if self.head == "text":
            return 100 * F.normalize(pooled, dim=1) @ F.normalize(table, dim=1).T
        if self.head == "distance":
            return -(pooled[:, None] - table).square().sum(2)
        if self.head == "cdist":
            return -torch.cdist(pooled, table)
        return self.classifier(pooled)  # type: ignore[no-any-return]


@pytest.mark.parametrize("head", ["linear", "buffer", "text", "distance", "cdist", "removed"])
def test_a_head_without_parameters_has_the_same_layer(head: str) -> None:
    assert find(Folded(head).eval(), torch.rand(1, 3, 24, 24)) == "features"


def test_a_head_in_a_buffer_on_a_real_network(real_data) -> None:  # type: ignore[no-untyped-def]
    import importlib.util

    spec = importlib.util.spec_from_file_location("zoo_of_tests", real_data / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model = zoo.mobilenet_v2_folded()

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = model.features
            self.register_buffer("weight", model.classifier.weight.detach())
            self.register_buffer("bias", model.classifier.bias.detach())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.features(x).mean((2, 3)), self.weight, self.bias)

    x = torch.rand(1, 3, 224, 224)
    assert find(Held().eval(), x) == find(model, x) == "features"


def test_a_convolution_whose_channels_are_the_classes_is_the_classifier() -> None:
    model = torchvision().models.squeezenet1_1(weights=None).eval()
    assert find(model, torch.rand(1, 3, 96, 96)) == "features"


class Auxiliary(nn.Module):
    """A head on earlier features that runs last."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 8, 3, 2)
        self.head, self.aux = nn.Linear(8, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        early = self.early(x).relu()
        logits = self.head(self.late(early).relu().mean((2, 3)))
        return logits, self.aux(early.mean((2, 3)))


def test_a_head_that_the_logits_do_not_depend_on_is_no_classifier() -> None:
    assert find(Auxiliary().eval(), torch.rand(1, 3, 24, 24)) == "late"


class Passing(nn.Module):
    """A block that returns, in front of its result, what it was given: nothing reads that afterwards."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, 2)

        def forward(self, before: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return before, self.conv(x + before)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 6, 3), self.Block(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.block(x, x)[1].mean((2, 3)))  # type: ignore[no-any-return]


def test_what_a_block_only_hands_on_is_not_looked_at() -> None:
    capture = Capture(Passing().eval(), torch.rand(2, 3, 24, 24))
    assert capture.layer == "block.conv"
    assert capture.grad(None, capture.target()).any()
    capture = Capture(Passing().eval(), torch.rand(2, 3, 24, 24), "block")
    with pytest.raises(LayerError, match=r"the logits do not depend on layer 'block': try 'block\.conv'"):
        capture.grad(None, capture.target())


@pytest.mark.slow
def test_advice_is_a_layer_that_works() -> None:
    model = timm().create_model("coat_tiny").eval()
    x = torch.rand(1, 3, 224, 224)
    capture = Capture(model, x)
    assert capture.grad(None, capture.target()).any()
    capture = Capture(model, x, "parallel_blocks.5")
    with pytest.raises(LayerError, match=r"do not depend on layer 'parallel_blocks\.5'") as error:
        capture.grad(None, capture.target())
    advised = str(error.value).rsplit("'", 2)[1]
    assert advised != "parallel_blocks.5"
    other = Capture(model, x, advised)
    assert other.grad(None, other.target()).any()


# -- a backbone that runs twice ------------------------------------------------------------------------------------


class Siamese(nn.Module):
    """Logits of an image and a picture that the model holds, which goes through the same backbone, before or after it."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 6, 3, 2), nn.ReLU())
        self.other, self.head, self.order = nn.Conv2d(3, 6, 3, 4), nn.Linear(6, 3), order
        self.register_buffer("held", torch.rand(1, 3, 24, 24))

    def forward(self, x: Tensor) -> Tensor:
        held: Tensor = self.held.expand(len(x), -1, -1, -1)
        if self.order == "image first":
            a = self.backbone(x)
            b = self.backbone(held)
        elif self.order == "picture first":
            b = self.backbone(held)
            a = self.backbone(x)
        else:
            a, b = self.backbone(x), self.other(held)
        return self.head((a.mean((2, 3)) - b.mean((2, 3))).abs())  # type: ignore[no-any-return]


@pytest.mark.parametrize("order", ["image first", "picture first"])
@pytest.mark.parametrize("layer", ["auto", "backbone"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_call_that_saw_the_image_is_taken(order: str, layer: str, frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = Siamese(order).eval(), torch.rand(2, 3, 24, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is in doubt
        capture = Capture(model, x, layer, frozen=frozen)
    assert capture.layer == "backbone"
    torch.testing.assert_close(capture.activations().detach(), model.backbone(x).detach())
    head, b = model.head, model.backbone(model.held).mean((2, 3))
    A = model.backbone(x).detach().requires_grad_(True)
    logits = head((A.mean((2, 3)) - b).abs())
    (expected,) = torch.autograd.grad(logits.gather(1, logits.argmax(1)[:, None]).sum(), A)
    torch.testing.assert_close(capture.grad(None, capture.target()).detach(), expected)
    torch.testing.assert_close(capture.tail(A.detach() * 0.5), head((A * 0.5).mean((2, 3)).sub(b).abs()).detach())


def test_a_layer_that_looks_at_another_picture_is_refused() -> None:
    model = Siamese("elsewhere").eval()
    with pytest.raises(LayerError, match=r"'other' does not depend on the image, .*: try 'backbone'"):
        Capture(model, torch.rand(2, 3, 24, 24), "other")
    with pytest.raises(LayerError, match="'other' does not depend on the image"):
        Capture(model, torch.rand(1, 3, 24, 24), "other", frozen=False)


def test_a_model_that_takes_no_single_image_is_looked_at_as_before() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) % 2:
                raise ValueError("an odd number")
            return self.layer(x).relu().mean((2, 3))  # type: ignore[no-any-return]

    capture = Capture(Pairs().eval(), torch.rand(2, 3, 12, 12), "layer")
    assert capture.grad(None, capture.target()).any()


def test_several_calls_that_saw_it_are_said() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 4, 3), relu, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.warns(UserWarning, match="'1' runs 2 times in one forward pass: its last output is used"):
        Capture(model, torch.rand(1, 3, 12, 12), "1")


def test_a_look_at_a_named_layer_costs_one_run_once() -> None:
    calls: list[int] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    for _ in range(3):
        Capture(model, torch.rand(4, 3, 20, 20), "1")
    assert calls == [4, 1, 4, 4]
    calls.clear()
    capture = Capture(copy.deepcopy(model), torch.rand(4, 3, 20, 20))  # what was seen while it was looked for
    capture.again(torch.rand(2, 3, 20, 20), model=copy.deepcopy(model))
    assert calls == [1, 4, 2]
