"""Training runs: splits and folds, groups, the film strip, heads, devices, what a run leaves, and runs side by side."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

import foveate
from foveate import Batch, FoveateError
from foveate.cli import app
from foveate.data import scenes
from foveate.models.weights import read_weights
from foveate.registry import LOSSES
from foveate.report import training
from foveate.report import training_comparison as trainings
from foveate.testing import assert_untouched, fingerprint
from foveate.training.compare import compare, interval
from foveate.training.film import Film, hugging_face_callback, lightning_callback
from foveate.training.groups import Group, group_accuracy, merged, worst
from foveate.training.loading import Kept
from foveate.training.module import learning_rate_at
from foveate.training.recipe import RECIPES, Recipe, read_recipe
from foveate.training.saved import read
from foveate.training.splits import Part, film_images, held_out, labels_of, open_splits
from foveate.training.train import train

SMALL = {"size": 32, "epochs": 2, "batch_size": 8, "measure.images": 8, "film.images": 4}


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COUNTS", {split: {"leopard": 12, "orca": 8} for split in scenes.SPLITS})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of ten pictures, with masks and backgrounds."""
    lines = ["file,name,mask,background"]
    for index in range(20):
        name = "cat" if index % 2 else "dog"
        image = np.full((40, 40, 3), 60, np.uint8)
        image[10:30, 10:30] = (200, 40, 40) if index % 2 else (40, 40, 200)
        mask = np.zeros((40, 40), np.uint8)
        mask[10:30, 10:30] = 255
        Image.fromarray(image).save(tmp_path / f"{index}.png")
        Image.fromarray(mask).save(tmp_path / f"{index}_mask.png")
        lines.append(f"{index}.png,{name},{index}_mask.png,{'sofa' if index < 10 else 'lawn'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def recipe(name: str = "scenes_ace", **changes: Any) -> Recipe:
    return read_recipe(name, {**SMALL, **changes})


class TestSplits:
    def test_folds_are_a_partition_and_classes_keep_their_share(self) -> None:
        labels = torch.tensor([0] * 15 + [1] * 10)
        parts = [held_out(labels, 0.2, 3, fold, 5) for fold in range(5)]
        assert sorted(i for part in parts for i in part) == list(range(25))
        assert [sum(labels[i] == 0 for i in part) for part in parts] == [3] * 5
        assert held_out(labels, 0.2, 3) == held_out(labels, 0.2, 3) != held_out(labels, 0.2, 4)
        with pytest.raises(FoveateError, match="class 1 has 1 image"):
            held_out(torch.tensor([0, 0, 1]), 0.2, 0)

    def test_the_splits_of_a_recipe_do_not_overlap(self, pictures: Path) -> None:
        made = read_recipe("pets_species", {"data.train": str(pictures), "data.folds": 5, "data.fold": 2}, small=True)
        splits = open_splits(made, foveate.load("foveate:small_cnn").preprocess)
        assert list(splits) == ["train", "val", "test"]
        ids = [{batch.id[0] for batch in split} for split in splits.values()]
        assert list(map(len, ids)) == [12, 4, 4]
        assert len(set.union(*ids)) == 20
        assert labels_of(splits["test"]).tolist() == [int(b.y) for b in splits["test"]]
        assert splits["test"][0].background in (("sofa",), ("lawn",))
        assert splits["train"].class_names == ("cat", "dog")

    def test_kept_images_are_read_once(self) -> None:
        class Slow(Dataset):
            reads = 0

            def __len__(self) -> int:
                return 3

            def __getitem__(self, index: int) -> Batch:
                Slow.reads += 1
                return Batch(torch.full((1, 3, 4, 4), float(index)), torch.tensor([index]))

        data = Kept.of(Slow())
        first = Slow.reads
        assert [int(data[i].y) for i in (0, 1, 2, 2, 1)] == [0, 1, 2, 2, 1]
        assert Slow.reads == first + 3

    def test_a_film_follows_every_class_of_validation_and_test(self) -> None:
        splits = {name: scenes.make(name, 0, 32) for name in ("train", "val", "test")}
        images = film_images(splits, 5)
        assert [name.split("/")[0] for name in images.id] == ["val", "val", "val", "test", "test"]
        assert images.y.tolist() == [0, 1, 0, 0, 1]


class TestGroups:
    def test_class_by_background_and_the_worst(self) -> None:
        predicted, labels = torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
        places = ["grass", "grass", "water", "water", "water", "grass"]
        groups = group_accuracy(predicted, labels, places, ["leopard", "orca"])
        assert groups == [
            Group("leopard on grass", 2, 1.0),
            Group("leopard on water", 1, 0.0),
            Group("orca on grass", 1, 0.0),
            Group("orca on water", 2, 1.0),
        ]
        assert worst(groups).name == "leopard on water"
        assert [g.name for g in group_accuracy(predicted, labels)] == ["class 0", "class 1"]
        both = merged([groups, [Group("orca on water", 6, 0.5)]])
        assert both[-1] == Group("orca on water", 8, pytest.approx(5 / 8))

    def test_refusals(self) -> None:
        with pytest.raises(FoveateError, match=r"one per image, and there are \[2, 2, 1\]"):
            group_accuracy(torch.zeros(2), torch.zeros(2), ["grass"])
        with pytest.raises(FoveateError, match="no group"):
            worst([])


class TestFilm:
    def film(self) -> Film:
        batch = scenes.make("val", 0, 32).batch()
        return Film(Batch(batch.x[:3], batch.y[:3], batch.mask[:3], id=batch.id[:3]), class_names=("leopard", "orca"))

    def test_a_frame_leaves_the_model_as_it_was_also_in_training(self) -> None:
        film, model = self.film(), foveate.load("foveate:small_cnn").train()
        model.model.stages[0][1].eval()
        before = fingerprint(model)
        frame = film.shoot(model, 1)
        assert_untouched(before, model)
        assert frame.maps.shape == (3, 32, 32)
        assert frame.maps.dtype == np.uint8
        model.eval()
        p = model(film.batch.x).softmax(1).gather(1, film.batch.y[:, None])[:, 0]
        np.testing.assert_allclose(frame.probability, p.detach().numpy(), rtol=1e-4)
        expected = foveate.explain(model, film.batch.x, "contrastive_cam")["contrastive_cam"]
        np.testing.assert_allclose(frame.maps / 255, expected.numpy(), atol=0.51 / 255)

    def test_saved_and_read_again(self, tmp_path: Path) -> None:
        film, model = self.film(), foveate.load("foveate:small_cnn")
        for epoch in (1, 2, 3):
            film.shoot(model, epoch)
        film.shoot(model, 2)  # a run that goes on from the first epoch
        assert [frame.epoch for frame in film.frames] == [1, 2]
        film.save(tmp_path / "film.npz")
        again = Film.load(tmp_path / "film.npz")
        assert again.class_names == ("leopard", "orca")
        assert again.batch.id == film.batch.id
        torch.testing.assert_close(again.batch.x, film.batch.x, rtol=0, atol=0.5 / 255)
        for a, b in zip(again.frames, film.frames, strict=True):
            for name in vars(a):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        state = film.state()
        other = self.film()
        other.restore(state)
        assert [frame.epoch for frame in other.frames] == [1, 2]
        (tmp_path / "other.npz").write_bytes(b"nothing")
        with pytest.raises(FoveateError, match="is not a film"):
            Film.load(tmp_path / "other.npz")

    @pytest.mark.parametrize("channels", [1, 2, 4, 6, 13])
    def test_pictures_and_page_of_any_number_of_channels(self, channels: int, tmp_path: Path) -> None:
        from foveate.data.images import as_rgb, colours_of, to_image
        from foveate.report import film as report

        torch.manual_seed(channels)
        net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
        film = Film(Batch(torch.rand(2, channels, 24, 32), torch.tensor([0, 1])), "hires_cam")
        for epoch in (1, 2):
            frame = film.shoot(net, epoch)
        page = report.write(film, tmp_path / "film.html").read_text()
        assert page.count('src="data:image/jpeg') == 2 * 3
        assert report.film_strip(film)["colours"] == colours_of(channels)
        picture = np.asarray(film.picture(frame))
        assert picture.shape == (48, 64, 3)
        np.testing.assert_array_equal(picture[:24, :32], np.asarray(to_image(as_rgb(film.batch.x[0]))))

    def test_a_logger_that_takes_pictures_is_given_each_epoch(self) -> None:
        from foveate.training.film import _show

        film, shown = self.film(), []
        frame = film.shoot(foveate.load("foveate:small_cnn"), 3)

        class Wandb:
            def log_image(self, key: str, images: list[Any], caption: list[str]) -> None:
                shown.append((key, images[0].size, caption))

        class Plain:
            experiment = None

        _show([Wandb(), Plain()], film.picture(frame), frame.epoch)
        assert shown == [("film", (64, 96), ["epoch 3"])]

    def test_large_images_are_kept_small(self) -> None:
        x = torch.rand(1, 3, 300, 200)
        film = Film(Batch(x, torch.tensor([0])))
        frame = film.shoot(foveate.load("foveate:small_cnn"), 1)
        assert frame.maps.shape == (1, 112, 75)
        assert np.isnan(frame.inside).all()

    def test_somebody_s_own_lightning_module(self, tmp_path: Path) -> None:
        callback = lightning_callback(self.film(), tmp_path / "film.npz")
        import lightning as L

        class Module(L.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.net = foveate.load("foveate:small_cnn")

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.net(x)

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                return nn.functional.cross_entropy(self(batch[0]), batch[1])

            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), 0.01)

        data = scenes.make("train", 0, 32).batch()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data.x, data.y), 10)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        L.Trainer(max_epochs=2, callbacks=[callback], enable_model_summary=False, **options).fit(Module(), loader)
        assert [frame.epoch for frame in Film.load(tmp_path / "film.npz").frames] == [1, 2]

    def test_a_hugging_face_trainer(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        config = transformers.ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=2,
            downsample_in_first_stage=False,
        )
        model = transformers.ResNetForImageClassification(config)
        data = scenes.make("train", 0, 32).batch()
        rows = [{"pixel_values": (x - 0.5) / 0.25, "labels": y} for x, y in zip(data.x, data.y, strict=True)]
        film = self.film()
        callback = hugging_face_callback(film, tmp_path / "film.npz", lambda m: foveate.normalized(m, (0.5,) * 3, (0.25,) * 3))
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            num_train_epochs=2,
            per_device_train_batch_size=10,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
        )
        transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        assert [frame.epoch for frame in Film.load(tmp_path / "film.npz").frames] == [1, 2]

    def test_refusals(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(FoveateError, match="needs one label"):
            Film(Batch(torch.rand(2, 3, 32, 32)))
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(FoveateError, match=r"pip install 'foveate\[hugging-face\]'"):
            hugging_face_callback(self.film())


class TestRuns:
    def test_what_a_run_leaves(self, tmp_path: Path) -> None:
        run = train(recipe(), tmp_path)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["kind"] == "training"
        assert set(record["accuracy"]) == {"train", "val", "test"}
        assert record["groups"]["test"] == run.outcome["groups"]["test"]
        assert set(record["groups"]["test"]) == {"leopard on water", "orca on grass"}
        lowest = min(g["accuracy"] for split in ("val", "test") for g in record["groups"][split].values())
        assert record["worst_group"]["accuracy"] == lowest
        assert set(record["maps"]["test"]) == {"AD", "AG", "AI", "mass_inside"}
        assert record["maps"]["val"]["AD"]["n"] <= 8
        again = read(tmp_path)
        assert [line["epoch"] for line in again.history] == [1, 2]
        assert [frame.epoch for frame in again.film.frames] == [1, 2]
        page = training.write(tmp_path).read_text(encoding="utf-8")
        assert "Where it looked, over time" in page
        assert page.count('alt="map after epoch') == 8
        assert 'src="http' not in page
        assert "url(http" not in page

    def test_the_film_goes_on_where_the_run_does(self, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import Callback

        class Kill(Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == 2:
                    raise RuntimeError("killed")

        made = recipe("scenes_interpretable_gradients", epochs=3, **{"augment.crop_padding": 2, "keep": "best"})
        whole = train(made, tmp_path / "whole")
        with pytest.raises(RuntimeError, match="killed"):
            train(made, tmp_path / "broken", callbacks=[Kill()])
        resumed = train(made, tmp_path / "broken", resume=True)
        assert [f.epoch for f in resumed.film.frames] == [1, 2, 3]
        for a, b in zip(whole.film.frames, resumed.film.frames, strict=True):
            np.testing.assert_allclose(a.probability, b.probability, atol=1e-5)
        for a, b in zip(whole.history, resumed.history, strict=True):
            assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
                {k: v for k, v in b.items() if k != "seconds"}, rel=1e-4
            )
        assert whole.outcome["accuracy"] == resumed.outcome["accuracy"]

    def test_a_dropout_repeats_itself_after_a_kill(self, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import Callback

        (tmp_path / "nets.py").write_text(
            "from torch import nn\n"
            "def net():\n"
            "    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
            "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), *pool, nn.Linear(4, 2)).eval()\n"
        )

        class Kill(Callback):
            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == 1:
                    raise RuntimeError("killed")

        made = recipe("scenes_plain", model=f"{tmp_path / 'nets.py'}:net", layer="1", **{"film.images": 0})
        whole = train(made, tmp_path / "whole")
        with pytest.raises(RuntimeError, match="killed"):
            train(made, tmp_path / "broken", callbacks=[Kill()])
        resumed = train(made, tmp_path / "broken", resume=True)
        for a, b in zip(whole.classifier.parameters(), resumed.classifier.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "change", [{"precision": "bf16"}, {"accumulate": 2}, {"gradient_clip": 0.1}, {"optimizer": "adam"}]
    )
    def test_options_reach_the_training(self, change: dict[str, Any]) -> None:
        plain, changed = (train(recipe("scenes_cam_loss", **extra)).history[-1]["train_loss"] for extra in ({}, change))
        assert np.isfinite(changed)
        assert plain != changed

    def test_two_batches_accumulated_are_one_large_batch(self, tmp_path: Path) -> None:
        """Without batch norm; the same images, the same number of steps."""
        (tmp_path / "nets.py").write_text(
            "from torch import nn\n"
            "def net():\n"
            "    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]\n"
            "    return nn.Sequential(*layers).eval()\n"
        )
        base = {"model": f"{tmp_path / 'nets.py'}:net", "layer": "1", "epochs": 1, "film.images": 0}
        one, two = (
            train(recipe("scenes_ace", **base, batch_size=size, accumulate=steps)) for size, steps in ((20, 1), (10, 2))
        )
        for a, b in zip(one.classifier.parameters(), two.classifier.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_frozen_batch_norms_stay(self) -> None:
        made = recipe("scenes_interpretable_gradients", freeze_batch_norm=True)
        norms = [m for m in train(made).classifier.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(bool((m.running_mean == 0).all() and (m.weight == 1).all()) for m in norms)

    def test_early_stop_and_the_best_epoch(self) -> None:
        run = train(recipe("scenes_plain", epochs=12, early_stop=1, keep="best", learning_rate=1e-7, warmup=0.0))
        assert len(run.history) < 12
        values = [line["val_accuracy"] for line in run.history]
        assert run.epoch == 1 + values.index(max(values))
        assert run.outcome["accuracy"]["val"] == pytest.approx(max(values), abs=0.051)  # one image of 20: float order

    def test_a_binary_head_and_a_multi_label_one(self) -> None:
        run = train(recipe("scenes_ace", head="binary"))
        assert run.classifier.model.classifier.out_features == 1
        assert set(run.outcome["groups"]["test"]) == {"leopard on water", "orca on grass"}

        class Tagged(Dataset):
            def __init__(self, split: scenes.Scenes) -> None:
                self.split, self.class_names = split, ("leopard", "orca", "grass")

            def __len__(self) -> int:
                return len(self.split)

            def __getitem__(self, index: int) -> Batch:
                one = self.split[index]
                y = torch.tensor([[one.y == 0, one.y == 1, one.background == ("grass",)]]).float()
                return Batch(one.x, y, one.mask, id=one.id)

        made = read_recipe("scenes_ace", {**SMALL, "head": "multilabel", "data": "anything"})
        data = {split: Tagged(scenes.make(split, 0, 32)) for split in scenes.SPLITS}
        tagged = train(made, data=data)
        assert tagged.classifier.model.classifier.out_features == 3
        assert 0 <= tagged.outcome["accuracy"]["test"] <= 1
        assert np.isfinite(tagged.history[-1]["ablated_cross_entropy"])

    def test_the_contrastive_architecture_of_a_recipe(self) -> None:
        made = recipe("scenes_ace", model="torchvision:resnet18", contrastive_architecture=True, epochs=1, size=64)
        model = train(made).classifier.model
        assert model.fc.bias is None
        assert model.layer4[0].conv1.stride == (1, 1)

    def test_loggers(self, tmp_path: Path) -> None:
        train(recipe(), tmp_path, loggers=["csv"])
        assert "val_accuracy" in (tmp_path / "logs" / "metrics.csv").read_text()
        if importlib.util.find_spec("tensorboard") is None:
            with pytest.raises(FoveateError, match=r"pip install 'foveate\[tensorboard\]'"):
                train(recipe(), tmp_path / "board", loggers=["tensorboard"])
        else:
            train(recipe(), tmp_path / "board", loggers=["tensorboard"])
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

            events = EventAccumulator(str(tmp_path / "board" / "logs")).Reload()
            films = events.Images("film")
            assert [event.step for event in films] == [1, 2]
            assert (films[0].width, films[0].height) == (2 * 32, 4 * 32)
        if importlib.util.find_spec("wandb") is None:
            with pytest.raises(FoveateError, match="pip install wandb"):
                train(recipe(), tmp_path / "other", loggers=["wandb"])
        with pytest.raises(FoveateError, match="logger 'mine' is unknown: use 'csv', 'tensorboard' or 'wandb'"):
            train(recipe(), tmp_path / "other", loggers=["mine"])

    def test_a_nan_says_at_which_step_and_what_is_kept(self, tmp_path: Path) -> None:
        made = recipe("scenes_plain", epochs=4, learning_rate=1e38, warmup=0.9)
        with pytest.raises(FoveateError, match=r"became NaN or infinite at step \d+, in epoch \d of 4"):
            train(made, tmp_path)

    def test_masks_are_asked_for_before_training(self, tmp_path: Path, pictures: Path) -> None:
        text = (pictures / "labels.csv").read_text().replace("mask", "ignored")
        (pictures / "labels.csv").write_text(text)
        made = recipe("scenes_ace", data=str(pictures))
        with pytest.raises(FoveateError, match="ablated_cross_entropy needs masks of the objects, and the data has none"):
            train(made, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("model", ["timm:test_vit", "torchvision:squeezenet1_1"])
    def test_a_head_without_a_closed_form_is_refused_before_training(self, model: str, tmp_path: Path) -> None:
        with pytest.raises(FoveateError, match="ablated_cross_entropy needs a head that is linear in layer"):
            train(recipe("scenes_ace", model=model, size=160 if "vit" in model else 64), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_learning_rates(self) -> None:
        steps = Recipe(warmup=0.1, decay="steps", milestones=[0.5], factor=0.1)
        rates = [learning_rate_at(steps, step, 100) for step in (0, 9, 10, 49, 50, 99)]
        assert rates == pytest.approx([0.1, 1, 1, 1, 0.1, 0.1])
        assert learning_rate_at(Recipe(warmup=0.0, decay="none"), 0, 10) == 1
        cosine = [learning_rate_at(Recipe(warmup=0.0), step, 10) for step in range(10)]
        assert cosine == sorted(cosine, reverse=True)

    def test_every_loss_trains_in_bf16(self) -> None:
        for name in LOSSES.all():
            made = recipe("scenes_plain", precision="bf16", losses=[{"name": name}], **{"film.images": 0, "measure.images": 0})
            assert np.isfinite(train(made).history[-1]["train_loss"]), name

    def test_any_seed(self) -> None:
        train(recipe("scenes_augmented", seed=20241005, epochs=1, **{"film.images": 0, "measure.images": 0}))

    def test_boxes_turn_with_the_image(self) -> None:
        from foveate.training.loading import augmenter
        from foveate.training.recipe import Augment

        batch = Batch(torch.rand(1, 3, 16, 16), torch.tensor([0]), boxes=(torch.tensor([[0.0, 0.0, 4.0, 16.0]]),))
        torch.manual_seed(0)
        masks = {tuple(augmenter(Augment(flip=True))(batch).mask[0, 0].nonzero()[:, 0].tolist()) for _ in range(20)}
        assert masks == {(0, 1, 2, 3), (12, 13, 14, 15)}

    def test_workers_change_images_as_one_process_does(self, pictures: Path) -> None:
        base = {"data": str(pictures), "augment.flip": True, "augment.color_jitter": 0.3, "film.images": 0, "measure.images": 0}
        one, two = (train(recipe("scenes_plain", **base), workers=count) for count in (0, 2))
        for a, b in zip(one.classifier.parameters(), two.classifier.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_broken_weights_do_not_replace_the_last_good_ones(self, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import Callback

        class Break(Callback):
            def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
                if trainer.current_epoch == 1 and batch_idx == trainer.num_training_batches - 1:
                    pl_module.classifier.model.classifier.bias.data.fill_(float("nan"))

        made = recipe("scenes_plain", epochs=3)
        with pytest.raises(FoveateError, match=r"became NaN or infinite at step 6, in epoch 2 of 3; .* epoch 1 are kept in"):
            train(made, tmp_path, callbacks=[Break()])
        state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert all(bool(torch.isfinite(value).all()) for value in state.values())
        assert all(name.startswith("classifier.") for name in state)

    def test_seconds_are_those_of_all_parts_of_a_run(self, tmp_path: Path) -> None:
        first = train(recipe(), tmp_path)
        again = train(recipe(), tmp_path, resume=True)
        assert again.seconds == pytest.approx(sum(line["seconds"] for line in first.history))

    def test_phases_of_one_s_own(self) -> None:
        phases = [{"until": 0.5, "added": 0.0}, {"until": 1.0, "cross_entropy": 0.0, "learning_rate": 0.5}]
        runs = [
            train(recipe("scenes_cam_loss", **{"losses.0.schedule": phases, "losses.0.weight": weight})).history
            for weight in (1, 5)
        ]
        assert runs[0][0]["val_loss"] == runs[1][0]["val_loss"]
        assert runs[0][1]["val_loss"] != runs[1][1]["val_loss"]

    def test_a_kernel_of_one_s_own(self, tmp_path: Path) -> None:
        picture = np.zeros((24, 24), np.uint8)
        picture[:, :12] = 255
        Image.fromarray(picture).save(tmp_path / "left.png")
        capture = foveate.Capture(foveate.load("foveate:small_cnn"), scenes.make("val", 0, 32).images[:2] / 255, frozen=False)
        batch = Batch(capture.x, torch.tensor([0, 1]))
        ours = LOSSES.get("cam_loss")(capture, batch, kernel=str(tmp_path / "left.png"))
        M = LOSSES.get("mass_outside")(capture, Batch(capture.x, batch.y, torch.arange(32).expand(2, 32, 32) < 16))
        torch.testing.assert_close(ours, M)

    def test_schedules_by_fit_change_the_weight(self) -> None:
        values = [
            train(recipe("scenes_cam_loss", **{"losses.0.schedule": name})).history[0]["val_loss"]
            for name in ("constant", "inverse_fit", "linear")
        ]
        assert len(set(values)) == 3


def test_two_processes_train_what_one_does(tmp_path: Path, pictures: Path) -> None:
    """Double backward and the maps through DDP on CPUs: the same weights; each process sees its half of every batch."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]\n"
        "    return nn.Sequential(*layers).eval()\n"
    )
    losses = "losses: [{name: ablated_cross_entropy}, {name: interpretable_gradients, weight: 0.1}]"
    text = f"model: {tmp_path / 'nets.py'}:net\nlayer: '1'\ndata: {pictures}\nsize: 32\nepochs: 2\nbatch_size: 8\n{losses}\n"
    (tmp_path / "recipe.yaml").write_text(text + "measure: {images: 8}\nfilm: {images: 2}\n")
    states = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        call = [sys.executable, "-m", "foveate", "train", str(tmp_path / "recipe.yaml"), "--out", str(out)]
        done = subprocess.run([*call, "--devices", str(devices), "--trust-code"], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(read_weights(out / "model.safetensors"))
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6, msg=name)
    one, two = (read(tmp_path / str(devices)).history[0] for devices in (1, 2))
    for key in ("val_accuracy", "val_loss", "ablated_cross_entropy"):
        assert one[key] == pytest.approx(two[key], rel=1e-4)


class TestCompare:
    def runs(self, tmp_path: Path) -> list[Path]:
        folders = []
        for name in ("scenes_plain", "scenes_ace"):
            for seed in (0, 1):
                folder = tmp_path / f"{name}-{seed}"
                train(recipe(name, seed=seed, epochs=1), folder)
                folders.append(folder)
        return folders

    def test_one_line_a_recipe_with_intervals_over_seeds(self, tmp_path: Path) -> None:
        folders = self.runs(tmp_path)
        found = compare(folders)
        assert list(found.runs) == ["plain", "ace"]
        values = [read(folder).record["accuracy"]["train"] for folder in folders]
        older = folders[1] / "recipe.yaml"  # of a version that had no such key yet
        older.write_text("".join(line for line in older.read_text().splitlines(True) if not line.startswith("ca_stream")))
        assert list(compare(folders).runs) == ["plain", "ace"]
        line = found.frame.loc[("ace", "train")]
        assert line["mean"] == pytest.approx(np.mean(values[2:]))
        assert line["n"] == 2
        assert line["difference"] == pytest.approx(np.mean(values[2:]) - np.mean(values[:2]))
        page = trainings.write(tmp_path / "page.html", found).read_text(encoding="utf-8")
        assert "2 recipes side by side" in page
        assert "Where each looks in the end" in page
        result = CliRunner().invoke(app, ["compare", *map(str, folders), "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["table"]["ace"]["train"]["n"] == 2
        shown = CliRunner().invoke(app, ["compare", *map(str, folders), "--out", str(tmp_path / "c.html")])
        assert "±" in shown.stdout
        assert (tmp_path / "c.html").is_file()

    def test_student_s_interval(self) -> None:
        mean, low, high = interval([1.0, 2.0, 3.0])
        assert (mean, low, high) == pytest.approx((2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-5)
        assert np.isnan(interval([1.0])[1])

    def test_refusals(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        train(recipe("scenes_plain", epochs=1), folder)
        with pytest.raises(FoveateError, match="name two runs or more"):
            compare([folder])
        with pytest.raises(FoveateError, match="holds no finished training run"):
            compare([folder, tmp_path])
        copy = tmp_path / "copy"
        copy.mkdir()
        for name in ("run.json", "recipe.yaml", "history.csv"):
            (copy / name).write_bytes((folder / name).read_bytes())
        with pytest.raises(FoveateError, match="two runs of one seed"):
            compare([folder, copy])
        result = CliRunner().invoke(app, ["compare", str(folder), str(copy), "--fail-under", "AG=-2"])
        assert result.exit_code == 2


class TestRecipes:
    @pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
    def test_every_recipe_is_one_and_says_what_it_is(self, path: Path) -> None:
        assert path.read_text(encoding="utf-8").startswith("# ")
        made = read_recipe(path.stem)
        if made.data != "scenes":
            reduced = read_recipe(path.stem, small=True)
            assert reduced.losses == made.losses
            assert reduced.epochs != made.epochs

    def test_a_small_variant_trains(self, pictures: Path, tmp_path: Path) -> None:
        change = ["--set", "epochs=1", "--set", "size=32", "--data", str(pictures), "--out", str(tmp_path / "run")]
        result = CliRunner().invoke(app, ["train", "pets_species_ace_divergence", "--small", *change])
        assert result.exit_code == 0, result.output
        assert "worst group" in result.output
        assert (tmp_path / "run" / "report.html").is_file()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("epoch: 3", "epoch is no key of a recipe: did you mean epochs?"),
            ("data: {train: x, folds: 3, fold: 3}", "fold 3 is not one of 3 folds"),
            ("data: {train: x, folds: 3, test: y}", "leave one of them out"),
            ("losses: [{name: ace, schedule: inverse_fit}]", "needs a loss that is a share of the map"),
            ("losses: [{name: ace}, {name: ablated_cross_entropy}]", "ablated_cross_entropy stands there twice"),
            ("cross_entropy: 0", "nothing would be trained"),
            ("losses: [{name: interpretable_gradients}]\nprecision: fp16", "too small for precision fp16"),
            ("film: {method: gradcm}", "did you mean grad_cam"),
            ("extends: scenes_plian", "did you mean scenes_plain"),
            ("extends: recipe", "extends itself"),
            ("losses: [{name: cam_loss, schedule: [{until: 0.5}]}]", "must end one after the other, at last at 1"),
        ],
    )
    def test_bad_recipes(self, text: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text(text)
        with pytest.raises(FoveateError, match="recipe") as caught:
            read_recipe(tmp_path / "recipe.yaml")
        assert message in str(caught.value)

    def test_what_extends_is_merged_to_the_leaves(self, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text("extends: caltech_plain\ndata: {fold: 2}\naugment: {flip: false}\n")
        made = read_recipe(tmp_path / "mine.yaml")
        assert (made.data.fold, made.data.folds, made.augment.flip, made.augment.rotation) == (2, 5, False, 20)

    def test_small_where_there_is_none(self) -> None:
        with pytest.raises(FoveateError, match="has no small variant"):
            read_recipe("scenes_plain", small=True)
        with pytest.raises(FoveateError, match=r"no place 'losses.3.weight' for 2"):
            read_recipe("scenes_ace", {"losses.3.weight": 2})

    def test_a_part_knows_its_classes(self) -> None:
        whole = scenes.make("val", 0, 32)
        assert Part(whole, (0, 3)).class_names == scenes.CLASSES


def test_the_example_of_lightning_trains_in_training_mode() -> None:
    """Lightning leaves modules in the mode that they come in, and what is loaded comes in evaluation mode."""
    spec = importlib.util.spec_from_file_location("example", "examples/lightning_module.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(part.training for part in module.Classifier().modules())


@pytest.mark.parametrize("name", ["bare_pytorch", "lightning_module"])
def test_the_examples_run(name: str, tmp_path: Path) -> None:
    call = [sys.executable, f"examples/{name}.py", "--epochs", "1", "--out", str(tmp_path / "film.html")]
    done = subprocess.run(call, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "film.html").read_text(encoding="utf-8").count('alt="map after epoch 1') == 3
