"""Real networks and real photographs: what must hold there, on any machine that has them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from foveate import Batch, Capture, evaluate, explain, load
from foveate.metrics.recognition import recognition
from foveate.models.classifier import Classifier

CAMS = ("cam", "grad_cam", "grad_cam_pp", "xgrad_cam", "layer_cam", "hires_cam")


def photographs(real_data: Path, model: Classifier, count: int) -> Batch:
    with (real_data / "imagenet" / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:count]
    x = model.read(*(real_data / "imagenet" / row["file"] for row in rows))
    return Batch(x, torch.tensor([int(row["class_index"]) for row in rows]), id=tuple(row["file"] for row in rows))


def open_model(real_data: Path, name: str) -> Classifier:
    weights = real_data / "weights"
    if name == "squeezenet":
        return load("torchvision:squeezenet1_1", weights=weights / "squeezenet1_1.safetensors")
    if name == "vit":
        return load("timm:vit_tiny_patch16_224", weights=weights / "vit_tiny_patch16_224.safetensors")
    return load(f"{real_data / 'zoo.py'}:mobilenet_v2_folded", mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(("name", "layer"), [("squeezenet", "features"), ("vit", "blocks.11.norm1"), ("mobilenet", "features")])
def test_layers_predictions_and_maps(real_data: Path, name: str, layer: str) -> None:
    model = open_model(real_data, name)
    batch = photographs(real_data, model, 16)
    explanation = explain(model, batch.x, ["grad_cam", "hires_cam"])
    assert explanation.layer == layer
    assert float((explanation.capture.pred == batch.y).float().mean()) > 0.8
    assert not explanation.degenerate["grad_cam"].any()
    assert explanation["grad_cam"].shape == (16, 224, 224)


def test_completeness_on_mobilenet(real_data: Path) -> None:
    model = open_model(real_data, "mobilenet")
    explanation = explain(model, photographs(real_data, model, 16).x, ["hires_cam", "contrastive_cam"])
    for name in ("hires_cam", "contrastive_cam"):
        assert explanation.completeness_error[name].max() < 1e-4


def test_a_map_of_ones_changes_nothing_on_mobilenet(real_data: Path) -> None:
    model = open_model(real_data, "mobilenet")
    batch = photographs(real_data, model, 32)
    capture = Capture(model, batch.x)
    for target in ("label", "second"):
        values = recognition(capture, torch.ones(32, 224, 224), batch, target=target)
        assert all((column == 0).all() for column in values.values())


def test_cams_agree_on_mobilenet(real_data: Path) -> None:
    model = open_model(real_data, "mobilenet")
    raw = explain(model, photographs(real_data, model, 8).x, CAMS).raw
    for name, factor in (("hires_cam", 1), ("xgrad_cam", 1), ("cam", 49)):
        torch.testing.assert_close(raw[name] / factor, raw["grad_cam"], rtol=1e-3, atol=1e-5)


def test_the_true_box_gets_more_of_the_map_than_noise_does(real_data: Path) -> None:
    """Orders that survive any protocol: the map's drop is below random's, and Fake-CAM's is the smallest of all."""
    model = open_model(real_data, "mobilenet")
    mean = evaluate(model, [photographs(real_data, model, 48)], ["grad_cam", "random", "fake_cam"], ["AD", "AG"])["mean"]
    assert mean["fake_cam", "AD"] < mean["grad_cam", "AD"] < mean["random", "AD"]
    assert mean["fake_cam", "AG"] < mean["grad_cam", "AG"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet", "squeezenet"])
def test_orders_that_survive_any_protocol(real_data: Path, name: str) -> None:
    """Opti-CAM has by far the highest gain and increase, and a drop near Fake-CAM's; XGrad-CAM is Grad-CAM behind pooling."""
    model = open_model(real_data, name)
    methods = ["grad_cam", "xgrad_cam", "grad_cam_pp", "opti_cam", "fake_cam", "random"]
    mean = evaluate(
        model, [photographs(real_data, model, 24)], methods, ["AD", "AG", "AI"], settings={"opti_cam": {"steps": 60}}
    )["mean"]
    real = ("grad_cam", "xgrad_cam", "grad_cam_pp")
    assert mean["opti_cam", "AG"] > 2.5 * max(mean[other, "AG"] for other in real)
    assert mean["opti_cam", "AI"] > max(mean[other, "AI"] for other in (*real, "fake_cam"))
    assert abs(mean["opti_cam", "AD"] - mean["fake_cam", "AD"]) < 5
    if name == "mobilenet":
        assert mean["xgrad_cam", "AD"] == pytest.approx(mean["grad_cam", "AD"], abs=0.05)


@pytest.mark.slow
def test_half_precision_hardly_changes_a_map_of_score_cam(real_data: Path) -> None:
    from scipy.stats import spearmanr

    model = open_model(real_data, "squeezenet")
    x = photographs(real_data, model, 6).x
    maps = [explain(model, x, "score_cam", precision=precision).raw["score_cam"] for precision in ("fp32", "bf16")]
    for a, b in zip(*maps, strict=True):
        assert spearmanr(a.flatten(), b.flatten()).statistic > 0.99


def test_full_grad_is_complete_on_mobilenet(real_data: Path) -> None:
    from foveate.methods.fullgrad import full_gradients

    model = open_model(real_data, "mobilenet")
    capture = Capture(model, photographs(real_data, model, 4).x)
    assert full_gradients(capture, capture.target(None)).error.max() < 1e-4
