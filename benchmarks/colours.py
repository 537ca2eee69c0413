"""Which colours of a map can be told from photographs: colour maps over a folder of them, in CIE Lab.

``python benchmarks/colours.py FOLDER [MAP...]`` prints one line per colour map:

- *alike*: share of the photographs' pixels that look like some colour of the map's upper half (CIE76 below ``ALIKE``);
- *full*: median distance of the overlay of full heat from the pixel that it covers;
- *warm*: the same, over the pixels whose hue is between red and yellow;
- *strange*: mean over photographs of the share of their pixels from which that overlay of full heat, of the whole photograph,
  is farther than ``ALIKE`` in all of its colours: no pixel of the photograph can be taken for heat, and no heat for it;
- *order*: how evenly lightness rises or falls along the map, 1 where every step does, as it reads without colour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial import cKDTree

from foveate.data.folder import files_in
from foveate.data.images import read, to_tensor
from foveate.overlay import OWN, overlay
from foveate.overlay import ramp as ramp_of

ALIKE = 10.0  # a difference that is seen at a glance; 2.3 is the least that is seen side by side
SIDE = 64  # pixels of a photograph that are compared
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]])
MAPS = ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "jet", "hot", "cool", "spring", "winter", "summer", "hsv",
        "gnuplot2", "RdPu_r", "BuPu_r", "PuRd_r", "GnBu_r", "cubehelix", "twilight_shifted", *OWN)  # fmt: skip


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB ``[n,3]`` in [0, 1] as CIE Lab under D65."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    scaled = linear @ TO_XYZ.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("maps", nargs="*", default=MAPS)
    given = parser.parse_args()
    photographs = [read(path).resize((SIDE, SIDE), Image.Resampling.NEAREST) for path in files_in(given.folder)]
    tensors = [to_tensor(photograph) for photograph in photographs]
    pixels = [lab(x.flatten(1).T.numpy().astype(np.float64)) for x in tensors]
    every = np.concatenate(pixels)
    hue = np.degrees(np.arctan2(every[:, 2], every[:, 1]))
    warm = (hue > 20) & (hue < 100) & (np.hypot(every[:, 1], every[:, 2]) > 15)
    print(f"{len(photographs)} photographs, {100 * warm.mean():.0f} % of their pixels warm\n")
    print("| colour map | alike, % | alike to all of it, % | full | warm | strange, % | order |\n|---|---|---|---|---|---|---|")
    rows = []
    for name in given.maps:
        ramp = lab(np.frombuffer(bytes.fromhex(ramp_of(name)), np.uint8).reshape(-1, 3) / 255)
        alike = 100 * (cKDTree(ramp[128:]).query(every, distance_upper_bound=ALIKE)[0] < ALIKE).mean()
        anything = 100 * (cKDTree(ramp).query(every, distance_upper_bound=ALIKE)[0] < ALIKE).mean()
        covered, strange = [], []
        for x, own in zip(tensors, pixels, strict=True):
            full = overlay(x, torch.ones(SIDE, SIDE), colormap=name)
            heated = lab(full.flatten(1).T.numpy().astype(np.float64))
            covered.append(np.linalg.norm(heated - own, axis=1))
            strange.append((cKDTree(heated).query(own, distance_upper_bound=ALIKE)[0] >= ALIKE).mean())
        distance = np.concatenate(covered)
        steps = np.diff(ramp[:, 0])
        order = abs(steps.sum()) / np.abs(steps).sum()
        rows.append((alike, name, anything, np.median(distance), np.median(distance[warm]), 100 * np.mean(strange), order))
    for alike, name, anything, full, warmly, strangely, order in sorted(rows):
        print(f"| {name} | {alike:.1f} | {anything:.1f} | {full:.0f} | {warmly:.0f} | {strangely:.1f} | {order:.2f} |")


if __name__ == "__main__":
    main()
