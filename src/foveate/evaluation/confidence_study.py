"""The confidence study: does the second order of the loss matter less, the surer a network is?"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from foveate.disk import files
from foveate.disk.text import read_json, read_text
from foveate.errors import FoveateError, NotFiniteError, required
from foveate.evaluation.evaluate import NOT_FINITE, batches, readable
from foveate.methods.second_order.solve import SAME, Unit, path
from foveate.runtime.capture import Capture

if TYPE_CHECKING:
    import pandas as pd

TIE = 1e-9  # of 1 - cosine: below it is the rounding of float32 images
ENOUGH = 20  # images, for a sentence about a trend
SHARED = ("data", "eta", "unit", "images")  # of the studies in one folder, which share a figure
COLUMNS = (
    *("id", "confidence", "cosine", "cosine_dense", "distance", "eta", "largest", "second", "predicted", "factored"),
    *("classes", "products", "error", "seconds", "ratio"),
)


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
    failures: list[tuple[str, str]] | None = None,
) -> pd.DataFrame:
    """One row per image, in ``file`` as they come; images that have a row there already are not run again.

    An image that cannot be read, or on which the model gives NaN, has no row, and is in ``failures`` with the reason.

    Columns: ``id``; ``confidence``, p of the predicted class q; ``cosine`` and ``distance`` (of the directions) between CASO
    and CAFO with the share ``eta`` of zeros; ``cosine_dense`` with ``lambda_1 = 0``; the eigenvalues ``largest`` and
    ``second`` and their ``ratio``; ``predicted``, the theorem's ratio ``C q``; ``factored``, ``classes``, ``products``,
    ``error`` (the bound of the solver) and ``seconds`` of the method, an image.

    Source: Singla et al., ICML 2019, section on confidence; the ratio for uniform residual mass is exact.

    Raises:
        FoveateError: ``file`` is there and is not such a table; the network has no softmax head.
    """
    required("confidence", "pandas")
    import pandas as pd

    known_rows = read_rows(file)
    done = set(known_rows["id"])
    failures = [] if failures is None else failures
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        data = readable(data, range(len(data)), failures)
    for batch in batches(data, batch_size):
        if set(batch.id) <= done:
            if tick is not None:
                tick(len(batch))
            continue
        try:
            capture = Capture(model, batch.x)
        except NotFiniteError as error:
            failures += [(batch.id[i], f"{batch.id[i]}: {NOT_FINITE}") for i in error.rows]
            batch = batch.only([i for i in range(len(batch)) if i not in error.rows])
            if not len(batch):
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
        known_rows = pd.concat([known_rows, rows], ignore_index=True) if len(known_rows) else rows
        with files.replacing(file) as waiting:  # some 150 bytes per image: nothing beside its eigenvalues
            known_rows.to_csv(waiting, index=False)
        done |= set(batch.id)
        if tick is not None:
            tick(len(batch))
    if not len(known_rows):
        raise FoveateError(f"no image can be measured, the first: {failures[0][1]}" if failures else "there is no image")
    return read_rows(file)


def read_rows(file: Path) -> pd.DataFrame:
    """The rows of :func:`study` in a file, none where it is not there; a last line that was cut short is left out.

    Raises:
        FoveateError: it is another table, or damaged.
    """
    required("confidence", "pandas")
    import pandas as pd

    try:
        text = read_text(file) if file.exists() else ""
        head = ",".join(COLUMNS) + "\n"
        if not (text.startswith(head) or head.startswith(text)):
            raise ValueError("its columns are others")
        rows = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1] or head), dtype=str, keep_default_na=False)
        for name in COLUMNS[1:]:
            rows[name] = [float(text) if text else float("nan") for text in rows[name]]
    except ValueError as error:  # pandas' own are of its kind, and so is FoveateError
        reason = " ".join(str(error).split())
        raise FoveateError(f"{str(file)!r} is no table of foveate confidence: {reason}; name another --out") from None
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
    required("a trend", "scipy")
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


def read_call(file: Path) -> dict[str, Any] | None:
    """What a network was studied with, from the JSON beside its rows; None where the file is of something else."""
    try:
        call = read_json(file)
    except FoveateError:
        return None
    return call if {*SHARED[:3]} <= call.keys() else None


def known(folder: Path) -> dict[str, pd.DataFrame]:
    """The rows of every network that has been studied into a folder, by its name: those whose call lies beside them."""
    pairs = [file for file in sorted(folder.glob("*.json")) if file.with_suffix(".csv").is_file()]
    calls = [file for file in pairs if read_call(file) is not None]
    return {file.stem: read_rows(file.with_suffix(".csv")) for file in calls}
