"""Explanation: the maps of one batch by several methods, to index, look at, pickle, save and read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from foveate.errors import FoveateError
from foveate.models.inputs import Taken
from foveate.registry import METHODS, Method
from foveate.runtime.capture import Capture
from foveate.runtime.model import unwrap
from foveate.shown import drawn, listed
from foveate.targets import SCORES, Head, Target, contrast, log_probability, predicted

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from foveate.data.images import Preprocess


@dataclass(frozen=True)
class Seen:
    """What an explanation is about, without the model: it is drawn, pickled and saved from this.

    Attributes:
        x: the images as the model saw them, ``[B,K,H,W]`` in [0, 1].
        logits: ``[B,C]``.
        head: ``softmax``, ``binary`` or ``multilabel``.
        names: one per image.
        photographs: of each image its file, or the picture that was given; None for a tensor.
        preprocess: from the photographs to ``x``; None where there are none.
        model: how the model was asked for, or its class.
        class_names: in index order, or None.
        settings: what was asked for beside the methods: their own settings, ``fuse``, ``precision``, ``score``.
    """

    x: Tensor
    logits: Tensor
    head: Head
    names: tuple[str, ...]
    photographs: tuple[Path | Image.Image | None, ...]
    preprocess: Preprocess | None = None
    model: str = ""
    class_names: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, capture: Capture, taken: Taken, settings: Mapping[str, Any]) -> Seen:
        """What a run saw."""
        model = unwrap(capture.model)
        names = getattr(model, "class_names", None)
        called = getattr(model, "name", "") or type(getattr(model, "model", model)).__name__
        known = None if names is None else tuple(map(str, names))
        x, logits = capture.x.detach(), capture.logits.detach()
        about = (taken.names, taken.photographs, taken.preprocess, str(called), known, dict(settings))
        return cls(x, logits, capture.head, *about)

    def called(self, index: int) -> str:
        """What an image is called where there is little room: a file without its folders."""
        name = self.names[index]
        return Path(name).name or name if isinstance(self.photographs[index], Path) else name

    def class_name(self, index: int) -> str:
        """The name of a class with its index, or ``class 7`` where names are not known."""
        names = self.class_names
        return f"{names[index]} ({index})" if names is not None and index < len(names) else f"class {index}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """Maps of one batch by several methods; in a notebook it shows itself.

    Attributes:
        maps: for each method ``M [B,H,W]`` in [0, 1], at the size of the images.
        raw: for each method ``S [B,h,w]``, signed, as the paper defines it.
        target: what was explained, with the class of each image in ``target.y``.
        targets: the same for each method: a contrast where the method makes one of it.
        layer: the layer that was looked at, or several, separated by commas; empty where no method asks for one.
        seen: the images, what the model says of them, and where they are from.
        completeness_error: for methods that promise it, ``[B]``, relative to the score; None elsewhere.
        seconds: time of each method, beyond what all share: the run, its gradients, growing maps to the images' size.
        degenerate: for each method which of its maps say nothing, ``[B]`` bool.
        facts: for each method what else it knows of its maps, such as the sparsity that CASO reached: ``{name: [B]}``.
        remarks: for each method the same for people, one sentence per image, or none.
        left_out: methods of a group that this model does not support, with the reason.
    """

    maps: dict[str, Tensor]
    raw: dict[str, Tensor]
    target: Target
    layer: str
    seen: Seen
    targets: dict[str, Target] = field(default_factory=dict)
    completeness_error: dict[str, Tensor | None] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    degenerate: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    run: Capture | None = None

    @property
    def capture(self) -> Capture:
        """The run itself, for metrics.

        Raises:
            FoveateError: the explanation was pickled or read from a folder, and the run did not come along.
        """
        if self.run is None:
            raise FoveateError("the run of this explanation was not kept when it was written: explain the images again")
        return self.run

    def __len__(self) -> int:
        return len(self.seen.x)

    def __getitem__(self, name: str | Method) -> Tensor:
        """The map of a method by name, alias or record, ``[B,H,W]``.

        Raises:
            FoveateError: it has none; where it came with a group, with the reason.
        """
        return self.maps[self.known(name)]

    def known(self, name: str | Method) -> str:
        """The name under which the map of a method stands here.

        Raises:
            FoveateError: there is none.
        """
        if not isinstance(name, (str, Method)):
            raise FoveateError(f"maps are by method, and {name!r} is none: there are {', '.join(self.maps)}")
        if isinstance(name, str) and name in self.maps:
            return name
        known = METHODS.get(name).name
        if known not in self.maps:
            why = self.left_out.get(known, f"there are {', '.join(self.maps)}")
            raise FoveateError(f"there is no map of {known!r}: {why}")
        return known

    def __contains__(self, name: object) -> bool:
        return name in self.maps

    def question(self, index: int, method: str | None = None) -> str:
        """What is explained of an image, in words: ``tabby (281)``, ``tabby (281), and not tiger cat (282)``."""
        target = self.target if method is None else self.targets.get(method, self.target)
        if target.name == "callable":
            return "a score of your own"
        words = self.seen.class_name(int(target.y[index]))
        if target.name in ("probability", "loss"):
            words = f"{target.name} of {words}"
        return words if target.other is None else f"{words}, and not {self.seen.class_name(int(target.other[index]))}"

    def said(self, index: int) -> tuple[int, float, float | None]:
        """What the model says of an image: its class, the probability of that, and of the class that is explained."""
        seen, row = self.seen, self.seen.logits[index : index + 1]
        best = predicted(row, seen.head)
        asked = None
        if self.target.name != "callable":
            asked = float(log_probability(row, self.target.y[index : index + 1].to(row.device), seen.head).exp())
        return int(best), float(log_probability(row, best, seen.head).exp()), asked

    # -- to look at ------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        height, width = self.seen.x.shape[-2:]
        lines = [f"Explanation of {len(self)} image{'s' * (len(self) != 1)} of {height} x {width} by {self.seen.model}"]
        lines.append(f"  maps:   {listed(list(self.maps), 8) or 'none'}" + (f"; layer {self.layer}" if self.layer else ""))
        for index in range(min(3, len(self))):
            best, p, _ = self.said(index)
            why = f"says {self.seen.class_name(best)} with p = {p:.3f}; why {self.question(index)}"
            lines.append(f"  {self.seen.called(index)}: {why}")
        if len(self) > 3:
            lines.append(f"  and {len(self) - 3} more")
        if flat := [f"{int(rows.sum())} of {name}" for name, rows in self.degenerate.items() if rows.any()]:
            lines.append(f"  constant maps, which say nothing: {', '.join(flat)}")
        if self.left_out:
            lines.append(f"  left out: {listed(list(self.left_out))}; see .left_out")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return drawn("explanation").html({"": self})  # type: ignore[no-any-return]

    def overlay(self, method: str | Method | None = None, image: int = 0) -> Image.Image:
        """A map on its photograph, at the photograph's own resolution and shape, with what the network saw in a frame.

        On what the network saw where a tensor was explained.

        Args:
            method: the first of the methods where it is None.
            image: which of the batch.

        Raises:
            FoveateError: no such method or image.
            ImageError: the photograph's file is not there any more, or cannot be read.
        """
        return drawn("explanation").overlaid(self, self._first(method), self._row(image))  # type: ignore[no-any-return]

    def figure(self, image: int | None = None) -> Figure:
        """A matplotlib figure of every method on every image, or on one, with what was asked; ``figure.savefig(path)``.

        Raises:
            FoveateError: no such image.
        """
        rows = range(len(self)) if image is None else [self._row(image)]
        return drawn("explanation").figure(self, list(rows))  # type: ignore[no-any-return]

    def photograph(self, image: int = 0) -> Image.Image | None:
        """The photograph that an image was made of, upright RGB; None where a tensor was given.

        Raises:
            ImageError: its file is not there any more, or cannot be read.
        """
        from foveate.data import images

        kept = self.seen.photographs[self._row(image)]
        if kept is None:
            return None
        return images.read(kept) if isinstance(kept, Path) else images.upright(kept, self.seen.names[image])

    def _first(self, method: str | Method | None) -> str:
        if method is not None:
            return self.known(method)
        if not self.maps:
            raise FoveateError("there is no map: no method applies to this model")
        return next(iter(self.maps))

    def _row(self, image: int) -> int:
        if isinstance(image, bool) or not isinstance(image, int) or not -len(self) <= image < len(self):
            raise FoveateError(f"image {image!r} is none of this explanation, which has {len(self)}, from 0")
        return image % len(self)

    # -- to keep ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write it to a folder: overlays as PNG, maps as ``maps.npz``, and ``manifest.json`` with versions, model and targets.

        A folder that this has written before is replaced; :func:`foveate.read_explanation` reads it.

        Raises:
            FoveateError: the folder has something else in it, or cannot be written.
        """
        return drawn("saved").write(self, folder)  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the run, on the CPU; a callable score becomes one that says so."""
        state = {own.name: getattr(self, own.name) for own in fields(self) if own.name not in ("run", "target", "targets")}
        aims = {"target": bare(self.target), "targets": {name: bare(target) for name, target in self.targets.items()}}
        seen = {own.name: getattr(self.seen, own.name) for own in fields(Seen)}
        return _on_cpu({**state, **aims, "seen": Seen(**_on_cpu(seen))})  # type: ignore[no-any-return]

    def __setstate__(self, state: dict[str, Any]) -> None:
        head = state["seen"].head
        again: dict[str, Any] = {"target": bound(state["target"], head), "run": None}
        again["targets"] = {name: bound(target, head) for name, target in state["targets"].items()}
        self.__dict__.update({**state, **again})


def bare(target: Target) -> dict[str, Any]:
    """A target without its function, which cannot be written."""
    return {"name": target.name, "y": target.y.detach(), "other": None if target.other is None else target.other.detach()}


def bound(state: Mapping[str, Any], head: Head) -> Target:
    """The target of :func:`bare`; a callable's says that it was not kept when it is asked for."""
    name, y, other = state["name"], state["y"], state["other"]
    if name in SCORES:
        return Target(y, SCORES[name](head), name, other)
    if name == "contrast" and other is not None:
        return Target(y, contrast(other, head), name, other)
    return Target(y, _lost, name, other)


def _lost(logits: Tensor, y: Tensor) -> Tensor:
    raise FoveateError("the score of this explanation is a function, which was not kept when it was written")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if type(value) is dict:
        return {key: _on_cpu(own) for key, own in value.items()}
    return value


class Answers(dict[str, Explanation]):
    """Explanations by question (``pred``, ``label``, ``pred-label``): a dict that shows itself."""

    def __repr__(self) -> str:
        first = next(iter(self.values()), None)
        if first is None:
            return "Answers({})"
        about = f"Answers to {len(self)} questions about {len(first)} image(s) by {first.seen.model}"
        asked = [f"  {key}: {first.seen.called(0)}, why {own.question(0)}" for key, own in self.items()]
        return "\n".join([about, *asked, f"  maps:   {listed(list(first.maps), 8)}"])

    def _repr_html_(self) -> str:
        return drawn("explanation").html(dict(self))  # type: ignore[no-any-return]

    def save(self, folder: str | Path) -> Path:
        """Write each answer to a folder of its name in ``folder``: see :meth:`Explanation.save`."""
        for key, answer in self.items():
            answer.save(Path(folder) / key)
        return Path(folder)


def read_explanation(folder: str | Path) -> Explanation:
    """What :meth:`Explanation.save` wrote, without the run: maps, targets and photographs are there, ``capture`` is not.

    Raises:
        FoveateError: there is no such folder, it was not written by ``save``, or it is damaged.
    """
    return drawn("saved").read(folder)  # type: ignore[no-any-return]
