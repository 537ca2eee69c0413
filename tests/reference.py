"""Replicas of every method, metric and loss, straight from the papers: loops, float64, one image at a time."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torch import Tensor, nn

from foveate.runtime.layers import Layout, to_grid


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


def loss_of(network: nn.Module, x: Tensor, y: int) -> Tensor:
    """Cross-entropy of one image."""
    return -network(x[None]).double().log_softmax(1)[0, y]


def hessian(network: nn.Module, x: Tensor, y: int) -> tuple[Tensor, Tensor]:
    """Gradient ``[d]`` and explicit Hessian ``[d,d]`` of the cross-entropy by the image."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(network, x, y), x, create_graph=True)
    each = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
    (rows,) = torch.autograd.grad(gradient, x, each, is_grads_batched=True)
    return gradient.detach().flatten(), rows.flatten(1)


def sparse_maximiser(g: Tensor, H: Tensor, lambda1: float, lambda2: float, steps: int = 4000) -> Tensor:
    """``argmax g^T D + D^T H D / 2 - lambda_1 |D|_1 - lambda_2 |D|_2^2`` by plain proximal gradient."""
    eigenvalues = torch.linalg.eigvalsh(H)
    t = 1 / (2 * lambda2 - min(0.0, float(eigenvalues[0])))
    D = torch.zeros_like(g)
    for _ in range(steps):
        v = D + t * (g + H @ D - 2 * lambda2 * D)
        new = torch.sign(v) * torch.clamp(v.abs() - t * lambda1, min=0)
        if torch.equal(new, D):
            break
        D = new
    return D


def cafo(network: nn.Module, x: Tensor, y: int, eta: float = 0.9) -> Tensor:
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss_of(network, x, y), x)
    values = sorted(abs(float(g)) for g in gradient.flatten())
    lambda1 = values[round(eta * len(values)) - 1]
    D = torch.zeros_like(gradient)
    for place in itertools.product(*map(range, gradient.shape)):
        g = float(gradient[place])
        D[place] = math.copysign(max(abs(g) - lambda1, 0.0), g) / (2 * 10)
    return D.abs().sum(0)


def caso(network: nn.Module, x: Tensor, y: int, lambda1: float = 0.0, tolerance: float = 0.0) -> Tensor:
    g, H = hessian(network, x, y)
    L = max(0.0, float(torch.linalg.eigvalsh(H)[-1]))
    return sparse_maximiser(g, H, lambda1, L / 2 + 10).view(x.shape).abs().sum(0)


# Settings that both sides are run with, where the defaults would take minutes here.
SETTINGS: dict[str, dict[str, Any]] = {
    "cafo": {"eta": 0.8},
    "caso": {"lambda1": 1e-3, "tolerance": 1e-12},
    "extremal_perturbation": {
        "steps": 3,
        "areas": (0.1, 0.4),
        "stride": 5,
        "sigma": 6.0,
        "strongest": 3.0,
        "blurs": 3,
        # Not ones: where many pixels of the mask are equal, rounding says which of them belong to the area.
        "start": torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    },
    "meaningful_perturbation": {"steps": 4, "stride": 4, "smooth": 1.5, "jitter": 2},
    "occlusion": {"window": (6, 5), "stride": (4, 3)},
    "opti_cam": {"steps": 7},
    "rise": {"masks": 30, "cells": 3},
    "smooth_grad": {"samples": 3},
}


def up(S: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(S[None, None], size=tuple(x.shape[1:]), mode="bilinear", align_corners=False)[0, 0]


def to_range(S: Tensor) -> Tensor:
    return (S - S.min()) / (S.max() - S.min()) if S.max() > S.min() else torch.zeros_like(S)


def seen(network: nn.Module, x: Tensor, M: Tensor) -> Tensor:
    """Logits ``[C]`` of an image seen through a mask, on black."""
    return network(torch.stack([channel * M for channel in x])[None])[0]


def sure(logits: Tensor, y: int) -> Tensor:
    return logits.exp()[y] / logits.exp().sum()


class Adam:
    """Adam by its formulas, for one tensor."""

    def __init__(self, start: Tensor, lr: float) -> None:
        self.value, self.lr, self.t = start.clone(), lr, 0
        self.first, self.second = torch.zeros_like(start), torch.zeros_like(start)

    def step(self, gradient: Tensor) -> None:
        self.t += 1
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.t), self.second / (1 - 0.999**self.t)
        self.value = self.value - self.lr * first / (second.sqrt() + 1e-8)


def score_cam(network: nn.Module, x: Tensor, y: int, weighting: str = "channel_softmax") -> Tensor:
    A, _, _ = run(network, x, y)
    with torch.no_grad():
        black = network(torch.zeros_like(x)[None])[0]
        logits = [seen(network, x, to_range(up(channel, x))) for channel in A]
    if weighting == "probability":
        weights = [float(sure(one, y)) for one in logits]
    elif weighting == "increase":
        weights = [float(one[y] - black[y]) for one in logits]
    else:
        total = sum(math.exp(float(one[y] - black[y])) for one in logits)
        weights = [math.exp(float(one[y] - black[y])) / total for one in logits]
    return sum((w * channel for w, channel in zip(weights, A, strict=True)), torch.zeros(A.shape[1:], dtype=A.dtype))


def raw_of(network: nn.Module, x: Tensor) -> Tensor:
    if not hasattr(network, "token"):
        return network.features(x[None]).detach()
    patches = network.patch(x[None]).flatten(2).transpose(1, 2)
    return network.features(torch.cat([network.token, patches], 1)).detach()


def ablation_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, _, logits = run(network, x, y)
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for k in range(len(A)):
        raw = raw_of(network, x).clone()
        if raw.ndim == 3:
            raw[:, 1:, k] = 0  # the class token is not a position
        else:
            raw[:, k] = 0
        without = float(network.tail(raw)[0, y].detach())
        S += (float(logits[y]) - without) / abs(float(logits[y])) * A[k]
    return S


def opti_cam(network: nn.Module, x: Tensor, y: int, steps: int) -> Tensor:
    A = run(network, x, y)[0].clamp(min=0)
    adam, best, found = Adam(torch.full((len(A),), 0.5, dtype=A.dtype), 0.1), -math.inf, A.mean(0)
    for _ in range(steps + 1):
        u = adam.value.clone().requires_grad_(True)
        S = sum(a * channel for a, channel in zip(u.exp() / u.exp().sum(), A, strict=True))
        value = seen(network, x, to_range(up(S, x)))[y]
        if float(value.detach()) > best:
            best, found = float(value.detach()), S.detach()
        adam.step(torch.autograd.grad(-value, u)[0])
    return found


def gradient_of(network: nn.Module, x: Tensor, y: int) -> Tensor:
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(network(x[None])[0, y], x)[0]


def gradient(network: nn.Module, x: Tensor, y: int) -> Tensor:
    return gradient_of(network, x, y).abs().max(0).values


def input_x_gradient(network: nn.Module, x: Tensor, y: int) -> Tensor:
    return (x * gradient_of(network, x, y)).sum(0)


def integrated_gradients(network: nn.Module, x: Tensor, y: int, steps: int = 50) -> Tensor:
    return sum((x * gradient_of(network, x * (i + 0.5) / steps, y)).sum(0) / steps for i in range(steps))


def smooth_grad(network: nn.Module, x: Tensor, y: int, samples: int, square: bool = False) -> Tensor:
    total = torch.zeros_like(x)
    for i in range(samples):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x)
        g = gradient_of(network, x + 0.15 * float(x.max() - x.min()) * noise, y)
        total += g * g if square else g
    return (total / samples).abs().max(0).values


def guided_gradient(network: nn.Module, x: Tensor, y: int) -> Tensor:
    """The gradient with every ReLU replaced by a product, and a hook that drops negative gradients behind it."""

    def relu(values: Tensor, inplace: bool = False) -> Tensor:
        out = values * (values.detach() > 0)
        out.register_hook(lambda g: g * (g > 0))
        return out

    plain, F.relu = F.relu, relu
    try:
        return gradient_of(network, x, y)
    finally:
        F.relu = plain


def guided_backprop(network: nn.Module, x: Tensor, y: int) -> Tensor:
    return guided_gradient(network, x, y).abs().max(0).values


def guided_grad_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    where = up(grad_cam(network, x, y).clamp(min=0), x)
    return torch.stack([(where * channel).abs() for channel in guided_gradient(network, x, y)]).max(0).values


def rise(network: nn.Module, x: Tensor, y: int, masks: int, cells: int) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    H, W = x.shape[1:]
    tall, wide = math.ceil(H / cells), math.ceil(W / cells)
    grids = (torch.rand(masks, cells, cells, generator=draws) < 0.5).to(x)
    downs = torch.randint(tall, (masks,), generator=draws)
    rights = torch.randint(wide, (masks,), generator=draws)
    S = torch.zeros(H, W, dtype=x.dtype)
    for grid, down, right in zip(grids, downs.tolist(), rights.tolist(), strict=True):
        grown = F.interpolate(grid[None, None], size=((cells + 1) * tall, (cells + 1) * wide), mode="bilinear")[0, 0]
        M = grown[down : down + H, right : right + W]
        S += float(sure(seen(network, x, M), y).detach()) * M
    return S / (masks * 0.5)


def occlusion(network: nn.Module, x: Tensor, y: int, window: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    H, W = x.shape[1:]
    start = float(network(x[None])[0, y].detach())
    total, count = torch.zeros(H, W, dtype=x.dtype), torch.zeros(H, W, dtype=x.dtype)
    top = 0
    while True:
        left = 0
        while True:
            hidden = x.clone()
            hidden[:, top : top + window[0], left : left + window[1]] = 0
            total[top : top + window[0], left : left + window[1]] += start - float(network(hidden[None])[0, y].detach())
            count[top : top + window[0], left : left + window[1]] += 1
            if left + window[1] >= W:
                break
            left += stride[1]
        if top + window[0] >= H:
            break
        top += stride[0]
    return total / count


def gauss(x: Tensor, sigma: float) -> Tensor:
    """Blur of ``[K,H,W]`` by weighted sums of shifted copies, edges repeated."""
    if sigma <= 0:
        return x
    radius = max(1, round(3 * sigma))
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(-radius, radius + 1)]
    for axis in (1, 2):
        size = x.shape[axis]
        places = [[min(max(p + i, 0), size - 1) for p in range(size)] for i in range(-radius, radius + 1)]
        x = sum(w * x.index_select(axis, torch.tensor(p)) for w, p in zip(weights, places, strict=True)) / sum(weights)
    return x


def meaningful_perturbation(
    network: nn.Module, x: Tensor, y: int, steps: int, stride: int, smooth: float, jitter: int
) -> Tensor:
    H, W = x.shape[1:]
    h, w = math.ceil(H / stride), math.ceil(W / stride)
    blank = gauss(x, max(H, W) / 10)

    def mixed(M: Tensor) -> Tensor:
        return x * M + blank * (1 - M)

    def p(image: Tensor) -> Tensor:
        return sure(network(image[None])[0], y)

    whole, nothing = float(p(x).detach()), float(p(blank).detach())
    m = torch.ones(h, w, dtype=x.dtype)
    for number in range(15):
        radius = 0.05 + 0.7 * number / 14
        for i in range(h):
            for j in range(w):
                distance = math.hypot((i + 0.5) / h - 0.5, (j + 0.5) / w - 0.5)
                m[i, j] = 1 / (1 + math.exp(-10 * (distance - radius)))
        if float(p(mixed(up(m, x))).detach()) <= whole - 0.99 * max(whole - nothing, 0):
            break
    adam, draws = Adam(m, 0.1), torch.Generator().manual_seed(0)
    for _ in range(steps):
        down, right = torch.randint(-jitter, jitter + 1, (2,), generator=draws).tolist()
        m = adam.value.clone().requires_grad_(True)
        image = mixed(gauss(up(m, x)[None], smooth)[0])
        rows = torch.tensor([min(max(i + down, 0), H - 1) for i in range(H)])
        columns = torch.tensor([min(max(j + right, 0), W - 1) for j in range(W)])
        variation = sum((m[i, j + 1] - m[i, j]).abs() ** 3 for i in range(h) for j in range(w - 1))
        variation = variation + sum((m[i + 1, j] - m[i, j]).abs() ** 3 for i in range(h - 1) for j in range(w))
        loss = p(image[:, rows][:, :, columns]) + 1e-4 * (1 - m).abs().sum() + 1e-2 * variation
        adam.step(torch.autograd.grad(loss, m)[0])
        adam.value = adam.value.clamp(0, 1)
    return (1 - gauss(up(adam.value, x)[None], smooth)[0]).clamp(0, 1)


def extremal_perturbation(
    network: nn.Module,
    x: Tensor,
    y: int,
    steps: int,
    areas: tuple[float, ...],
    stride: int,
    sigma: float,
    strongest: float,
    blurs: int,
    start: Tensor,
    baseline: float | None = None,
) -> Tensor:
    H, W = x.shape[1:]
    h, w, radius = math.ceil(H / stride), math.ceil(W / stride), 1 + math.ceil(sigma / stride)
    levels = [gauss(x, (1 - level / (blurs - 1)) * strongest) for level in range(blurs)]
    if baseline is not None:  # fading is linear, however many levels
        levels = [x * level / (blurs - 1) + baseline * (1 - level / (blurs - 1)) for level in range(blurs)]

    def mask(p: Tensor) -> Tensor:
        pixels = []
        for i in range(H):
            for j in range(W):
                values = []
                for a in range(i // stride - radius, i // stride + radius + 1):
                    for b in range(j // stride - radius, j // stride + radius + 1):
                        z = math.hypot(i - a * stride - (stride - 1) / 2, j - b * stride - (stride - 1) / 2) / sigma
                        kernel = math.exp(-2 * max(z - 0.5, 0) ** 2)
                        inside = 0 <= a < h and 0 <= b < w
                        values.append(kernel * p[a, b] if inside else p.new_zeros(()))
                v = torch.stack(values)
                pixels.append((v * (20 * v).exp()).sum() / (20 * v).exp().sum())
        return torch.stack(pixels).view(H, W).clamp(0, 1)

    def mixed(m: Tensor) -> Tensor:
        place = m * (blurs - 1)
        below = place.detach().floor().clamp(max=blurs - 2)
        image = torch.zeros_like(x)
        for level in range(blurs - 1):
            here = (1 - (place - level)) * levels[level] + (place - level) * levels[level + 1]
            image = torch.where(below == level, here, image)
        return image

    found = []
    for area in areas:
        p, momentum = start, None
        wanted = torch.tensor([1.0 if r >= H * W * (1 - area) else 0.0 for r in range(H * W)]).to(x)
        for step in range(steps):
            p = p.clone().requires_grad_(True)
            m = mask(p)
            image = mixed(m)
            if step % 2 == 0:
                image = image.flip(2)
            miss = ((m.flatten().sort().values - wanted) ** 2).mean()
            loss = 300 * 1.0035**step * miss - network(image[None])[0, y]
            (g,) = torch.autograd.grad(loss, p)
            momentum = g if momentum is None else 0.9 * momentum + 0.1 * g
            p = (p.detach() - 0.01 * momentum).clamp(0, 1)
        found.append(mask(p))
    return sum(found) / len(found)


def component(matrix: Tensor) -> Tensor:
    """Positions on the first right singular vector of ``[N,K]``, with the sign of the rows' mean."""
    _, _, right = torch.linalg.svd(matrix, full_matrices=False)
    projected = matrix @ right[0]
    return projected if float(projected @ matrix.mean(1)) >= 0 else -projected


def eigen_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, _, _ = run(network, x, y)
    return component(A.flatten(1).T).view(A.shape[1:])


def eigen_grad_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    A, G, _ = run(network, x, y)
    return component((A * G).flatten(1).T).view(A.shape[1:])


def finer_cam(network: nn.Module, x: Tensor, y: int) -> Tensor:
    _, _, logits = run(network, x, y)
    others = sorted((c for c in range(len(logits)) if c != y), key=lambda c: abs(float(logits[c] - logits[y])))[:3]
    return grad_cam(network, x, y) - 0.6 * sum(grad_cam(network, x, d) for d in others) / len(others)


def full_grad(network: nn.Module, x: Tensor, y: int) -> Tensor:
    """What the score changes by with each bias: its gradient by a tensor of zeros added where the bias is added."""
    probes: list[tuple[Tensor, Tensor]] = []

    def probe(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        zeros = torch.zeros_like(output, requires_grad=True)
        if isinstance(module, nn.BatchNorm2d):
            bias = module.bias - module.weight * module.running_mean / (module.running_var + module.eps).sqrt()
        else:
            bias = module.bias
        probes.append((bias.detach(), zeros))
        return output + zeros

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    handles = [m.register_forward_hook(probe) for m in network.modules() if isinstance(m, kinds)]
    try:
        inside = x.clone().requires_grad_(True)
        gradients = torch.autograd.grad(network(inside[None])[0, y], [inside, *(zeros for _, zeros in probes)])
    finally:
        for handle in handles:
            handle.remove()
    S = sum(to_range((x * gradients[0]).abs()[c]) for c in range(3))
    for (bias, _), g in zip(probes, gradients[1:], strict=True):
        for k in range(g.shape[1]):
            S = S + up(to_range((bias[k] * g[0, k]).abs()), x)
    return S


def attention_rollout(network: nn.Module, x: Tensor, y: int) -> Tensor:
    tokens = raw_of(network, x)[0]
    q, k = network.query(tokens).detach(), network.key(tokens).detach()
    N = len(tokens)
    R = torch.zeros(N, N, dtype=x.dtype)
    for i in range(N):
        row = [math.exp(float(q[i] @ k[j]) / math.sqrt(8)) for j in range(N)]
        for j in range(N):
            R[i, j] = (row[j] / sum(row) + (i == j)) / 2
    return R[0, 1:].view(4, 5)


def ca_stream(network: nn.Module, x: Tensor, y: int) -> Tensor:
    """The token's dot product with every cell, over the square root of the channels."""
    A, token = run(network, x, y)[0], network.stream.token[0].detach()
    S = torch.zeros(A.shape[1:], dtype=A.dtype)
    for i in range(A.shape[1]):
        for j in range(A.shape[2]):
            S[i, j] = sum(float(A[k, i, j] * token[k]) for k in range(len(A))) / math.sqrt(len(A))
    return S


METHODS: dict[str, Callable[..., Tensor] | None] = {
    "ca_stream": ca_stream,
    "ablation_cam": ablation_cam,
    "attention_rollout": attention_rollout,
    "cafo": cafo,
    "cam": cam,
    "caso": caso,
    "centre": centre,
    "contrastive_cam": contrastive_cam,
    "eigen_cam": eigen_cam,
    "eigen_grad_cam": eigen_grad_cam,
    "extremal_perturbation": extremal_perturbation,
    "fake_cam": fake_cam,
    "finer_cam": finer_cam,
    "full_grad": full_grad,
    "grad_cam": grad_cam,
    "grad_cam_pp": grad_cam_pp,
    "gradient": gradient,
    "guided_backprop": guided_backprop,
    "guided_grad_cam": guided_grad_cam,
    "hires_cam": hires_cam,
    "input_x_gradient": input_x_gradient,
    "integrated_gradients": integrated_gradients,
    "layer_cam": layer_cam,
    "meaningful_perturbation": meaningful_perturbation,
    "occlusion": occlusion,
    "opti_cam": opti_cam,
    "random": None,  # noise has no replica; its seeds are tested in test_methods.py
    "rise": rise,
    "score_cam": score_cam,
    "smooth_grad": smooth_grad,
    "xgrad_cam": xgrad_cam,
}

# Networks on which a method is defined, where that is not all of them.
DEFINED_ON = {
    "attention_rollout": ("tokens",),
    "ca_stream": ("stream",),
    "cam": ("gap",),
    "full_grad": ("gap", "flat"),  # tanh, layer norm and softmax are neither affine nor ReLUs
    "guided_backprop": ("gap", "flat", "inplace"),
    "guided_grad_cam": ("gap", "flat", "inplace"),
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


def insertion_deletion(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, Any]:
    """Pixel by pixel, one copy of the image a step; the networks here have no normalisation, so that its zero is black."""
    H, W = M.shape
    order = sorted(range(H * W), key=lambda i: (-float(M.flatten()[i]), i))
    side, step = 11, math.ceil(H * W / 28)
    impulse = np.zeros((side, side))
    impulse[5, 5] = 1
    kernel = ndimage.gaussian_filter(impulse, 5)
    blurred = torch.stack([torch.from_numpy(ndimage.correlate(c.numpy(), kernel, mode="constant")) for c in x])
    values: dict[str, Any] = {}
    for column, start, finish in (("I", blurred, x), ("D", x, torch.zeros_like(x))):
        image, curve = start.clone(), [probability(network, start, y)]
        for begin in range(0, H * W, step):
            for pixel in order[begin : begin + step]:
                image[:, pixel // W, pixel % W] = finish[:, pixel // W, pixel % W]
            curve.append(probability(network, image, y))
        values[column] = 100 * (sum(curve) - curve[0] / 2 - curve[-1] / 2) / (len(curve) - 1)
        values[f"{column}_curve"] = curve
    return values


def flood(binary: list[list[bool]], diagonal: bool) -> list[list[tuple[int, int]]]:
    """Connected components in raster order of their first pixel."""
    H, W, seen, found = len(binary), len(binary[0]), set(), []
    near = [(-1, 0), (1, 0), (0, -1), (0, 1)] + ([(-1, -1), (-1, 1), (1, -1), (1, 1)] if diagonal else [])
    for i in range(H):
        for j in range(W):
            if not binary[i][j] or (i, j) in seen:
                continue
            part, waiting = [], [(i, j)]
            seen.add((i, j))
            while waiting:
                a, b = waiting.pop()
                part.append((a, b))
                for da, db in near:
                    c, d = a + da, b + db
                    if 0 <= c < H and 0 <= d < W and binary[c][d] and (c, d) not in seen:
                        seen.add((c, d))
                        waiting.append((c, d))
            found.append(part)
    return found


def box_of(binary: list[list[bool]], diagonal: bool = False) -> tuple[int, int, int, int] | None:
    parts = flood(binary, diagonal)
    if not parts:
        return None
    largest = max(parts, key=len)
    return (
        min(j for _, j in largest),
        min(i for i, _ in largest),
        max(j for _, j in largest) + 1,
        max(i for i, _ in largest) + 1,
    )


def overlap(a: tuple[int, int, int, int] | None, b: tuple[int, int, int, int]) -> float:
    if a is None:
        return 0.0
    pixels = [{(i, j) for i in range(y0, y1) for j in range(x0, x1)} for x0, y0, x1, y1 in (a, b)]
    return len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])


def localization(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, Any]:
    """From a mask: its tight box for OM, LE, BA and SM, its pixels for F1, SP and EP."""
    H, W = M.shape
    grid = [[float(M[i, j]) for j in range(W)] for i in range(H)]
    rows = [i for i in range(H) if any(bool(mask[i, j]) for j in range(W))]
    columns = [j for j in range(W) if any(bool(mask[i, j]) for i in range(H))]
    truth = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    mean = sum(map(sum, grid)) / (H * W)
    box = box_of([[value > mean for value in row] for row in grid])
    found = overlap(box, truth) > 0.5
    right = int(network(x[None])[0].argmax()) == y
    total = sum(map(sum, grid))
    inside = sum(grid[i][j] for i in range(H) for j in range(W) if bool(mask[i, j]))
    precision, recall = inside / (total + 1e-6), inside / int(mask.sum())
    low, high = min(map(min, grid)), max(map(max, grid))
    levels = [[int(255 * (value - low) / (high - low)) for value in row] for row in grid]
    accuracy = []
    for step in range(100):
        threshold = int(step * 0.01 * 255)
        accuracy.append(100.0 * (overlap(box_of([[v > threshold for v in row] for row in levels], True), truth) >= 0.5))
    peaks = [bool(mask[i, j]) for i in range(H) for j in range(W) if grid[i][j] == high]
    area, part = 0.0, torch.zeros_like(x)
    if box is not None:
        x0, y0, x1, y1 = box
        area = (x1 - x0) * (y1 - y0) / (H * W)
        part = nn.functional.interpolate(x[None, :, y0:y1, x0:x1], (H, W), mode="bicubic")[0].clamp(0, 1)
    return {
        "OM": 0.0 if found and right else 100.0,
        "LE": 0.0 if found else 100.0,
        "F1": 100 * 2 * precision * recall / (precision + recall + 1e-6),
        "BA": accuracy,
        "SP": 100 * sum(peaks) / len(peaks),
        "EP": 100 * inside / total,
        "SM": math.log(max(area, 0.05)) - math.log(probability(network, part, y)),
    }


def sparsity(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    """Of HiResCAM, as the tests explain with it; Gini by its definition over all pairs."""
    values = [abs(float(v)) for v in hires_cam(network, x, y).flatten()]
    pairs = sum(abs(a - b) for a in values for b in values)
    return {
        "sparsity": sum(v == 0 for v in values) / len(values),
        "eta": sum(v == 0 for v in values) / len(values),
        "gini": pairs / (2 * len(values) * sum(values)),
    }


def completeness_error(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    """Of HiResCAM before a linear head: the sum of the map and the bias is the logit."""
    logit = float(network(x[None])[0, y].detach())
    if type(network).__name__ not in ("_GapNet", "_FlatNet"):  # no linear head behind their layer
        return {"completeness_error": float("nan")}
    total = float(hires_cam(network, x, y).sum()) + float(network.classifier.bias[y].detach())
    return {"completeness_error": abs(total - logit) / abs(logit)}


def class_sensitivity(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    order = network(x[None])[0].argsort(descending=True)
    first, second = (hires_cam(network, x, int(c)).flatten() for c in order[:2])
    return {"class_sensitivity": 1 - float(stats.spearmanr(first, second).statistic)}


def structural(a: Tensor, b: Tensor, side: int) -> float:
    """SSIM with a square window, over windows that lie wholly inside."""
    values = []
    for i in range(a.shape[0] - side + 1):
        for j in range(a.shape[1] - side + 1):
            u, v = (m[i : i + side, j : j + side].flatten() for m in (a, b))
            mu, mv = u.mean(), v.mean()
            cov = (u * v).mean() - mu * mv
            up, down = (2 * mu * mv + 1e-4) * (2 * cov + 9e-4), (mu**2 + mv**2 + 1e-4)
            values.append(float(up / (down * (u.var(correction=0) + v.var(correction=0) + 9e-4))))
    return sum(values) / len(values)


def randomisation(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, Any]:
    """A cascade of five stages: the head, then quarters of the other layers with parameters, from the output back."""
    changed = copy.deepcopy(network)
    layers = [m for m in changed.modules() if list(m.parameters(recurse=False))][::-1]
    count = min(5, len(layers))
    if count == len(layers):
        parts = [[m] for m in layers]
    else:
        edges = [round(i * (len(layers) - 1) / 4) for i in range(5)]
        parts = [layers[:1]] + [layers[1:][a:b] for a, b in itertools.pairwise(edges)]
    before = hires_cam(network, x, y)
    ranks, structures = [], []
    for number, part in enumerate(parts):
        torch.manual_seed(number)
        for module in part:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            else:  # what has no initialisation of its own: normal, with its own standard deviation
                with torch.no_grad():
                    for parameter in module.parameters(recurse=False):
                        parameter.copy_(torch.randn_like(parameter) * parameter.std(correction=0))
        after = hires_cam(changed, x, y)
        positive = after.clamp(min=0)
        flat = bool((after == after[0, 0]).all())
        ranks.append(float("nan") if flat else float(stats.spearmanr(before.flatten(), after.flatten()).statistic))
        if float(positive.max() - positive.min()) == 0:
            structures.append(float("nan"))
        else:
            structures.append(structural(M, to_range(up(positive, x)), 7))
    return {
        "randomisation": float(np.nanmean(ranks)),
        "randomisation_ssim": float(np.nanmean(structures)) if not np.isnan(structures).all() else float("nan"),
        "randomisation_curve": ranks,
        "randomisation_ssim_curve": structures,
    }


def accuracy(network: nn.Module, x: Tensor, M: None, y: int, mask: Tensor) -> dict[str, float]:
    logits = network(x[None])[0].tolist()
    return {"accuracy": 100.0 if max(logits) == logits[y] else 0.0}


def foreground_share(network: nn.Module, x: Tensor, M: None, y: int, mask: Tensor) -> dict[str, float]:
    maps = [hires_cam(network, x, c) for c in range(network(x[None]).shape[1])]
    h, w = maps[0].shape
    share = nn.functional.adaptive_avg_pool2d(mask.double()[None], (h, w))[0]
    inside = total = 0.0
    for S in maps:
        for i in range(h):
            for j in range(w):
                K = abs(float(maps[y][i, j] - S[i, j]))
                total += K
                inside += K * float(share[i, j])
    return {"foreground_share": inside / total}


def relative_foreground_sensitivity(network: nn.Module, x: Tensor, M: None, y: int, mask: Tensor) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    right = [0.0, 0.0]
    for _ in range(4):
        drawn = 0.25 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        for column in (0, 1):
            image = x.clone()
            for i in range(x.shape[1]):
                for j in range(x.shape[2]):
                    if bool(mask[i, j]) == bool(column):
                        image[:, i, j] = (x[:, i, j] + drawn[:, i, j]).clamp(0, 1)
            right[column] += (int(network(image[None])[0].argmax()) == y) / 4
    return {"relative_foreground_sensitivity": right}


def cost(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    """What the tests say was spent."""
    return {"T": 0.5, "forwards": 4.0, "backwards": 1.0, "memory": 2.0}


def size(network: nn.Module, x: Tensor, M: Tensor, y: int, mask: Tensor) -> dict[str, float]:
    """Parameters in millions; two operations for each multiplication of a convolution or a linear layer, in billions."""
    operations = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal operations
        places = output.shape[2] * output.shape[3] if isinstance(module, nn.Conv2d) else output.numel() // output.shape[-1]
        operations += 2 * places * module.weight.numel()

    handles = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    network(x[None])
    for handle in handles:
        handle.remove()
    if hasattr(network, "query"):  # attention of 21 tokens of 8 numbers: two products of matrices
        operations += 2 * (2 * 21 * 21 * 8)
    return {"parameters": sum(p.numel() for p in network.parameters()) / 1e6, "stream_share": 0.0, "GFLOPs": operations / 1e9}


METRICS = {
    "size": size,
    "accuracy": accuracy,
    "class_sensitivity": class_sensitivity,
    "completeness_error": completeness_error,
    "cost": cost,
    "foreground_share": foreground_share,
    "insertion_deletion": insertion_deletion,
    "localization": localization,
    "mass_inside": mass_inside,
    "randomisation": randomisation,
    "recognition": recognition,
    "relative_foreground_sensitivity": relative_foreground_sensitivity,
    "sparsity": sparsity,
}


# -- losses --------------------------------------------------------------------------------------------------------


def cam_loss(S: Tensor, form: str = "mass", sigma: float = 0.25) -> float:
    """CAM loss of one map ``[h,w]``, by loops."""
    h, w = S.shape
    gauss = [
        [math.exp(-(((i - (h - 1) / 2) / h) ** 2 + ((j - (w - 1) / 2) / w) ** 2) / (2 * sigma**2)) for j in range(w)]
        for i in range(h)
    ]
    cells = [(i, j) for i in range(h) for j in range(w)]
    value = {cell: float(S[cell]) for cell in cells}
    if form == "mass":
        mass = sum(max(v, 0.0) for v in value.values())
        return sum((1 - gauss[i][j]) * max(value[i, j], 0.0) for i, j in cells) / mass if mass else 0.0
    if form in ("abs", "raw", "square"):
        phi = {"abs": abs, "raw": lambda v: v, "square": lambda v: v * v}[form]
        return sum((1 - gauss[i][j]) * phi(value[i, j]) for i, j in cells) / len(cells)
    raise ValueError(form)


def contrastive(maps: Tensor, t: int, bias: Tensor) -> float:
    """Cross-entropy of one image's class maps ``[C,h,w]``: minus the log of 1 / sum_c exp(-(y_t - y_c))."""
    total = 0.0
    for c in range(len(maps)):
        total += math.exp(-(float((maps[t] - maps[c]).sum()) + float(bias[t] - bias[c])))
    return math.log(total)


def ablated_cross_entropy(maps: Tensor, t: int, bias: Tensor, mask: Tensor, background: float = 1.0) -> float:
    """ACE of one image, by loops over classes and cells."""
    logits = []
    for c in range(len(maps)):
        a = float(bias[c] - bias[t])
        for i in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                k, h = float(maps[t, i, j] - maps[c, i, j]), float(mask[i, j])
                a += -h * k + background * (1 - h) * abs(k)
        logits.append(a)
    return math.log(sum(math.exp(a) for a in logits)) - logits[t]


def ablated_binary(maps: Tensor, y: list[int], bias: Tensor, mask: Tensor) -> float:
    """ACE of one image of a multi-label head: -log s for present classes, -log(1 - s) for absent ones."""
    loss = 0.0
    for c, present in enumerate(y):
        s = float(bias[c])
        for i in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                m, h = float(maps[c, i, j]), float(mask[i, j])
                s += h * m - (1 - h) * abs(m) if present else m
        loss += math.log(1 + math.exp(-s)) if present else math.log(1 + math.exp(s))
    return loss


def divergence(maps: Tensor, t: int, mask: Tensor, mask_sharpness: float = 50.0, map_sharpness: float = 1.0) -> float:
    """sum_ij P log(P' / Q), over the other classes."""
    cells = [(i, j) for i in range(mask.shape[0]) for j in range(mask.shape[1])]
    weight = {cell: math.exp(mask_sharpness * float(mask[cell])) for cell in cells}
    P = {cell: weight[cell] / sum(weight.values()) for cell in cells}
    values = []
    for c in range(len(maps)):
        if c == t:
            continue
        e = {cell: math.exp(map_sharpness * float(maps[t][cell] - maps[c][cell])) for cell in cells}
        value = 0.0
        for cell in cells:
            log_P = 0.0 if mask[cell] > 0.5 else math.log(P[cell])
            value += P[cell] * (log_P - math.log(max(e[cell] / sum(e.values()), 1e-6)))
        values.append(value)
    return sum(values)


def sliced_wasserstein(maps: Tensor, t: int, mask: Tensor, p: float = 0.95, directions: int = 32, tag: float = 10.0) -> float:
    """Squared sliced Wasserstein distance of the points (K, tag h) to the target's."""
    C = len(maps)
    h = mask.flatten().tolist()
    enough = -math.log((1 - p) / (p * (C - 1)))
    T = [enough * v / max(1.0, sum(h)) for v in h]
    values = []
    for c in range(C):
        if c == t:
            continue
        K = (maps[t] - maps[c]).flatten().tolist()
        K = [min(k, goal) if v > 0.5 else k for k, goal, v in zip(K, T, h, strict=True)]
        distance = 0.0
        for d in range(directions):
            x, y = math.cos(math.pi * d / directions), math.sin(math.pi * d / directions)
            ours = sorted(x * k + y * tag * v for k, v in zip(K, h, strict=True))
            theirs = sorted(x * k + y * tag * v for k, v in zip(T, h, strict=True))
            distance += sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / len(h)
        values.append(distance / directions)
    return sum(values) / len(values)


def interpretable_gradients(a: Tensor, b: Tensor, error: str = "cosine") -> float:
    """The error between two gradients of one image, by loops over their entries."""
    u, v = a.flatten().tolist(), b.flatten().tolist()
    if error == "cosine":
        dot = sum(x * y for x, y in zip(u, v, strict=True))
        return 1 - dot / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v))
    if error in ("l1", "l2"):
        power = 1 if error == "l1" else 2
        return sum(abs(x - y) ** power for x, y in zip(u, v, strict=True)) / len(u)
    return 1 - sum(min(abs(x) / sum(map(abs, u)), abs(y) / sum(map(abs, v))) for x, y in zip(u, v, strict=True))


def mass_outside(S: Tensor, mask: Tensor) -> float:
    """Share of the positive mass of one map that is not on the mask."""
    inside = outside = 0.0
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            value = max(float(S[i, j]), 0.0)
            inside += value * float(mask[i, j])
            outside += value * (1 - float(mask[i, j]))
    return outside / (inside + outside) if inside + outside else 0.0


LOSSES = {
    "cam_loss": cam_loss,
    "contrastive": contrastive,
    "ablated_cross_entropy": ablated_cross_entropy,
    "divergence": divergence,
    "sliced_wasserstein": sliced_wasserstein,
    "interpretable_gradients": interpretable_gradients,
    "mass_outside": mass_outside,
}
