"""What is asked of a batch of images, the answers, and what is drawn and said of each image."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.drawing import Drawing, Drawn, Studio, named_class
from foveate.cli.images import Picture
from foveate.errors import DegenerateMapWarning, FoveateError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.explain import Explanation
    from foveate.models.load import Classifier
    from foveate.report.sheets import About


@dataclass(frozen=True)
class Question:
    """What is asked of every image, and what is written of it."""

    methods: list[str]
    layer: str | list[str]
    fuse: Any
    targets: list[str | int]
    against: str | int | None
    head: Any
    precision: Any
    settings: dict[str, dict[str, Any]]
    only_errors: bool

    @property
    def needs_labels(self) -> bool:
        return self.only_errors or "label" in (*self.targets, self.against)


@dataclass
class Missing:
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


def explain_batch(
    classifier: Classifier, read: Sequence[Picture], question: Question, folder: Path, missing: Missing, studio: Studio
) -> Iterator[dict[str, Any]]:
    """The entries of a batch in the document, each after its pictures went to the studio.

    Raises:
        FoveateError: no method has an answer, or the question is none for this model.
    """
    import torch

    if question.only_errors:
        with torch.inference_mode():
            said = _predicted(classifier, torch.stack([picture.x for picture in read]), question.head).tolist()
        read = [picture for picture, index in zip(read, said, strict=True) if index != picture.label]
        if not read:
            return
    x = torch.stack([picture.x for picture in read])
    labels = torch.tensor([picture.label for picture in read]) if question.needs_labels else None
    refused: dict[str, str] = {}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateMapWarning)  # said of each image, by its name
        answers = _ask(classifier, x, question, labels, refused)
    missing.add(answers, refused)
    capture = next(iter(answers.values())).capture  # of all of them
    # As masked images are run: two precisions differ by more than a map may change.
    logits = capture.score(capture.images) if capture.precision != "fp32" else capture.logits.detach()
    asked = {key: Answer.of(key if len(answers) > 1 else "", answer, logits) for key, answer in answers.items() if answer.maps}
    if not asked:
        raise FoveateError("; ".join(dict.fromkeys(refused.values())))
    methods = sum(sum(answer.seconds.values()) for answer in answers.values())
    shared = (time.perf_counter() - start - methods) / len(read)
    for i, picture in enumerate(read):
        yield _entry(classifier, list(asked.values()), i, picture, folder, shared, studio)


def _predicted(classifier: Classifier, x: Tensor, head: Any) -> Tensor:
    from foveate.classifier import read_logits
    from foveate.targets import head_of, predicted

    first = next(classifier.parameters(), None)
    logits = read_logits(classifier(x if first is None else x.to(first.device, first.dtype)))
    return predicted(logits, head_of(logits, head)).cpu()


def _ask(
    classifier: Classifier, x: Tensor, question: Question, labels: Tensor | None, refused: dict[str, str]
) -> dict[str, Explanation]:
    from foveate.explain import explain, explain_each

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
        return explain_each(classifier, x, question.methods, targets=question.targets, **options)
    target, against = question.targets[0], question.against
    return {"": explain(classifier, x, question.methods, target=target, against=against, **options)}


@dataclass(frozen=True)
class Answer:
    """The maps of a batch for one question, and the probability of its class on each image and behind each map.

    Of a contrast also the share of the class between the two, ``sigmoid(y_c - y_other)``, which is what it is about; NaN
    where a method asks for none.
    """

    key: str
    explanation: Explanation
    before: Tensor  # [B]
    after: Tensor  # [methods,B]
    share_before: Tensor  # [methods,B]
    share_after: Tensor  # [methods,B]

    @classmethod
    def of(cls, key: str, explanation: Explanation, logits: Tensor) -> Answer:
        """Mask every image by every map, and run them; ``logits [B,C]`` are of the images as they are."""
        import torch

        from foveate.maps import apply_mask
        from foveate.targets import log_probability

        capture, y, maps = explanation.capture, explanation.target.y, explanation.maps.values()
        masked = (apply_mask(capture.x.detach(), saliency) for saliency in maps)
        behind = capture.score(masked).view(len(maps), len(y), -1)  # [methods,B,C]
        before = log_probability(logits, y, capture.head).exp()
        after = torch.stack([log_probability(own, y, capture.head).exp() for own in behind])
        shares = torch.full((2, *after.shape), torch.nan, dtype=after.dtype, device=after.device)
        for row, name in enumerate(explanation.maps):
            target = explanation.targets[name]
            if target.name == "contrast":
                shares[0, row] = target.log_probability(logits, capture.head).exp()
                shares[1, row] = target.log_probability(behind[row], capture.head).exp()
        return cls(key, explanation, before, after, *shares)

    def shown(self, row: int, i: int, contrast: bool) -> tuple[str, float, float]:
        """What a picture says of a map: the name of a number, the number before, and behind the map."""
        if contrast and math.isfinite(self.share_before[row, i]):  # of one logit, p is the share already
            return "share", float(self.share_before[row, i]), float(self.share_after[row, i])
        return "p", float(self.before[i]), float(self.after[row, i])

    def question(self, i: int) -> tuple[int, int | None]:
        """The class that is explained of an image, and the one it is told from."""
        target = self.explanation.target
        return int(target.y[i]), int(target.other[i]) if target.name == "contrast" and target.other is not None else None


def _entry(
    classifier: Classifier, asked: list[Answer], i: int, picture: Picture, folder: Path, shared: float, studio: Studio
) -> dict[str, Any]:
    """One image: its pictures go to the studio, the numbers are returned. The same question is answered once."""
    from foveate.report.explained import Seen

    by_question: dict[tuple[int, int | None], Answer] = {}
    for answer in asked:
        by_question.setdefault(answer.question(i), answer)
    distinct = list(by_question.values())
    first = asked[0].explanation
    top = _top(first.capture.logits[i].detach(), first.capture.head, classifier)
    item: dict[str, Any] = {
        "file": printable(picture.path),
        "layer": first.layer or None,  # none where no method asked for one
        "grid": str(first.capture.layout()) if first.layer else None,
        "target": int(first.target.y[i]),
        "target_name": classifier.class_name(int(first.target.y[i])),
        "label": picture.label,
        "label_name": None if picture.label is None else classifier.class_name(picture.label),
        "right": None if picture.label is None else picture.label == top[0][0],
        "cropped": round(picture.cropped, 4),
        "top": top,
        "seconds_shared": round(shared, 5),
        "answers": [],
    }
    rows: list[tuple[str, float, dict[str, Drawn]]] = []
    for answer in distinct:
        target, against = answer.question(i)
        document: dict[str, Any] = {
            "question": answer.key or "target",
            "target": target,
            "against": against,
            "target_name": classifier.class_name(target),
            "against_name": None if against is None else classifier.class_name(against),
            "maps": {},
        }
        before, drawn = float(answer.before[i]), {}
        for row, name in enumerate(answer.explanation.maps):
            entry = document["maps"][name] = _map(answer, name, row, i, classifier)
            drawn[name] = _drawn(answer, name, row, i, classifier, entry, document, folder / picture.stem)
            for key, kinds, end in (("overlay", ("all", "overlay"), ".overlay"), ("picture", ("all",), "")):
                if studio.kind in kinds:
                    entry[key] = printable(f"{drawn[name].base}{end}.{studio.form}")
            before = drawn[name].before if entry["against"] == against else before
        item["answers"].append(document)
        rows.append((why(document, indices=True), before, drawn))
    item["maps"] = item["answers"][0]["maps"]
    several = len(distinct) > 1
    sheet = None
    if studio.kind == "sheet" or (studio.kind == "all" and (several or len(item["maps"]) > 1)):
        sheet = folder / f"{picture.stem}.{'answers' if several else 'methods'}"
        item["picture"] = printable(f"{sheet}.{studio.form}")
    if studio.kind != "none":
        seen = Seen.of(first.capture.x[i].detach())
        about = _about(classifier, item, picture)
        studio.take(Drawing(picture.path, picture.frame, about, rows, sheet, picture.shown, item, seen))
    if not several:
        del item["answers"]
    return item


def _about(classifier: Classifier, item: dict[str, Any], picture: Picture) -> About:
    from foveate.report.sheets import About

    layer = f"{item['layer']} ({item['grid']})" if item["layer"] else ""
    label = "" if picture.label is None else named_class(item["label_name"], picture.label)
    channels = 3 if picture.shown is None else len(picture.shown)
    return About(picture.path.name, classifier.name, layer, label, item["right"], picture.cropped, channels)


def _map(answer: Answer, name: str, row: int, i: int, classifier: Classifier) -> dict[str, Any]:
    """The numbers of one map."""
    from foveate.registry import METHODS

    explanation, before, after = answer.explanation, float(answer.before[i]), float(answer.after[row, i])
    record, target, error = METHODS.get(name), explanation.targets[name], explanation.completeness_error[name]
    other = int(target.other[i]) if target.other is not None and not record.control else None
    return {
        "against": other,
        "against_name": None if other is None else classifier.class_name(other),
        "p_before": before,
        "p_after": after,
        "share_before": _finite(float(answer.share_before[row, i])),
        "share_after": _finite(float(answer.share_after[row, i])),
        "completeness_error": float(error[i]) if error is not None else None,
        "seconds": round(explanation.seconds[name] / len(explanation.capture.x), 6),
        "degenerate": bool(explanation.degenerate[name][i]),
        "facts": {key: _plain(values[i]) for key, values in explanation.facts[name].items()},
        "remark": remarks[i] if (remarks := explanation.remarks[name]) else None,
    }


def _drawn(
    answer: Answer,
    name: str,
    row: int,
    i: int,
    classifier: Classifier,
    entry: dict[str, Any],
    document: dict[str, Any],
    stem: Path,
) -> Drawn:
    """What is drawn of one map."""
    from foveate.registry import METHODS

    explanation, record, other = answer.explanation, METHODS.get(name), entry["against"]
    completeness, target = entry["completeness_error"], document["target"]
    end = f".{answer.key}" if answer.key else ""
    base = f"{stem.name}{end}.{name.replace(':', '_')}" + ("" if other is None else f".against_{other}")
    title = f"{record.title}: {named_class(classifier.class_name(target), target)}"
    if record.control:
        title = f"{record.title} (control: it does not look at the model)"
    short_title = f"{record.title} (control)" if record.control else record.title
    if other is not None:
        title += f", and not {named_class(entry['against_name'], other)}"
        if other != document["against"]:
            short_title += f", not {short(entry['against_name'])}"
    note = "" if completeness is None else f"completeness error {completeness:.1e}"
    if entry["degenerate"]:
        note = "nothing here speaks for the class"
    measure, before, after = answer.shown(row, i, contrast=other is not None and document["against"] is not None)
    raw, size = explanation.raw[name][i].detach().float().cpu().clone(), explanation.capture.size
    return Drawn(stem.with_name(base), title, short_title, raw, size, record.signed, measure, before, after, note)


def why(answer: dict[str, Any], indices: bool = False) -> str:
    """The question of an answer in words, its classes with their indices or without."""
    word = {"pred": "predicted: ", "label": "label: ", "second": "runner-up: "}.get(answer["question"], "")
    names = [
        named_class(answer[f"{side}_name"], answer[side]) if indices else short(answer[f"{side}_name"])
        for side in ("target", "against")
        if answer[side] is not None
    ]
    return f"{word}why {names[0]}" if len(names) == 1 else f"why {names[0]}, not {names[1]}"


def _top(logits: Tensor, head: str, classifier: Classifier, count: int = 5) -> list[list[Any]]:
    import torch

    if head == "binary":
        p = torch.stack([(-logits[0]).sigmoid(), logits[0].sigmoid()])
    else:
        p = logits.softmax(0) if head == "softmax" else logits.sigmoid()
    values, indices = p.topk(min(count, len(p)))
    return [[i, classifier.class_name(i), round(v, 6)] for i, v in zip(indices.tolist(), values.tolist(), strict=True)]


def _plain(value: Any) -> Any:
    return _finite(value.item())


def _finite(number: Any) -> Any:
    """A number as JSON has it: NaN and infinity are null there."""
    return None if isinstance(number, float) and not math.isfinite(number) else number


def short(name: str) -> str:
    """The first of a class's synonyms."""
    return name.split(",")[0]
