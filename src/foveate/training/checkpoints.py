"""Checkpoints: the last epoch of a training run, replaced as a whole; whose folder it is, and what it may be used for."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from foveate.disk import files
from foveate.errors import FoveateError, WriteError
from foveate.training import saved as trained
from foveate.training.lightning import ready
from foveate.training.loading import processes
from foveate.training.recipe import Recipe

ready()
from lightning.pytorch.plugins.io import TorchCheckpointIO  # noqa: E402

UNCHECKED = ("name", "measure", "film")  # of a recipe: what a run that goes on may have otherwise
OTHERS = ("film.npz", "report.html")  # what a run writes beside trained.FILES
NEEDED = ("recipe", "history", "state_dict", "epoch")


class RunFolder:
    """The folder of a training run: free for a new run, or with one to go on with.

    A new run takes the place of one that was there when its first epoch is on the disk, and not before.

    Args:
        resume, overwrite: what is asked for with a run that is there.

    Raises:
        FoveateError: something is there that was not asked to be replaced; there is nothing to resume; it was another
            recipe; the checkpoint is damaged.
    """

    def __init__(self, folder: Path, recipe: Recipe, resume: bool = False, overwrite: bool = False) -> None:
        self.folder, self.settings = folder, recipe.model_dump(mode="json")
        self.checkpoint = folder / "checkpoints" / "last.ckpt"
        self._unborn = folder / "checkpoints" / "overwriting"  # a run that is to replace this one has no epoch yet
        self.resumed = resume and self.checkpoint.is_file()
        self._there: str | None = None
        if not is_first():
            return
        record = trained.read_record(folder)
        begun = record.get("kind") == trained.KIND and not record.get("finished", True)
        # What a new run would replace: one that was killed in its first epoch left nothing of worth.
        names = ("checkpoints/last.ckpt", *trained.FILES, *OTHERS)[: 2 if begun else None]
        self._there = next((name for name in names if (folder / name).exists()), None)
        if resume:
            self._check_resumable(record if begun else {})
        elif record and record.get("kind") != trained.KIND:
            raise FoveateError(f"{str(folder / trained.RECORD)!r} is not of a training run: name another folder")
        elif not overwrite and self._there is not None:
            raise FoveateError(
                f"{str(folder)!r} holds a run already ({self._there}): name another folder, or ask to "
                "resume it (--resume) or to overwrite it (--overwrite)"
            )

    def _check_resumable(self, begun: Mapping[str, Any]) -> None:
        if self._unborn.exists():
            raise FoveateError(
                f"the run in {str(self.folder)!r} was to be overwritten, and that was stopped in its first epoch: start it "
                f"again with --overwrite, or delete {str(self._unborn)!r} to go on with the run before it"
            )
        before = read_checkpoint(self.checkpoint)["recipe"] if self.resumed else begun.get("recipe")
        if not isinstance(before, Mapping):
            raise FoveateError(f"there is no run to resume in {str(self.folder)!r}: start one without --resume")
        for key in self.settings:
            if key not in UNCHECKED and before.get(key) != self.settings[key]:
                raise FoveateError(
                    f"the run in {str(self.folder)!r} was started with {key} {before.get(key)!r}, and now it is "
                    f"{self.settings[key]!r}: resume it with the same recipe, or start another run"
                )

    def begin(self) -> None:
        """Everything fits, and training starts now; what killed runs were writing is cleared."""
        if not is_first():
            return
        files.make_folder(self.folder)
        files.clear_waiting(self.folder, *(path for path in self.folder.glob("*") if path.is_dir() and not path.is_symlink()))
        files.clear_waiting(*self.folder.glob("features/*/"))
        if self.resumed:
            return
        if self._there is not None:
            files.write_text(self._unborn, "")
        else:
            trained.begin(self.folder, self.settings)

    def born(self) -> None:
        """The first epoch is on the disk."""
        if self._unborn.exists():
            trained.begin(self.folder, self.settings)
            files.delete(self._unborn)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, an error leaves the run that was there as it was, and a full disk is said with what is kept."""
        try:
            yield
        except OSError as error:  # of Lightning's loggers
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            where = error.filename or str(self.folder)
            raise WriteError(self._kept(f"{str(where)!r} cannot be written: {error.strerror or error}")) from error
        except WriteError as error:
            raise WriteError(self._kept(str(error))) from error
        finally:
            if is_first() and self._unborn.exists():
                files.delete(self._unborn)

    def _kept(self, sentence: str) -> str:
        if not self.checkpoint.is_file() or self._unborn.exists():
            return sentence
        return f"{sentence}; the last finished epoch is kept in {str(self.checkpoint)!r}: go on with --resume"


def finished(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What ``run.json`` says of a run of this recipe that is finished; None of one that is not.

    Raises:
        FoveateError: the run is of another recipe, or damaged.
    """
    record = trained.read_record(folder)
    if record.get("kind") != trained.KIND or not record.get("finished", True):
        return None
    if not RunFolder(folder, recipe, resume=True).resumed:
        return None
    return trained.read(folder).record


class CheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside the one before and read without running code in them.

    Lightning's own are written to the temporary folder and copied over the one before where that is another file system.
    """

    def __init__(self, place: RunFolder) -> None:
        self.place = place

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint, whole or not at all."""
        files.write_checkpoint(path, checkpoint)
        self.place.born()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read one; see :func:`read_checkpoint`."""
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Nothing: there is one, and it is replaced."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint, on the CPU; code in it is never run.

    Raises:
        FoveateError: it is damaged, or none of foveate.
    """
    advice = "put a copy in its place, or start the run again with --overwrite"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FoveateError(f"the checkpoint {str(path)!r} is damaged and cannot be read ({reason}): {advice}") from None
    if not isinstance(content, dict) or any(key not in content for key in NEEDED):
        raise FoveateError(f"{str(path)!r} is no checkpoint of foveate train: {advice}")
    return content


def held(folder: Path | None) -> Any:
    """A context that holds the folder of a run, in the first of its processes."""
    return nullcontext() if folder is None or not is_first() else files.locked(folder)


def is_first() -> bool:
    """Whether this is the first process of a run, also before the processes have met."""
    rank, count = processes()
    return rank == 0 if count > 1 else all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
