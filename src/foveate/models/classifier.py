"""Classifier: a model with its normalisation inside, and what is known about it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from foveate.data.imagenet import LINE, WORDNET_ID, imagenet_names, without_ids, wordnet_ids
from foveate.data.images import Preprocess
from foveate.errors import FoveateError
from foveate.runtime import layers
from foveate.runtime.model import Normalized
from foveate.shown import listed


class Classifier(Normalized):
    """A model with its normalisation inside, and what is known about it.

    Attributes:
        name: how it was asked for.
        preprocess: from an image file to what it takes.
        class_names: one name per class, or None.
        wordnet_ids: other names of the classes, where they came with the names (``n01440764 tench``); ImageNet's own
            names need them not.
        notes: what was assumed while it was loaded, one sentence each.
        assumed: nobody said how the input is normalised, so that ImageNet's mean and std were taken.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        name: str = "",
        class_names: Sequence[str] | None = None,
        notes: Sequence[str] = (),
        assumed: bool = False,
    ) -> None:
        super().__init__(model, preprocess.mean, preprocess.std)
        self.name = name
        self.preprocess = preprocess
        self.class_names = list(class_names) if class_names is not None else None
        self.notes = list(notes)
        self.assumed = assumed

    @property
    def class_names(self) -> list[str] | None:
        """One name per class, in index order; ids of WordNet in front of them are taken off, and kept beside them."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: list[str] | None) -> None:
        self._class_names: list[str] | None = None
        self.wordnet_ids: list[str | None] | None = None
        if names is not None:
            self._class_names, ids = without_ids(names)
            self.wordnet_ids = ids if any(ids) else None

    def read(self, *images: Any) -> Tensor:
        """Photographs as this classifier takes them, ``[B,3,H,W]`` in [0, 1]: paths, folders, PIL images, arrays, tensors.

        Raises:
            FoveateError: see :func:`foveate.models.inputs.taken`.
        """
        from foveate.models.inputs import taken

        return taken(self, images[0] if len(images) == 1 else list(images)).x

    def __repr__(self) -> str:
        """A few lines for people; ``print(classifier.model)`` shows the modules."""
        height, width = self.preprocess.crop
        mean, std = (
            " ".join(f"{value:.3g}" for value in dict.fromkeys(values))
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        names, layer = self.class_names, layers.already_found(self, (self.mean.shape[1], height, width))
        first = next(self.parameters(), None)
        lines = [
            f"Classifier {self.name or type(self.model).__name__}" + ("" if first is None else f" on {first.device}"),
            f"  takes:   images in [0, 1], {height} x {width}; inside, mean {mean} and std {std}",
            "  classes: " + ("names are not known" if names is None else f"{len(names)}: {listed(names, 3)}"),
            f"  layer:   {layer or 'found when it is first asked for'}",
            *(f"  note:    {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def class_index(self, name: str) -> int:
        """The class of a name, or of one of its synonyms (``tabby`` for ``tabby, tabby cat``), or of a part of it.

        ImageNet's classes are known by their WordNet ids (``n02123045``) too.

        Raises:
            FoveateError: no class, or several, of that name; names are not known.
        """
        names = self.class_names
        if names is None:
            raise FoveateError(f"class {name!r} is a name, but this model's class names are not known: give them, or an index")
        wanted = _plain(name)
        found = self.classes_called(name) or [i for i, known in enumerate(names) if wanted in known.lower()]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(f"{names[i]} ({i})" for i in found[:4])
            more = " and others" if len(found) > 4 else ""
            raise FoveateError(f"class {name!r} may be any of {len(found)} classes: {some}{more}; give the index")
        near = difflib.get_close_matches(wanted, [known.lower() for known in names], 3, 0.5)
        raise FoveateError(f"no class is called {name!r}" + (f": did you mean {' or '.join(near)}?" if near else ""))

    def classes_called(self, name: str) -> list[int]:
        """The classes that have exactly this name, this synonym or this WordNet id; none where names are not known."""
        line = LINE.fullmatch(name.strip())
        wanted = _plain(name if line is None else line[1])  # an id is surer than the name behind it
        parts = [(known.lower(), *map(str.strip, known.lower().split(","))) for known in self.class_names or ()]
        found = [index for index, synonyms in enumerate(parts) if wanted in synonyms]
        if found or not WORDNET_ID.fullmatch(wanted):
            return found
        ids = self.wordnet_ids or (wordnet_ids() if self.class_names == imagenet_names() else ())
        return [ids.index(wanted)] if wanted in ids else []

    def class_name(self, index: int) -> str:
        """The name of a class, or ``class 7`` where names are not known."""
        if self.class_names is not None and index < len(self.class_names):
            return self.class_names[index]
        return f"class {index}"


def _plain(name: str) -> str:
    return name.lower().strip().replace("_", " ")
