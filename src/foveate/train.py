"""Train: a recipe, a LightningModule for cross-entropy and any sum of registered losses, and what a run leaves behind."""

from __future__ import annotations

import csv
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from foveate import schedules
from foveate._torchvision import torchvision
from foveate.batch import Batch
from foveate.capture import Capture
from foveate.data import scenes
from foveate.data.folder import Folder, open_folder
from foveate.errors import FoveateError
from foveate.evaluate import batches
from foveate.models.load import Classifier, load
from foveate.recipe import Augment, Recipe
from foveate.registry import LOSSES

torchvision()  # lightning imports torchmetrics, which imports torchvision
import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import Callback, ModelCheckpoint  # noqa: E402

# -- data ----------------------------------------------------------------------------------------------------------


def open_data(recipe: Recipe, classifier: Classifier) -> dict[str, Dataset[Batch]]:
    """The splits that a recipe names: ``train``, ``val`` and, where there is one, ``test``."""
    if recipe.data == "scenes":
        size = recipe.size or classifier.preprocess.crop[0]
        return {split: scenes.make(split, recipe.seed, size) for split in ("train", "val", "test")}
    train_data = open_folder(recipe.data.train, classifier.preprocess)
    found: dict[str, Dataset[Batch]] = {"train": train_data}
    for split in ("val", "test"):
        root = getattr(recipe.data, split)
        if root is not None:
            found[split] = _numbered_alike(open_folder(root, classifier.preprocess), train_data, root)
    return found


def _numbered_alike(data: Folder, like: Folder, root: Path) -> Folder:
    """Classes by name get the numbers that they have in training, also where a folder lacks one of them."""
    if data.class_names is None or like.class_names is None:
        return data
    if unknown := [name for name in data.class_names if name not in like.class_names]:
        raise FoveateError(f"{str(root)!r} has the class {unknown[0]!r}, and the training data has not")
    return data.renumbered({i: like.class_names.index(name) for i, name in enumerate(data.class_names)})


class EpochSampler(Sampler[int]):
    """A random order that depends on the seed and the epoch alone, so that a resumed run sees the same images.

    Args:
        labels: of all images.
        rebalance: draw with replacement, every class equally often; as many draws as there are images.
    """

    def __init__(self, labels: Tensor, seed: int, rebalance: bool = False) -> None:
        self.labels, self.seed, self.rebalance, self.epoch = labels, seed, rebalance, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.rebalance:
            share = 1 / torch.bincount(self.labels).double()[self.labels]
            return iter(torch.multinomial(share, len(self), replacement=True, generator=generator).tolist())
        return iter(torch.randperm(len(self), generator=generator).tolist())


def _labels(data: Dataset[Batch]) -> Tensor:
    if isinstance(data, scenes.Scenes):
        return data.labels
    if isinstance(data, Folder):
        labels = [entry.label for entry in data.entries]
    else:
        labels = [None if data[i].y is None else int(data[i].y) for i in range(len(data))]  # type: ignore[arg-type]
    if any(label is None for label in labels):
        raise FoveateError("training needs a label for every image")
    return torch.tensor(labels)


def augmenter(augment: Augment) -> Callable[[Batch], Batch] | None:
    """The changes of a recipe as a function of a batch, each image and its mask changed on its own; None for no change."""
    torchvision()
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    steps: list[nn.Module] = []
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.rotation:
        fill: Any = {tv_tensors.Image: 0.5, tv_tensors.Mask: 0}
        steps.append(v2.RandomRotation(augment.rotation, v2.InterpolationMode.BILINEAR, fill=fill))
    if augment.color_jitter:
        steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
    if not steps:
        return None
    change = v2.Compose(steps)

    def apply(batch: Batch) -> Batch:
        images, masks = [], []
        for index in range(len(batch)):
            image = tv_tensors.Image(batch.x[index])
            if batch.mask is None:
                image = change(image)
            else:
                image, mask = change(image, tv_tensors.Mask(batch.mask[index : index + 1].float()))
                masks.append(mask.as_subclass(Tensor) > 0.5)
            images.append(image.as_subclass(Tensor))
        mask = torch.cat(masks) if masks else None
        return replace(batch, x=torch.stack(images), mask=mask, boxes=None)

    return apply


# -- training ------------------------------------------------------------------------------------------------------


class Training(L.LightningModule):
    """Cross-entropy and any sum of registered losses on one model; each epoch's figures go to ``history``."""

    def __init__(self, classifier: Classifier, recipe: Recipe) -> None:
        super().__init__()
        self.classifier = classifier
        self.recipe = recipe
        self.terms = [(LOSSES.get(term.name), term, schedules.get(term.schedule)) for term in recipe.losses]
        self.history: list[dict[str, float]] = []
        self._augment = augmenter(recipe.augment)
        self._sums: dict[str, float] = {}
        self._started = 0.0

    def _augmented(self, batch: Batch, index: int) -> Batch:
        """The batch with the recipe's changes, drawn from seed, epoch and step alone, so that a resumed run repeats them."""
        if self._augment is None:
            return batch
        with torch.random.fork_rng():
            torch.manual_seed((self.recipe.seed * 100_003 + self.current_epoch) * 100_003 + index)
            return self._augment(batch)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        batch = self._augmented(batch, index)
        assert batch.y is not None  # open_data gives labels
        progress = self.current_epoch / self.recipe.epochs
        if self.terms:
            capture = Capture(self.classifier, batch.x, self.recipe.layer, frozen=False)
            logits = capture.logits
        else:
            logits = self.classifier(batch.x)
        cross_entropy = F.cross_entropy(logits, batch.y)
        share = min((schedule(progress).cross_entropy for *_, schedule in self.terms), default=1.0)
        total = share * cross_entropy
        self._add("train_loss", cross_entropy, len(batch))
        for record, term, schedule in self.terms:
            value = record(capture, batch, **term.settings).mean()
            total = total + term.weight * schedule(progress).added * value
            self._add(term.name, value, len(batch))
        self._add("train_accuracy", (logits.argmax(1) == batch.y).float().mean(), len(batch))
        self._add("images", torch.tensor(1.0), len(batch))
        return total

    def validation_step(self, batch: Batch, index: int) -> None:
        assert batch.y is not None  # likewise
        logits = self.classifier(batch.x)
        self._add("val_loss", F.cross_entropy(logits, batch.y), len(batch))
        self._add("val_accuracy", (logits.argmax(1) == batch.y).float().mean(), len(batch))
        self._add("val_images", torch.tensor(1.0), len(batch))

    def _add(self, name: str, value: Tensor, count: int) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value.detach()) * count

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return replace(batch, x=batch.x.contiguous(memory_format=torch.channels_last))

    def on_train_epoch_start(self) -> None:
        self._sums, self._started = {}, time.perf_counter()

    def on_validation_epoch_end(self) -> None:
        # Here and not at the end of the training epoch: callbacks of that hook read the history.
        train, val = self._sums.pop("images"), self._sums.pop("val_images", 1.0)
        figures = {name: value / (val if name.startswith("val") else train) for name, value in self._sums.items()}
        figures["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.history.append({"epoch": self.current_epoch + 1, **figures, "seconds": time.perf_counter() - self._started})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history
        checkpoint["recipe"] = self.recipe.model_dump(mode="json")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = list(checkpoint["history"])

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        parameters = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, recipe.learning_rate, recipe.momentum, weight_decay=recipe.weight_decay)
        else:
            optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, round(recipe.warmup * steps))

        def rate(step: int) -> float:
            phase = min((schedule(step / steps).learning_rate for *_, schedule in self.terms), default=1.0)
            if step < warm:
                return phase * (step + 1) / warm
            return phase * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass
class Run:
    """What a training run leaves: the model, its recipe, its data and its curves.

    Attributes:
        history: one line an epoch.
        seconds: of training alone.
        out: folder with ``model.safetensors``, ``recipe.yaml``, ``history.csv`` and ``run.json``, or None.
    """

    classifier: Classifier
    recipe: Recipe
    data: dict[str, Dataset[Batch]]
    history: list[dict[str, float]]
    seconds: float
    out: Path | None

    def accuracy(self, split: str) -> float:
        """Share of images of a split that are classified right."""
        right, count = 0, 0
        for batch in batches(self.data[split], 128):
            assert batch.y is not None  # open_data gives labels
            right += int((predict(self.classifier, batch.x).argmax(1) == batch.y).sum())
            count += len(batch)
        return right / count


@torch.inference_mode()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of a batch in evaluation mode, ``[B,C]``; the mode is put back."""
    training = model.training
    first = next(model.parameters(), None)
    model.eval()
    try:
        return model(x if first is None else x.to(first.device)).cpu()
    finally:
        model.train(training)


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    data: Mapping[str, Dataset[Batch]] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Run:
    """Train a recipe; with the same recipe the same weights on the same machine.

    Args:
        out: folder for weights, curves and checkpoints; nothing is written where it is None.
        data: the splits, where they are at hand already.
        callbacks: Lightning's, such as a progress bar.
        resume: go on from the last finished epoch in ``out``, with the recipe that it was started with.
        overwrite: replace a run that ``out`` holds.

    Raises:
        KeyboardInterrupt: with a message that says how to go on.
        FoveateError: ``out`` holds a run, or one of another recipe where it is to be resumed; there is nothing to resume;
            the model and the data do not fit; the loss became NaN.
    """
    folder = Path(out) if out is not None else None
    checkpoint = folder / "checkpoints" / "last.ckpt" if folder is not None else None
    if resume and (checkpoint is None or not checkpoint.is_file()):
        raise FoveateError(f"there is no run to resume in {str(folder)!r}: start one without --resume")
    if resume and checkpoint is not None:
        _check_same(recipe, checkpoint)
    elif checkpoint is not None and checkpoint.is_file() and not overwrite:
        raise FoveateError(f"{str(folder)!r} holds a run already: name another folder, or ask to resume or to overwrite it")
    elif checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    L.seed_everything(recipe.seed, verbose=False)
    classifier = _classifier(recipe)
    splits = dict(data) if data is not None else open_data(recipe, classifier)
    labels = _labels(splits["train"])
    _check_classes(classifier, labels, splits["train"])
    loader: DataLoader[Batch] = DataLoader(
        splits["train"],
        recipe.batch_size,
        sampler=EpochSampler(labels, recipe.seed, recipe.rebalance),
        collate_fn=Batch.collate,
    )
    validation: DataLoader[Batch] = DataLoader(splits["val"], 128, collate_fn=Batch.collate)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs
    module = Training(classifier, recipe)
    saving = []
    if checkpoint is not None:
        saving = [ModelCheckpoint(checkpoint.parent, filename="last", save_top_k=1, enable_version_counter=False)]
    start = time.perf_counter()
    with _quiet():
        trainer = L.Trainer(
            max_epochs=recipe.epochs,
            devices=1,
            logger=False,
            enable_checkpointing=bool(saving),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[*saving, _StopAtNaN(), *callbacks],
        )
        try:
            trainer.fit(module, loader, validation, ckpt_path=str(checkpoint) if resume else None, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            if not trainer.interrupted:
                raise
    if trainer.interrupted:
        done = len(module.history)
        go_on = "; go on with --resume" if checkpoint is not None and checkpoint.is_file() else ""
        raise KeyboardInterrupt(f"interrupted after {done} of {recipe.epochs} epochs{go_on}")
    classifier.eval()
    run = Run(classifier, recipe, splits, module.history, time.perf_counter() - start, folder)
    if folder is not None:
        save(run, folder)
    return run


def _check_same(recipe: Recipe, checkpoint: Path) -> None:
    """Another recipe, or another number of epochs, which the learning rate follows, would be a run of neither."""
    before = torch.load(checkpoint, map_location="cpu", weights_only=True).get("recipe", {})
    now = recipe.model_dump(mode="json")
    for key in now:
        if before.get(key) != now[key]:
            raise FoveateError(
                f"the run in {str(checkpoint.parents[1])!r} was started with {key} {before.get(key)!r}, and now it is "
                f"{now[key]!r}: resume it with the same recipe, or start another run"
            )


def _classifier(recipe: Recipe) -> Classifier:
    count = None
    if recipe.data != "scenes":
        tree = open_folder(recipe.data.train, load("foveate:small_cnn").preprocess)
        count = len(tree.class_names) if tree.class_names else int(_labels(tree).max()) + 1
    elif not recipe.model.partition(":")[0].endswith(".py"):
        count = len(scenes.CLASSES)
    if recipe.model.rpartition(":")[0].endswith(".py"):
        count = None
    classifier = load(recipe.model, weights=recipe.weights, pretrained=recipe.pretrained, num_classes=count, size=recipe.size)
    classifier.class_names = list(scenes.CLASSES) if recipe.data == "scenes" else classifier.class_names
    return classifier.train()


def _check_classes(classifier: Classifier, labels: Tensor, data: Dataset[Batch]) -> None:
    outputs = predict(classifier, data[0].x).shape[1]
    if int(labels.max()) >= outputs:
        raise FoveateError(f"the model has {outputs} outputs, and the data has a class {int(labels.max())}: set num_classes")


def save(run: Run, folder: Path) -> None:
    """Write the weights of the user's own model, the recipe, the curves and the accuracies of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in run.classifier.model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    with (folder / "history.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(run.history[0]))
        writer.writeheader()
        writer.writerows(run.history)
    figures = {
        "accuracy": {split: run.accuracy(split) for split in run.data},
        "seconds": run.seconds,
        "versions": {"torch": torch.__version__, "lightning": L.__version__},
    }
    (folder / "run.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


class _StopAtNaN(Callback):
    """End a run whose loss is no longer a number, with a sentence instead of a broken model."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        value = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if value is not None and not torch.isfinite(value):
            raise FoveateError(
                f"the loss became {float(value)} in epoch {trainer.current_epoch + 1}: lower learning_rate or the weights"
            )


class _quiet:
    """Lightning without its advice on GPUs, workers and loggers, which is not the user's business here."""

    def __enter__(self) -> None:
        import logging

        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", message=".*(num_workers|isinstance\\(treespec|LeafSpec).*")
        self._levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)

    def __exit__(self, *error: Any) -> None:
        import logging

        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._caught.__exit__(*error)
