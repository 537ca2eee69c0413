"""What is asked of images, and the maps that answer it: of a batch in one run, or of one photograph in several crops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from foveate.cli.images import Picture
from foveate.errors import DegenerateMapWarning

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.data.crops import Crops
    from foveate.explanation.explain import Explanation
    from foveate.models.classifier import Classifier
    from foveate.precision import Precision
    from foveate.targets import Head, Target

AT_ONCE = 16  # images, or crops of one, that share one run of the model, at most
Scorer = Callable[[Iterable["Tensor"]], "Tensor"]


@dataclass(frozen=True)
class Question:
    """What is asked of every image, and what is written of it."""

    methods: list[str]
    layer: str | list[str]
    fuse: Any
    targets: list[str | int]
    against: str | int | None
    head: Head | None
    precision: Precision
    settings: dict[str, dict[str, Any]]
    only_errors: bool

    @property
    def needs_labels(self) -> bool:
        return self.only_errors or "label" in (*self.targets, self.against)


@dataclass
class Unanswered:
    """Methods that have no answer, with the reason: those that were asked for, and those that came with a group."""

    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, answers: Mapping[str, Explanation], refused: Mapping[str, str]) -> None:
        """Note those of one batch; a method that misses in every answer for one reason is named once."""
        left_out = {
            f"{name} for {key}" if key else name: reason
            for key, answer in answers.items()
            for name, reason in answer.left_out.items()
        }
        self.refused |= _once(refused, len(answers))
        self.left_out |= _once(left_out, len(answers))


def _once(reasons: Mapping[str, str], answers: int) -> dict[str, str]:
    methods: dict[str, list[str]] = {}
    for name in reasons:
        methods.setdefault(name.partition(" for ")[0], []).append(name)
    whole = {
        method: reasons[names[0]]
        for method, names in methods.items()
        if len(names) == answers and len({reasons[name] for name in names}) == 1
    }
    return whole | {name: reason for name, reason in reasons.items() if name.partition(" for ")[0] not in whole}


@dataclass(frozen=True)
class Asked:
    """The maps of a batch, and how it is asked what is left behind them.

    Attributes:
        answers: by question; their images are those that maps are laid over.
        logits: ``[B,C]`` of the images, run as masked images are: two precisions differ by more than a map may change.
        score: logits of masked images.
        grid: of the layer, in words.
    """

    answers: dict[str, Explanation]
    logits: Tensor
    score: Scorer
    grid: str


def ask(classifier: Classifier, read: Sequence[Picture], question: Question, refused: dict[str, str]) -> Asked:
    """The answers for images of one size.

    Pictures that are seen in crops come one at a time.

    Raises:
        FoveateError: the question is none for this model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateMapWarning)  # said of each image, by its name
        (picture, *_) = read
        if picture.crops is None:
            return _ask_whole(classifier, read, question, refused)
        return _ask_in_crops(classifier, picture, picture.crops, question, refused)


def wrong(classifier: Classifier, read: Sequence[Picture], head: Head | None) -> list[Picture]:
    """Those that the model gets wrong."""
    import torch

    from foveate.targets import predicted

    if not read:
        return []
    if read[0].crops is None:
        logits, kind = _logits(classifier, torch.stack([picture.x for picture in read]), head)
    else:
        logits, kind = _mean_logits(classifier, read[0], head)
    said = predicted(logits, kind).tolist()
    return [picture for picture, index in zip(read, said, strict=True) if index != picture.label]


def _logits(classifier: Classifier, x: Tensor, head: Head | None) -> tuple[Tensor, Head]:
    import torch

    from foveate.runtime.model import read_logits
    from foveate.targets import head_of

    first = next(classifier.parameters(), None)
    with torch.no_grad():
        logits = read_logits(classifier(x if first is None else x.to(first.device, first.dtype)))
    return logits, head_of(logits, head)


def _mean_logits(classifier: Classifier, picture: Picture, head: Head | None) -> tuple[Tensor, Head]:
    import torch

    from foveate.data.crops import mean_logits

    assert picture.crops is not None
    found = [_logits(classifier, part, head) for part in picture.crops.cut(picture.x).split(AT_ONCE)]
    return mean_logits(torch.cat([logits for logits, _ in found]), found[0][1]), found[0][1]


def _ask_whole(classifier: Classifier, read: Sequence[Picture], question: Question, refused: dict[str, str]) -> Asked:
    import torch

    from foveate.explanation.explain import explain, explain_each

    x = torch.stack([picture.x for picture in read])
    labels = torch.tensor([picture.label for picture in read]) if question.needs_labels else None
    options: dict[str, Any] = {
        "layer": question.layer,
        "fuse": question.fuse,
        "labels": labels,
        "head": question.head,
        "precision": question.precision,
        "settings": question.settings,
        "refused": refused,
    }
    if len(question.targets) > 1:
        answers: dict[str, Explanation] = explain_each(classifier, x, question.methods, targets=question.targets, **options)
    else:
        target, against = question.targets[0], question.against
        answers = {"": explain(classifier, x, question.methods, target=target, against=against, **options)}
    first = next(iter(answers.values()))
    capture = first.capture  # of all of them
    logits = capture.score(capture.images) if capture.precision != "fp32" else capture.logits.detach()
    return Asked(answers, logits, capture.score, str(capture.layout()) if first.layer else "")


def _ask_in_crops(classifier: Classifier, picture: Picture, crops: Crops, question: Question, refused: dict[str, str]) -> Asked:
    """One class is explained in all crops, that of the mean of their probabilities; their maps are averaged where they meet."""
    import torch

    from foveate.data.crops import mean_logits
    from foveate.explanation.explain import Asking
    from foveate.targets import resolve, strongest_other

    options = (question.methods, question.layer, question.fuse, question.head, None, question.precision, question.settings)
    parts = [Asking.of(classifier, part, *options) for part in crops.cut(picture.x).split(AT_ONCE)]
    captures, head = [part.capture for part in parts], parts[0].capture.head
    logits = mean_logits(torch.cat([capture.logits.detach() for capture in captures]), head)
    labels = None if picture.label is None else torch.tensor([picture.label])
    answers, answered = dict[str, "Explanation"](), set[str]()
    for key, target, against in _resolved(question, logits, labels, head):
        aim = resolve(target, logits, against=against, labels=labels, head=head)
        other, settings = None if aim.other is None else int(aim.other), dict[str, dict[str, Any]]()
        if other is None:  # one class for all crops, also for methods that choose one
            for record in (record for record in parts[0].records if record.contrasts):
                chosen = parts[0].own.get(record.name, {}).get("against")
                if chosen is None or chosen == "strongest":
                    settings[record.name] = {"against": int(strongest_other(logits, aim.y, head))}
        optional = answered if against is not None and len(question.targets) > 1 else ()  # these may pass over contrasts
        found = [
            part.answer(
                part.capture.target(int(aim.y), against=other), key, settings=settings, optional=optional, refused=refused
            )
            for part in parts
        ]
        answers[key] = _joined(found, crops, picture, replace(aim, name=found[0].target.name))
        answered |= answers[key].maps.keys()

    def score(images: Iterable[Tensor]) -> Tensor:
        """The means over the crops of each image, ``[N,C]``."""
        rows = []
        for image in images:
            for one in image:
                pieces = crops.cut(one).split(AT_ONCE)
                found = [capture.score(piece) for capture, piece in zip(captures, pieces, strict=True)]
                rows.append(mean_logits(torch.cat(found), head))
        return torch.cat(rows)

    first = next(iter(answers.values()))
    grid = f"{captures[0].layout()} in each of {len(crops)} crops" if first.layer else ""
    precise = captures[0].precision == "fp32"
    return Asked(answers, first.seen.logits if precise else score([picture.x[None]]), score, grid)


def _resolved(question: Question, logits: Tensor, labels: Tensor | None, head: Head) -> list[tuple[str, Any, Any]]:
    """Each question to one image: its name, its class, and the class it is asked against."""
    from foveate.targets import resolve, told_apart

    if len(question.targets) == 1:
        return [("", question.targets[0], question.against)]
    classes = {str(target): resolve(target, logits, labels=labels, head=head).y for target in question.targets}
    (first, own), *others = classes.items()
    contrasts = [(f"{first}-{name}", own, told_apart(own, y, logits, head)) for name, y in others]
    return [*((name, y, None) for name, y in classes.items()), *contrasts]


def _joined(found: Sequence[Explanation], crops: Crops, picture: Picture, aim: Target) -> Explanation:
    """The explanation of a photograph from those of its crops."""
    import torch

    from foveate import maps
    from foveate.data.crops import mean_logits
    from foveate.explanation.explain import Explanation

    first = found[0]
    names = [name for name in first.maps if all(name in answer.maps for answer in found)]
    raw = {name: crops.join(torch.cat([answer.raw[name] for answer in found]).float())[None] for name in names}
    logits = mean_logits(torch.cat([answer.seen.logits for answer in found]), first.seen.head)
    seen = replace(first.seen, x=picture.x[None].to(logits.device), logits=logits)
    joined = Explanation(maps.prepare_all(raw, crops.size), raw, aim, first.layer, seen)
    for name in names:
        errors = [answer.completeness_error[name] for answer in found]
        target = first.targets[name]
        joined.targets[name] = aim if target is first.target else target.rows(torch.zeros_like(aim.y))
        whole = [error for error in errors if error is not None]
        joined.completeness_error[name] = torch.cat(whole).abs().max()[None] if len(whole) == len(found) else None
        joined.seconds[name] = sum(answer.seconds[name] for answer in found)
        joined.degenerate[name] = maps.is_constant(maps.relu(raw[name]))
        facts = [answer.facts[name] for answer in found]
        same = [key for key in facts[0] if all(key in own for own in facts)]
        joined.facts[name] = {key: torch.cat([own[key] for own in facts]).float().mean()[None] for key in same}
        remarks = list(dict.fromkeys(remark for answer in found for remark in answer.remarks[name]))
        if flat := sum(int(answer.degenerate[name].sum()) for answer in found):
            remarks.append(f"nothing speaks for the class in {flat} of {len(crops)} crops")
        joined.remarks[name] = ["; ".join(remarks)] if remarks else []
    for answer in found:
        joined.left_out.update(answer.left_out)
    return joined
