"""Replicas of every method, metric and loss, straight from the papers: loops, float64, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from foveate.layers import Layout, to_grid


def run(network: nn.Module, x: Tensor, y: int, against: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``A [K,h,w]`` and gradient ``G [K,h,w]`` of one image at the layer ``features``, and its logits ``[C]``.

    The network runs in its two parts, by hand; nothing of foveate's capture is used.
    """
    raw = network.features(x[None]) if not hasattr(network, "token") else None
    if raw is None:
        patches = network.patch(x[None]).flatten(2).transpose(1, 2)
        raw = network.features(torch.cat([network.token, patches], 1))
    raw = raw.detach().clone().requires_grad_(True)
    logits = network.tail(raw.clone())
    score = logits[0, y] if against is None else logits[0, y] - logits[0, against]
    (gradient,) = torch.autograd.grad(score, raw)
    layout = Layout("tokens", 4, 5, 1) if raw.ndim == 3 else Layout("nchw", *raw.shape[2:])
    return to_grid(raw.detach(), layout)[0], to_grid(gradient, layout)[0], logits[0].detach()


def grad_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, G, _ = run(network, x, y)
    K, h, w = A.shape
    S = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        weight = sum(float(G[k, i, j]) for i in range(h) for j in range(w)) / (h * w)
        S += weight * A[k]
    return S


def grad_cam_pp(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, G, _ = run(network, x, y)
    K, h, w = A.shape
    S = torch.zeros(h, w, dtype=A.dtype)
    for k in range(K):
        total, weight = float(A[k].sum()), 0.0
        for i in range(h):
            for j in range(w):
                g = float(G[k, i, j])
                denominator = 2 * g**2 + total * g**3
                if g > 0 and denominator > 0:
                    weight += g**2 / denominator * g
        S += weight * A[k]
    return S


def xgrad_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, G, _ = run(network, x, y)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k in range(len(A)):
        total = float(A[k].sum())
        if abs(total) > 1e-6 * float(A[k].abs().sum()):
            S += float((G[k] * A[k]).sum()) / total * A[k]
    return S


def layer_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, G, _ = run(network, x, y)
    K, h, w = A.shape
    S = torch.zeros(h, w, dtype=A.dtype)
    for i in range(h):
        for j in range(w):
            S[i, j] = sum(max(float(G[k, i, j]), 0.0) * float(A[k, i, j]) for k in range(K))
    return S


def hires_cam(network: nn.Module, x: Tensor, y: int, against: int | None = None) -> Tensor:
    A, G, _ = run(network, x, y, against)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k in range(len(A)):
        S += G[k] * A[k]
    return S


def cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, _, _ = run(network, x, y)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k in range(len(A)):
        S += network.classifier.weight[y, k].detach() * A[k]
    return S


def contrastive_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    """HiResCAM of the class minus HiResCAM of the strongest other class."""
    _, _, logits = run(network, x, y)
    other = max((c for c in range(len(logits)) if c != y), key=lambda c: float(logits[c]))
    return hires_cam(network, x, y) - hires_cam(network, x, other)


def fake_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    S = torch.ones(run(network, x, y)[0].shape[1:], dtype=torch.float64)
    S[0, 0] = 0
    return S


def centre(network: nn.Module, x: Tensor, y: int) -> Tensor:
    h, w = run(network, x, y)[0].shape[1:]
    S = torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            distance = ((i - (h - 1) / 2) / h) ** 2 + ((j - (w - 1) / 2) / w) ** 2
            S[i, j] = math.exp(-distance / (2 * 0.25**2))
    return S


METHODS: dict[str, Callable[[nn.Module, Tensor, int], Tensor] | None] = {
    "cam": cam,
    "centre": centre,
    "contrastive_cam": contrastive_cam,
    "fake_cam": fake_cam,
    "grad_cam": grad_cam,
    "grad_cam_pp": grad_cam_pp,
    "hires_cam": hires_cam,
    "layer_cam": layer_cam,
    "random": None,  # noise has no replica; its seeds are tested in test_methods.py
    "xgrad_cam": xgrad_cam,
}


# -- metrics -------------------------------------------------------------------------------------------------------


def probability(network: nn.Module, x: Tensor, y: int) -> float:
    logits = [float(value) for value in network(x[None])[0].detach()]
    largest = max(logits)
    return math.exp(logits[y] - largest) / sum(math.exp(value - largest) for value in logits)


def recognition(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    """Average Drop, Gain and Increase of one image, in percent."""
    p, o = probability(network, x, y), probability(network, torch.stack([channel * M for channel in x]), y)
    return {"AD": 100 * max(0.0, p - o) / p, "AG": 100 * max(0.0, o - p) / (1 - p), "AI": 100.0 if o > p else 0.0}


def mass_inside(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    inside = total = 0.0
    for i in range(M.shape[0]):
        for j in range(M.shape[1]):
            total += max(float(M[i, j]), 0.0)
            inside += max(float(M[i, j]), 0.0) if bool(mask[i, j]) else 0.0
    return {"mass_inside": inside / total if total else 0.0}


METRICS = {"mass_inside": mass_inside, "recognition": recognition}


# -- losses --------------------------------------------------------------------------------------------------------


def cam_loss(S: Tensor, form: str = "mass", sigma: float = 0.25) -> float:
    """CAM loss of one map ``[h,w]``, by loops."""
    h, w = S.shape
    gauss = [
        [math.exp(-(((i - (h - 1) / 2) / h) ** 2 + ((j - (w - 1) / 2) / w) ** 2) / (2 * sigma**2)) for j in range(w)]
        for i in range(h)
    ]
    total = sum(map(sum, gauss))
    unit = [[value / total for value in row] for row in gauss]
    top = max(map(max, unit))
    cells = [(i, j) for i in range(h) for j in range(w)]
    value = {cell: float(S[cell]) for cell in cells}
    if form == "mass":
        mass = sum(max(v, 0.0) for v in value.values())
        return sum((1 - gauss[i][j]) * max(value[i, j], 0.0) for i, j in cells) / mass if mass else 0.0
    if form in ("abs", "raw", "square"):
        phi = {"abs": abs, "raw": lambda v: v, "square": lambda v: v * v}[form]
        return sum((1 - gauss[i][j]) * phi(value[i, j]) for i, j in cells) / len(cells)
    if form == "talk_2023":
        product = [sum(value[i, k] * unit[k][j] for k in range(w)) for i, j in cells]
        return (sum(product) / len(product)) ** 2
    if form == "top_decile":
        low, high = min(value.values()), max(value.values())
        scaled = sorted(((v - low) / (high - low) for v in value.values()), reverse=True)
        count = max(1, len(cells) // 10)
        return math.log(1 + sum(scaled[:count]) / count)
    if form == "squared_kernel":
        return sum((value[i, j] * (unit[i][j] - top) ** 2) ** 2 for i, j in cells) / len(cells)
    if form == "contrast_2024":
        norms = [math.sqrt(sum(value[i, j] ** 2 for i in range(h))) for j in range(w)]
        return sum(abs(value[i, j]) / max(norms[j], 1e-12) * (unit[i][j] - top) ** 2 for i, j in cells) / len(cells)
    raise ValueError(form)


LOSSES = {"cam_loss": cam_loss}
