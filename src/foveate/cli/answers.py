"""The answers to what is asked of images, and what is drawn and said of each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.drawing import Drawing, Drawn, Studio, named_class
from foveate.cli.images import Picture
from foveate.cli.questions import Asked, Question, Unanswered, ask, wrong
from foveate.errors import FoveateError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.explanation.explain import Explanation
    from foveate.models.classifier import Classifier
    from foveate.report.sheets import About


def explain_batch(
    classifier: Classifier, read: Sequence[Picture], question: Question, folder: Path, missing: Unanswered, studio: Studio
) -> Iterator[dict[str, Any]]:
    """The entries of a batch in the document, each after its pictures went to the studio.

    Raises:
        FoveateError: no method has an answer, or the question is none for this model.
    """
    if question.only_errors:
        read = wrong(classifier, read, question.head)
    if not read:
        return
    refused: dict[str, str] = {}
    start = time.perf_counter()
    found = ask(classifier, read, question, refused)
    answers, shared = found.answers, time.perf_counter() - start
    missing.add(answers, refused)
    several = len(answers) > 1
    asked = {key: Answer.of(key if several else "", answer, found) for key, answer in answers.items() if answer.maps}
    if not asked:
        raise FoveateError("; ".join(dict.fromkeys(refused.values())))
    methods = sum(sum(answer.seconds.values()) for answer in answers.values())
    left = (time.perf_counter() - start - shared) / len(read)
    seconds = (max(0.0, shared - methods) / len(read), left)
    for i, picture in enumerate(read):
        yield _entry(classifier, list(asked.values()), i, picture, folder, seconds, studio)


@dataclass(frozen=True)
class Answer:
    """The maps of a batch for one question, and the probability of its class on each image and behind each map.

    Of a contrast also the share of the class between the two, ``sigmoid(y_c - y_other)``, which is what it is about; NaN
    where a method asks for none.
    """

    key: str
    explanation: Explanation
    grid: str
    before: Tensor  # [B]
    after: Tensor  # [methods,B]
    share_before: Tensor  # [methods,B]
    share_after: Tensor  # [methods,B]

    @classmethod
    def of(cls, key: str, explanation: Explanation, asked: Asked) -> Answer:
        """Mask every image by every map, and run them."""
        import torch

        from foveate.maps import apply_mask
        from foveate.targets import log_probability

        seen, y, maps, logits = explanation.seen, explanation.target.y, explanation.maps.values(), asked.logits
        masked = (apply_mask(seen.x, saliency) for saliency in maps)
        behind = asked.score(masked).view(len(maps), len(y), -1)  # [methods,B,C]
        before = log_probability(logits, y, seen.head).exp()
        after = torch.stack([log_probability(own, y, seen.head).exp() for own in behind])
        shares = torch.full((2, *after.shape), torch.nan, dtype=after.dtype, device=after.device)
        for row, name in enumerate(explanation.maps):
            target = explanation.targets[name]
            if target.name == "contrast":
                shares[0, row] = target.log_probability(logits, seen.head).exp()
                shares[1, row] = target.log_probability(behind[row], seen.head).exp()
        return cls(key, explanation, asked.grid, before, after, *shares)

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
    classifier: Classifier,
    asked: list[Answer],
    i: int,
    picture: Picture,
    folder: Path,
    seconds: tuple[float, float],
    studio: Studio,
) -> dict[str, Any]:
    """One image: its pictures go to the studio, the numbers are returned. The same question is answered once.

    Args:
        seconds: per image, of what all methods share, and of what is left after each map.
    """
    from foveate.report.explained import thumb

    by_question: dict[tuple[int, int | None], Answer] = {}
    for answer in asked:
        by_question.setdefault(answer.question(i), answer)
    distinct = list(by_question.values())
    first = asked[0].explanation
    top = _top(first.seen.logits[i], first.seen.head, classifier)
    item: dict[str, Any] = {
        "file": printable(picture.path),
        "layer": first.layer or None,  # none where no method asked for one
        "grid": asked[0].grid if first.layer else None,
        "target": int(first.target.y[i]),
        "target_name": classifier.class_name(int(first.target.y[i])),
        "label": picture.label,
        "label_name": None if picture.label is None else classifier.class_name(picture.label),
        "right": None if picture.label is None else picture.label == top[0][0],
        "cropped": round(picture.cropped, 4),
        "crops": None if picture.crops is None else len(picture.crops),
        "top": top,
        "seconds_shared": round(seconds[0], 5),
        "seconds_left": round(seconds[1], 5),
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
        seen = thumb(first.seen.x[i])
        about = _about(classifier, item, picture)
        studio.take(Drawing(picture.path, picture.frame, about, rows, sheet, picture.shown, dict(item), seen))
    if not several:
        del item["answers"]
    return item


def _about(classifier: Classifier, item: dict[str, Any], picture: Picture) -> About:
    from foveate.report.sheets import About

    layer = f"{item['layer']} ({item['grid']})" if item["layer"] else ""
    label = "" if picture.label is None else named_class(item["label_name"], picture.label)
    crops = 0 if picture.crops is None else len(picture.crops)
    channels = 3 if picture.shown is None else len(picture.shown)
    return About(picture.path.name, classifier.name, layer, label, item["right"], picture.cropped, channels, crops)


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
        "seconds": round(explanation.seconds[name] / len(explanation), 6),
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
    measure, before, after = answer.shown(row, i, contrast=document["against"] is not None)
    (height, width), raw = explanation.seen.x.shape[-2:], explanation.raw[name][i].detach().float().cpu().clone()
    return Drawn(stem.with_name(base), title, short_title, raw, (height, width), record.signed, measure, before, after, note)


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
