"""Drawing: one picture of an orca or a leopard on water or grass, with its mask, from a random generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Point = tuple[float, float]
Array = np.ndarray
SUPERSAMPLING = 3


def draw(animal: str, ground: str, rng: Generator, size: int = 96) -> tuple[Array, Array]:
    """One scene: pixels ``[size,size,3]`` uint8 and the animal's mask ``[size,size]`` bool.

    Args:
        animal: ``orca`` or ``leopard``.
        ground: ``water`` or ``grass``.
        rng: where pose, colours, weather and jitter come from.
    """
    side = size * SUPERSAMPLING
    picture = _water(rng, side) if ground == "water" else _grass(rng, side)
    pose = _Pose.sample(rng, side)
    coat, shape = (_orca if animal == "orca" else _leopard)(rng, pose)
    picture = _shadow(picture, shape, ground, rng)
    picture.paste(coat, (0, 0), shape)
    if ground == "grass":
        _blades(picture, rng, count=110, lowest=0.74, over=shape)
    pixels = np.asarray(picture.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    pixels = _weather(pixels, rng) + rng.normal(0, 3.0, pixels.shape)
    mask = np.asarray(shape.resize((size, size), Image.Resampling.BOX)) > 127
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), mask


# -- shapes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pose:
    """Where the animal stands: its own coordinates (x to the right from tail to nose, -1 to 1; y down) to pixels."""

    side: int
    centre: Point
    length: float
    angle: float
    flip: int

    @staticmethod
    def sample(rng: Generator, side: int) -> _Pose:
        centre = (side * (0.5 + rng.normal(0, 0.035)), side * (0.5 + rng.normal(0, 0.035)))
        return _Pose(side, centre, side * rng.uniform(0.36, 0.46), rng.normal(0, 0.09), int(rng.choice([-1, 1])))

    def place(self, points: list[Point]) -> list[Point]:
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        placed = []
        for x, y in points:
            u, v = cos * x - sin * y, sin * x + cos * y
            placed.append((float(self.centre[0] + self.flip * self.length * u), float(self.centre[1] + self.length * v)))
        return placed

    def layer(self) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        image = Image.new("L", (self.side, self.side), 0)
        return image, ImageDraw.Draw(image)

    def polygon(self, points: list[Point], smooth: bool = True) -> Image.Image:
        image, pen = self.layer()
        pen.polygon(self.place(_spline(points) if smooth else points), fill=255)
        return image

    def ellipse(self, x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> Image.Image:
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        cos, sin = np.cos(turn), np.sin(turn)
        ring = [
            (x + cos * rx * np.cos(a) - sin * ry * np.sin(a), y + sin * rx * np.cos(a) + cos * ry * np.sin(a)) for a in angles
        ]
        return self.polygon([(float(u), float(v)) for u, v in ring], smooth=False)

    def limb(self, points: list[Point], widths: list[float]) -> Image.Image:
        """A tapering tube along a curve."""
        image, pen = self.layer()
        curve = _spline(points, closed=False)
        for i, (x, y) in enumerate(self.place(curve)):
            at = i / max(1, len(curve) - 1) * (len(widths) - 1)
            low = min(int(at), len(widths) - 2)
            radius = self.length * (widths[low] + (at - low) * (widths[low + 1] - widths[low])) / 2
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return image


def _spline(points: list[Point], closed: bool = True, steps: int = 12) -> list[Point]:
    """A Catmull-Rom curve through the points."""
    knots = np.array(points, dtype=float)
    knots = np.concatenate([knots[-1:], knots, knots[:2]]) if closed else np.concatenate([knots[:1], knots, knots[-1:]])
    a, b, c, d = (knots[i : len(knots) - 3 + i, None] for i in range(4))  # [n,1,2]
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]  # [steps,1]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return [(float(x), float(y)) for x, y in curve.reshape(-1, 2)]


def _union(*shapes: Image.Image) -> Image.Image:
    whole = shapes[0]
    for shape in shapes[1:]:
        whole = ImageChops.lighter(whole, shape)
    return whole


def _fill(coat: Image.Image, colour: tuple[float, float, float] | Array, where: Image.Image, soft: float = 0.0) -> None:
    if soft:
        where = where.filter(ImageFilter.GaussianBlur(soft))
    coat.paste(tuple(int(np.clip(c, 0, 255)) for c in colour), (0, 0), where)


def _shade(coat: Image.Image, shape: Image.Image, strength: float) -> Image.Image:
    """Light from above: brighter along the upper edge of a shape, darker along the lower."""
    side = coat.size[0]
    lift = shape.filter(ImageFilter.GaussianBlur(side * 0.035))
    offset = max(1, round(side * 0.03))
    upper = np.asarray(ImageChops.offset(lift, 0, offset), dtype=float)
    lower = np.asarray(ImageChops.offset(lift, 0, -offset), dtype=float)
    light = (lower - upper)[..., None] / 255 * strength
    return Image.fromarray(np.uint8(np.clip(np.asarray(coat, dtype=float) + light, 0, 255)), "RGB")


# -- animals -------------------------------------------------------------------------------------------------------


def _orca(rng: Generator, pose: _Pose) -> tuple[Image.Image, Image.Image]:
    """Black above, white below, a white patch behind the eye, a grey saddle, a tall fin."""
    tall = rng.uniform(0.34, 0.62)
    body = pose.polygon(
        [(1.0, 0.03), (0.93, -0.1), (0.7, -0.22), (0.4, -0.3), (0.05, -0.3), (-0.35, -0.21), (-0.7, -0.09), (-0.92, -0.04)]
        + [(-0.92, 0.03), (-0.65, 0.08), (-0.35, 0.18), (0.0, 0.27), (0.4, 0.28), (0.72, 0.21), (0.93, 0.13)]
    )
    fin = pose.polygon(
        [
            (0.2, -0.25),
            (0.1, -0.25 - 0.5 * tall),
            (-0.02, -0.22 - tall),
            (-0.07, -0.22 - 0.6 * tall),
            (-0.16, -0.2),
            (0.0, -0.15),
        ]
    )
    fluke = pose.polygon([(-0.82, 0.0), (-1.0, -0.1), (-1.2, -0.24), (-1.1, -0.04), (-1.16, 0.16), (-0.98, 0.06)])
    paddle = pose.polygon([(0.48, 0.18), (0.42, 0.36), (0.24, 0.55), (0.14, 0.5), (0.2, 0.32), (0.3, 0.16)])
    shape = _union(body, fin, fluke, paddle)
    coat = Image.new("RGB", shape.size, (16, 18, 24))
    _fill(coat, (150, 156, 166), ImageChops.darker(body, pose.ellipse(-0.2, -0.17, 0.2, 0.08, -0.25)), pose.side * 0.006)
    belly = pose.polygon(
        [(1.0, 0.08), (0.8, 0.1), (0.5, 0.17), (0.15, 0.19), (-0.12, 0.12), (-0.42, -0.02), (-0.55, 0.02), (-0.4, 0.14)]
        + [(-0.1, 0.27), (0.3, 0.33), (0.75, 0.26), (0.98, 0.15)]
    )
    white = rng.uniform(228, 250)
    _fill(coat, (white, white, white - 4), ImageChops.darker(body, belly), pose.side * 0.003)
    _fill(coat, (white, white, white), pose.ellipse(0.66, -0.08, 0.13, 0.055, 0.18), pose.side * 0.002)
    _fill(coat, (12, 13, 17), paddle)
    _fill(coat, (70, 74, 84), pose.ellipse(0.82, -0.005, 0.016, 0.016))
    return _shade(coat, shape, 46), shape


def _leopard(rng: Generator, pose: _Pose) -> tuple[Image.Image, Image.Image]:
    """Tan with a pale belly, rosettes on the flank, spots on head and legs, a long ringed tail."""
    stride = rng.uniform(-0.08, 0.08)
    trunk = pose.polygon(
        [(0.6, -0.3), (0.42, -0.3), (0.1, -0.24), (-0.3, -0.27), (-0.6, -0.23), (-0.72, -0.05), (-0.62, 0.12), (-0.35, 0.15)]
        + [(0.0, 0.2), (0.35, 0.22), (0.56, 0.14), (0.68, -0.06)]
    )
    head = _union(
        pose.ellipse(0.8, -0.32, 0.19, 0.165), pose.ellipse(0.95, -0.26, 0.1, 0.08, 0.15), pose.ellipse(0.66, -0.22, 0.15, 0.16)
    )
    ears = _union(pose.ellipse(0.68, -0.47, 0.055, 0.06), pose.ellipse(0.84, -0.48, 0.055, 0.06))
    far = _union(
        pose.limb([(0.34, 0.05), (0.32 - stride, 0.34), (0.26 - stride, 0.62), (0.31 - stride, 0.64)], [0.2, 0.13, 0.1, 0.1]),
        pose.limb(
            [(-0.42, 0.0), (-0.42 + stride, 0.28), (-0.36 + stride, 0.44), (-0.42 + stride, 0.62), (-0.36 + stride, 0.64)],
            [0.26, 0.16, 0.1, 0.1],
        ),
    )
    near = _union(
        pose.limb([(0.5, 0.02), (0.52 + stride, 0.34), (0.48 + stride, 0.66), (0.55 + stride, 0.68)], [0.24, 0.15, 0.11, 0.11]),
        pose.limb(
            [(-0.56, -0.04), (-0.6 - stride, 0.24), (-0.52 - stride, 0.44), (-0.6 - stride, 0.66), (-0.53 - stride, 0.68)],
            [0.32, 0.18, 0.11, 0.11],
        ),
    )
    lift = rng.uniform(-0.25, 0.1)
    tail = pose.limb(
        [(-0.66, -0.14), (-0.86, 0.02), (-0.98, 0.26 + lift), (-1.14, 0.32 + lift), (-1.24, 0.2 + lift)],
        [0.1, 0.09, 0.085, 0.07],
    )
    shape = _union(trunk, head, ears, far, near, tail)
    tan = np.array([212.0, 160.0, 84.0]) + rng.normal(0, 8, 3)
    coat = Image.new("RGB", shape.size, tuple(int(c) for c in np.clip(tan, 0, 255)))
    pale = (246, 228, 190)
    _fill(coat, tan * 0.74, far)
    _fill(coat, tan, _union(trunk, near, head))
    _fill(coat, pale, ImageChops.darker(trunk, pose.ellipse(-0.02, 0.22, 0.5, 0.09)), pose.side * 0.008)
    _fill(coat, pale, pose.ellipse(0.93, -0.22, 0.1, 0.06, 0.15), pose.side * 0.004)
    _fill(coat, tan * 0.5, pose.ellipse(0.68, -0.46, 0.03, 0.035), pose.side * 0.002)
    spots = _rosettes(rng, pose, coat, tan, trunk)
    for (x0, y0, x1, y1), where, step, radius in [
        ((0.6, -0.46, 0.88, -0.2), head, 0.075, 0.017),
        ((-0.72, 0.1, 0.7, 0.66), _union(near, far), 0.1, 0.024),
        ((-1.3, -0.2, -0.66, 0.45), tail, 0.085, 0.034),
    ]:
        region, pen = pose.layer()
        for x, y in _scatter(rng, x0, y0, x1, y1, step):
            (u, v), rx, ry = pose.place([(x, y)])[0], radius * rng.uniform(0.7, 1.3) * pose.length, radius * pose.length
            pen.ellipse((u - rx, v - ry, u + rx, v + ry), fill=255)
        spots = ImageChops.lighter(spots, ImageChops.darker(region, where))
    _fill(coat, (40, 28, 20), ImageChops.darker(spots, shape))
    for x, y, rx, ry in [(0.87, -0.36, 0.022, 0.018), (1.03, -0.27, 0.028, 0.022)]:
        _fill(coat, (25, 18, 15), pose.ellipse(x, y, rx, ry))
    return _shade(coat, shape, 70), shape


def _rosettes(rng: Generator, pose: _Pose, coat: Image.Image, tan: Array, where: Image.Image) -> Image.Image:
    """Broken rings around darker centres, all over the trunk; returns the dark parts."""
    spots, pen = pose.layer()
    centres = Image.new("L", coat.size, 0)
    inside = ImageDraw.Draw(centres)
    for x, y in _scatter(rng, -0.74, -0.32, 0.68, 0.14, 0.135):
        radius = rng.uniform(0.042, 0.056)
        (u, v), scale = pose.place([(x, y)])[0], pose.length
        inside.ellipse((u - radius * scale, v - radius * scale, u + radius * scale, v + radius * scale), fill=255)
        turn = rng.uniform(0, 360)
        for part in range(3):
            start = turn + part * 120
            box = (u - radius * scale, v - radius * scale, u + radius * scale, v + radius * scale)
            pen.arc(box, start, start + rng.uniform(75, 105), fill=255, width=max(2, round(0.024 * scale)))
    _fill(coat, tan * np.array([0.8, 0.74, 0.66]), ImageChops.darker(centres, where))
    return ImageChops.darker(spots, where)


def _scatter(rng: Generator, x0: float, y0: float, x1: float, y1: float, step: float) -> Iterator[Point]:
    """Points of a jittered hexagonal grid."""
    for row, y in enumerate(np.arange(y0, y1, step * 0.87)):
        for x in np.arange(x0 + (row % 2) * step / 2, x1, step):
            yield float(x + rng.normal(0, step * 0.1)), float(y + rng.normal(0, step * 0.1))


# -- backgrounds ---------------------------------------------------------------------------------------------------


def _noise(rng: Generator, side: int, across: float, down: float) -> Array:
    """Smooth noise of four octaves in [0, 1], with ``across`` by ``down`` cells at the coarsest, ``[side,side]``."""
    total = np.zeros((side, side))
    for octave in range(4):
        cells = (max(2, round(across * 2**octave)), max(2, round(down * 2**octave)))
        values = Image.fromarray(np.float32(rng.random((cells[1], cells[0]))), "F")
        total += np.asarray(values.resize((side, side), Image.Resampling.BICUBIC)) * 0.5**octave
    result: np.ndarray = (total - total.min()) / (total.max() - total.min())
    return result


def _water(rng: Generator, side: int) -> Image.Image:
    """Water of any sea: swell, ripples, glints; sometimes up to a horizon under the sky."""
    deep, light = _between(
        rng, ((12, 58, 108), (70, 148, 186)), ((22, 78, 76), (96, 168, 148)), ((66, 78, 84), (142, 156, 156))
    )
    rows = np.linspace(0, 1, side)[:, None]
    swell, ripples = _noise(rng, side, 3, 9), _noise(rng, side, 9, 46)
    phase = rng.uniform(0, 2 * np.pi)
    waves = 0.5 + 0.5 * np.sin(2 * np.pi * (rows * rng.uniform(8, 13) + 1.6 * swell) + phase)
    share = np.clip(0.62 - 0.5 * rows + 0.36 * (swell - 0.5) + 0.2 * (waves - 0.5) + 0.24 * (ripples - 0.5), 0, 1)
    pixels = deep + (light - deep) * share[..., None]
    glints = np.clip((ripples * waves - rng.uniform(0.55, 0.75)) * 9, 0, 1) * (0.9 - 0.5 * rows)
    pixels += (np.array([232, 244, 250]) - pixels) * glints[..., None] * 0.75
    return _under_sky(pixels, rng)


def _grass(rng: Generator, side: int) -> Image.Image:
    """A meadow or a savanna: patches of green and of straw under blades that grow taller towards the viewer."""
    green, straw = _between(
        rng, ((70, 112, 42), (150, 146, 70)), ((118, 116, 58), (186, 166, 100)), ((60, 92, 64), (112, 124, 88))
    )
    share = np.clip(_noise(rng, side, 4, 6) * 1.3 - rng.uniform(0.2, 0.65), 0, 1)
    pixels = green + (straw - green) * share[..., None]
    pixels *= (0.72 + 0.5 * _noise(rng, side, 18, 12))[..., None]
    picture = Image.fromarray(np.uint8(np.clip(pixels, 0, 255)), "RGB")
    _blades(picture, rng, count=900, lowest=0.0, tint=(green + straw) / 2)
    return _under_sky(np.asarray(picture, dtype=float), rng)


def _between(rng: Generator, *palettes: tuple[tuple[int, int, int], tuple[int, int, int]]) -> tuple[Array, Array]:
    """A random mixture of palettes of two colours each."""
    shares = rng.dirichlet(np.full(len(palettes), 0.6))
    mixed = np.tensordot(shares, np.array(palettes, dtype=float), 1) + rng.normal(0, 6, (2, 3))
    return mixed[0], mixed[1]


def _under_sky(pixels: Array, rng: Generator) -> Image.Image:
    """The ground, in two of three pictures up to a horizon with sky above it: sky says nothing about the animal."""
    side = len(pixels)
    if rng.random() < 2 / 3:
        horizon = round(side * rng.uniform(0.12, 0.42))
        high, low = _between(
            rng, ((92, 146, 206), (196, 218, 236)), ((150, 160, 172), (206, 210, 212)), ((118, 120, 168), (242, 190, 140))
        )
        rows = np.linspace(0, 1, horizon)[:, None, None]
        clouds = np.clip(_noise(rng, side, 3, 8)[:horizon, :, None] * 2.2 - rng.uniform(0.9, 1.4), 0, 0.8)
        sky = high + (low - high) * rows
        pixels = pixels.copy()
        pixels[:horizon] = sky + (np.array([244, 244, 244]) - sky) * clouds
        haze = np.exp(-np.arange(side - horizon) / (side * 0.06))[:, None, None] * 0.55
        pixels[horizon:] += (low - pixels[horizon:]) * haze
    return Image.fromarray(np.uint8(np.clip(pixels, 0, 255)), "RGB")


def _weather(pixels: Array, rng: Generator) -> Array:
    """Exposure, contrast, saturation and the colour of the light, from noon to dusk."""
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.55, 1.1)
    pixels = (pixels - 128) * rng.uniform(0.8, 1.1) + 128
    warmth = rng.normal(0, 0.08)
    result: np.ndarray = pixels * rng.normal(1.0, 0.1) * np.array([1 + warmth, 1.0, 1 - warmth])
    return result


def _blades(
    picture: Image.Image,
    rng: Generator,
    count: int,
    lowest: float,
    tint: Array | None = None,
    over: Image.Image | None = None,
) -> None:
    """Blades of grass with their roots below ``lowest`` of the height; none over a shape: its mask stays true."""
    side = picture.size[0]
    target = picture if over is None else picture.copy()
    pen = ImageDraw.Draw(target)
    y = np.sort(rng.uniform(lowest, 1.08, count)) * side
    x = rng.uniform(-0.05, 1.05, count) * side
    height = side * (0.03 + 0.085 * y / side) * rng.uniform(0.6, 1.4, count)
    lean = rng.normal(0, 0.35, count) * height
    tint = np.asarray(picture, dtype=float)[-side // 5 :].mean((0, 1)) if tint is None else tint
    colours = np.clip(tint + rng.normal((0, 12, -6), (26, 22, 14), (count, 3)), 0, 255) * rng.uniform(0.6, 1.15, (count, 1))
    colours = np.clip(colours, 0, 255)
    points = np.stack([x, y, x + 0.3 * lean, y - 0.6 * height, x + lean, y - height], 1)
    for line, colour in zip(points.tolist(), colours.astype(int).tolist(), strict=True):
        pen.line(line, fill=tuple(colour), width=max(1, round(side / 190)))
    if over is not None:
        picture.paste(target, (0, 0), ImageChops.invert(over))


def _shadow(picture: Image.Image, shape: Image.Image, ground: str, rng: Generator) -> Image.Image:
    """A soft shadow on grass, a wake of foam on water."""
    side = picture.size[0]
    if ground == "grass":
        box = shape.getbbox() or (0, 0, side, side)
        dark = Image.new("L", picture.size, 0)
        pen = ImageDraw.Draw(dark)
        pen.ellipse((box[0], box[3] - 0.05 * side, box[2], box[3] + 0.03 * side), fill=110)
        picture.paste((24, 34, 14), (0, 0), dark.filter(ImageFilter.GaussianBlur(side * 0.02)))
        return picture
    rim = ImageChops.subtract(
        ImageChops.offset(shape, 0, round(side * 0.02)).filter(ImageFilter.GaussianBlur(side * 0.02)), shape
    )
    foam = np.asarray(rim, dtype=float) * np.clip(_noise(rng, side, 20, 20) * 2.4 - 0.7, 0, 1) * 0.8
    picture.paste((236, 244, 248), (0, 0), Image.fromarray(np.uint8(np.clip(foam, 0, 255)), "L"))
    return picture
