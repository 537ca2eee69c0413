"""Evaluation: a run of methods and metrics as table.csv, table.md, prevalence.csv, run.json and report.html."""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate._version import __version__
from foveate.data.labels import images_of
from foveate.disk.files import replacing, write_text
from foveate.errors import DegenerateMapWarning, ImageError, printable
from foveate.evaluation import runs
from foveate.evaluation.evaluate import Plan
from foveate.evaluation.findings import advice, findings
from foveate.evaluation.prevalence import EVERY, Prevalence, prevalence
from foveate.evaluation.results import MAP, MODEL, Results, plain, read, with_accuracy
from foveate.evaluation.statistics import disagreement, metric_of
from foveate.models.normalisation import about_input
from foveate.overlay import HEAT, heat, ramp
from foveate.records import GROUPS
from foveate.registry import METHODS, is_control, title_of
from foveate.report import pictures, tables
from foveate.report.page import render
from foveate.report.pictures import Thumb, digits, grey

if TYPE_CHECKING:
    import pandas as pd

    from foveate.models.classifier import Classifier

GALLERY = 200  # images at most, so that the page stays a file one can send
CELLS = 4000  # maps at most
THUMB = 200  # pixels
CLASSES = 8  # whose mean maps are shown


ASKED = {"label": "the label is explained", "pred": "the predicted class is explained", "second": "the runner-up is explained"}
LINKS = {
    "faithfulness": "What the model needs",
    "localization": "On the object",
    "sanity": "Model and class",
    "sparsity": "Concentrated",
    "cost": "Cost",
    "other": "Other columns",
}

FAINT = 0.5  # the largest value of a small map of cells is above, also where one cell alone is hot
SmallMaps = Mapping[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class Written:
    """What was written, for the terminal and for ``--json``."""

    frame: pd.DataFrame
    results: Results
    plan: Plan
    findings: list[str]
    advice: str = ""

    def protocol_line(self) -> str:
        """The protocol in one line."""
        shown = [metric_of(column) for column in tables.columns(self.frame)]
        records = {record.name: record for record in shown if record is not None and record.name != "cost"}
        protocol = self.plan.protocol
        parts = [f"{name} {protocol.digest(record)}" for name, record in records.items()]
        return (
            f"protocol {protocol.name}, class {protocol.target}, 95 % intervals over {len(self.results)} images; "
            + ", ".join(parts)
        )

    def document(self, folder: Path) -> dict[str, Any]:
        """For ``--json``."""
        document: dict[str, Any] = {"table": {}, "costs": {}, "model": {}, "differences": {}}
        for (method, column), line in self.frame.iterrows():
            record = metric_of(column)
            cell = {key: plain(line[key]) for key in ("mean", "low", "high")} | {"n": int(line["n"])}
            cell |= {"rank": [int(line["rank"]), int(line["rank_last"])]} if line["rank"] else {}
            part = "model" if method == MODEL else "costs" if record is not None and record.name == "cost" else "table"
            if part == "model":
                document[part][column] = cell
            else:
                document[part].setdefault(method, {})[column] = cell
            if part == "table" and np.isfinite(line["difference"]):
                names = ("difference", "difference_low", "difference_high")
                change = {key.removeprefix("difference_"): plain(line[key]) for key in names}
                document["differences"].setdefault(method, {})[column] = change
        document["accuracy"] = document["model"].get("accuracy")
        failures = [{"file": file, "reason": reason} for file, reason in self.results.failures]
        document |= {"missing": self.results.missing}
        document |= {"out": printable(folder), "failures": failures, "degenerate": self.results.degenerate}
        agreement = disagreement(self.frame)
        document["agreement"] = {a: {b: plain(v) for b, v in line.items()} for a, line in agreement.to_dict().items()}
        document |= {
            "left_out": self.results.left_out,
            "findings": self.findings,
            "advice": self.advice,
            "protocol": self.plan.protocol.record(),
        }
        return document | {"baseline": self.frame.attrs["baseline"], "report": str(folder / "report.html")}


def about(plan: Plan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run.json`` says about a run: the call, the protocol, the versions."""
    names = {"numpy": np.__version__, "torch": torch.__version__, "foveate": __version__, "python": platform.python_version()}
    settings = {name: dict(own) for name, own in plan.own.items()}
    return {"arguments": {**arguments, "settings": settings}, "protocol": plan.protocol.record(), "versions": names}


def write(
    folder: Path,
    results: Results,
    plan: Plan,
    source: Any,
    classifier: Classifier,
    baseline: str | None,
    arguments: Mapping[str, Any],
) -> Written:
    """Everything that is made of the rows of a run, which is finished with this."""
    runs.write_record(folder, runs.read_record(folder) | {"finished": True})  # the rows are complete, whatever comes now
    results = with_accuracy(results)
    frame = results.table(baseline)
    said = [*findings(frame, results), *_accuracy(frame, results), *about_input(classifier)]
    written = Written(frame, results, plan, said, advice(frame, results))
    digests = [metric_of(column) for column in frame.index.get_level_values("column")]
    stored = frame.assign(protocol=[plan.protocol.digest(record) if record else "" for record in digests])
    with replacing(folder / "table.csv") as waiting:
        stored.to_csv(waiting)
    write_text(folder / "table.md", tables.markdown(frame, [*said, *([written.advice] if written.advice else [])]))
    main = frame.attrs["baseline"]
    files = runs.chunks(folder)
    whole = prevalence(lambda: map(read, files), results.methods, main) if plan.keep_maps else {}
    whole = {name: one for name, one in whole.items() if EVERY in one.table.index}  # not where every map is constant
    if whole:
        import pandas as pd

        joined = pd.concat({name: one.table for name, one in whole.items()}, names=["method", "class"])
        with replacing(folder / "prevalence.csv") as waiting:
            joined.to_csv(waiting)
    wanted = {*_gallery(len(results), len(results.methods)), *(whole[main].farthest() if main in whole else ())}
    small = _small_maps(files, wanted)
    page = _content(results, written, source, classifier, whole.get(main), small, arguments)
    render("evaluation.html.j2", folder / "report.html", page)
    record = runs.read_record(folder)
    failures = [{"file": file, "reason": reason} for file, reason in results.failures]
    record |= {"finished": True, "images": len(results), "failures": failures, "degenerate": results.degenerate}
    record |= {"left_out": results.left_out, "missing": results.missing, "findings": said, "advice": written.advice}
    record |= {"baseline": main}
    runs.write_record(folder, record)
    return written


def _accuracy(frame: pd.DataFrame, results: Results) -> list[str]:
    """How much the model gets right, in a sentence; none where no label is known."""
    if (MODEL, "accuracy") not in frame.index:
        return []
    middle, low, high = tables.cell(frame, MODEL, "accuracy")
    what = "images" if images_of(list(results.ids)) is None else "labels"
    return [f"The model gets {middle} % [{low}, {high}] of {int(frame.loc[(MODEL, 'accuracy'), 'n'])} {what} right."]


def _content(
    results: Results,
    written: Written,
    source: Any,
    classifier: Classifier,
    whole: Prevalence | None,
    small: SmallMaps,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    frame, names = written.frame, tables.methods(written.frame)
    shown, model = tables.columns(frame), tables.columns(frame, model=True)
    chosen, places = _gallery(len(results), len(names)), _places(source)
    curves = _curves(results, names)
    data = {
        "methods": [{"name": n, "title": title_of(n), "control": is_control(n)} for n in names],
        "columns": [{"name": c, "title": (known := tables.heading(c)).title, "up": known.better == "Higher"} for c in shown],
        "curves": curves,
        "images": [_image(results, i, classifier, source, places, names, shown, small) for i in chosen],
        "ramp": ramp(HEAT),
    }
    correlation = disagreement(frame)
    protocol = written.plan.protocol
    records = {r.name: r for r in map(metric_of, [*shown, *model]) if r is not None}
    return {
        "title": f"{arguments.get('model', 'model')} on {arguments.get('data', 'data')}",
        "images": len(results),
        "asked": ASKED.get(str(protocol.target), f"class {protocol.target}"),
        "pictured": len(chosen),
        "baseline": title_of(frame.attrs["baseline"]),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "model_row": [(tables.heading(c), *tables.cell(frame, MODEL, c)) for c in model],
        "findings": written.findings,
        "advice": written.advice,
        "failures": results.failures,
        "left_out": [(title_of(name), reason) for name, reason in results.left_out.items()],
        "groups": _groups(frame, names, shown),
        "has_curves": bool(curves),
        "protocol": protocol,
        "settings": [(record.title, protocol.digest(record), protocol.describe(record)) for record in records.values()],
        "methods": [_method(name, written.plan.own.get(name, {})) for name in names],
        "versions": about(written.plan, arguments)["versions"],
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        "correlation": {
            "columns": [tables.heading(column) for column in correlation.columns],
            "rows": [
                (tables.heading(name).title, [None if np.isnan(v) else float(v) for v in row])
                for name, row in zip(correlation.index, correlation.to_numpy(), strict=True)
            ],
        },
        "prevalence": None if whole is None else _prevalence(whole, results, classifier, source, places, small),
    }


def _groups(frame: pd.DataFrame, names: Sequence[str], shown: Sequence[str]) -> list[dict[str, Any]]:
    """A table for each question: its columns, and a line per method."""
    found: dict[str, list[str]] = {}
    for column in shown:
        record = metric_of(column)
        found.setdefault("other" if record is None else record.group, []).append(column)
    return [
        {
            "name": group,
            "link": LINKS[group],
            "question": question,
            "columns": [tables.heading(column) for column in found[group]],
            "lines": [
                {
                    "name": name,
                    "title": title_of(name),
                    "control": is_control(name),
                    "cells": [_cell(frame, name, column) for column in found[group]],
                }
                for name in names
            ],
        }
        for group, question in GROUPS.items()
        if group in found
    ]


def _method(name: str, own: Mapping[str, Any]) -> dict[str, str]:
    record = METHODS.known(name)
    paper = "" if record is None else record.paper
    return {"name": name, "title": title_of(name), "paper": paper, "settings": " ".join(f"{k}={v}" for k, v in own.items())}


def _small_maps(files: Sequence[Path], wanted: set[int]) -> SmallMaps:
    """The small maps of some images, by method and number; one file is in memory at a time."""
    found: dict[tuple[str, int], np.ndarray] = {}
    start = 0
    for path in files:
        part = read(path)
        for index in sorted(wanted & set(range(start, start + len(part)))):
            found |= {(m, index): values[index - start] for (m, column), values in part.values.items() if column == MAP}
        start += len(part)
    return found


def _gallery(count: int, methods: int) -> list[int]:
    """The images of the gallery: all, or as many as the page bears, evenly through the data."""
    most = min(GALLERY, max(1, CELLS // max(1, methods)))
    return list(range(count)) if count <= most else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _cell(frame: pd.DataFrame, method: str, column: str) -> dict[str, Any]:
    middle, low, high = tables.cell(frame, method, column)
    return {
        "value": plain(frame.loc[(method, column), "mean"]) if (method, column) in frame.index else None,
        "mean": middle,
        "low": low,
        "high": high,
        "best": tables.is_best(frame, method, column),
        "change": tables.change(frame, method, column),
        "rank": tables.rank(frame, method, column),
    }


def _curves(results: Results, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The mean curves: by title the lines of the methods, and what is across."""
    found: dict[str, dict[str, Any]] = {}
    shares, across = ["0 %", "25 %", "50 %", "75 %", "100 %"], "share of pixels"
    for curve, title in (("I", "Insertion"), ("D", "Deletion"), ("randomisation", "Randomisation (Spearman)")):
        lines = {n: results.values[n, f"{curve}_curve"] for n in names if (n, f"{curve}_curve") in results.values}
        if not lines:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a stage at which no map was left has no mean
            means = {n: np.nanmean(values, 0) for n, values in lines.items()}
        rounded = {n: [None if np.isnan(v) else round(float(v), 4) for v in values] for n, values in means.items()}
        found[title] = {"lines": rounded, "ticks": shares, "across": across}
        if curve == "randomisation":
            stages = len(next(iter(means.values())))
            ticks = [str(stage + 1) for stage in range(stages)] if stages < 16 else ["1", str(stages)]
            found[title] |= {"ticks": ticks, "across": "stages randomised, from the head"}
    return found


def _image(
    results: Results,
    index: int,
    classifier: Classifier,
    source: Any,
    places: Mapping[str, int],
    names: Sequence[str],
    shown: Sequence[str],
    small: SmallMaps,
) -> dict[str, Any]:
    label, said = int(results.labels[index]), int(results.predicted[index])
    per_image = [c for c in shown if (r := metric_of(c)) is not None and r.name != "cost" and c not in r.pooled]
    values = {n: [digits(results.values[n, c][index]) if (n, c) in results.values else None for c in per_image] for n in names}
    thumb = _thumb(source, places, results.ids[index], index)
    visible = {n: _visible(small[n, index]) for n in names if (n, index) in small}
    return {
        "id": results.ids[index],
        "label": _class_name(classifier, label) if label >= 0 else "",
        "said": _class_name(classifier, said),
        "p": round(float(results.confidence[index]), 3),
        "wrong": label >= 0 and label != said,
        "picture": thumb.picture,
        "aspect": thumb.aspect,
        "columns": per_image,
        "values": values,
        "maps": {n: grey(values.reshape(2 * (round(len(values) ** 0.5),))) for n, (values, _) in visible.items()},
        "alike": [n for n, (_, alike) in visible.items() if alike],  # whose brightest 1 % are shown alike
    }


def _visible(small: np.ndarray) -> tuple[np.ndarray, bool]:
    """A small map as the gallery shows it, and whether its brightest 1 % are alike, as of maps of single pixels.

    The mean over a cell of such a map is far below its largest pixel, and the map would be black at its own scale.
    """
    bright = float(np.sort(small)[int(0.99 * (len(small) - 1))])
    if small.max() > FAINT or bright <= 0:
        return small, False
    return np.minimum(small / bright, 1), True


def _thumb(source: Any, places: Mapping[str, int], name: str, index: int) -> Thumb:
    """The picture of an image, and its width by its height; found by its name: what cannot be read shifts the numbers."""
    try:
        return Thumb.of(source[places.get(name, index)].x[0], THUMB, 78)
    except (ImageError, IndexError):
        return Thumb("", 1.0)


def _places(source: Any) -> dict[str, int]:
    """The number of each image by its name, for data on disk."""
    name = getattr(getattr(source, "dataset", source), "name_of", None)
    return {name(i): i for i in range(len(source))} if callable(name) else {}


def _class_name(classifier: Classifier, index: int) -> str:
    names = getattr(classifier, "class_names", None)
    return names[index].split(",")[0] if names and index < len(names) else f"class {index}"


def _prevalence(
    whole: Prevalence, results: Results, classifier: Classifier, source: Any, places: Mapping[str, int], small: SmallMaps
) -> dict[str, Any]:
    classes = whole.table.drop(index=EVERY)
    classes = classes[classes["n"] > 1].sort_values("n", ascending=False).head(CLASSES)
    panels = []
    for label in [EVERY, *classes.index]:
        line = whole.table.loc[label]
        facts = f"n = {int(line['n'])}"
        if np.isfinite(line["background"]):
            facts += f", {100 * line['background']:.0f} % on the background"
        name = "all images" if label == EVERY else _class_name(classifier, int(label))
        panels.append((name, _panel(whole.mean[label]), _panel(whole.spread[label]), facts))
    return {
        "method": title_of(whole.method),
        "sentence": whole.sentence(),
        "panels": panels,
        "farthest": [
            (
                results.ids[i],
                f"{whole.distance[i]:.2f}",
                _thumb(source, places, results.ids[i], i).picture,
                _panel(small[whole.method, i].reshape(whole.mean[EVERY].shape)),
            )
            for i in whole.farthest()
        ],
    }


def _panel(values: np.ndarray) -> str:
    tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateMapWarning)
        scaled = tensor / tensor.max() if float(tensor.max()) > 0 else tensor
    return pictures.data_uri(pictures.enlarge(heat(scaled), 5), 80)
