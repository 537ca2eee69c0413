"""Results: every value of every image, in memory and as parquet files, one a chunk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.disk import files
from foveate.errors import FoveateError, printable, required

if TYPE_CHECKING:
    import pandas as pd

MODEL = "(model)"  # the row of what is said about the model and not about a map
MAP = "map"  # the curve that holds small maps
MAP_SIDE = 28
MARK, BLANK = b"foveate.blake2b=", b"0" * 32  # in the footer: the digest of the file, with zeros where it stands itself
REMEDY = "foveate evaluate ... --resume measures its batch again"
Key = tuple[str, str]
MissingCounts = dict[str, dict[str, dict[str, int]]]


@dataclass
class Results:
    """Values of some images, aligned: row i of every array belongs to image i.

    Attributes:
        ids: one name per image.
        values: by ``(method, column)``: ``[N]`` values, NaN where undefined, or ``[N,k]`` curves.
        labels, predicted: class of each image; -1 where no label is known.
        confidence: probability of the predicted class, ``[N]``.
        degenerate: how many maps of each method were constant.
        failures: images that were left out, with the reason: files that cannot be read, images on which the model gives NaN.
        left_out: methods that do not apply to this model, with the reason.
        protocol: how it was measured, as ``run.json`` has it; only of :func:`foveate.measure`.
        same: methods whose maps were equal on every image, by the method they equal.
        missing: how many images have no value, by method, column and reason.
        contents: what each image was, as :func:`foveate.evaluation.identity.contents` says it; only of runs on disk.
    """

    ids: list[str] = field(default_factory=list)
    values: dict[Key, np.ndarray] = field(default_factory=dict)
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    predicted: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(0))
    degenerate: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    missing: MissingCounts = field(default_factory=dict)
    contents: list[str] = field(default_factory=list)
    judged: Any = field(default=None, repr=False, compare=False)  # kept by foveate.evaluation.statistics

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def methods(self) -> list[str]:
        """The methods that have rows, in the order they ran; not the model's own row."""
        return [name for name in dict.fromkeys(method for method, _ in self.values) if name != MODEL]

    def frame(self) -> pd.DataFrame:
        """One row a value: ``id, method, column, value``; curves are left out."""
        required("a table of every value", "pandas")
        import pandas as pd

        flat = {key: values for key, values in self.values.items() if values.ndim == 1}
        if not flat:
            return pd.DataFrame({"id": [], "method": [], "column": [], "value": []})
        names = [name for key in flat for name in [key] * len(self)]
        return pd.DataFrame(
            {
                "id": self.ids * len(flat),
                "method": [method for method, _ in names],
                "column": [column for _, column in names],
                "value": np.concatenate(list(flat.values())),
            }
        )

    def table(self, baseline: str | None = None, *, samples: int = 2000, seed: int = 0) -> pd.DataFrame:
        """Mean, 95 % interval, difference to the baseline and rank of each method and column.

        See :func:`foveate.evaluation.statistics.table`.
        """
        from foveate.evaluation.statistics import table

        return table(self, baseline, samples=samples, seed=seed)


def with_accuracy(results: Results) -> Results:
    """The same with the model's accuracy in percent, where labels are known: it costs no pass, and every table needs it."""
    known = results.labels >= 0
    if not known.any() or (MODEL, "accuracy") in results.values:
        return results
    right = np.where(known, 100.0 * (results.labels == results.predicted), np.nan)
    return replace(results, values={**results.values, (MODEL, "accuracy"): right})


def joined(parts: Iterable[Results]) -> Results:
    """One from several, in their order; a column that some lack is NaN there.

    Parts are taken one at a time, and arrays joined a column at a time: no second copy of everything exists.
    """
    whole, counts = Results(), []
    waiting: dict[Key, dict[int, np.ndarray]] = {}
    about: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    always: set[tuple[str, str]] | None = None
    for place, part in enumerate(parts):
        for key, values in part.values.items():
            waiting.setdefault(key, {})[place] = values
        counts.append(len(part))
        whole.ids += part.ids
        whole.contents += part.contents
        whole.failures += part.failures
        whole.left_out |= part.left_out
        for name, count in part.degenerate.items():
            whole.degenerate[name] = whole.degenerate.get(name, 0) + count
        add_missing(whole.missing, part.missing)
        if len(part):
            about.append((part.labels, part.predicted, part.confidence))
            always = set(part.same.items()) if always is None else always & set(part.same.items())
    if about:
        whole.labels, whole.predicted, whole.confidence = (np.concatenate(arrays) for arrays in zip(*about, strict=True))
        whole.same = dict(sorted(always or ()))
    for key in list(waiting):
        arrays = waiting.pop(key)
        like = max(arrays.values(), key=lambda array: array.shape[-1])
        shapes = [(count, *like.shape[1:]) for count in counts]
        filled = (arrays.get(place, np.full(shape, np.nan, like.dtype)) for place, shape in enumerate(shapes))
        whole.values[key] = np.concatenate([_stretched(a, shape) for a, shape in zip(filled, shapes, strict=True)])
    return whole


def _stretched(curves: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Curves with as many points as others have: images of another size change in another number of steps."""
    if curves.shape == shape:
        return curves
    old, new = np.linspace(0, 1, curves.shape[1]), np.linspace(0, 1, shape[1])
    return np.stack([np.interp(new, old, curve) for curve in curves]).astype(curves.dtype)


def add_missing(whole: MissingCounts, part: MissingCounts) -> None:
    """Add the counts of ``part`` to those of ``whole``."""
    for method, columns in part.items():
        for column, reasons in columns.items():
            known = whole.setdefault(method, {}).setdefault(column, {})
            for reason, count in reasons.items():
                known[reason] = known.get(reason, 0) + count


@dataclass(frozen=True)
class Origin:
    """What a file of results is about.

    Attributes:
        run: the digest of the run's fingerprint.
        images: name, what the list says of it, and what it was (see :mod:`foveate.evaluation.identity`), of each image of the
            batch, also of those that were left out.
    """

    run: str = ""
    images: tuple[tuple[str, str, str], ...] = ()


def write(part: Results, path: Path, origin: Origin | None = None) -> None:
    """One parquet file with the columns ``id, method, column, value, curve``; it is there whole or not at all.

    Its footer has the digest of all its bytes (with zeros in the digest's own place), so that no bit can change unseen,
    be it of a value, of the metadata or of padding; parquet's own checksums know the pages alone, and are there for others.
    """
    required("a run on disk", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys, origin = list(part.values), origin or Origin()
    count = len(part)
    names = [printable(name) for name in part.ids]  # a file's name may be any bytes
    rows = {
        "id": pa.array(names * len(keys), pa.string()).dictionary_encode(),
        "method": pa.array([m for m, _ in keys for _ in range(count)], pa.string()).dictionary_encode(),
        "column": pa.array([c for _, c in keys for _ in range(count)], pa.string()).dictionary_encode(),
        "value": pa.array(
            [None if part.values[k].ndim > 1 else v for k in keys for v in part.values[k].tolist()], pa.float64()
        ),
        "curve": pa.array(
            [v if part.values[k].ndim > 1 else None for k in keys for v in part.values[k].astype(np.float32).tolist()],
            pa.list_(pa.float32()),
        ),
    }
    about = {
        "run": origin.run,
        "images": origin.images,
        "ids": part.ids,
        "keys": keys,
        "labels": part.labels.tolist(),
        "predicted": part.predicted.tolist(),
        "confidence": part.confidence.tolist(),
        "degenerate": part.degenerate,
        "failures": part.failures,
        "left_out": part.left_out,
        "same": part.same,
        "missing": part.missing,
    }
    text = json.dumps(about).replace(MARK.decode(), MARK.decode()[:-1] + "\\u003d")  # the mark stands once, whatever a name is
    table = pa.table(rows).replace_schema_metadata({"foveate": text, "digest": (MARK + BLANK).decode()})
    stream = pa.BufferOutputStream()
    with pq.ParquetWriter(stream, table.schema, compression="zstd", write_page_checksum=True) as writer:
        writer.write(table)
    content = stream.getvalue().to_pybytes()
    place = content.rindex(MARK) + len(MARK)
    with files.replacing(path) as waiting:
        waiting.write_bytes(content[:place] + _digest(content) + content[place + len(BLANK) :])


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=len(BLANK) // 2).hexdigest().encode()


def _checked(path: Path) -> bytes:
    """The bytes of a file of results, as they were written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FoveateError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}): {REMEDY}") from None
    place = content.rfind(MARK) + len(MARK)
    found, blank = content[place : place + len(BLANK)], content[:place] + BLANK + content[place + len(BLANK) :]
    if place < len(MARK) or found != _digest(blank):
        raise FoveateError(f"{path} is not a file of results with a digest, or a damaged one: {REMEDY}")
    return content


def origin_of(path: Path) -> tuple[Origin, list[str], list[tuple[str, str]]]:
    """What a file of results is about, the names of the images that it has values of, and those left out with the reason.

    Raises:
        FoveateError: another program's file, or a damaged one.
    """
    required("a run on disk", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    about = json.loads(pq.read_metadata(pa.BufferReader(_checked(path))).metadata[b"foveate"])
    images = tuple((name, listed, content) for name, listed, content in about["images"])
    return Origin(about["run"], images), about["ids"], [(file, reason) for file, reason in about["failures"]]


def read(path: Path, maps: bool = True, run: str | None = None) -> Results:
    """What :func:`write` wrote, or without the small maps.

    Args:
        run: the digest of the fingerprint that it has to have.

    Raises:
        FoveateError: another program's file, a damaged one, or one of another run.
    """
    required("a run on disk", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(pa.BufferReader(_checked(path)))
    about = json.loads(table.schema.metadata[b"foveate"])
    if run is not None and about["run"] != run:
        raise FoveateError(f"{path} is of another run than the run.json beside it: {REMEDY}")
    count, keys = len(about["ids"]), [(method, column) for method, column in about["keys"]]
    values: dict[Key, np.ndarray] = {}
    numbers = table["value"].to_numpy()
    curves = table["curve"].combine_chunks()
    for place, key in enumerate(keys if count else []):
        if key[1] == MAP and not maps:
            continue
        rows = slice(place * count, (place + 1) * count)
        part = curves.slice(place * count, count)
        if part.null_count:
            values[key] = numbers[rows].astype(float)
        else:
            # A copy: a view would keep the whole file in memory.
            values[key] = np.array(part.flatten().to_numpy(zero_copy_only=False)).reshape(count, -1)
    known = {name: content for name, _, content in about["images"]}
    return Results(
        about["ids"],
        values,
        np.array(about["labels"], int),
        np.array(about["predicted"], int),
        np.array(about["confidence"], float),
        about["degenerate"],
        [(file, reason) for file, reason in about["failures"]],
        about["left_out"],
        about["same"],
        missing=about["missing"],
        contents=[known.get(name, "") for name in about["ids"]] if known else [],
    )


def read_all(paths: Sequence[Path], maps: bool = False, run: str | None = None) -> Results:
    """Chunks of a run, in order; without the small maps, which are the larger part, where nobody asks for them."""
    return joined(read(path, maps, run) for path in paths)


def plain(value: Any) -> Any:
    """A number for JSON: None for what is not one."""
    return float(value) if np.isfinite(value) else None
