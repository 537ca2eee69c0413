"""Layers: the right one is found by itself, its layout read, and named ones are found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from foveate import Capture, LayerError, normalized
from foveate._torchvision import timm, torchvision
from foveate.runtime.layers import Layout, find, from_grid, get, layout_of, to_grid

# name, layer that a person would choose, layout
TORCHVISION = [
    ("resnet18", "layer4", Layout("nchw", 7, 7)),
    ("vgg11_bn", "features.27", Layout("nchw", 14, 14)),  # the ReLU in front of the last max-pool
    ("convnext_tiny", "features", Layout("nchw", 7, 7)),
    ("mobilenet_v2", "features", Layout("nchw", 7, 7)),
    ("mobilenet_v3_small", "features", Layout("nchw", 7, 7)),
    ("efficientnet_b0", "features", Layout("nchw", 7, 7)),
    ("densenet121", "features", Layout("nchw", 7, 7)),
    ("regnet_y_400mf", "trunk_output", Layout("nchw", 7, 7)),
    ("squeezenet1_1", "features", Layout("nchw", 13, 13)),
    ("vit_b_32", "encoder.layers.encoder_layer_11.ln_1", Layout("tokens", 7, 7, 1)),
    ("swin_t", "permute", Layout("nchw", 7, 7)),
]
TIMM = [
    ("resnet18", "layer4", Layout("nchw", 7, 7)),
    ("vgg11", "features.19", Layout("nchw", 14, 14)),
    ("convnext_atto", "stages", Layout("nchw", 7, 7)),
    ("mobilenetv3_small_050", "blocks", Layout("nchw", 7, 7)),
    ("efficientnet_b0", "bn2", Layout("nchw", 7, 7)),
    ("densenet121", "features", Layout("nchw", 7, 7)),
    ("regnety_002", "s4", Layout("nchw", 7, 7)),
    ("vit_tiny_patch16_224", "blocks.11.norm1", Layout("tokens", 14, 14, 1)),
    ("deit_tiny_distilled_patch16_224", "blocks.11.norm1", Layout("tokens", 14, 14, 2)),
    ("swin_tiny_patch4_window7_224", "norm", Layout("nhwc", 7, 7)),
    ("vit_tiny_patch16_224.avg", "norm", Layout("tokens", 14, 14, 1)),
    ("mixer_s32_224", "norm", Layout("tokens", 7, 7)),
]
SLOW = [
    ("timm", "inception_v3", "Mixed_7c", 299),
    ("torchvision", "inception_v3", "Mixed_7c", 299),
    ("torchvision", "googlenet", "inception5b", 224),
    ("timm", "vit_small_patch14_reg4_dinov2", "blocks.11.norm1", 518),
    ("timm", "swinv2_tiny_window8_256", "norm", 256),
    ("timm", "cait_xxs24_224", "blocks_token_only.1.norm1", 224),
    ("timm", "beit_base_patch16_224", "blocks.11", 224),
    ("timm", "resmlp_12_224", "blocks", 224),
    ("timm", "maxvit_nano_rw_256", "norm", 256),
    ("timm", "hrnet_w18_small", "final_layer", 224),
    ("timm", "pvt_v2_b0", "stages", 224),
]


@pytest.mark.parametrize(("name", "layer", "layout"), TORCHVISION)
def test_torchvision(name: str, layer: str, layout: Layout) -> None:
    model = getattr(torchvision().models, name)(weights=None).eval()
    capture = Capture(model, torch.rand(1, 3, 224, 224))
    assert (capture.layer, capture.layout()) == (layer, layout)


@pytest.mark.parametrize(("name", "layer", "layout"), TIMM)
def test_timm(name: str, layer: str, layout: Layout) -> None:
    base, _, pool = name.partition(".")
    model = timm().create_model(base, **({"global_pool": pool, "fc_norm": False} if pool else {})).eval()
    capture = Capture(model, torch.rand(1, 3, 224, 224))
    assert (capture.layer, capture.layout()) == (layer, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "name", "layer", "size"), SLOW)
def test_more_architectures(source: str, name: str, layer: str, size: int) -> None:
    if source == "timm":
        model = timm().create_model(name)
    else:
        model = getattr(torchvision().models, name)(weights=None, init_weights=False)
    assert find(model.eval(), torch.rand(1, 3, size, size)) == layer


def test_images_that_are_not_square() -> None:
    model = timm().create_model("vit_tiny_patch16_224", img_size=(160, 96)).eval()
    assert Capture(model, torch.rand(1, 3, 160, 96)).layout() == Layout("tokens", 10, 6, 1)
    resnet = timm().create_model("resnet18").eval()
    assert Capture(resnet, torch.rand(1, 3, 160, 96)).layout() == Layout("nchw", 5, 3)
    swin = timm().create_model("swin_tiny_patch4_window7_224", img_size=(224, 448)).eval()
    assert Capture(swin, torch.rand(1, 3, 224, 448)).layout() == Layout("nhwc", 7, 14)


def test_channels_last_is_not_read_across() -> None:
    """A Swin's map has the values of its grid, not of its channels."""
    model = timm().create_model("swin_tiny_patch4_window7_224").eval()
    x = torch.rand(1, 3, 224, 224)
    capture = Capture(model, x)
    expected = model.forward_features(x).permute(0, 3, 1, 2)
    torch.testing.assert_close(capture.activations().detach(), expected.detach())
    assert capture.linear_head().pooled


class HuggingFace(nn.Module):
    """What a Hugging Face vision transformer looks like from outside: pixel_values in, an object with logits out."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layernorm_before, self.layernorm_after = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
            self.mlp = nn.Linear(width, width)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            normed = self.layernorm_before(x)
            x = x + self.attention(normed, normed, normed, need_weights=False)[0]
            return (x + self.mlp(self.layernorm_after(x)),)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch, self.cls_token = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, 1, width))
        self.layer = nn.ModuleList([self.Block(width) for _ in range(2)])
        self.layernorm, self.classifier = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, pixel_values: Tensor) -> object:
        x = self.patch(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        for block in self.layer:
            (x,) = block(x)
        return SimpleNamespace(logits=self.classifier(self.layernorm(x)[:, 0]))


def test_a_transformer_like_hugging_faces() -> None:
    capture = Capture(HuggingFace().eval(), torch.rand(2, 3, 40, 24))
    assert capture.layer == "layer.1.layernorm_before"
    assert capture.layout() == Layout("tokens", 5, 3, 1)
    assert capture.grad(None, capture.target()).shape == (2, 16, 5, 3)
    block = Capture(HuggingFace().eval(), torch.rand(2, 3, 40, 24), "layer.0")
    assert block.grad(None, block.target()).any()


def test_a_plain_sequential() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    ).eval()
    assert find(model, torch.rand(1, 3, 20, 20)) == "2"


def test_a_classifier_of_zeros_does_not_hide_the_layer() -> None:
    model = torchvision().models.resnet18(weights=None).eval()
    nn.init.zeros_(model.fc.weight)
    assert find(model, torch.rand(1, 3, 64, 64)) == "layer4"


def test_no_layer_at_all() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)).eval()
    with pytest.raises(LayerError, match="both a spatial grid and a gradient at the image size 8x8"):
        find(model, torch.rand(1, 3, 8, 8))


def test_layers_by_path_module_and_through_the_wrapper() -> None:
    inner = torchvision().models.resnet18(weights=None).eval()
    model = normalized(inner)
    x = torch.rand(1, 3, 64, 64)
    assert get(model, "layer4.1") is get(model, "model.layer4.1") is inner.layer4[1]
    assert Capture(model, x, inner.layer4).layer == "layer4"
    assert Capture(model, x).layer == "layer4"
    capture = Capture(model, x, ["layer3", "layer4"])
    assert [capture.activations(name).shape[1] for name in capture.layers] == [256, 512]


def test_choice_is_remembered_by_size() -> None:
    calls = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    model.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(3):
        find(model, torch.rand(1, 3, 20, 20))
    assert len(calls) == 1


def test_another_head_asks_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    assert find(model, torch.rand(1, 3, 20, 20)) == "1"
    model[2], model[4] = nn.Conv2d(4, 4, 3).eval(), nn.Linear(4 * 16 * 16, 2).eval()
    assert find(model, torch.rand(1, 3, 20, 20)) == "2"
    for _ in range(20):  # an id is soon given to another module
        model[2] = nn.Sequential()
        model[2] = nn.Conv2d(4, 4, 3).eval()
        assert find(model, torch.rand(1, 3, 20, 20)) == "2"


@pytest.mark.parametrize("layout", [Layout("nchw", 3, 4), Layout("nhwc", 3, 4), Layout("tokens", 3, 4, 2)])
def test_to_grid_and_back(layout: Layout) -> None:
    shape = {"nchw": (2, 5, 3, 4), "nhwc": (2, 3, 4, 5), "tokens": (2, 14, 5)}[layout.kind]
    raw = torch.rand(shape)
    grid = to_grid(raw, layout)
    assert grid.shape == (2, 5, 3, 4)
    assert torch.equal(from_grid(grid, raw, layout), raw)


@pytest.mark.parametrize(
    ("shape", "image", "module", "expected"),
    [
        ((1, 64, 7, 7), (224, 224), nn.Conv2d(1, 1, 1), Layout("nchw", 7, 7)),
        ((1, 7, 7, 64), (224, 224), nn.LayerNorm(64), Layout("nhwc", 7, 7)),
        ((1, 8, 8, 8), (64, 64), nn.Conv2d(1, 1, 1), Layout("nchw", 8, 8)),
        ((1, 8, 8, 8), (64, 64), nn.LayerNorm(8), Layout("nhwc", 8, 8)),
        ((1, 5, 9, 16), (72, 40), nn.Identity(), Layout("nchw", 9, 16)),  # neither keeps 72 x 40: the usual order
        ((1, 197, 64), (224, 224), nn.LayerNorm(64), Layout("tokens", 14, 14, 1)),
        ((1, 196, 64), (224, 224), nn.LayerNorm(64), Layout("tokens", 14, 14, 0)),
        ((1, 201, 64), (224, 224), nn.LayerNorm(64), Layout("tokens", 14, 14, 5)),
        ((1, 1000), (224, 224), nn.Linear(1, 1), None),
        ((1, 25, 64), (64, 80), nn.LayerNorm(64), Layout("tokens", 4, 5, 5)),  # not 4 x 6 after 1: 13 does not tile 64 x 80
        ((1, 11, 64), (223, 223), nn.LayerNorm(64), None),  # 3 x 3 after 2 or 2 x 2 after 7: who knows
    ],
)
def test_layout_of(shape: tuple[int, ...], image: tuple[int, int], module: nn.Module, expected: Layout | None) -> None:
    assert layout_of(torch.Size(shape), image, module, nn.Identity()) == expected


@pytest.mark.parametrize("layer", [3, ["0", 3]])
def test_what_is_no_layer_is_quoted(layer: object) -> None:
    with pytest.raises(LayerError, match=f"and this is {layer[1] if isinstance(layer, list) else layer}"):
        Capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), torch.rand(1, 3, 8, 8), layer)
