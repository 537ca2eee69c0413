"""Targets: which scalar of the logits is explained, and for which class of each image."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import FoveateError

Head = Literal["softmax", "binary", "multilabel"]
Score = Callable[[Tensor, Tensor], Tensor]
Labels = Tensor | Sequence[int]
NOISE = 2e-5  # of the largest logit, or of 1: far more than two ways of running a network in float32 were seen to differ by

SINGLE = "one output is taken as the logit of a binary classifier: head='binary' (--head binary) says so without this note"


def head_of(logits: Tensor, head: Head | None = None) -> Head:
    """The kind of head that gives ``logits [B,C]``: as named, else ``binary`` for one column and ``softmax`` for more.

    A regression has one column too: its output, or minus it where that is negative, is then explained as a logit is.

    Raises:
        FoveateError: the named head does not fit the number of columns.
    """
    columns = logits.shape[1]
    if head is None:
        return "binary" if columns == 1 else "softmax"
    if head not in ("softmax", "binary", "multilabel"):
        raise FoveateError(f"head {head!r} is unknown: use 'softmax', 'binary' or 'multilabel'")
    if (head == "binary") != (columns == 1) and head != "multilabel":
        raise FoveateError(f"head {head!r} does not fit a model with {columns} output(s)")
    return head


def check_single(logits: Tensor, head: Head | None, labels: Tensor | None, names: Sequence[str] = ()) -> None:
    """Raise a FoveateError where one output is measured as a binary classifier, and nothing says that it is one.

    A regression has one output too, and no classes whose probability could rise or fall: ``head`` says that there are, or
    labels that are all 0 or 1 do, which is said in a warning.

    Args:
        names: what the images are called, for the message.
    """
    if logits.shape[1] != 1 or head is not None:
        return
    found = "the data has no labels" if labels is None else ""
    if labels is not None:
        wrong = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else (labels != 0) & (labels != 1)
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            which = f"of image {names[first]!r}" if len(names) == len(labels) else f"at {first} of the batch"
            found = f"its labels are not all 0 or 1 (the first other: {labels[first].item():g}, {which})"
    if found:
        raise FoveateError(
            f"the model has one output and {found}, so that it may be a regression, which has no classes to measure: where the "
            "output is the logit of a class, say head='binary' (--head binary)"
        )
    note_single(logits, head, 4)


def note_single(logits: Tensor, head: Head | None, stacklevel: int = 3) -> None:
    """Warn where one output is taken as a logit, and nothing says that it is one."""
    if logits.shape[1] == 1 and head is None:
        warnings.warn(SINGLE, stacklevel=stacklevel)


def num_classes(logits: Tensor, head: Head) -> int:
    """Number of classes that can be named: 2 for a binary head with its one logit, else the columns of ``logits``."""
    return 2 if head == "binary" else logits.shape[1]


def predicted(logits: Tensor, head: Head) -> Tensor:
    """The predicted class of each image, ``[B]``: the largest logit; for a binary head whether it is positive."""
    return (logits[:, 0] > 0).long() if head == "binary" else logits.argmax(1)


def is_right(logits: Tensor, y: Tensor, head: Head) -> Tensor:
    """Whether a class is what the model says of each image, ``[B]`` bool: the likeliest, or of sigmoids one above .5."""
    if head == "softmax":
        return logits.argmax(1) == y
    return log_probability(logits, y, head) > math.log(0.5)


def log_probability(logits: Tensor, y: Tensor, head: Head) -> Tensor:
    """Log-probability of class ``y`` in float64: log-softmax, or log-sigmoid for binary and multi-label heads.

    float64 because ``1 - p`` of a confident class, which Average Gain divides by, has no digits left in float32. Not a number
    where any logit is NaN or infinite: such a row says nothing, also where the class itself would have a probability.
    """
    logits = logits.double()
    own = F.log_softmax(logits, 1).gather(1, y[:, None])[:, 0] if head == "softmax" else F.logsigmoid(_logit(logits, y, head))
    return own.masked_fill(~torch.isfinite(logits).all(1), torch.nan)


def apart(logits: Tensor, log_p: Tensor, log_o: Tensor) -> bool:
    """Whether log-probabilities ``[B]`` differ, in all images, by more than two float32 runs of a network may.

    In log-odds, which carry the noise of ``logits [B,C]`` as it is; beyond 30 float64 has no digits left for them.
    """
    odds, other = ((value - (-torch.expm1(value)).log()).clamp(max=30) for value in (log_p, log_o))
    return bool(((odds - other).abs() > NOISE * logits.abs().amax(1).clamp(min=1)).all())


def _logit(logits: Tensor, y: Tensor, head: Head) -> Tensor:
    if head == "binary":
        return torch.where(y == 1, logits[:, 0], -logits[:, 0])
    return logits.gather(1, y[:, None])[:, 0]


def logit(head: Head = "softmax") -> Score:
    """Score ``y_c``: the logit of the class; for a binary head ``z`` for class 1 and ``-z`` for class 0."""
    return lambda logits, y: _logit(logits, y, head)


def probability(head: Head = "softmax") -> Score:
    """Score ``p_c``: its gradient mixes the classes, and vanishes where the network is sure (methods: prefer the logit)."""
    if head == "softmax":
        return lambda logits, y: logits.softmax(1).gather(1, y[:, None])[:, 0]
    return lambda logits, y: _logit(logits, y, head).sigmoid()


def contrast(other: Tensor, head: Head = "softmax") -> Score:
    """Score ``y_c - y_other``: why class c and not the other; for a binary head this is its logit, the log-odds.

    Args:
        other: the class asked against, one per image, ``[B]``.
    """
    if head == "binary":
        return logit(head)
    return lambda logits, y: _logit(logits, y, head) - logits.gather(1, other[:, None])[:, 0]


def loss(head: Head = "softmax") -> Score:
    """Score ``-log p_c``: the cross-entropy of the class (binary cross-entropy for binary and multi-label heads)."""
    if head == "softmax":
        return lambda logits, y: F.cross_entropy(logits, y, reduction="none")
    return lambda logits, y: -F.logsigmoid(_logit(logits, y, head))


SCORES: dict[str, Callable[[Head], Score]] = {"logit": logit, "probability": probability, "loss": loss}


@dataclass(frozen=True, eq=False)
class Target:
    """A score bound to the images of a batch.

    Attributes:
        y: class of each image, ``[B]``.
        score: ``(logits [N,C], y [N]) -> [N]``; differentiable.
        name: what is explained, for tables and captions, such as ``logit`` or ``contrast``.
        other: for a contrast, the class asked against, ``[B]``.
    """

    y: Tensor
    score: Score
    name: str
    other: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The scores ``[B]`` of ``logits [B,C]``."""
        return self.score(logits, self.y)

    def log_probability(self, logits: Tensor, head: Head) -> Tensor:
        """Log-probability ``[B]`` of what is explained, float64, for methods that are about a probability.

        Of the class; for a contrast, of the class between the two: ``log sigmoid(y_c - y_other)``.

        Raises:
            FoveateError: a callable score has no probability.
        """
        if self.name == "contrast":
            return F.logsigmoid(self(logits).double())
        if self.name not in SCORES:
            raise FoveateError(f"this method is about the probability of a class, and a {self.name!r} score has none")
        return log_probability(logits, self.y, head)

    def rows(self, index: Tensor) -> Target:
        """The target of images ``index [N]`` of this batch: what changed copies of those images are scored with."""
        if self.other is not None and self.name == "contrast":
            return Target(self.y[index], contrast(self.other[index]), self.name, self.other[index])
        if self.name == "callable":
            score = self.score
            per_row = getattr(score, "of_rows", None)
            return Target(self.y[index], per_row(index) if per_row else score, self.name)
        return Target(self.y[index], self.score, self.name)


def classes(
    target: object, logits: Tensor, labels: Labels | None = None, head: Head | None = None, what: str = "target"
) -> Tensor:
    """The class of each image, ``[B]``, from what a person may write.

    Args:
        target: None or ``"pred"`` (the predicted class), ``"label"``, ``"second"`` (the runner-up), an int for all
            images, or a sequence or tensor with one int an image.
        logits: ``[B,C]``.
        labels: the true classes ``[B]``, for ``"label"``.
        what: how to call it in messages.

    Raises:
        FoveateError: a wrong count, a class out of range, an unknown word, or ``"label"`` without labels.
    """
    head = head_of(logits, head)
    size, count = len(logits), num_classes(logits, head)
    if target is None or (isinstance(target, str) and target == "pred"):
        return predicted(logits, head)
    if isinstance(target, str):
        if target == "second":
            if count < 2:
                raise FoveateError(f"{what} 'second' needs a model with at least 2 classes, and this one has {count}")
            return 1 - predicted(logits, head) if head == "binary" else logits.topk(2, 1).indices[:, 1]
        if target == "label":
            if labels is None:
                raise FoveateError(f"{what} 'label' was asked for, but the images have no labels: name a class instead")
            target = labels
        else:
            raise FoveateError(f"{what} {target!r} is unknown: use 'pred', 'label', 'second', a class index or one per image")
    if isinstance(target, Tensor):
        indices = target.detach().to(logits.device)
        indices = indices.clone() if indices.is_inference() else indices  # what a graph keeps was not made in inference mode
    else:
        try:
            indices = torch.as_tensor(target, device=logits.device)
        except (TypeError, ValueError, RuntimeError):
            raise FoveateError(f"{what} {target!r} is not a class index, nor one for each image") from None
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise FoveateError(f"{what} holds {indices.dtype} values, but class indices are integers")
    indices = indices.long()
    indices = indices.clone() if indices.is_inference() else indices
    if indices.ndim == 0:
        indices = indices.expand(size)
    if indices.shape != (size,):
        raise FoveateError(f"{what} has shape {list(indices.shape)}, but there are {size} image(s): give one class per image")
    wrong = (indices < 0) | (indices >= count)
    if wrong.any():
        raise FoveateError(f"{what} {int(indices[wrong][0])} is out of range: the model has {count} classes, 0 to {count - 1}")
    return indices


def strongest_other(logits: Tensor, y: Tensor, head: Head) -> Tensor:
    """The class with the largest logit other than ``y``, one per image, ``[B]``.

    Raises:
        FoveateError: there is no other class.
    """
    if num_classes(logits, head) < 2:
        raise FoveateError("a contrast needs a model with at least 2 classes, and this one has 1")
    if head == "binary":
        return 1 - y
    return logits.detach().scatter(1, y[:, None], float("-inf")).argmax(1)


def told_apart(y: Tensor, other: Tensor, logits: Tensor, head: Head) -> Tensor:
    """The class that ``y`` is asked against, ``[B]``: ``other``, and the strongest other class where both are one.

    Raises:
        FoveateError: there is no other class.
    """
    return torch.where(other == y, strongest_other(logits, y, head), other)


def resolve(
    target: object,
    logits: Tensor,
    *,
    score: str = "logit",
    against: object = None,
    labels: Labels | None = None,
    head: Head | None = None,
) -> Target:
    """The one resolver for methods and metrics: from what a person writes to a :class:`Target`.

    Args:
        target: as in :func:`classes`; or a callable of the logits ``[B,C]`` that returns ``[B]``; or a sequence of
            callables, one per image, each of its image's logits ``[C]``; or a ready Target.
        score: ``logit``, ``probability`` or ``loss``.
        against: the class of a contrast, in the forms of :func:`classes`, or ``"strongest"``: the likeliest class other
            than the target; None for no contrast.

    Raises:
        FoveateError: a wrong count, a class out of range, an unknown word or score.
    """
    head = head_of(logits, head)
    if isinstance(target, Target):
        if len(target.y) != len(logits):
            raise FoveateError(f"the target is for {len(target.y)} image(s), but there are {len(logits)}")
        if against is not None or score not in ("logit", target.name):
            raise FoveateError(
                f"the target is bound to {target.name!r} already: make another with the score or contrast you want"
            )
        return target
    callables = callable(target) or (
        isinstance(target, Sequence) and not isinstance(target, str) and len(target) > 0 and all(callable(t) for t in target)
    )
    if callables:
        if against is not None:
            raise FoveateError("'against' cannot be joined with a callable target: let the callable return the difference")
        return Target(predicted(logits, head), _from_callable(target, len(logits)), "callable")
    y = classes(target, logits, labels, head)
    if against is not None:
        if score != "logit":
            raise FoveateError(f"a contrast is a difference of logits: score {score!r} cannot be joined with 'against'")
        other = (
            strongest_other(logits, y, head) if against == "strongest" else classes(against, logits, labels, head, "against")
        )
        if (same := other == y).any():
            raise FoveateError(
                f"class {int(y[same][0])} is asked against itself: 'against' must name another class than the target"
            )
        return Target(y, contrast(other, head), "contrast" if head != "binary" else "logit", other)
    if score not in SCORES:
        raise FoveateError(f"score {score!r} is unknown: use {', '.join(map(repr, SCORES))}")
    return Target(y, SCORES[score](head), score)


def _from_callable(target: object, size: int) -> Score:
    """A score from a user's callable(s), with the shape of what they return checked at every call."""
    if callable(target):
        function = target
        pair = _positional(function) >= 2

        def score(logits: Tensor, y: Tensor) -> Tensor:
            value = function(logits, y) if pair else function(logits)
            if not isinstance(value, Tensor) or value.shape != (len(logits),):
                given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise FoveateError(
                    f"a target callable returns one score an image, a tensor of shape [{len(logits)}]; it returned {given}"
                )
            return value

        return score
    functions = list(target)  # type: ignore[call-overload]
    if len(functions) != size:
        raise FoveateError(f"{len(functions)} target callables were given for {size} image(s): give one per image")

    def per_image(chosen: list[Callable[[Tensor], Tensor]]) -> Score:
        def score(logits: Tensor, y: Tensor) -> Tensor:
            return torch.stack([function(row).reshape(()) for function, row in zip(chosen, logits, strict=True)])

        score.of_rows = lambda index: per_image([chosen[i] for i in index.tolist()])  # type: ignore[attr-defined]
        return score

    return per_image(functions)


def _positional(function: Callable[..., object]) -> int:
    """How many required positional arguments a callable takes; 1 where that cannot be told."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
