"""Film: the film strip of a training run, as rows of pictures and as a page of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveate.data.images import colours_of, to_image
from foveate.errors import FoveateError
from foveate.maps import upsample
from foveate.overlay import overlay
from foveate.registry import METHODS
from foveate.report import pictures
from foveate.report.page import render
from foveate.training.film import Film, Frame

SHOWN = 8  # epochs of a film that fit beside each other
SIDE = 112


def write(film: Film, path: str | Path, title: str = "Where it looked, over time") -> Path:
    """Write the page of a film that any training loop has shot.

    Raises:
        FoveateError: the film has no frame.
    """
    if not film.frames:
        raise FoveateError("this film has no frame yet: film.shoot(model, epoch) after every epoch")
    return render("film.html.j2", path, {"title": title, "film": film_strip(film)})


def epochs_shown(film: Film, count: int = SHOWN) -> list[Frame]:
    """The first and the last frame of a film, and evenly spaced ones between."""
    places = np.unique(np.linspace(0, len(film.frames) - 1, min(count, len(film.frames))).round().astype(int))
    return [film.frames[place] for place in places]


def film_strip(film: Film, count: int = SHOWN) -> dict[str, Any]:
    """What the page shows of a film: for each image its picture, and its map at some epochs."""
    frames = epochs_shown(film, count)
    batch, names = film.batch, film.class_names
    assert batch.y is not None  # a film has labels
    rows = []
    for index in range(len(batch)):
        label = int(batch.y[index])
        x = batch.x[index]
        cells = []
        for frame in frames:
            M = upsample(torch.from_numpy(frame.maps[index : index + 1]).float() / 255, (x.shape[-2], x.shape[-1]))[0]
            inside = float(frame.inside[index])
            cells.append(
                {
                    "picture": picture(overlay(x, M)),
                    "probability": float(frame.probability[index]),
                    "right": int(frame.predicted[index]) == label,
                    "inside": None if np.isnan(inside) else inside,
                }
            )
        title = batch.id[index] if batch.id else ""
        rows.append({"picture": picture(x), "label": names[label] if names else f"class {label}", "id": title, "cells": cells})
    about = {"method": METHODS.get(film.method).title, "colours": colours_of(batch.x.shape[1])}
    return {"epochs": [frame.epoch for frame in frames], "rows": rows, **about}


def picture(x: torch.Tensor) -> str:
    """An image ``[3,H,W]`` as a data URI of a size for such rows."""
    image = to_image(x)
    factor = SIDE * 2 / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return pictures.data_uri(image.resize(size, Image.Resampling.LANCZOS), 82)
