"""Layout: which files below a folder are images, and which folders in it are its splits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from foveate.data.images import ARRAYS
from foveate.errors import FoveateError, SplitWarning, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jpe")
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
MEASURED = ("test", "val", "train")  # which split a folder of several stands for where one is measured: the first there is


def files_in(folder: Path, channels: int = 3) -> list[Path]:
    """The image files in a folder and in those below it, by name, but for hidden ones; a link to a folder is one.

    Arrays (``.npy``, ``.npz``) are images for networks of other than three channels.
    """
    suffixes = SUFFIXES if channels == 3 else (*SUFFIXES, *ARRAYS)
    return sorted(path for path in walked(folder) if path.suffix.lower() in suffixes)


def walked(folder: Path) -> Iterator[Path]:
    """The files below a folder, also behind links to folders; each folder once, so that a link to one above it ends."""
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        about = os.stat(root)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in names if not name.startswith("."))


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, by name, but for hidden ones."""
    return sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def split_of(folder: Path) -> str | None:
    """Which split a folder's name says that it is, in any case: ``train``, ``val`` or ``test``."""
    return next((split for split, names in SPLITS.items() if folder.name.lower() in names), None)


def splits_in(root: Path) -> dict[str, Path]:
    """The folders of a folder's splits, by ``train``, ``val`` and ``test``; none where it has a ``labels.csv``, or classes.

    A split is called ``train``, ``training``, ``val``, ``valid``, ``validation``, ``dev``, ``test`` or ``testing``, in any
    case, and has a ``labels.csv`` or a folder for each class. A folder of such a name with nothing but images beside folders
    of other names is the class of that name.

    Raises:
        FoveateError: splits and other folders of images side by side, two folders for one split, or none with classes.
    """
    if not root.is_dir() or (root / "labels.csv").exists():
        return {}
    below = folders_in(root)
    if not any(split_of(folder) for folder in below):
        return {}
    divided = {folder: split for folder in below if (split := split_of(folder)) and _has_classes(folder)}
    rest = [folder for folder in below if folder not in divided and _has_images(folder)]
    classes = [folder for folder in rest if split_of(folder) is None]
    if not divided:
        if classes or not rest:
            return {}
        raise FoveateError(
            f"{_names(rest)} of {str(root)!r} hold images of no class: give each a folder for each class, or a labels.csv"
        )
    if classes:
        raise FoveateError(
            f"{str(root)!r} has {_names(divided)} as splits, and {_names(classes)} beside: give a folder of splits alone or of "
            "classes alone, or name one split"
        )
    found: dict[str, Path] = {}
    for folder, split in divided.items():
        if split in found:
            raise FoveateError(
                f"{str(root)!r} has {_names([found[split], folder])}, which are both its {split} split: keep one"
            )
        found[split] = folder
    if rest:
        warnings.warn(
            f"{printable(root)}: {_names(rest)} holds images of no class, and is passed over", SplitWarning, stacklevel=2
        )
    return {split: found[split] for split in SPLITS if split in found}


def split_named(path: Path) -> Path:
    """A split by any of its names, where the folder on disk has another: ``mine/val`` of ``mine/Validation``."""
    split = split_of(path)
    return path if split is None or path.is_dir() else splits_in(path.parent).get(split, path)


def chosen_split(root: Path, split: str | None = None) -> Path:
    """The folder itself, or the split of it that is asked for, or else the one to be measured, which is said.

    Raises:
        FoveateError: as :func:`splits_in`, or it has splits and not this one.
    """
    there = splits_in(root)
    if not there:
        return root
    if split is not None:
        if split not in there:
            raise FoveateError(f"{str(root)!r} has no {split} split, and {_names(there.values())} alone")
        return there[split]
    taken = next(there[name] for name in MEASURED if name in there)
    others = [folder for folder in there.values() if folder != taken]
    hint = f"; another is named by its folder, such as {printable(others[-1])}" if others else ""
    warnings.warn(
        f"{printable(root)} has {_names(there.values())}, and {taken.name}/ is taken{hint}", SplitWarning, stacklevel=3
    )
    return taken


def _names(folders: Iterable[Path]) -> str:
    names = [f"{printable(folder.name)}/" for folder in folders]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _has_classes(folder: Path) -> bool:
    return (folder / "labels.csv").is_file() or any(map(_has_images, folders_in(folder)))


def _has_images(folder: Path) -> bool:
    """Whether there is an image in a folder or below it: it ends at the first."""
    return any(path.suffix.lower() in (*SUFFIXES, *ARRAYS) for path in walked(folder))
