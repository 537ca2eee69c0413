"""CA-Stream: parameter counts, limits, symmetry, what learns and what does not, caching, saving, exporting."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import foveate
from foveate import Capture, FoveateError
from foveate.data import scenes
from foveate.models.castream import CAStream, Stage, Stream, ca_stream
from foveate.models.weights import load_weights
from foveate.testing import assert_untouched, fingerprint
from foveate.training.features import FeatureCache
from foveate.training.recipe import read_recipe
from foveate.training.train import train

STAGES = ("maxpool", "layer1", "layer2", "layer3", "layer4")


def small(name: str = "torchvision:resnet18", size: int = 64) -> foveate.Classifier:
    return ca_stream(foveate.load(name, num_classes=5, size=size))


@pytest.mark.parametrize(
    ("name", "count", "share"),
    [
        ("torchvision:resnet50", 6_969_152, 27.27),
        ("timm:resnet18", 439_808, 3.76),
        ("timm:convnext_small", 979_104, 1.95),
        ("torchvision:convnext_small", 979_104, 1.95),
        ("timm:convnext_base", 1_739_648, 1.96),
    ],
)
def test_the_parameters_of_the_thesis(name: str, count: int, share: float) -> None:
    model = ca_stream(foveate.load(name), size=(64, 64)).model
    assert sum(p.numel() for p in model.stream.parameters()) == count
    assert 100 * model.share == pytest.approx(share, abs=0.005)


class TestLimits:
    def stage(self) -> Stage:
        torch.manual_seed(0)
        return Stage(6, 4).double()

    def test_a_token_of_0_is_average_pooling(self) -> None:
        F_l = torch.rand(2, 6, 3, 5, dtype=torch.float64)
        pooled = self.stage().pool(F_l, torch.zeros(2, 6, dtype=torch.float64))
        torch.testing.assert_close(pooled, F_l.mean((2, 3)), rtol=1e-14, atol=1e-15)

    def test_constant_features_are_average_pooling(self) -> None:
        F_l = torch.rand(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, 3, 5)
        torch.testing.assert_close(self.stage().pool(F_l, torch.rand(2, 6).double()), F_l.mean((2, 3)))

    def test_permuting_positions_permutes_the_attention_and_nothing_else(self) -> None:
        stage, F_l, q = self.stage(), torch.rand(2, 6, 3, 5, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64)
        order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
        moved = F_l.flatten(2)[..., order].view_as(F_l)
        torch.testing.assert_close(stage.attention(moved, q).flatten(1), stage.attention(F_l, q).flatten(1)[:, order])
        torch.testing.assert_close(stage(moved, q), stage(F_l, q))

    def test_the_equations_by_loops(self) -> None:
        torch.manual_seed(3)
        stream = Stream([4, 6]).double()
        features = [torch.rand(1, 4, 3, 2, dtype=torch.float64), torch.rand(1, 6, 2, 2, dtype=torch.float64)]
        q = stream.token[0]
        for stage, F_l in zip(stream.stages, features, strict=True):
            rows = F_l[0].flatten(1).T  # [N,d]
            logits = [float(row @ q) / len(q) ** 0.5 for row in rows]
            weights = np.exp(logits) / np.exp(logits).sum()
            pooled = sum(float(w) * row for w, row in zip(weights, rows, strict=True))
            q = stage.project.weight @ pooled + stage.project.bias
        torch.testing.assert_close(stream(features)[0], q)

    def test_half_precision_does_not_overflow(self) -> None:
        stage = Stage(2048, 8).half()
        F_l = torch.full((1, 2048, 2, 2), 60.0).half()
        assert torch.isfinite(stage.attention(F_l, torch.full((1, 2048), 60.0).half())).all()


class TestModel:
    @pytest.mark.parametrize(
        "name", ["torchvision:resnet18", "timm:convnext_atto", "torchvision:mobilenet_v2", "timm:resnet18"]
    )
    def test_the_classifier_is_the_backbone_s_own(self, name: str) -> None:
        """With attention that is uniform and projections that are the identity at the end, it is the backbone itself."""
        made, x = small(name), torch.rand(2, 3, 64, 64)
        model: CAStream = made.model
        last = model.stream.stages[-1]
        with torch.no_grad():
            last.project.weight.copy_(torch.eye(len(last.project.weight)))
            last.project.bias.zero_()
            if len(model.stream.stages) > 1:
                model.stream.stages[-2].project.weight.zero_()
                model.stream.stages[-2].project.bias.zero_()
        torch.testing.assert_close(made(x), model.backbone(made.normalise(x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "name",
        [
            *("timm:efficientnet_b0", "timm:mobilenetv2_050", "timm:regnetx_002", "timm:densenet121", "timm:resnetv2_50"),
            *("torchvision:regnet_x_400mf", "torchvision:shufflenet_v2_x0_5", "torchvision:efficientnet_b0"),
        ],
    )
    def test_other_backbones_find_their_stages(self, name: str) -> None:
        made, x = small(name), torch.rand(2, 3, 64, 64)
        assert made(x).shape == (2, 5)
        features = made.model.features(made.normalise(x))
        pooled = features[-1].mean((2, 3), keepdim=True)
        from foveate.models.castream import run_head

        theirs = made.model.backbone(made.normalise(x))
        torch.testing.assert_close(run_head(made.model.backbone, made.model.head, pooled), theirs, rtol=1e-3, atol=1e-4)

    def test_the_caller_s_model_stays_as_it_is(self) -> None:
        model = foveate.load("torchvision:resnet18", num_classes=3, size=64)
        before = fingerprint(model)
        made = ca_stream(model).train()
        made.model.backbone.train()
        made(torch.rand(2, 3, 64, 64))
        assert_untouched(before, model)
        assert int(made.model.backbone.bn1.num_batches_tracked) == 0

    def test_after_a_step_only_the_stream_has_changed_bit_for_bit(self) -> None:
        made = small().train()
        assert not made.model.backbone.training
        before = {name: value.clone() for name, value in made.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], 0.1)
        nn.functional.cross_entropy(made(torch.rand(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
        changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all(name.startswith("model.stream.") for name in changed)
        assert "model.stream.token" in changed
        assert sum("project.weight" in name for name in changed) == len(STAGES)

    def test_unfrozen_it_is_trained_whole(self) -> None:
        made = small()
        made.model.unfreeze()
        made.train()
        assert made.model.backbone.training
        assert all(p.requires_grad for p in made.parameters())

    def test_every_cam_works_on_it(self) -> None:
        made, x = small(), torch.rand(2, 3, 64, 64)
        capture = Capture(made, x)
        assert capture.layer == "backbone.layer4"
        names = ["grad_cam", "grad_cam_pp", "layer_cam", "hires_cam", "score_cam", "opti_cam", "contrastive_cam", "ca_stream"]
        shown = foveate.explain(made, x, names, settings={"opti_cam": {"steps": 3}})
        assert all(shown[name].shape == (2, 64, 64) for name in names)
        # The gradient flows through the attention as well as through the values.
        last = made.model.stream.stages[-1]
        A = capture.activations().detach().requires_grad_(True)
        features = [*made.model.features(made.normalise(x))[:-1], A]
        target = capture.target(torch.tensor([1, 2]))
        (G,) = torch.autograd.grad(target(made.model.classify(features)).sum(), A)
        torch.testing.assert_close(capture.grad(None, target), G, rtol=1e-4, atol=1e-7)
        assert isinstance(last, Stage)

    def test_the_raw_attention_of_each_stage(self) -> None:
        made, x = small(), torch.rand(2, 3, 64, 64)
        capture = Capture(made, x)
        features, query = made.model.features(made.normalise(x)), made.model.stream.token.expand(2, -1)
        for number, (stage, F_l) in enumerate(zip(made.model.stream.stages, features, strict=True)):
            expected = torch.einsum("bdhw,bd->bhw", F_l, query) / F_l.shape[1] ** 0.5
            ours = foveate.registry.METHODS.get("ca_stream")(capture, None, capture.target(), stage=number)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
            query = stage(F_l, query)
        with pytest.raises(FoveateError, match="stage 5 is not one of the stream's 5"):
            foveate.registry.METHODS.get("ca_stream")(capture, None, capture.target(), stage=5)

    def test_saved_loaded_and_exported(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        made, x = small(), torch.rand(2, 3, 64, 64)
        save_file({k: v.contiguous() for k, v in made.model.state_dict().items()}, tmp_path / "m.safetensors")
        again = foveate.load("ca_stream:torchvision:resnet18", weights=tmp_path / "m.safetensors", num_classes=5, size=64)
        assert torch.equal(again(x), made(x))
        assert not again.notes
        other = small()
        load_weights(other.model, tmp_path / "m.safetensors")
        twin = copy.deepcopy(other)
        assert torch.equal(twin(x), made(x))
        with torch.no_grad():
            twin.model.backbone.fc.weight.zero_()
        assert not torch.equal(twin(x), made(x))  # its classifier is its own
        assert torch.isfinite(copy.deepcopy(other).double()(x.double())).all()
        torch.save(made, tmp_path / "whole.pt")
        assert torch.equal(torch.load(tmp_path / "whole.pt", weights_only=False)(x), made(x))
        made.model.backbone.fc = nn.Linear(512, 7)
        assert made(x).shape == (2, 7)
        batch = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(other, (x,), dynamic_shapes=batch).module()
        more = torch.rand(5, 3, 64, 64)
        torch.testing.assert_close(exported(more), other(more))

    def test_fine_tuning_with_the_losses(self) -> None:
        made = small().train()
        data = scenes.make("train", 0, 64)
        batch = foveate.Batch.collate([data[0], data[200]])
        capture = Capture(made, batch.x, frozen=False)
        for name in ("cam_loss", "mass_outside"):
            value = foveate.registry.LOSSES.get(name)(capture, batch, form="abs").mean()
            slopes = torch.autograd.grad(value, list(made.model.stream.parameters()), retain_graph=True, allow_unused=True)
            assert any(s is not None and s.abs().max() > 0 for s in slopes)

    def test_refusals(self) -> None:
        with pytest.raises(FoveateError, match="a stream reads"):
            CAStream(foveate.load("timm:vit_tiny_patch16_224").model, ["blocks.3"])
        with pytest.raises(FoveateError, match="not average pooling and a classifier"):
            CAStream(foveate.load("torchvision:vgg11").model, ["features.10", "features.20"])
        with pytest.raises(FoveateError, match="not average pooling and a classifier"):
            CAStream(foveate.load("timm:efficientnet_b0").model, ["blocks.5", "blocks.6"], (64, 64))
        with pytest.raises(FoveateError, match="must be a list of paths"):
            CAStream(foveate.load("torchvision:resnet18").model, "layer4")
        with pytest.raises(FoveateError, match="name one module twice"):
            CAStream(foveate.load("torchvision:resnet18").model, ["layer3", "layer3"])
        with pytest.raises(FoveateError, match="has a CA-Stream already"):
            ca_stream(small())
        with pytest.raises(FoveateError, match="'layer9' is not in the backbone"):
            CAStream(foveate.load("torchvision:resnet18").model, ["layer9"])
        with pytest.raises(FoveateError, match="ca_stream needs a model with a CA-Stream"):
            foveate.explain(foveate.load("foveate:small_cnn"), torch.rand(1, 3, 32, 32), "ca_stream")


class TestTraining:
    @pytest.fixture(autouse=True)
    def few_images(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scenes, "COUNTS", {split: {"leopard": 6, "orca": 4} for split in scenes.SPLITS})

    def recipe(self, **changes: Any) -> Any:
        base = {"ca_stream": True, "size": 64, "epochs": 2, "batch_size": 5, "measure.images": 0, "film.images": 0}
        return read_recipe("scenes_plain", {"model": "torchvision:resnet18", **base, **changes})

    def test_cached_features_train_the_same_stream(self, tmp_path: Path) -> None:
        plain, cached = (train(self.recipe(cache_features=c), tmp_path / str(c)) for c in (False, True))
        for (name, a), b in zip(plain.classifier.state_dict().items(), cached.classifier.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
        assert len(list((tmp_path / "True" / "features").glob("*/*.safetensors"))) == 20

    def test_a_run_is_a_model(self, tmp_path: Path) -> None:
        """The folder of a run loads as what was trained, stages and classes included; also for the command line."""
        run = train(self.recipe(ca_stream=["layer2", "layer4"], **{"measure.images": 4}), tmp_path)
        again = foveate.load(str(tmp_path))
        x = scenes.make("val", 0, 64)[0].x
        torch.testing.assert_close(again(x), run.classifier(x))
        assert again.class_names == ["leopard", "orca"]
        assert again.model.names == ("layer2", "layer4")

    def test_a_backbone_that_learns_too(self) -> None:
        made = train(self.recipe(freeze_backbone=False, epochs=1)).classifier
        assert int(made.model.backbone.bn1.num_batches_tracked) > 0

    def test_the_cache_computes_each_image_once(self, tmp_path: Path) -> None:
        seen: list[int] = []

        def compute(x: Tensor) -> list[Tensor]:
            seen.append(len(x))
            return [x * 2, x.mean((2, 3))]

        model = nn.Conv2d(3, 3, 1)
        cache, x = FeatureCache(tmp_path, compute, model), torch.rand(3, 3, 4, 4)
        cache(x[:2])
        found = cache(x)
        assert seen == [2, 1]
        torch.testing.assert_close(found[0], x * 2)
        torch.testing.assert_close(found[1], x.mean((2, 3)))
        again = FeatureCache(tmp_path, compute, copy.deepcopy(model))
        again(x)
        assert seen == [2, 1]
        with torch.no_grad():
            model.weight += 1
        other = FeatureCache(tmp_path, compute, model)
        other(x)  # another model's features are never read
        assert seen == [2, 1, 3]
        assert len(list(tmp_path.iterdir())) == 1
        with pytest.raises(FoveateError, match="train without cache_features, or on fewer images"):
            other.check_room(x[:1], 10**15)

    def test_images_of_one_name_in_two_folders_are_two_images(self, tmp_path: Path) -> None:
        """Validation images with the names of training images and the other class's colour: all wrong, cached or not."""
        from PIL import Image

        for split in ("train", "val"):
            for label, name in enumerate(("a", "b")):
                (tmp_path / split / name).mkdir(parents=True)
                shown = label if split == "train" else 1 - label
                for number in range(4):
                    colour = (250 * shown, 30, 250 * (1 - shown))
                    Image.new("RGB", (64, 64), colour).save(tmp_path / split / name / f"{number}.png")
        data = {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")}
        losses = [train(self.recipe(data=data, cache_features=cached)).history[-1]["val_loss"] for cached in (False, True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"cache_features": True, "ca_stream": False}, "without ca_stream none is frozen"),
            ({"cache_features": True, "augment.flip": True}, "images that no augmentation changes"),
            ({"cache_features": True, "losses": [{"name": "cam_loss"}]}, "plain cross-entropy"),
        ],
    )
    def test_refusals(self, change: dict[str, Any], message: str) -> None:
        with pytest.raises(FoveateError, match=message):
            self.recipe(**change)


def test_size_beside_a_count_by_hand() -> None:
    """ResNet-50: 4.09 billion multiplications and additions, 25.6 million parameters; the table counts both operations."""
    model = foveate.load("torchvision:resnet50")
    capture = Capture(model, torch.rand(1, 3, 224, 224))
    values = foveate.registry.METRICS.get("size")(capture, None, foveate.Batch(capture.x))
    assert float(values["parameters"]) == pytest.approx(25.557, abs=1e-3)
    assert float(values["GFLOPs"]) == pytest.approx(8.178, abs=0.1)
    stream = Capture(ca_stream(model), capture.x)
    more = foveate.registry.METRICS.get("size")(stream, None, foveate.Batch(capture.x))
    assert float(more["parameters"] - values["parameters"]) == pytest.approx(6.969152, abs=1e-6)
    assert 0.01 < float(more["GFLOPs"] - values["GFLOPs"]) < 0.03


def test_a_stream_beside_real_weights() -> None:
    data = Path(os.environ.get("FOVEATE_DATA", "../shared/data"))
    if not (data / "zoo.py").is_file():
        pytest.skip("no real weights here")
    made = ca_stream(foveate.load(f"{data / 'zoo.py'}:mobilenet_v2_folded", mean=(0.5,), std=(0.5,)))
    assert made.model.names[-1] == "features"
    assert Capture(made, torch.rand(1, 3, 224, 224)).layer == "backbone.features"
