"""The model zoo of timm, with random weights: every CAM finds its layer by itself and says something there."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from foveate import Capture, FoveateError, normalized
from foveate._torchvision import timm
from foveate.registry import METHODS

CAMS = (
    *("cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "hires_cam", "contrastive_cam", "finer_cam"),
    *("eigen_cam", "eigen_grad_cam", "score_cam", "ablation_cam", "opti_cam"),
)
OWN = {"opti_cam": {"steps": 3}}
SIZES = {
    **dict.fromkeys(
        (
            *("resnet18", "resnet50d", "resnext50_32x4d", "seresnet50", "wide_resnet50_2", "res2net50_26w_4s", "resnest14d"),
            *("densenet121", "vgg11_bn", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv4_conv_small"),
            *("efficientnet_b0", "efficientnetv2_rw_t", "regnety_002", "regnetx_002", "convnext_atto", "convnextv2_atto"),
            *("ghostnet_100", "dla34", "hardcorenas_a", "mnasnet_100", "nfnet_l0", "repvgg_a0", "rexnet_100", "cspresnet50"),
            *("edgenext_xx_small", "inception_next_atto", "tf_efficientnet_lite0", "xception41", "darknet53", "hgnet_tiny"),
        ),
        64,
    ),
    "inception_v3": 139,
    "vit_tiny_patch16_224": 224,
    "vit_small_patch16_224": 224,
    "deit_tiny_patch16_224": 224,
    "deit_tiny_distilled_patch16_224": 224,
    "deit3_small_patch16_224": 224,
    "vit_tiny_r_s16_p8_224": 224,
    "vit_small_patch14_reg4_dinov2": 518,
    "swin_tiny_patch4_window7_224": 224,
    "swinv2_tiny_window8_256": 256,
    "mixer_s16_224": 224,
    "cait_xxs24_224": 224,
    "xcit_nano_12_p16_224": 224,
    "pvt_v2_b0": 96,
    "maxvit_rmlp_nano_rw_256": 256,
    "poolformer_s12": 96,
    "coatnet_0_rw_224": 224,
    "beit_base_patch16_224": 224,
    "eva02_tiny_patch14_224": 224,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_every_cam_on_the_zoo(name: str) -> None:
    torch.manual_seed(0)
    size = SIZES[name]
    options = {"dynamic_img_size": True} if name.startswith("vit_small_patch14") else {}
    model = timm().create_model(name, num_classes=12, **options).eval()
    size = 224 if options else size
    last = model.get_classifier()
    if isinstance(last, nn.Linear) and not last.weight.any():
        nn.init.normal_(last.weight, std=0.02)  # some begin with a classifier of zeros, which says nothing of any layer
    x = torch.rand(1, 3, size, size)
    refused = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capture = Capture(normalized(model), x)
        target = capture.target(1)
        grid = capture.layout()
        for method in CAMS:
            try:
                saliency = METHODS.get(method)(capture, None, target, **OWN.get(method, {}))
            except FoveateError as error:
                refused[method] = str(error)
                continue
            assert saliency.shape == (1, grid.height, grid.width), method
            assert torch.isfinite(saliency).all(), method
            low, high = saliency.amin((1, 2)), saliency.amax((1, 2))
            assert ((high - low) > 1e-6 * torch.maximum(high.abs(), low.abs())).all(), f"{method} is constant"
    assert grid.height > 1
    assert grid.width > 1
    assert set(refused) <= {"cam"}, refused
