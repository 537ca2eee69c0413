"""The images that a call names: files and folders of them, labels beside them, read as they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import FoveateError, ImageError

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.models.load import Classifier


@dataclass(frozen=True)
class Picture:
    """An image as the model takes it, the name of what is written of it, and its label where one is asked for."""

    path: Path
    stem: str
    x: Tensor  # [3,H,W]
    label: int | None = None


@dataclass(frozen=True)
class Pictures:
    """Images by path; only those of one batch are in memory.

    Attributes:
        stems: one an image, none twice: files of the same name in different folders get a number.
        labels: the class of each, or why there is none; None where no label is asked for.
    """

    paths: list[Path]
    stems: list[str]
    labels: list[int | str] | None

    @classmethod
    def named(cls, names: Sequence[str], classifier: Classifier, labelled: bool, out: Path) -> Pictures:
        """The images of files, and of folders but for what was written there under ``out``.

        Raises:
            FoveateError: a folder without images, or a ``labels.csv`` that cannot be read.
        """
        paths = [path for name in names for path in _files(Path(name), out)]
        return cls(paths, _stems(paths), _labels(paths, classifier) if labelled else None)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, rows: Iterable[int], classifier: Classifier, failures: list[tuple[str, str]]) -> list[Picture]:
        """Images that can be read; the others go to ``failures``, with the reason."""
        from foveate import images

        found = []
        for row in rows:
            path, label = self.paths[row], None if self.labels is None else self.labels[row]
            try:
                x = classifier.preprocess(images.read(path))
                if isinstance(label, str):
                    raise ImageError(label)
                found.append(Picture(path, self.stems[row], x, label))
            except ImageError as error:
                failures.append((str(path), str(error)))
        return found


def _files(path: Path, out: Path) -> list[Path]:
    from foveate.data.folder import files_in

    if not path.is_dir():
        return [path]
    written = out.resolve()
    found = [file for file in files_in(path) if written not in file.resolve().parents]
    if not found:
        raise FoveateError(f"{path} is a folder without images")
    return found


def _stems(paths: Sequence[Path]) -> list[str]:
    taken: dict[str, None] = {}
    for path in paths:
        stem, number = path.stem, 2
        while stem in taken:
            stem, number = f"{path.stem}_{number}", number + 1
        taken[stem] = None
    return list(taken)


def _labels(paths: Sequence[Path], classifier: Classifier) -> list[int | str]:
    """The class of each image by the ``labels.csv`` beside it, or by its folder where that has the name of a class."""
    from foveate.data.folder import labels_beside

    labels: list[int | str] = []
    for path, label in zip(paths, labels_beside(paths), strict=True):
        if isinstance(label, str):
            label = classifier.class_index(label)
        if label is None:
            folder = path.resolve().parent.name
            label = _class_called(folder, classifier)
        why = f"--target label: no labels.csv beside {path} has a line for it, and its folder is no class: name a class instead"
        labels.append(why if label is None else label)
    return labels


def _class_called(name: str, classifier: Classifier) -> int | None:
    wanted = name.lower().replace("_", " ")
    known = [[part.strip() for part in one.lower().split(",")] + [one.lower()] for one in classifier.class_names or ()]
    found = [index for index, synonyms in enumerate(known) if wanted in synonyms]
    return found[0] if len(found) == 1 else None
