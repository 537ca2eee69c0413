"""Train: from a recipe to a model, and what a run leaves behind."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from foveate.batch import Batch
from foveate.data import scenes
from foveate.errors import FoveateError
from foveate.losses.contrastive import required_head
from foveate.models.castream import CAStream, ca_stream
from foveate.models.classifier import Classifier
from foveate.models.load import load
from foveate.models.surgery import contrastive_architecture
from foveate.precision import warn_if_slow
from foveate.registry import LOSSES
from foveate.runtime.capture import Capture
from foveate.runtime.model import evaluating
from foveate.training import outcome
from foveate.training import saved as trained
from foveate.training.checkpoints import CheckpointIO, RunFolder, held
from foveate.training.features import FeatureCache
from foveate.training.film import Film, lightning_callback
from foveate.training.lightning import made_loggers, quiet, ready
from foveate.training.loading import Augmented, EpochSampler, Kept, augmenter
from foveate.training.module import Training
from foveate.training.recipe import Data, Recipe
from foveate.training.splits import film_images, labels_of, open_splits

ready()
import lightning as L  # noqa: E402
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402

PRECISION = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
Logger = Literal["csv", "tensorboard"]


@dataclass
class Run:
    """What a training run leaves: the model, its recipe, its data and its curves.

    Attributes:
        history: one line per epoch.
        seconds: of training alone.
        out: folder with ``model.safetensors``, ``recipe.yaml``, ``history.csv``, ``run.json`` and ``film.npz``, or None.
        film: where the model looked after each epoch.
        epoch: whose weights these are.
    """

    classifier: Classifier
    recipe: Recipe
    data: dict[str, Dataset[Batch]]
    history: list[dict[str, float]]
    seconds: float
    out: Path | None = None
    film: Film | None = None
    epoch: int = 0

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """Accuracy of every split and group, and the measures of the maps: see :func:`foveate.training.outcome.outcome`."""
        return outcome.outcome(self.classifier, self.data, self.recipe)

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return int(outcome.predict(self.classifier, self.data["train"][0].x).shape[1])

    def accuracy(self, split: str) -> float:
        """Share of images of a split that are classified right."""
        return float(self.outcome["accuracy"][split])


def train(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    data: Mapping[str, Dataset[Batch]] | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    devices: int = 1,
    loggers: Sequence[Logger] = (),
    workers: int = 0,
    compiled: bool = False,
    trust_code: bool = False,
) -> Run:
    """Train a recipe; on CPUs the same recipe gives the same weights.

    A run can be killed at any moment: ``resume`` goes on from its last finished epoch to the same weights.

    Args:
        out: folder for weights, curves, film and checkpoints; nothing is written where it is None.
        data: the splits, where they are at hand already.
        callbacks: Lightning's, such as a progress bar.
        resume: go on from the last finished epoch in ``out``, with the recipe that it was started with.
        overwrite: replace a run that ``out`` holds, once the first epoch of this one is on the disk.
        devices: GPUs, or processes on CPUs; a batch is divided among them.
        loggers: ``csv``, ``tensorboard`` and ``wandb``, into ``out/logs``; the last two show the film too.
        workers: processes that read images.
        compiled: ``torch.compile`` for what no loss looks into.
        trust_code: where the model is the folder of a run whose recipe names a Python file, run it.

    Raises:
        KeyboardInterrupt: with a message that says how to go on.
        WriteError: a file cannot be written; the last checkpoint is kept.
        FoveateError: ``out`` holds a run, or one of another recipe where it is to be resumed; another process writes there;
            there is nothing to resume; the model, the data and the losses do not fit; the loss became NaN.
    """
    folder = Path(out) if out is not None else None
    if folder is None and resume:
        raise FoveateError("there is no run to resume without a folder: name the one where it is")
    with held(folder):
        place = RunFolder(folder, recipe, resume, overwrite) if folder is not None else None
        options: dict[str, Any] = {"devices": devices, "loggers": loggers, "workers": workers, "compiled": compiled}
        return _train(recipe, place, data, callbacks, trust_code=trust_code, **options)


def _train(
    recipe: Recipe,
    place: RunFolder | None,
    data: Mapping[str, Dataset[Batch]] | None,
    callbacks: Sequence[Callback],
    *,
    devices: int,
    loggers: Sequence[Logger],
    workers: int,
    compiled: bool,
    trust_code: bool,
) -> Run:
    folder, checkpoint = (None, None) if place is None else (place.folder, place.checkpoint)
    L.seed_everything(recipe.seed, verbose=False)
    classifier, splits = prepared(recipe, data, trust_code)
    module = Training(classifier, recipe, compiled)
    if recipe.cache_features:
        stream: CAStream = classifier.model  # type: ignore[assignment]
        kept = tempfile.TemporaryDirectory(prefix="foveate-")  # gone with the run, where it has no folder
        where = Path(kept.name) if folder is None else folder / "features"
        compute = torch.no_grad()(lambda x: stream.features(classifier.normalise(x)))
        module.cache = FeatureCache(where, compute, stream.backbone)
        module.cache.check_room(splits["train"][0].x, len(splits["train"]) + len(splits["val"]))  # type: ignore[arg-type]
    film = None
    extra: list[Callback] = [EarlyStopping("val_accuracy", patience=recipe.early_stop, mode="max")] if recipe.early_stop else []
    if recipe.film.images and recipe.head != "multilabel":
        images = film_images(splits, recipe.film.images)
        film = Film(images, recipe.film.method, recipe.layer, tuple(classifier.class_names or ()) or None)
        path = None if folder is None else folder / "film.npz"
        extra.append(lightning_callback(film, path, lambda m: m.classifier))
    if checkpoint is not None:
        options: dict[str, Any] = {"save_top_k": 1, "enable_version_counter": False, "save_on_train_epoch_end": True}
        extra.append(ModelCheckpoint(checkpoint.parent, filename="last", **options))
    with quiet(), place.running() if place is not None else nullcontext():
        plugins = [CheckpointIO(place)] if place is not None else []
        trainer = _trainer(recipe, devices, made_loggers(loggers, folder), [*extra, *callbacks], plugins)
        loaders = _loaders(recipe, splits, devices, workers)
        if place is not None:
            place.begin()
        try:
            resumed = str(checkpoint) if place is not None and place.resumed else None
            trainer.fit(module, *loaders, ckpt_path=resumed, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            if not trainer.interrupted:
                raise
    if trainer.interrupted:
        done = len(module.history)
        go_on = "; go on with --resume" if done and checkpoint is not None and checkpoint.is_file() else ""
        raise KeyboardInterrupt(f"interrupted after {done} of {recipe.epochs} epochs{go_on}")
    epoch = len(module.history)
    if module.best is not None:
        classifier.load_state_dict(module.best["state"])
        epoch = int(module.best["epoch"])
    classifier.cpu().eval()
    seconds = sum(line["seconds"] for line in module.history)  # also those before it was interrupted
    run = Run(classifier, recipe, splits, module.history, seconds, folder, film, epoch)
    if place is not None and trainer.is_global_zero:
        record = {"name": recipe.name, "seed": recipe.seed, "epoch": epoch, "seconds": run.seconds, **run.outcome}
        record |= {"outputs": run.outputs, "class_names": classifier.class_names, "wordnet_ids": classifier.wordnet_ids}
        with place.running():
            trained.save(place.folder, classifier.model, place.settings, run.history, record)
    return run


def prepared(
    recipe: Recipe, data: Mapping[str, Dataset[Batch]] | None = None, trust_code: bool = False
) -> tuple[Classifier, dict[str, Dataset[Batch]]]:
    """The model of a recipe, in training mode, and its splits; what does not fit together is refused before training.

    Raises:
        FoveateError: fewer outputs than classes; a loss needs masks that the data has not.
    """
    classifier = _classifier(recipe, data, trust_code)
    splits = dict(data) if data is not None else open_splits(recipe, classifier.preprocess)
    if missing := [split for split in ("train", "val") if split not in splits]:
        raise FoveateError(f"training needs the splits train and val, and {missing[0]} is missing")
    labels, first = labels_of(splits["train"]), splits["train"][0]
    outputs = outcome.predict(classifier, first.x).shape[1]
    if labels.ndim == 2 and labels.shape[1] != outputs:
        raise FoveateError(f"the model has {outputs} outputs, and an image has {labels.shape[1]} labels")
    if labels.ndim == 1 and int(labels.max()) >= max(2, outputs):
        raise FoveateError(f"the model has {outputs} outputs, and the data has a class {int(labels.max())}: set num_classes")
    for term in recipe.losses:
        record = LOSSES.get(term.name)
        boxes = "region" in record.needs and first.boxes is not None
        if {"mask", "region"} & set(record.needs) and first.mask is None and not boxes:
            raise FoveateError(f"{record.name} needs masks of the objects, and the data has none: 'cam_loss' needs none")
        if "linear_head" in record.needs:
            with evaluating(classifier):
                required_head(Capture(classifier, first.x, recipe.layer), record.name)
    classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs
    return classifier, splits


def _classifier(recipe: Recipe, data: Mapping[str, Dataset[Batch]] | None, trust_code: bool) -> Classifier:
    count, names = None, list(scenes.CLASSES) if recipe.data == "scenes" else None
    if not recipe.model.rpartition(":")[0].endswith(".py"):
        if names is not None:
            count = len(names)
        else:
            assert isinstance(recipe.data, Data)
            from foveate.data.benchmarks import open_benchmark

            tree = data["train"] if data is not None else None
            tree = tree or open_benchmark(recipe.data.train, load("foveate:small_cnn").preprocess, train=True)
            known = getattr(tree, "class_names", None)
            labels = labels_of(tree)
            count = len(known) if known else labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
            names = list(known) if known else None
        if recipe.head == "binary":
            if count != 2:
                raise FoveateError(f"a binary head has two classes, and the data has {count}")
            count = 1
    options: dict[str, Any] = {"size": recipe.size, "mean": recipe.mean, "std": recipe.std, "num_classes": count}
    options["trust_code"] = trust_code
    classifier = load(recipe.model, weights=recipe.weights, pretrained=recipe.pretrained, **options)
    if recipe.contrastive_architecture:
        classifier = contrastive_architecture(classifier)
    if recipe.ca_stream:
        classifier = ca_stream(classifier, None if recipe.ca_stream is True else recipe.ca_stream)
    if not recipe.freeze_backbone:
        for stream in (m for m in classifier.modules() if isinstance(m, CAStream)):
            stream.unfreeze()
    if names:  # its own names again would come without their ids
        classifier.class_names = names
    return classifier.train()


def _loaders(
    recipe: Recipe, splits: Mapping[str, Dataset[Batch]], devices: int, workers: int
) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    if recipe.batch_size % devices:
        raise FoveateError(f"batch_size {recipe.batch_size} cannot be divided among {devices} devices")
    options: dict[str, Any] = {"collate_fn": Batch.collate, "num_workers": workers, "persistent_workers": workers > 0}
    train_data, val_data = (splits[s] if workers else Kept.of(splits[s]) for s in ("train", "val"))
    change = augmenter(recipe.augment)
    sampler = EpochSampler(labels_of(splits["train"]), recipe.seed, recipe.rebalance, numbered=change is not None)
    if change is not None:
        train_data = Augmented(train_data, change, recipe.seed)
    train_loader: DataLoader[Batch] = DataLoader(train_data, recipe.batch_size // devices, sampler=sampler, **options)
    return train_loader, DataLoader(val_data, 128, **options)


def _trainer(
    recipe: Recipe, devices: int, loggers: list[Any], callbacks: list[Callback], plugins: Sequence[Any] = ()
) -> L.Trainer:
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.precision == "bf16":
        warn_if_slow(torch.device(accelerator))
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision=PRECISION[recipe.precision],  # type: ignore[arg-type]
            max_epochs=recipe.epochs,
            accumulate_grad_batches=recipe.accumulate,
            gradient_clip_val=recipe.gradient_clip,
            logger=loggers or False,
            log_every_n_steps=10,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            callbacks=callbacks,
            plugins=list(plugins),
        )
    except (RuntimeError, ValueError) as error:
        raise FoveateError(f"{devices} device(s) cannot be used here: {str(error).splitlines()[0]}") from None
