"""The confidence study, as a figure and as a page: agreement of CASO with CAFO, and eigenvalues, against confidence."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.disk.files import replacing
from foveate.errors import required
from foveate.evaluation.confidence_study import TIE, Trend
from foveate.report.page import render
from foveate.report.pictures import ACCENT, INK, MUTED, WRONG

if TYPE_CHECKING:
    import pandas as pd

COLOURS = (ACCENT, WRONG, "#7048e8", "#5c940d")
MARKERS = ("o", "^", "s", "D")


def draw(rows: Mapping[str, pd.DataFrame], trends: Mapping[str, Trend], path: Path) -> None:
    """Three panels against confidence, a colour and a marker per network; written as ``path`` says by its ending.

    ``1 - cosine`` of CASO and CAFO with a target sparsity, the same without a penalty, and the ratio of the two largest
    eigenvalues with what the theorem says of uniform residual mass, ``C q``, as a line. Spearman's correlations are between
    confidence and cosine.
    """
    required("a figure", "matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.3), dpi=110, layout="constrained")
    axes: Any = figure.subplots(1, 3)
    panels = (("cosine", "sparse: 1 - cosine(CASO, CAFO)"), ("cosine_dense", "no penalty: 1 - cosine((2λ₂I - H)⁻¹g, g)"))
    for number, (name, frame) in enumerate(rows.items()):
        look: dict[str, Any] = {"color": COLOURS[number % 4], "marker": MARKERS[number % 4], "s": 20, "alpha": 0.65}
        look |= {"linewidths": 0}
        unsure = (1 - frame["confidence"]).clip(lower=1e-6)
        for axis, (column, _) in zip(axes, panels, strict=False):
            trend = trends[name].correlation if column == "cosine" else trends[name].without_penalty
            label = f"{name}: Spearman of confidence and cosine {trend[0]:+.2f} [{trend[1]:+.2f}, {trend[2]:+.2f}]"
            axis.scatter(unsure, (1 - frame[column]).clip(lower=TIE), label=label, **look)
        axes[2].scatter(unsure, frame["ratio"], label=f"{name}: median {100 * trends[name].ratio:.2g} % of C q", **look)
        if number == 0:
            classes = float((frame["predicted"] / frame["confidence"]).median())
            q = np.linspace(1e-3, 1 - 1e-6, 400)
            axes[2].plot(1 - q, classes * q, color=INK, linewidth=1.2, label=f"theorem: C q, C = {classes:.0f}")
    for axis in axes[:2]:
        axis.axhline(TIE, color=MUTED, linewidth=0.8, linestyle=":")
        axis.update_datalim([(1, TIE), (1, 10 * TIE)])  # a height also where all is the same
        axis.text(1, TIE * 1.4, "the same, to rounding", fontsize=7.5, color=MUTED)
    for axis, title in zip(axes, (*(title for _, title in panels), "ratio of the two largest eigenvalues"), strict=True):
        axis.set_title(title, fontsize=10, color=INK, loc="left")
        axis.set_xlabel("1 - confidence: sure on the right", fontsize=8.5, color=MUTED)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(1.2, 5e-7)
        axis.tick_params(labelsize=8, colors=MUTED)
        axis.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    with replacing(path) as waiting:
        figure.savefig(waiting, format=path.suffix[1:] or "png", facecolor="white")


COLUMNS_OF_TRENDS = (
    ("images", "Images with a value."),
    (
        "correlation with confidence",
        "Spearman's, of the agreement of CASO and CAFO with p of the predicted class.",
    ),
    ("without a penalty", "The same where no sparsity is asked for."),
    ("median cosine", "Of the directions of CASO and CAFO: 1 where they are the same."),
    ("least cosine", "Of all images."),
    ("below .99", "Share of images whose cosine is below .99: where the second order matters."),
    (
        "ratio over C q",
        "Median ratio of the two largest eigenvalues over what the theorem says of uniform residual mass.",
    ),
    ("eigenvalues with confidence", "Spearman's, of that ratio of eigenvalues with p of the predicted class."),
)


def write(path: Path, figure: Path, trends: Mapping[str, Trend]) -> Path:
    """The page of the study, with its figure inside."""
    content = {
        "names": list(trends),
        "sentences": [trend.sentence(name) for name, trend in trends.items()],
        "figure": "data:image/png;base64," + base64.b64encode(figure.read_bytes()).decode(),
        "columns": COLUMNS_OF_TRENDS,
        "rows": [(name, cells(trend)) for name, trend in trends.items()],
    }
    return render("confidence.html.j2", path, content)


def cells(trend: Trend) -> list[tuple[str, str]]:
    """A network's line: each value, with its interval where it has one."""
    spearman = [_with_interval(values) for values in (trend.correlation, trend.without_penalty, trend.ratio_correlation)]
    return [
        (str(trend.images), ""),
        spearman[0],
        spearman[1],
        (f"{trend.cosine[0]:.4f}", ""),
        (f"{trend.cosine[1]:.4f}", ""),
        (f"{100 * trend.matters:.0f} %", ""),
        (f"{100 * trend.ratio:.2g} %" if np.isfinite(trend.ratio) else "–", ""),
        spearman[2],
    ]


def _with_interval(values: tuple[float, float, float]) -> tuple[str, str]:
    middle, low, high = values
    return (f"{middle:+.2f}", f"{low:+.2f} to {high:+.2f}") if np.isfinite(middle) else ("–", "")
