"""Makes docs/loop.png from the folder of a finished `foveate demo`: python docs/picture.py demo."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from foveate import explain, load
from foveate.data import scenes
from foveate.data.images import to_image
from foveate.report.pictures import overlay

INK, GOOD, BAD = "#1c2733", "#0b7285", "#c2410c"


def main(folder: Path) -> None:
    """The first three swapped pictures of each class: as they are, and as both networks see them."""
    test = scenes.make("test", 0, 96)
    chosen = [i for label in (0, 1) for i in (test.labels == label).nonzero()[:3, 0].tolist()]
    x, y = test.batch().x[chosen], test.labels[chosen]
    figure = Figure(figsize=(11.2, 5.9), dpi=110, layout="constrained")
    axes = figure.subplots(3, len(chosen))
    names = {"plain": "cross-entropy", "cam_loss": "+ CAM loss"}
    for row, run in enumerate((None, *names)):
        if run is not None:
            model = load("foveate:small_cnn", weights=folder / run / "model.safetensors")
            explanation = explain(model, x, "contrastive_cam")
        for column, axis in enumerate(axes[row]):
            picture = x[column] if run is None else overlay(x[column], explanation["contrastive_cam"][column])
            axis.imshow(to_image(picture).resize((288, 288), 1))
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if run is not None:
                said = int(explanation.capture.pred[column])
                right = said == int(y[column])
                axis.set_xlabel(f"“{scenes.CLASSES[said]}”", fontsize=11, color=GOOD if right else BAD, weight="bold")
        axes[row][0].set_ylabel("test picture" if run is None else names[run], fontsize=11.5, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(256).save(Path(__file__).parent / "loop.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
