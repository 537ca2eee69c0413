"""Sanity: does a map add up, does it change with the class, and does it change when the model forgets what it learnt?"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate import maps
from foveate.batch import Batch
from foveate.errors import FoveateError
from foveate.missing import not_finite
from foveate.models.randomize import Init, Mode, randomized, stages_of
from foveate.registry import Column, Explained, metric
from foveate.runtime.capture import Capture

KEPT_BYTES = 2**30  # of randomised networks, while a batch is measured
_captures: weakref.WeakKeyDictionary[Capture, dict[object, list[Capture | None]]] = weakref.WeakKeyDictionary()


@metric(
    "completeness_error",
    title="Completeness error",
    paper="Draelos and Carin, 2020 (HiResCAM); Sundararajan et al., ICML 2017 (integrated gradients)",
    columns={
        "completeness_error": Column(
            "down",
            "completeness_error",
            "Completeness error",
            "",
            None,
            "|sum of the map + bias - score| / |score|",
            "How far is the map from adding up to the score, where a theorem says that it does?",
            "1e-7: rounding.",
            "0.3: a third of the score is not in the map.",
        )
    },
    digits=4,
    group="sanity",
)
def completeness_error(capture: Capture, M: Tensor, batch: Batch, *, explained: Explained | None = None) -> dict[str, Tensor]:
    """How far the sum of the map misses what a theorem says it adds up to, relative to the score, one value per image.

    Not a number where no theorem applies: to the method, or to this model's head.
    """
    values = None
    if explained is not None and explained.method.complete is not None:
        values = explained.method.complete(capture, None, explained.target, explained.raw, **explained.settings)
    if values is None:
        values = torch.full((len(capture.x),), float("nan"), device=capture.x.device)
    return {"completeness_error": values.detach().double()}


@metric(
    "class_sensitivity",
    title="Class sensitivity",
    paper="after Sixt et al., ICML 2020, and Khakzar et al., CVPR 2022",
    columns={
        "class_sensitivity": Column(
            "up",
            "class_sensitivity",
            "Class sensitivity",
            "",
            (0, 2),
            "1 - Spearman's correlation of the maps of the two likeliest classes",
            "Does the map change when another class is asked for?",
            "The two maps are unrelated: 1.",
            "The two maps are the same: 0. The map does not know which class was asked for.",
        )
    },
    costly=True,
    digits=3,
    group="sanity",
)
def class_sensitivity(capture: Capture, M: Tensor, batch: Batch, *, explained: Explained | None = None) -> dict[str, Tensor]:
    """``1 - rho`` of the raw maps for the first and the second class the model names, ``rho`` Spearman's; in [0, 2].

    0: the map does not know which class was asked for, as of every control. Not a number where a map is constant.
    """
    explained = _needed(explained, "class_sensitivity")
    first, second = (explained.again(capture, capture.target(which)) for which in ("pred", "second"))
    return {"class_sensitivity": 1 - spearman(first, second)}


@metric(
    "randomisation",
    title="Model-parameter randomisation",
    paper="Adebayo et al., NeurIPS 2018",
    columns={
        "randomisation": Column(
            "down",
            "randomisation",
            "Randomisation",
            "",
            (-1, 1),
            "mean over stages of Spearman's correlation with the map of a network whose parameters were redrawn",
            "Does the map stay as it is when the network forgets what it learnt?",
            "0: the maps of the random networks are other maps.",
            "0.9: nearly the same map without anything learnt, as of an edge detector.",
        ),
        "randomisation_ssim": Column(
            "down",
            "randomisation_ssim",
            "Randomisation, SSIM",
            "",
            (-1, 1),
            "the same with the structural similarity",
            "Does the map look the same when the network forgets what it learnt?",
            "0.1: another picture.",
            "0.9: the same picture.",
        ),
    },
    costly=True,
    digits=3,
    group="sanity",
)
def randomisation(
    capture: Capture,
    M: Tensor,
    batch: Batch,
    *,
    explained: Explained | None = None,
    mode: Mode = "cascade",
    stages: int = 5,
    init: Init = "reset",
    reset_buffers: bool = True,
    absolute: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Similarity of the map with that of networks whose parameters were redrawn, mean over stages, one value per image.

    ``randomisation`` is Spearman's rank correlation of raw maps, ``randomisation_ssim`` the structural similarity of maps in
    [0, 1]; curves ``randomisation_curve`` and ``randomisation_ssim_curve`` ``[B,stages]`` have each stage, from the head
    alone to the whole network. A map that stays similar does not depend on what the network learnt.

    The target stays what it was; the model is copied, never changed. Maps that turn constant have no rank correlation: they
    are NaN in the curve, and left out of the mean.

    Args:
        mode: ``cascade``: each stage keeps the stages before it random; ``independent``: one stage at a time.
        stages: the head alone, and the other layers with parameters in ``stages - 1`` equal parts; 0 for one per layer.
        init, reset_buffers: see :func:`foveate.models.randomize.randomized`.
        absolute: compare absolute values, the other form of Adebayo et al.
    """
    explained = _needed(explained, "randomisation")
    ranks, structure = [], []
    from_image = "image_gradient" in explained.method.needs
    for changed in _forgetful(capture, (mode, stages, init, seed, reset_buffers), from_image):
        try:
            if changed is None:
                raise FoveateError("this random network gives no logits")
            again = explained.again(changed)
            form = torch.abs if absolute else torch.clone
            ranks.append(spearman(form(explained.raw), form(again)))
            structure.append(similarity(M, maps.prepare(again, capture.size).to(M)))
        except FoveateError:  # a random network may give nothing to explain
            ranks.append(torch.full((len(M),), float("nan"), dtype=torch.float64, device=M.device))
            structure.append(ranks[-1])
    curves = {"randomisation": torch.stack(ranks, 1), "randomisation_ssim": torch.stack(structure, 1)}
    return {name: curve.nanmean(1) for name, curve in curves.items()} | {f"{n}_curve": curve for n, curve in curves.items()}


def _forgetful(capture: Capture, how: tuple[Mode, int, Init, int, bool], from_image: bool) -> Iterator[Capture | None]:
    """Captures of the randomised networks: kept for the other methods of this batch, so that each runs once for all of them.

    Networks too large for that are rebuilt each time, and so are those whose graph begins at the image, which is larger.
    """
    kept = _captures.setdefault(capture, {})
    if how in kept and not from_image:
        yield from kept[how]
        return
    size = sum(p.numel() * p.element_size() for p in capture.model.parameters())
    keep = not from_image and size * len(stages_of(capture.model, how[1])) <= KEPT_BYTES
    made: list[Capture | None] = []
    for _, changed in randomized(capture.model, *how):
        model = copy.deepcopy(changed) if keep else changed
        try:
            one = capture.again(capture.x, model=model, from_image=from_image)
        except FoveateError:  # NaN, or nothing at the layer
            one = None
        made += [one] if keep else []
        yield one
    if keep:
        kept[how] = made


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of maps ``[B,...]``, ``[B]`` in [-1, 1], float64; ties share their mean rank.

    Not a number where a map is constant, or holds NaN or infinity.
    """
    spoilt = not_finite(a) | not_finite(b)
    a, b = (_mean_rank(values.detach().double().flatten(1)) for values in (a, b))
    a, b = (values - values.mean(1, keepdim=True) for values in (a, b))
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where((scale > 0) & ~spoilt, (a * b).sum(1) / torch.where(scale > 0, scale, torch.ones_like(scale)), torch.nan)


def similarity(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of maps ``[B,H,W]`` in [0, 1], ``[B]``: its mean over square windows that lie wholly inside.

    ``(2 u v + C1)(2 cov + C2) / ((u^2 + v^2 + C1)(var_a + var_b + C2))`` with means ``u, v``, ``C1 = .01^2``, ``C2 = .03^2``
    (Wang et al., 2004). Not a number where a map is constant.
    """
    side = min(window, *a.shape[-2:])
    a, b = (values.detach().double()[:, None] for values in (a, b))  # [B,1,H,W]
    u, v, uu, vv, uv = (F.avg_pool2d(values, side, 1) for values in (a, b, a * a, b * b, a * b))
    closeness = (2 * u * v + 1e-4) * (2 * (uv - u * v) + 9e-4)
    values = closeness / ((u * u + v * v + 1e-4) * ((uu - u * u) + (vv - v * v) + 9e-4))
    flat = maps.is_constant(a[:, 0]) | maps.is_constant(b[:, 0])
    return torch.where(flat, torch.nan, values.mean((1, 2, 3)))


def _mean_rank(values: Tensor) -> Tensor:
    ordered = values.sort(1).values.contiguous()
    values = values.contiguous()
    return (torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)).double() / 2


def _needed(explained: Explained | None, name: str) -> Explained:
    if explained is None:
        raise FoveateError(f"{name} runs the method again: give it explained=Explained(method, raw, target)")
    return explained
