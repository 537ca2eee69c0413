"""The confidence study: does the second order of the loss matter less, the surer a network is?"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from foveate.capture import Capture
from foveate.errors import FoveateError
from foveate.evaluate import batches
from foveate.methods.caso import SAME, Unit, path
from foveate.text import read_text

TIE = 1e-9  # of 1 - cosine: below it is the rounding of float32 images
COLUMNS = ("id", "confidence", "cosine", "cosine_dense", "predicted", "ratio")  # that a trend is made of
ENOUGH = 20  # images, for a sentence about a trend


@dataclass(frozen=True)
class Trend:
    """What the rows of one network say.

    Attributes:
        images: how many there are.
        correlation: Spearman's, between confidence and the cosine of CASO and CAFO, with its 95 % interval: the talk's
            claim is that it is clearly positive.
        without_penalty: the same where ``lambda_1 = 0``, ``(2 lambda_2 I - H)^-1 g`` against g.
        cosine: median cosine, and the least.
        matters: share of images whose cosine is below .99.
        ratio: median of the two largest eigenvalues' ratio over ``C q``, what the theorem says of uniform residual mass.
        ratio_correlation: Spearman's, between confidence and that ratio of eigenvalues.
    """

    images: int
    correlation: tuple[float, float, float]
    without_penalty: tuple[float, float, float]
    cosine: tuple[float, float]
    matters: float
    ratio: float
    ratio_correlation: tuple[float, float, float]

    def sentence(self, name: str) -> str:
        """The trend in words."""
        middle, low, high = self.correlation
        if self.cosine[1] >= 1 - TIE:
            return f"{name}: CASO and CAFO are the same on all {self.images} images, so that there is no trend in confidence."
        verdict = (
            "rises with confidence" if low > 0 else "falls with confidence" if high < 0 else "shows no trend in confidence"
        )
        verdict = verdict if self.images >= ENOUGH else f"on fewer than {ENOUGH} images says nothing of a trend in confidence"
        theorem = f"{100 * self.ratio:.2g} %" if np.isfinite(self.ratio) else "an unknown part"
        dense, share = self.without_penalty[0], 100 * self.matters
        return (
            f"{name}: the agreement of CASO with CAFO {verdict} (Spearman {middle:+.2f} [{low:+.2f}, {high:+.2f}], "
            f"{self.images} images; without a penalty {dense:+.2f}). The median cosine is {self.cosine[0]:.4f}, the least "
            f"{self.cosine[1]:.4f}, and {share:.0f} % are below {SAME}. The ratio of the two largest eigenvalues is "
            f"{theorem} of C q (median)."
        )


def study(
    model: nn.Module,
    data: Iterable[object],
    file: Path,
    *,
    eta: float = 0.9,
    unit: Unit = "network",
    batch_size: int = 4,
    tick: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """One row an image, appended to ``file`` as they come; images that have a row there already are not run again.

    Columns: ``id``; ``confidence``, p of the predicted class q; ``cosine`` and ``distance`` (of the directions) between CASO
    and CAFO with the share ``eta`` of zeros; ``cosine_dense`` with ``lambda_1 = 0``; the eigenvalues ``largest`` and
    ``second`` and their ``ratio``; ``predicted``, the theorem's ratio ``C q``; ``factored``, ``classes``, ``products``,
    ``error`` (the bound of the solver) and ``seconds`` of the method, an image.

    Source: Singla et al., ICML 2019, section on confidence; the ratio for uniform residual mass is exact.
    """
    done = set(rows_of(file)["id"]) if file.exists() else set()
    for batch in batches(data, batch_size):
        if set(batch.id) <= done:
            if tick is not None:
                tick(len(batch))
            continue
        capture = Capture(model, batch.x)
        if capture.head != "softmax":
            raise FoveateError(f"the study is about softmax networks, and this one has a {capture.head!r} head")
        target = capture.target(None)
        start = time.perf_counter()
        sparse, whole = path(capture, target, [None, 0.0], eta=eta, unit=unit, second=True)
        seconds = (time.perf_counter() - start) / len(batch)
        confidence = capture.logits.detach().double().softmax(1).amax(1)
        rows = pd.DataFrame(
            {
                "id": batch.id,
                "confidence": confidence.tolist(),
                "cosine": sparse.cosine.tolist(),
                "cosine_dense": whole.cosine.tolist(),
                "distance": (2 - 2 * sparse.cosine).clamp(min=0).sqrt().tolist(),
                "eta": sparse.eta.tolist(),
                "largest": sparse.largest.tolist(),
                "second": sparse.second.tolist(),
                "predicted": (capture.logits.shape[1] * confidence).tolist(),
                "factored": sparse.factored.int().tolist(),
                "classes": sparse.classes.tolist(),
                "products": sparse.products.tolist(),
                "error": sparse.error.tolist(),
                "seconds": seconds,
            }
        )
        rows["ratio"] = rows["largest"] / rows["second"].where(rows["second"] > 0)
        rows = rows[~rows["id"].isin(done)]
        rows.to_csv(file, mode="a", header=not file.exists(), index=False)
        done |= set(batch.id)
        if tick is not None:
            tick(len(batch))
    return rows_of(file)


def rows_of(file: Path) -> pd.DataFrame:
    """The rows of a network that has been studied.

    Raises:
        FoveateError: they are damaged.
    """
    text = read_text(file)
    try:
        rows = pd.read_csv(io.StringIO(text), dtype={"id": str})
        if lost := [name for name in COLUMNS if name not in rows or (name != "id" and rows[name].dtype.kind not in "if")]:
            raise ValueError(f"{lost[0]} is not a column of numbers")
    except ValueError as error:  # pandas' own are of its kind
        reason = " ".join(str(error).split())
        raise FoveateError(f"{file} holds no rows of a study: {reason}; use another --out") from None
    return rows


def trend(rows: pd.DataFrame) -> Trend:
    """What the rows of :func:`study` say, with bootstrap intervals over images."""
    confidence = rows["confidence"].to_numpy()
    ratio = rows["ratio"].to_numpy(float)
    return Trend(
        len(rows),
        _spearman(confidence, rows["cosine"].clip(upper=1 - TIE).to_numpy()),
        _spearman(confidence, rows["cosine_dense"].clip(upper=1 - TIE).to_numpy()),
        (float(rows["cosine"].median()), float(rows["cosine"].min())),
        float((rows["cosine"] < SAME).mean()),
        float(np.nanmedian(ratio / rows["predicted"].to_numpy())) if np.isfinite(ratio).any() else float("nan"),
        _spearman(confidence, ratio),
    )


def _spearman(x: np.ndarray, y: np.ndarray, samples: int = 1000) -> tuple[float, float, float]:
    """Spearman's correlation with a 95 % bootstrap interval; NaN with fewer than 3 images."""
    from scipy.stats import rankdata

    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) < 3:
        return (float("nan"),) * 3

    def of(a: np.ndarray, b: np.ndarray) -> float:
        a, b = rankdata(a), rankdata(b)
        if a.std() == 0 or b.std() == 0:
            return float("nan")
        return float(np.corrcoef(a, b)[0, 1])

    generator = np.random.default_rng(0)
    drawn = [of(x[rows], y[rows]) for rows in (generator.integers(0, len(x), len(x)) for _ in range(samples))]
    low, high = np.nanquantile(drawn, [0.025, 0.975]) if np.isfinite(drawn).any() else (float("nan"),) * 2
    return of(x, y), float(low), float(high)


def known(folder: Path) -> dict[str, pd.DataFrame]:
    """The rows of every network that has been studied into a folder, by its name: those whose call lies beside them."""
    calls = [file for file in sorted(folder.glob("*.json")) if file.with_suffix(".csv").is_file()]
    return {file.stem: rows_of(file.with_suffix(".csv")) for file in calls}
