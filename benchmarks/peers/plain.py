"""RISE and extremal perturbation as their papers say it, one image at a time, for rows where no peer has the method."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.methods.mask import blur_pyramid


def rise(model: nn.Module, x: Tensor, target: int, masks: int, batch: int = 50, cells: int = 7, keep: float = 0.5) -> Tensor:
    """Petsiuk et al. 2018, equation 6: all masks first, then batches of masked images, smaller of large ones; ``[H,W]``."""
    side = x.shape[-1]
    batch = max(1, batch * 224**2 // side**2)
    cell = math.ceil(side / cells)
    grids = (torch.rand(masks, 1, cells, cells) < keep).float()
    grown = F.interpolate(grids, size=((cells + 1) * cell,) * 2, mode="bilinear", align_corners=False)[:, 0]
    shifts = torch.randint(0, cell, (masks, 2)).tolist()
    all_masks = torch.stack([mask[d : d + side, r : r + side] for mask, (d, r) in zip(grown, shifts, strict=True)]).to(x)
    scores = []
    with torch.no_grad():
        for part in all_masks.split(batch):
            scores.append(model(part[:, None] * x).softmax(1)[:, target])
    return (torch.cat(scores)[:, None, None] * all_masks).sum(0) / (masks * keep)


def extremal(model: nn.Module, x: Tensor, target: int, area: float, steps: int, lr: float = 0.01) -> Tensor:
    """Fong et al. 2019, equations 2 to 6, with the defaults of their code; ``[H,W]``."""
    side, stride, sigma, levels = x.shape[-1], 7, 21.0, 8
    pyramid = blur_pyramid(x, levels, 20.0)[:, 0]  # [L,3,H,W]
    grid, radius = math.ceil(side / stride), 1 + math.ceil(sigma / stride)
    parameters = torch.ones(1, 1, grid, grid, device=x.device, requires_grad=True)
    pixels = torch.arange(stride, device=x.device) - (stride - 1) / 2
    cells = torch.arange(-radius, radius + 1, device=x.device) * stride
    gap = (pixels[None, :] - cells[:, None]) ** 2  # [n,s]
    distance = (gap[:, None, :, None] + gap[None, :, None, :]).sqrt() / sigma  # [n,n,s,s]
    kernel = torch.exp(-2 * (distance - 0.5).clamp(min=0) ** 2).reshape(-1, 1, stride * stride)
    wanted = torch.ones(side * side, device=x.device)
    wanted[: math.ceil(side * side * (1 - area))] = 0
    optimiser = torch.optim.SGD([parameters], lr, momentum=0.9, dampening=0.9)

    def mask() -> Tensor:
        near = F.unfold(F.pad(parameters, (radius,) * 4), 2 * radius + 1)[0]  # [n^2,hw]
        values = near[:, :, None] * kernel  # [n^2,hw,s^2]
        smooth = (values * (20 * values).softmax(0)).sum(0)
        return smooth.view(grid, grid, stride, stride).transpose(1, 2).reshape(grid * stride, -1)[:side, :side].clamp(0, 1)

    for step in range(steps):
        m = mask()
        height = m * (levels - 1)
        low = height.detach().long().clamp(max=levels - 2)
        index = low.expand(3, -1, -1)[None]
        below, above = pyramid.gather(0, index)[0], pyramid.gather(0, index + 1)[0]
        seen = (below + (height - low) * (above - below))[None]
        reward = model(seen.flip(-1) if step % 2 == 0 else seen)[0, target]
        miss = (m.flatten().sort().values - wanted).square().mean()
        (parameters.grad,) = torch.autograd.grad(300 * 1.0035**step * miss - reward, parameters)
        optimiser.step()
        with torch.no_grad():
            parameters.clamp_(0, 1)
    return mask().detach()
