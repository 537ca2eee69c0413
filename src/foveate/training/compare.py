"""Trainings: runs of ``foveate train`` side by side, one line a recipe, with intervals over seeds and folds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import FoveateError, required
from foveate.evaluation.intervals import correct
from foveate.training.recipe import Recipe
from foveate.training.saved import Trained, read

if TYPE_CHECKING:
    import pandas as pd

VARIES = ("seed", "fold")  # what may differ between runs that make one line
MEASURES = ("mass_inside", "AD", "AG", "AI")
DOWN = ("AD", "train_loss")
IGNORED = ("name", "seed", "measure", "film")


@dataclass(frozen=True)
class Trainings:
    """Runs by recipe.

    Attributes:
        runs: the runs of each line, in the order given.
        frame: index ``recipe, column``: ``mean``, ``low``, ``high`` (95 %, Student's t over runs, within the range that a
            column can have; NaN for one run),
            ``n`` runs, and ``difference``, ``difference_low``, ``difference_high`` to the first line, paired by seed and fold,
            with ``p`` of Student's t, corrected for the recipes that are compared (Holm).
        notes: what a reader should know.
    """

    runs: dict[str, list[Trained]]
    frame: pd.DataFrame
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        """The columns in the order of the first appearance."""
        return list(dict.fromkeys(self.frame.index.get_level_values("column")))


def compare(folders: Sequence[str | Path]) -> Trainings:
    """Training runs as a table: runs that differ in their seed or fold alone make one line.

    Columns: ``train``, ``val``, ``test`` and ``worst_group`` accuracy in [0, 1], ``train_loss`` (the last epoch's plain
    cross-entropy), and of the maps ``mass_inside``, ``AD``, ``AG``, ``AI``, each with its split in front.

    Raises:
        FoveateError: a folder without a finished run, or the same run twice.
    """
    required("compare", "pandas", "scipy")
    import pandas as pd
    from scipy import stats

    lines: dict[str, list[Trained]] = {}
    kinds: dict[str, str] = {}
    notes: list[str] = []
    for folder in dict.fromkeys(map(Path, folders)):
        run = read(folder)
        kind = json.dumps(_kind(run.recipe), sort_keys=True)
        title = kinds.setdefault(kind, _title(run, lines))
        lines.setdefault(title, []).append(run)
    if sum(map(len, lines.values())) < 2:
        raise FoveateError(f"there is nothing to compare {[str(f) for f in folders]} with: name two runs or more")
    epochs = {name: len(runs[0].history) for name, runs in lines.items()}
    if len(set(epochs.values())) > 1:
        notes.append("Budgets differ: " + ", ".join(f"{name} {count} epochs" for name, count in epochs.items()) + ".")
    twice = {name for name, runs in lines.items() if len({_place(run) for run in runs}) < len(runs)}
    if twice:
        raise FoveateError(f"{sorted(twice)[0]} has two runs of one seed and fold: name each once")
    values = {name: [(_place(run), figures(run)) for run in runs] for name, runs in lines.items()}
    first = next(iter(values.values()))
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for name, runs in values.items():
        for column in dict.fromkeys(column for _, known in runs for column in known):
            own = {place: known[column] for place, known in runs if column in known}
            mean, low, high = interval(list(own.values()))
            if column != "train_loss":  # shares and percentages end somewhere, and Student's t does not know it
                top = 100.0 if column.split()[-1] in ("AD", "AG", "AI") else 1.0
                low, high = float(np.clip(low, 0, top)), float(np.clip(high, 0, top))
            cell = {"mean": mean, "low": low, "high": high, "n": float(len(own))}
            base = {place: known[column] for place, known in first if column in known}
            both = [own[place] - base[place] for place in own if place in base]
            if runs is not first and both:
                cell |= dict(zip(("difference", "difference_low", "difference_high"), interval(both), strict=True))
                if np.isfinite(cell["difference_low"]):
                    cell["p"] = float(stats.ttest_1samp(both, 0).pvalue)
            cells[name, column] = cell
    for column in {column for _, column in cells}:
        correct([cell for (_, c), cell in cells.items() if c == column], "p")
    alike = [f"{c.replace('_', ' ')} of {name}" for (name, c), cell in cells.items() if cell["n"] > 1 and np.isnan(cell["low"])]
    if alike:
        notes.append(f"All runs gave the same value, which leaves no interval: {', '.join(alike)}.")
    frame = pd.DataFrame.from_dict(cells, orient="index")
    for key in ("difference", "difference_low", "difference_high", "p"):
        if key not in frame:
            frame[key] = np.nan
    frame.index = pd.MultiIndex.from_tuples(list(cells), names=["recipe", "column"])
    return Trainings(lines, frame, notes)


def figures(run: Trained) -> dict[str, float]:
    """The numbers of one run, by column."""
    record = run.record
    found = {split: float(value) for split, value in record["accuracy"].items()}
    if "worst_group" in record:
        found["worst_group"] = float(record["worst_group"]["accuracy"])
    for split, measures in record["maps"].items():
        found |= {f"{split} {name}": float(measures[name]["mean"]) for name in MEASURES if name in measures}
    if run.history:
        found["train_loss"] = run.history[-1]["train_loss"]
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t over runs; none for a single one, or where all are equal."""
    known = np.asarray(values, float)
    mean = float(known.mean())
    if len(known) < 2 or np.ptp(known) <= 1e-12 * abs(mean):
        return mean, float("nan"), float("nan")
    required("an interval", "scipy")
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / np.sqrt(len(known)))
    return mean, mean - half, mean + half


def better(column: str) -> int:
    """1 where more is better, -1 where less is."""
    return -1 if column.split()[-1] in DOWN else 1


def _kind(recipe: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(ValueError):  # a run of an older version lacks what has come since: the defaults
        recipe = Recipe.model_validate(recipe).model_dump(mode="json")
    kept = {key: value for key, value in recipe.items() if key not in IGNORED}
    if isinstance(kept.get("data"), dict):
        kept["data"] = {key: value for key, value in kept["data"].items() if key != "fold"}
    return kept


def _place(run: Trained) -> tuple[int, int]:
    data = run.recipe["data"]
    return int(run.recipe["seed"]), int(data.get("fold", 0)) if isinstance(data, dict) else 0


def _title(run: Trained, lines: dict[str, list[Trained]]) -> str:
    """The recipe's name; where another line has it, with what differs."""
    if run.name not in lines:
        return run.name
    before, now = _kind(lines[run.name][0].recipe), _kind(run.recipe)
    changed = [key for key in now if before.get(key) != now[key]]
    short = [f"{key.replace('_', ' ')} {now[key]}" for key in changed if not isinstance(now[key], (dict, list))]
    title = f"{run.name}, {', '.join(short or [f'other {key}' for key in changed])}"
    return title if title not in lines else f"{title} ({run.folder.name})"
