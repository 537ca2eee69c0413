"""Film: where a model looks at a few fixed images, kept after every epoch, for any training loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from foveate import maps
from foveate.batch import Batch
from foveate.data.images import as_rgb, to_image
from foveate.disk import files
from foveate.disk.files import is_regular
from foveate.errors import FoveateError, not_imported
from foveate.overlay import overlay
from foveate.registry import METHODS
from foveate.runtime.capture import Capture
from foveate.runtime.model import evaluating
from foveate.shown import drawn
from foveate.targets import log_probability
from foveate.training.lightning import ready

SIDE = 112  # pixels of a kept map: what a picture of it is drawn from


@dataclass(frozen=True)
class Frame:
    """One epoch.

    Attributes:
        epoch: its number, from 1; 0 for before training.
        maps: ``[N,h,w]`` uint8, of what the model says of each image, 255 where it is largest.
        predicted: class of each image, ``[N]``.
        probability: of the label, ``[N]``.
        inside: share of each map on its mask, ``[N]``; NaN where there is no mask.
    """

    epoch: int
    maps: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    inside: np.ndarray


@dataclass(repr=False)
class Film:
    """Maps of a few fixed images over the epochs of a training run.

    ``film.shoot(model, epoch)`` in any loop; :func:`lightning_callback` and :func:`hugging_face_callback` call it.

    Args:
        batch: the images, in [0, 1], with labels, and masks where they are known.
        method: whose maps of the predicted classes are kept.
        layer: where to look.
        class_names: for captions.
    """

    batch: Batch
    method: str = "contrastive_cam"
    layer: str = "auto"
    class_names: tuple[str, ...] | None = None
    frames: list[Frame] = field(default_factory=list)

    def __post_init__(self) -> None:
        METHODS.get(self.method)
        if self.batch.y is None or self.batch.y.ndim != 1:
            raise FoveateError("a film needs one label for each of its images")

    def __repr__(self) -> str:
        count, height, width = len(self.batch), *self.batch.x.shape[-2:]
        epochs = [frame.epoch for frame in self.frames]
        span = f"epochs {epochs[0]} to {epochs[-1]}" if epochs else "none yet: film.shoot(model, epoch) after every epoch"
        lines = [
            f"Film of {count} image{'s' * (count != 1)} of {height} x {width} by {self.method}",
            f"  frames: {len(epochs)}, {span}",
        ]
        for frame in self.frames[:1] + self.frames[1:][-1:]:
            known = frame.inside[np.isfinite(frame.inside)]
            inside = f", {known.mean():.2f} of the maps on the object" if len(known) else ""
            lines.append(f"  epoch {frame.epoch}: p of the label {frame.probability.mean():.3f}{inside}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return drawn("explanation").film_html(self)  # type: ignore[no-any-return]

    def shoot(self, model: nn.Module, epoch: int) -> Frame:
        """Keep where a model looks now; one frame an epoch, so that a run that goes on replaces what it repeats.

        The model may be in training mode: it is put into evaluation mode and back, and nothing else of it changes.
        """
        assert self.batch.y is not None  # __post_init__ has seen them
        with evaluating(model):
            capture = Capture(model, self.batch.x, self.layer)
            raw = METHODS.get(self.method)(capture, None, capture.target()).detach()
            M = maps.prepare(raw, capture.size)
            probability = log_probability(capture.logits.detach(), self.batch.y.to(M.device), capture.head).exp()
        inside = torch.full((len(M),), float("nan"))
        if self.batch.mask is not None:
            inside = maps.mass_inside(M, self.batch.mask.to(M.device))
        factor = min(1.0, SIDE / max(M.shape[-2:]))
        small = M
        if factor < 1:
            height, width = (max(1, round(side * factor)) for side in M.shape[-2:])
            small = torch.nn.functional.adaptive_avg_pool2d(M[:, None], (height, width))[:, 0]
        frame = Frame(
            epoch,
            (255 * small).round().byte().cpu().numpy(),
            capture.pred.cpu().numpy(),
            probability.float().cpu().numpy(),
            inside.float().cpu().numpy(),
        )
        self.frames = [*(known for known in self.frames if known.epoch < epoch), frame]
        return frame

    def picture(self, frame: Frame) -> Image.Image:
        """One epoch as one picture: each image of the film, and beside it the image under its map."""
        lines = []
        for x, values in zip(self.batch.x.cpu(), frame.maps, strict=True):
            M = maps.upsample(torch.from_numpy(values[None]).float() / 255, (x.shape[-2], x.shape[-1]))[0]
            lines.append(torch.cat([as_rgb(x.float()), overlay(x, M)], -1))
        return to_image(torch.cat(lines, -2))

    def state(self) -> dict[str, Any]:
        """The frames as tensors, for a checkpoint."""
        return {"frames": [{name: torch.as_tensor(value) for name, value in vars(frame).items()} for frame in self.frames]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the frames of :meth:`state` back."""
        self.frames = [
            Frame(int(frame["epoch"]), *(frame[name].numpy() for name in ("maps", "predicted", "probability", "inside")))
            for frame in state["frames"]
        ]

    def save(self, path: str | Path) -> None:
        """Write images and frames to a ``.npz`` file that numpy can open, whole or not at all."""
        columns = ("epoch", "maps", "predicted", "probability", "inside")
        frames: dict[str, Any] = {
            name: np.stack([getattr(frame, name) for frame in self.frames]) for name in columns if self.frames
        }
        assert self.batch.y is not None  # likewise
        mask: dict[str, Any] = {} if self.batch.mask is None else {"mask": self.batch.mask.cpu().numpy()}
        with files.replacing(path) as waiting, waiting.open("wb") as file:  # by its name, numpy would add an ending
            np.savez_compressed(
                file,
                images=(255 * self.batch.x).round().byte().cpu().numpy(),
                labels=self.batch.y.cpu().numpy(),
                ids=np.array(self.batch.id, dtype=str),
                names=np.array(self.class_names or (), dtype=str),
                method=np.array(self.method),
                **mask,
                **frames,
            )

    @staticmethod
    def load(path: str | Path) -> Film:
        """Read what :meth:`save` wrote.

        Raises:
            FoveateError: no such file, or another one.
        """
        if not is_regular(path):
            raise FoveateError(f"{str(path)!r} is not a film: there is no such file")
        try:
            with np.load(path, allow_pickle=False) as file:
                known = dict(file)
            images = torch.from_numpy(known["images"]).float() / 255
            mask = torch.from_numpy(known["mask"]) if "mask" in known else None
            batch = Batch(images, torch.from_numpy(known["labels"]), mask, id=tuple(map(str, known["ids"])))
            film = Film(batch, str(known["method"]), class_names=tuple(map(str, known["names"])) or None)
            if len(known["labels"]) != len(images) or len(known["ids"]) not in (0, len(images)):
                raise ValueError(f"it has {len(known['labels'])} labels and {len(images)} images")
            columns = ("maps", "predicted", "probability", "inside")
            for number, epoch in enumerate(known.get("epoch", ())):
                frame = Frame(int(epoch), *(known[name][number] for name in columns))
                if any(len(getattr(frame, name)) != len(images) for name in columns) or frame.maps.ndim != 3:
                    raise ValueError(f"the frame of epoch {frame.epoch} is not of its {len(images)} images")
                film.frames.append(frame)
        except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
            raise FoveateError(f"{str(path)!r} is not a film: {' '.join(str(error).split()) or type(error).__name__}") from None
        return film


def _show(loggers: Sequence[Any], picture: Image.Image, epoch: int) -> None:
    """Give the picture of an epoch to the loggers that take pictures: TensorBoard's and Weights & Biases'."""
    for logger in loggers:
        if callable(getattr(logger, "log_image", None)):
            logger.log_image("film", [picture], caption=[f"epoch {epoch}"])
        elif callable(add := getattr(logger.experiment, "add_image", None)):
            add("film", np.asarray(picture), epoch, dataformats="HWC")


def lightning_callback(film: Film, path: str | Path | None = None, model: Callable[[Any], nn.Module] | None = None) -> Any:
    """A Lightning callback that shoots a film after every epoch of a run, and carries it through checkpoints.

    Where the trainer has a logger of TensorBoard or Weights & Biases, each epoch's picture goes there as ``film``.

    Args:
        path: ``.npz`` file that is rewritten each time.
        model: from the LightningModule to the classifier of images in [0, 1]; the module itself where it is None.
    """
    ready()
    from lightning.pytorch.callbacks import Callback

    class FilmStrip(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            frame = film.shoot(pl_module if model is None else model(pl_module), trainer.current_epoch + 1)
            if path is not None and trainer.is_global_zero:
                film.save(path)
            if trainer.is_global_zero and trainer.loggers:
                _show(trainer.loggers, film.picture(frame), frame.epoch)

        def state_dict(self) -> dict[str, Any]:
            return film.state()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            film.restore(state_dict)

    return FilmStrip()


def hugging_face_callback(
    film: Film, path: str | Path | None = None, wrap: Callable[[nn.Module], nn.Module] = lambda model: model
) -> Any:
    """A callback for ``transformers.Trainer`` that shoots a film after every epoch.

    Args:
        path: ``.npz`` file that is rewritten each time.
        wrap: from the trainer's model to a classifier of images in [0, 1], such as
            ``lambda model: foveate.normalized(model, mean, std)``.

    Raises:
        FoveateError: transformers is not installed, or cannot be imported.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise not_imported("a callback for its Trainer", "transformers", error) from None

    class FilmStrip(TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            film.shoot(wrap(kwargs["model"]), round(state.epoch))
            if path is not None and state.is_world_process_zero:
                film.save(path)

    return FilmStrip()
