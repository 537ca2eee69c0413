"""Opti-CAM: the channel weights that make the model surest of the class when it sees the image through the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from foveate import maps
from foveate.errors import FoveateError
from foveate.records import Found
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.targets import Target

Objective = Literal["logit", "probability", "margin", "difference"]
Normaliser = Literal["range", "max", "sigmoid", "sigmoid_2"]
TOGETHER = "optimised in a batch: alone, its rounding and so its map would be somewhat different (alone=true: the same in any)"


@dataclass(frozen=True)
class Optimised:
    """What an optimisation of channel weights found.

    Attributes:
        saliency: ``S = sum_k softmax(u)_k A_k``, ``[B,h,w]``, of the best iterate of each image.
        mask: ``n(up(S))``, ``[B,H,W]``, what the image was seen through.
        weights: ``softmax(u) [B,K]``, over the channels of all layers.
        scores: the objective at every iterate, ``[steps + 1, B]``; after an image has stopped, its last value.
        steps: how many steps each image took, ``[B]``.
    """

    saliency: Tensor
    mask: Tensor
    weights: Tensor
    scores: Tensor
    steps: Tensor


@method("opti_cam", title="Opti-CAM", paper="Zhang, Torres et al., CVIU 2024, eq. 7 to 11", aliases=("opticam",), repeats=True)
def opti_cam(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    objective: Objective = "logit",
    normaliser: Normaliser = "range",
    steps: int = 100,
    lr: float = 0.1,
    patience: int | None = None,
    layers: Sequence[str] | None = None,
    alone: bool = False,
) -> Found:
    """``S = sum_k softmax(u*)_k A_k`` with ``u* = argmax_u score(x * n(up(S(u))))``, ``[B,h,w]``; see :func:`optimise`.

    Tables and pictures scale every map to its range. With another normaliser the mask that was optimised is
    ``optimise(...).mask``.
    """
    found = optimise(
        capture,
        layer,
        target,
        objective=objective,
        normaliser=normaliser,
        steps=steps,
        lr=lr,
        patience=patience,
        layers=layers,
        alone=alone,
    )
    together = len(capture.x) > 1 and capture.x.dtype != torch.float64 and not alone
    return Found(found.saliency, remarks=[TOGETHER] * len(capture.x) if together else [])


def optimise(
    capture: Capture,
    layer: str | None,
    target: Target,
    *,
    objective: Objective = "logit",
    normaliser: Normaliser = "range",
    steps: int = 100,
    lr: float = 0.1,
    patience: int | None = None,
    layers: Sequence[str] | None = None,
    alone: bool = False,
) -> Optimised:
    """Opti-CAM with its trajectory: ``steps`` forward and backward passes of the batch, one forward more.

    ``A = relu(features)`` is computed once and stays; ``u [B,K]`` starts at 0 for every channel, where S is the mean
    feature map; Adam on ``u`` alone. Every image is optimised for itself, and no step mixes the images of a batch. But
    the network's own arithmetic rounds as the number of images has it, and a hundred steps make much of that: in float32
    the masks of SqueezeNet for one photograph, alone and in a batch, differ by .02 to .05 in the mean and by .15 to .48
    where they differ most; in float64 by 3e-12. ``alone=True`` makes it one map.

    Args:
        objective: ``logit``: the target's score, as the paper has it (a contrast, where the target is one);
            ``probability``: of the class, maximised through its logarithm, which has the same maximum and a gradient
            where p is near 0; ``margin``: the logit less the largest other one; ``difference``: ``-|s(x * m) - s(x)|``,
            the default of the authors' class, though not of their paper.
        normaliser: ``range``; ``max``: ``S / max S``; ``sigmoid``: ``1 / (1 + exp(-S))`` as in the authors' release;
            ``sigmoid_2``: of ``2 S``, as in their later code.
        steps, lr: of Adam.
        patience: an image stops when its best score is this many steps old; never where it is None.
        layers: several captured layers at once: their channels share one softmax, on the largest of their grids.
        alone: run each image by itself, so that its map is the same in any batch, to the last bit; on a CPU a batch of 8
            took 1.1 (SqueezeNet), 1.3 (MobileNet-V2) and 2.1 times (ResNet-18) as long.

    Deviations: the best iterate of each image is kept, because the objective is not monotone under Adam (the release
    keeps the last); the release stops the whole batch when its summed loss rises, which couples its images.

    Raises:
        FoveateError: an unknown option, steps below 1, a layer that was not captured.
    """
    _check(objective, normaliser, steps, lr, patience)
    if not isinstance(target, Target):
        raise FoveateError(f"the target is what capture.target({target!r}) gives, and this is {target!r}")
    layers = [layers] if isinstance(layers, str) else layers
    if alone and len(capture.x) > 1:
        return _each(capture, layer, target, layers, (objective, normaliser, steps, lr, patience))
    activations = _channels(capture, list(layers) if layers else [layer])  # [B,K,h,w]
    search = _Search(capture, activations, target, objective, normaliser, steps, lr, patience)
    every = torch.arange(len(activations), device=activations.device)
    found = [search.run(rows) for rows in every.split(capture.chunk_size("backward"))]
    with torch.no_grad():
        u = torch.cat([one.u for one in found])  # [B,K]
        saliency = _combine(u, activations)
        mask = _mask(saliency, normaliser, capture.size)
        scores, taken = torch.cat([one.scores for one in found], 1), torch.cat([one.taken for one in found])
        return Optimised(saliency, mask, u.softmax(1), scores, taken)


def _each(
    capture: Capture,
    layer: str | None,
    target: Target,
    layers: Sequence[str] | None,
    options: tuple[Objective, Normaliser, int, float, int | None],
) -> Optimised:
    """The same of each image on a run of its own, so that no operation sees how many there are."""
    objective, normaliser, steps, lr, patience = options
    own = {"objective": objective, "normaliser": normaliser, "steps": steps, "lr": lr, "patience": patience}
    found = []
    for row in torch.arange(len(capture.x), device=capture.x.device).split(1):
        one = capture.again(capture.x[row])
        found.append(optimise(one, layer, target.rows(row), layers=layers, **own))  # type: ignore[arg-type]
    along = {"scores": 1}
    return Optimised(
        **{
            each.name: torch.cat([getattr(one, each.name) for one in found], along.get(each.name, 0))
            for each in fields(Optimised)
        }
    )


@dataclass(frozen=True)
class _Found:
    u: Tensor
    scores: Tensor
    taken: Tensor


@dataclass(frozen=True)
class _Search:
    """One optimisation: its options, and the images of a capture that it may be run on."""

    capture: Capture
    activations: Tensor
    target: Target
    objective: Objective
    normaliser: Normaliser
    steps: int
    lr: float
    patience: int | None

    def run(self, given: Tensor) -> _Found:
        """The best weights of the images ``given``, together, each for itself."""
        count, channels, steps = len(given), self.activations.shape[1], self.steps
        device = given.device
        place = torch.arange(count, device=device)  # of the images that still run
        u = torch.zeros(count, channels, dtype=self.activations.dtype, device=device).requires_grad_(True)
        optimiser = torch.optim.Adam([u], self.lr)
        best = torch.full((count,), float("-inf"), dtype=torch.float64, device=device)
        best_u, age, taken = u.detach().clone(), torch.zeros_like(place), torch.zeros_like(place)
        scores = torch.zeros(steps + 1, count, dtype=torch.float64, device=device)
        for step in range(steps + 1):
            value = self._value(u, given[place], last=step == steps)
            now = value.detach().double()
            scores[step:, place] = now  # an image that stops keeps its last value
            better = now > best[place]
            age[place] = torch.where(better, 0, age[place] + 1)
            best[place[better]], best_u[place[better]] = now[better], u.detach()[better]
            if step == steps:
                break
            if self.patience is not None and not (going := age[place] < self.patience).all():
                place = place[going]
                if not len(place):
                    break
                u, optimiser = _without(u, optimiser, going, self.lr)
            optimiser.step()
            taken[place] += 1
        return _Found(best_u, scores, taken)

    def _value(self, u: Tensor, rows: Tensor, last: bool) -> Tensor:
        """The objective of images ``rows``, ``[n]``; its gradient goes to ``u.grad``, but for the last iterate."""
        capture, target = self.capture, self.target.rows(rows)
        with torch.inference_mode(False), torch.set_grad_enabled(not last):
            mask = _mask(_combine(u, self.activations[rows]), self.normaliser, capture.size)
            seen = maps.apply_mask(capture.images[rows], mask)
            logits = capture.differentiable(seen, cast=True)  # the last one too: another precision would be another scale
            start = target(capture.logits.detach()[rows])
            value = _objective(self.objective, logits, target, start, capture)
            if not last:
                (u.grad,) = torch.autograd.grad(-value.sum(), u)
                capture.passes.backward += len(rows)
        return value


def _channels(capture: Capture, layers: Sequence[str | None]) -> Tensor:
    """Non-negative features of all layers, upsampled to the largest grid, ``[B,K,h,w]``."""
    each = [capture.activations(name).detach().clamp(min=0) for name in layers]
    height, width = max(tuple(a.shape[-2:]) for a in each)
    grown = [maps.upsample(a.flatten(0, 1), (height, width)).view(*a.shape[:2], height, width) for a in each]
    return torch.cat(grown, 1)


def _combine(u: Tensor, activations: Tensor) -> Tensor:
    return torch.einsum("bk,bkhw->bhw", u.softmax(1), activations)


def _mask(saliency: Tensor, normaliser: Normaliser, size: tuple[int, int]) -> Tensor:
    grown = maps.upsample(saliency, size)
    if normaliser in ("range", "max"):
        return maps.scale(grown, normaliser)
    return grown.sigmoid() if normaliser == "sigmoid" else (2 * grown).sigmoid()


def _objective(objective: Objective, logits: Tensor, target: Target, start: Tensor, capture: Capture) -> Tensor:
    if objective == "logit":
        return target(logits)
    if objective == "probability":
        return target.log_probability(logits, capture.head)
    if objective == "difference":
        return -(target(logits) - start).abs()
    if capture.head == "binary" or target.name == "contrast":
        return target(logits)  # a contrast is a margin already, and so is one logit between its two classes
    if target.name != "logit":
        raise FoveateError(f"a margin is between the logits of classes: a {target.name!r} score has none")
    others = logits.scatter(1, target.y[:, None], float("-inf")).amax(1)
    return logits.gather(1, target.y[:, None])[:, 0] - others


def _without(u: Tensor, optimiser: torch.optim.Adam, going: Tensor, lr: float) -> tuple[Tensor, torch.optim.Adam]:
    """The weights and Adam's memory of the images that go on; Adam works element by element, so nothing else changes."""
    rest = u.detach()[going].clone().requires_grad_(True)
    rest.grad = None if u.grad is None else u.grad[going]
    smaller = torch.optim.Adam([rest], lr)
    state = optimiser.state[u]
    smaller.state[rest] = {
        key: value[going] if isinstance(value, Tensor) and value.ndim else value for key, value in state.items()
    }
    return rest, smaller


def _check(objective: str, normaliser: str, steps: int, lr: float, patience: int | None) -> None:
    if objective not in ("logit", "probability", "margin", "difference"):
        raise FoveateError(f"objective {objective!r} is unknown: use 'logit', 'probability', 'margin' or 'difference'")
    if normaliser not in ("range", "max", "sigmoid", "sigmoid_2"):
        raise FoveateError(f"normaliser {normaliser!r} is unknown: use 'range', 'max', 'sigmoid' or 'sigmoid_2'")
    if steps < 1 or not lr > 0 or (patience is not None and patience < 1):
        raise FoveateError(f"steps {steps}, lr {lr} and patience {patience} must be above 0")
