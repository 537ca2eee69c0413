"""Training: recipes, the order of images, augmentation, resumption, and the small network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from foveate import Batch, Capture, FoveateError
from foveate.data import scenes
from foveate.models.small import SmallCNN, small_cnn
from foveate.training.loading import EpochSampler, augmenter
from foveate.training.recipe import RECIPES, Augment, Recipe, read_recipe
from foveate.training.train import train


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COUNTS", {split: {"leopard": 12, "orca": 8} for split in scenes.SPLITS})


def tiny(**changes: object) -> Recipe:
    return read_recipe("scenes_cam_loss", {"size": 32, "epochs": 3, "batch_size": 8, **changes})


class TestSmallCNN:
    @pytest.mark.parametrize("size", [(192, 192), (96, 96), (33, 41), (8, 8)])
    def test_any_size_and_a_true_cam(self, size: tuple[int, int]) -> None:
        model, x = small_cnn().double().eval(), torch.rand(2, 3, *size, dtype=torch.float64)
        capture = Capture(model, x, "features") if min(size) > 8 else None
        if capture is not None:
            assert capture.linear_head().pooled
            logits = capture.class_maps().sum((2, 3)) + model.classifier.bias
            torch.testing.assert_close(logits, model(x))
        assert model(x).shape == (2, 2)

    def test_the_talks_stages(self) -> None:
        model = small_cnn(kernel=2)
        assert [stage[0].out_channels for stage in model.stages] == [16, 64, 32]
        assert all(isinstance(stage[1], nn.BatchNorm2d) for stage in model.stages)
        assert model.features(model.stages(model.stem(torch.rand(1, 3, 192, 192)))).shape == (1, 32, 24, 24)

    def test_refusal(self) -> None:
        with pytest.raises(FoveateError, match="a small CNN needs"):
            SmallCNN(0)


class TestSampler:
    def test_the_order_depends_on_seed_and_epoch_alone(self) -> None:
        labels = torch.arange(10) % 2
        orders = []
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
            sampler = EpochSampler(labels, seed)
            sampler.set_epoch(epoch)
            orders.append(list(sampler))
        assert orders[0] == orders[1]
        assert orders[0] != orders[2]
        assert orders[0] != orders[3]
        assert sorted(orders[2]) == list(range(10))

    def test_rebalancing_draws_classes_equally(self) -> None:
        labels = torch.tensor([0] * 900 + [1] * 100)
        drawn = labels[list(EpochSampler(labels, 0, rebalance=True))]
        assert len(drawn) == 1000
        assert 430 < int(drawn.sum()) < 570  # mean 500, standard deviation 16


class TestAugment:
    def batch(self) -> Batch:
        x = torch.rand(1, 3, 16, 16)
        mask = torch.zeros(1, 16, 16, dtype=torch.bool)
        mask[:, 2:6, 3:13] = True
        x[:, :, 2:6, 3:13] = 1
        return Batch(x, torch.tensor([1]), mask, id=("a",))

    def test_nothing_by_default(self) -> None:
        assert augmenter(Augment()) is None

    def test_the_mask_follows_flip_and_rotation(self) -> None:
        change = augmenter(Augment(flip=True, rotation=30))
        seen = set()
        for seed in range(8):
            torch.manual_seed(seed)
            batch = change(self.batch())
            assert batch.x.shape == (1, 3, 16, 16)
            assert type(batch.x) is torch.Tensor
            assert batch.mask.dtype == torch.bool
            assert float(batch.x[0, :, batch.mask[0]].mean()) > 0.85
            seen.add(batch.mask.numpy().tobytes())
        assert len(seen) > 4

    def test_jitter_changes_colours_and_not_the_mask(self) -> None:
        batch, before = augmenter(Augment(color_jitter=0.5))(self.batch()), self.batch()
        assert torch.equal(batch.mask, before.mask)
        assert 0 <= float(batch.x.min()) <= float(batch.x.max()) <= 1


class TestTrain:
    def test_the_same_recipe_gives_the_same_weights(self, few_images: None) -> None:
        first, second = (train(tiny()) for _ in range(2))
        for a, b in zip(first.classifier.parameters(), second.classifier.parameters(), strict=True):
            assert torch.equal(a, b)
        assert not first.classifier.training

    def test_a_resumed_run_ends_where_an_uninterrupted_one_does(self, few_images: None, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import Callback

        class Kill(Callback):
            def on_train_epoch_start(self, trainer: object, pl_module: object) -> None:
                if trainer.current_epoch == 2:
                    raise RuntimeError("killed")

        recipe = tiny(**{"augment.flip": True, "augment.color_jitter": 0.2})
        whole = train(recipe, tmp_path / "whole")
        with pytest.raises(RuntimeError, match="killed"):
            train(recipe, tmp_path / "broken", callbacks=[Kill()])
        resumed = train(recipe, tmp_path / "broken", resume=True)
        for (name, a), b in zip(whole.classifier.state_dict().items(), resumed.classifier.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
        assert [line["epoch"] for line in resumed.history] == [1, 2, 3]

    def test_history(self, few_images: None) -> None:
        history = train(tiny()).history
        assert {"epoch", "train_loss", "cam_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(history[0])
        assert history[-1]["train_loss"] < history[0]["train_loss"]

    def test_the_loss_moves_the_map_inwards(self, few_images: None) -> None:
        """Weight 0 and weight 5, the same seed: the loss itself must be lower where it is trained."""
        free, held = (train(tiny(**{"losses.0.weight": weight, "epochs": 8})).history[-1]["cam_loss"] for weight in (0, 5))
        assert held < 0.8 * free

    def test_three_phases(self, few_images: None) -> None:
        """In the first third the added loss does not train: its weight makes no difference there, and later it does."""
        runs = [train(tiny(**{"losses.0.schedule": "three_phase", "losses.0.weight": w})).history for w in (0, 5)]
        assert runs[0][0]["val_loss"] == runs[1][0]["val_loss"]
        assert runs[0][1]["val_loss"] != runs[1][1]["val_loss"]
        constant = train(tiny()).history
        assert constant[0]["val_loss"] != runs[0][0]["val_loss"]

    @pytest.mark.parametrize("change", [{"augment.flip": True}, {"augment.color_jitter": 0.5}, {"rebalance": True}])
    def test_the_first_remedy_reaches_the_training(self, few_images: None, change: dict[str, object]) -> None:
        plain, changed = (train(tiny(losses=[], epochs=1, **extra)).history[0]["train_loss"] for extra in ({}, change))
        assert plain != changed

    def test_ctrl_c_says_how_to_go_on(self, few_images: None, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import Callback

        class Stop(Callback):
            def on_train_epoch_start(self, trainer: object, pl_module: object) -> None:
                if trainer.current_epoch == 1:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt, match="interrupted after 1 of 3 epochs; go on with --resume"):
            train(tiny(), tmp_path, callbacks=[Stop()])
        assert len(train(tiny(), tmp_path, resume=True).history) == 3

    def test_data_of_ones_own_kind(self, few_images: None) -> None:
        class Own(torch.utils.data.Dataset):
            def __init__(self, split: str) -> None:
                self.inner = scenes.make(split, 0, 32)

            def __len__(self) -> int:
                return len(self.inner)

            def __getitem__(self, index: int) -> Batch:
                return self.inner[index]

        run = train(tiny(epochs=1), data={split: Own(split) for split in ("train", "val")})
        assert 0 <= run.accuracy("val") <= 1

    def test_a_loss_that_explodes_ends_with_a_sentence(self, few_images: None) -> None:
        with pytest.raises(FoveateError, match="the loss became"):
            train(tiny(learning_rate=1e30, losses=[]))

    def test_a_folder_of_ones_own(self, few_images: None, tmp_path: Path) -> None:
        from foveate.data.images import to_image

        for split in ("train", "val"):
            data = scenes.make(split, 0, 32)
            for i, batch in enumerate(data):
                folder = tmp_path / split / scenes.CLASSES[int(batch.y)]
                folder.mkdir(parents=True, exist_ok=True)
                to_image(batch.x[0]).save(folder / f"{i}.png")
        recipe = Recipe(data={"train": tmp_path / "train", "val": tmp_path / "val"}, size=32, epochs=1)
        for file in (tmp_path / "val" / "leopard").iterdir():
            file.unlink()
        (tmp_path / "val" / "leopard").rmdir()  # orca is class 1 all the same
        run = train(recipe)
        assert {int(batch.y) for batch in run.data["val"]} == {1}
        (tmp_path / "val" / "orca").rename(tmp_path / "val" / "whale")
        with pytest.raises(FoveateError, match="has the class 'whale', and the training data has not"):
            train(recipe)
        assert set(run.data) == {"train", "val"}
        assert run.classifier.class_names == ["leopard", "orca"]


def test_own_recipes_can_be_read() -> None:
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    assert {"scenes_plain", "scenes_cam_loss", "scenes_augmented"} <= set(names)
    for name in names:
        assert read_recipe(name).epochs >= 1


def test_plain_and_cam_loss_differ_in_the_loss_alone() -> None:
    plain, cam = (read_recipe(f"scenes_{name}").model_dump(exclude={"name", "losses"}) for name in ("plain", "cam_loss"))
    assert plain == cam


def test_changes_to_a_recipe() -> None:
    recipe = read_recipe("scenes_cam_loss", {"losses.0.settings.sigma": 0.1, "augment.flip": True, "seed": 3})
    assert recipe.losses[0].settings["sigma"] == 0.1
    assert recipe.augment.flip
    assert recipe.seed == 3
