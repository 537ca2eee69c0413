"""Module: a LightningModule for cross-entropy and any sum of registered losses, with their schedules."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.batch import Batch
from foveate.errors import FoveateError, NotFiniteError
from foveate.models.castream import CAStream
from foveate.models.classifier import Classifier
from foveate.precision import uncast
from foveate.registry import LOSSES
from foveate.runtime.capture import Capture
from foveate.runtime.layers import INPUT
from foveate.runtime.model import read_logits
from foveate.targets import Head, head_of
from foveate.training import schedules
from foveate.training.features import FeatureCache
from foveate.training.groups import correct, decided
from foveate.training.lightning import ready
from foveate.training.loading import processes, seed_of
from foveate.training.recipe import LossTerm, Recipe

ready()
import lightning as L  # noqa: E402


class Training(L.LightningModule):
    """Cross-entropy and any sum of registered losses on one model; each epoch's figures go to ``history``.

    Args:
        compiled: run the model through ``torch.compile`` where no loss looks into it: validation, and plain training.
    """

    def __init__(self, classifier: Classifier, recipe: Recipe, compiled: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.recipe = recipe
        self.terms = [(LOSSES.get(term.name), term, _schedule(term)) for term in recipe.losses]
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None
        self.cache: FeatureCache | None = None
        # In a tuple: as a child it would stand in every checkpoint a second time.
        self._plain: tuple[Callable[[Tensor], Any]] = (torch.compile(classifier) if compiled else classifier,)
        self._guided = any("guided" in record.needs for record, *_ in self.terms)
        self._sums: dict[str, Tensor] = {}
        self._started = 0.0
        self._norms = [m for m in classifier.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if recipe.freeze_batch_norm:
            for parameter in (p for module in self._norms for p in module.parameters()):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B,C]`` of images in [0, 1]."""
        return read_logits(self._plain[0](x))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        rank, _ = processes()
        # Whatever is drawn in a step depends on seed, epoch, step and process alone, so that a resumed run repeats it.
        torch.manual_seed(seed_of(self.recipe.seed, self.current_epoch, index, rank))
        try:
            total = self.loss_of(batch, self.current_epoch / self.recipe.epochs)
        except NotFiniteError:
            raise self._diverged("an output of the model", self.global_step + 1) from None
        if not torch.isfinite(total):
            raise self._diverged("the loss", self.global_step + 1)
        self.log("loss", total.detach(), on_step=True, on_epoch=False, batch_size=len(batch))
        return total

    def loss_of(self, batch: Batch, progress: float) -> Tensor:
        """The sum of losses on a batch, at a share of the epochs in [0, 1)."""
        assert batch.y is not None  # open_splits gives labels
        if not self.terms:
            logits = self._logits(batch)
            head: Head = head_of(logits, self.recipe.head)
        else:
            layers = (self.recipe.layer, INPUT) if self._guided else self.recipe.layer
            options: dict[str, Any] = {"frozen": False, "head": self.recipe.head, "guided": self._guided}
            capture = Capture(self.classifier, batch.x, layers, **options)
            logits, head = capture.logits, capture.head
        plain = _cross_entropy(logits, batch.y, head)
        share, total = 1.0, plain.new_zeros(())
        with uncast(batch.x.device.type):  # sums over thousands of cells
            for record, term, schedule in self.terms:
                value = record(capture, batch, **term.settings).mean()
                weights = schedule(progress, self._together(value) if term.schedule == "inverse_fit" else 0.0)
                share = min(share, weights.cross_entropy)
                total = total + term.weight * weights.added * value
                self._add(term.name, value, len(batch))
        self._add("train_loss", plain, len(batch))
        self._add("train_accuracy", correct(decided(logits, head), batch.y).float().mean(), len(batch))
        self._add("images", torch.ones_like(plain), len(batch))
        # Also where its weight is 0: in several processes every parameter must have a gradient.
        return total + share * self.recipe.weight_of_cross_entropy * plain

    @staticmethod
    def _together(value: Tensor) -> float:
        """The mean of a value over all processes."""
        mean = value.detach().clone()
        if processes()[1] > 1:
            torch.distributed.all_reduce(mean)
        return float(mean) / processes()[1]

    def _logits(self, batch: Batch) -> Tensor:
        if self.cache is None:
            return self(batch.x)  # type: ignore[no-any-return]
        stream: CAStream = self.classifier.model  # type: ignore[assignment]
        return stream.classify(self.cache(batch.x))

    def _diverged(self, what: str, step: int) -> FoveateError:
        done = len(self.history)
        callback = self.trainer.checkpoint_callback
        kept = f"; the weights after epoch {done} are kept in {callback.dirpath}" if done and callback is not None else ""  # type: ignore[attr-defined]
        return FoveateError(
            f"{what} became NaN or infinite at step {step}, in epoch {self.current_epoch + 1} of "
            f"{self.recipe.epochs}{kept}: lower learning_rate or the weights of the losses"
        )

    def validation_step(self, batch: Batch, index: int) -> None:
        rank, count = processes()
        if index % count != rank:  # every process is asked for every batch, and runs its own
            return
        assert batch.y is not None  # likewise
        logits = self._logits(batch)
        head = head_of(logits, self.recipe.head)
        self._add("val_loss", _cross_entropy(logits, batch.y, head), len(batch))
        self._add("val_accuracy", correct(decided(logits, head), batch.y).float().mean(), len(batch))
        self._add("val_images", torch.ones((), device=logits.device), len(batch))

    def _add(self, name: str, value: Tensor, count: int) -> None:
        before = self._sums.get(name)
        self._sums[name] = value.detach().float() * count if before is None else before + value.detach().float() * count

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return replace(batch, x=batch.x.contiguous(memory_format=torch.channels_last))

    def on_train_epoch_start(self) -> None:
        self._sums, self._started = {}, time.perf_counter()
        if self.recipe.freeze_batch_norm:
            for module in self._norms:
                module.training = False

    def on_validation_epoch_end(self) -> None:
        # Here and not at the end of the training epoch: callbacks of that hook read the history.
        names = ["images", "val_images", "train_loss", *(term.name for _, term, _ in self.terms), "train_accuracy"]
        names += ["val_loss", "val_accuracy"]  # the same in every process, also in one without a validation batch
        sums = torch.stack([self._sums.get(name, torch.zeros((), device=self.device)).double() for name in names])
        if processes()[1] > 1:
            torch.distributed.all_reduce(sums)
        values = dict(zip(names, sums.tolist(), strict=True))
        train, val = values.pop("images"), values.pop("val_images")
        figures = {name: value / (val if name.startswith("val") else train) for name, value in values.items()}
        figures["learning_rate"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.classifier.parameters())
        if not finite or not math.isfinite(figures["val_loss"]):  # before the film and the checkpoint of this epoch
            raise self._diverged("a weight of the model" if not finite else "the loss in validation", self.global_step)
        self.log_dict({name: torch.tensor(value) for name, value in figures.items()})
        self.history.append({"epoch": self.current_epoch + 1, **figures, "seconds": time.perf_counter() - self._started})
        if self.recipe.keep == "best" and (self.best is None or figures["val_accuracy"] > self.best["val_accuracy"]):
            state = {name: value.detach().cpu().clone() for name, value in self.classifier.state_dict().items()}
            self.best = {"val_accuracy": figures["val_accuracy"], "epoch": self.current_epoch + 1, "state": state}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["history"] = self.history
        checkpoint["best"] = self.best
        checkpoint["recipe"] = self.recipe.model_dump(mode="json")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if before != {name: value.shape for name, value in self.state_dict().items()}:
            raise FoveateError("the checkpoint is of another model than the recipe and its data make now: start another run")
        self.history = list(checkpoint["history"])
        self.best = checkpoint.get("best")

    def configure_optimizers(self) -> Any:
        recipe = self.recipe
        parameters = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        decay: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        optimizer: torch.optim.Optimizer
        if recipe.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, momentum=recipe.momentum, nesterov=recipe.nesterov, **decay)
        elif recipe.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters, **decay)
        else:
            optimizer = torch.optim.AdamW(parameters, **decay)
        steps = int(self.trainer.estimated_stepping_batches)

        def rate(step: int) -> float:
            progress = step * recipe.epochs // steps / recipe.epochs  # that of the losses: of whole epochs
            phase = min((schedule(progress, 0.0).learning_rate for *_, schedule in self.terms), default=1.0)
            return phase * learning_rate_at(recipe, step, steps)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _schedule(term: LossTerm) -> schedules.Schedule:
    if isinstance(term.schedule, str):
        return schedules.get(term.schedule)
    parts = [(p.until, schedules.Weights(p.cross_entropy, p.added, p.learning_rate)) for p in term.schedule]
    return schedules.phases(parts)


def learning_rate_at(recipe: Recipe, step: int, steps: int) -> float:
    """The factor of the learning rate at a step: a linear warm-up, then a cosine to 0, or steps down, or nothing."""
    warm = max(1, round(recipe.warmup * steps)) if recipe.warmup else 0
    if step < warm:
        return (step + 1) / warm
    if recipe.decay == "none":
        return 1.0
    if recipe.decay == "steps":
        return float(recipe.factor ** sum(step >= share * steps for share in recipe.milestones))
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _cross_entropy(logits: Tensor, y: Tensor, head: Head) -> Tensor:
    logits = logits.float() if logits.element_size() < 4 else logits
    if head == "softmax":
        return F.cross_entropy(logits, y)
    if head == "binary":
        return F.binary_cross_entropy_with_logits(logits[:, 0], y.to(logits.dtype))
    return F.binary_cross_entropy_with_logits(logits, y.to(logits.dtype), reduction="none").sum(1).mean()
