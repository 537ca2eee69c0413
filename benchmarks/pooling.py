"""Average pooling against CA-Stream: the talk's table, on the test images of finished runs.

    python benchmarks/pooling.py RUN RUN ... [--limit 64] [--methods grad_cam,grad_cam_pp,score_cam] [--out pooling.csv]

Each RUN is a folder of ``foveate train`` with ``ca_stream: true``; its backbone with its own pooling is measured beside it,
on the same images: accuracy, parameters, operations, AD, AG, AI, I and D.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

import foveate
from foveate.evaluation.intervals import interval
from foveate.evaluation.results import MODEL
from foveate.evaluation.statistics import range_of
from foveate.models.castream import CAStream
from foveate.models.classifier import Classifier
from foveate.models.weights import load_weights
from foveate.training.recipe import read_recipe
from foveate.training.splits import Part
from foveate.training.train import prepared

COLUMNS = ["accuracy", "AD", "AG", "AI", "I", "D"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--methods", default="grad_cam,grad_cam_pp,score_cam")
    parser.add_argument("--out", type=Path, default=Path("pooling.csv"))
    call = parser.parse_args()
    methods = call.methods.split(",")
    call.out.unlink(missing_ok=True)
    for folder in call.runs:
        made, splits = prepared(read_recipe(folder / "recipe.yaml", trust_code=True))
        load_weights(made.model, folder / "model.safetensors")
        made.eval()
        stream: CAStream = made.model
        plain = Classifier(stream.backbone, made.preprocess, "gap", made.class_names)
        test = splits["test"]
        part = Part(test, tuple(range(0, len(test), -(-len(test) // call.limit))))
        for name, model in (("GAP", plain), ("CA", made)):
            own = [*methods, "ca_stream"] if name == "CA" else methods
            results = foveate.measure(model, part, own, [*COLUMNS, "size"])
            rows = [
                {
                    "run": folder.name,
                    "pooling": name,
                    "method": "model" if method == MODEL else method,
                    "column": column,
                    "id": id_,
                }
                | {"value": float(value)}
                for (method, column), values in results.values.items()
                if values.ndim == 1
                for id_, value in zip(results.ids, values, strict=True)
            ]
            frame = pd.DataFrame(rows)
            frame.to_csv(call.out, mode="a", header=not call.out.exists(), index=False)
            print(f"{folder.name}, {name}", flush=True)
    table = pd.read_csv(call.out)
    for (method, column), part in table.groupby(["method", "column"]):
        cells = []
        for name, values in part.groupby("pooling")["value"]:
            low, high = interval(values.to_numpy(), range_of(column))
            cells.append(f"{name} {values.mean():.2f} [{low:.2f}, {high:.2f}]")
        print(f"{method:12s} {column:12s} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
