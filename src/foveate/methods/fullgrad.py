"""FullGrad: the gradient at the input and at every bias, which together make up the score of a network of ReLUs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate import maps
from foveate.errors import FoveateError
from foveate.registry import method
from foveate.runtime.capture import Capture
from foveate.runtime.memo import Memo
from foveate.runtime.model import Normalized, hooked
from foveate.runtime.noise import generator
from foveate.targets import Target

Hook = Callable[..., Any]
_missed = Memo()


@dataclass(frozen=True)
class FullGradients:
    """The parts of a score: ``score = sum(image) + sum of all biases`` in a network of ReLUs, max-pools and affine maps.

    Attributes:
        image: input times gradient at the normalised input, ``[B,C,H,W]``.
        biases: for each bias with a grid, bias times gradient at the output it was added to, ``[B,K,h,w]``.
        scalars: what biases without a grid add, ``[B]``.
        error: how far the sum misses the score, relative to the sizes of the parts and of the score, ``[B]``.
    """

    image: Tensor
    biases: list[Tensor]
    scalars: Tensor
    error: Tensor


Scaling = Literal["channel", "layer"]


@method(
    "full_grad", title="FullGrad", whole=True, paper="Srinivas and Fleuret, NeurIPS 2019, eq. 4 to 6", aliases=("fullgrad",)
)
def full_grad(
    capture: Capture, layer: str | None, target: Target, *, scaling: Scaling = "channel", strict: bool = True
) -> Tensor:
    """``S = psi(x * g) + sum_layers sum_k psi(b_k g_k)``, ``psi`` = absolute value, range, upsampled; ``[B,H,W]``.

    It uses all layers, so that ``layer`` has no say. Batch norm in evaluation mode counts as its affine map.

    Args:
        scaling: each ``channel`` to its own range, as eq. 6 has it, or all of a ``layer`` to one, as the authors' code.
        strict: refuse where the parts miss the score by more than 1 % of what they add and take away (10 % in half
            precision): the decomposition holds for networks of ReLUs, max-pooling and affine layers, and not for GELU,
            SiLU, attention or layer norm. Four images of noise decide that, once a model, and every image is checked too.

    Raises:
        FoveateError: as said; the message has the error.
    """
    if scaling not in ("channel", "layer"):
        raise FoveateError(f"scaling {scaling!r} is unknown: use 'channel' or 'layer'")
    tolerance = (0.01 if capture.x.element_size() >= 4 else 0.1) if strict else math.inf
    if strict:
        _check(_missed_by(capture), tolerance)
    rows = torch.arange(len(capture.x), device=capture.x.device)
    return torch.cat(
        [
            _saliency(full_gradients(capture, target, part), capture.size, scaling, tolerance)
            for part in rows.split(capture.chunk_size("backward"))
        ]
    )


def _missed_by(capture: Capture) -> float:
    """How far the parts miss the score on images of noise, at worst: a matter of the model, looked at once for each.

    A photograph may come near by chance, and whether a method holds must not hang on that.
    """
    known, key = _missed.of(capture.model), (capture.x.dtype, capture.autocast)
    if key not in known:
        fine, coarse = torch.rand(2, 2, *capture.x.shape[1:], generator=generator(0))
        coarse = maps.upsample(F.adaptive_avg_pool2d(coarse, 8).flatten(0, 1), capture.size).view_as(coarse)
        images = torch.cat([fine, coarse]).to(capture.x)
        probes = capture.again(images, frozen=True, guided=False, from_image=False)
        target, rows = probes.target(), torch.arange(4, device=capture.x.device)
        known[key] = max(
            float(full_gradients(probes, target, part).error.max()) for part in rows.split(capture.chunk_size("backward"))
        )
    return float(known[key])


def _check(worst: float, tolerance: float) -> None:
    if worst > tolerance:
        raise FoveateError(
            f"full_grad does not hold for this model: input and biases miss the score by {100 * worst:.0f} %, because it has "
            "other parts than modules of ReLU, ReLU6, max-pooling and affine layers; use 'input_x_gradient', or strict=False"
        )


def _saliency(parts: FullGradients, size: tuple[int, int], scaling: Scaling, tolerance: float) -> Tensor:
    _check(float(parts.error.max()), tolerance)
    saliency = _summed(parts.image, size, scaling)
    for bias in parts.biases:
        saliency = saliency + _summed(bias, size, scaling)
    return saliency


def _summed(values: Tensor, size: tuple[int, int], scaling: Scaling) -> Tensor:
    """``sum_k psi(v_k)``, ``[B,K,h,w]`` to ``[B,H,W]``; a sum of upsampled maps is the upsampled sum."""
    rows = values.abs().flatten(0, 1) if scaling == "channel" else values.abs().flatten(1, 2)
    return maps.upsample(maps.scale(rows).view(values.shape).sum(1), size)


def full_gradients(capture: Capture, target: Target, rows: Tensor | None = None) -> FullGradients:
    """Input and bias gradients of the score from one forward and one backward pass; see :class:`FullGradients`.

    Args:
        rows: of which images; all where it is None.
    """
    rows = torch.arange(len(capture.x), device=capture.x.device) if rows is None else rows
    outputs: list[tuple[Tensor, Tensor]] = []  # bias, and the output that it was added to

    def keep(bias: Callable[[Tensor], Tensor]) -> Hook:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, Tensor) or not output.requires_grad:
                return None
            outputs.append((bias(output.detach()), output))
            return output.clone()  # an in-place ReLU after it must not overwrite it

        return hook

    x = capture.images[rows].clone()
    found = ((module, _bias_of(module)) for module in capture.model.modules())
    hooks = [(module, keep(bias)) for module, bias in found if bias is not None]
    with torch.inference_mode(False), torch.enable_grad():
        x.requires_grad_(True)
        with hooked(capture.model, hooks):
            logits = capture.differentiable(x)
        score = target.rows(rows)(logits)
        gradients = torch.autograd.grad(score.sum(), [x, *(output for _, output in outputs)], allow_unused=True)
    capture.passes.backward += len(x)
    with torch.no_grad():
        image = gradients[0] * (x - _mean_of(capture.model).to(x))
        biases, scalars = [], torch.zeros_like(score)
        for (b, output), gradient in zip(outputs, gradients[1:], strict=True):
            if gradient is None:
                continue
            if b.ndim == 1:  # one value per channel
                b = b.view((1, -1, 1, 1) if output.ndim == 4 else (1,) * (output.ndim - 1) + (-1,))
            if output.ndim == 4 and output.shape[-1] * output.shape[-2] > 1:
                biases.append(gradient * b)
            else:
                scalars = scalars + (gradient * b).flatten(1).sum(1)
        total = image.flatten(1).sum(1) + scalars + sum(bias.flatten(1).sum(1) for bias in biases)
        size = score.abs() + image.flatten(1).sum(1).abs() + scalars.abs()
        size = size + sum(bias.flatten(1).sum(1).abs() for bias in biases)
        error = (total - score).abs() / size.clamp(min=1e-6)
    return FullGradients(image, biases, scalars, error)


def _bias_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a module adds to a linear map of its input, from its output: a value per channel, or a position.

    A ReLU6 is the constant 6 where it clips, which is a bias there.
    """
    if isinstance(module, nn.Hardtanh) and module.min_val == 0:
        high = module.max_val
        return lambda output: high * (output >= high).to(output.dtype)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None:
        norm = module

        def shift(output: Tensor) -> Tensor:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            if norm.weight is not None:
                scale = scale * norm.weight.detach()
            own = 0 if norm.bias is None else norm.bias.detach()
            return own - norm.running_mean * scale

        return shift
    bias = getattr(module, "bias", None)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and isinstance(bias, Tensor):
        return lambda output: bias.detach()
    return None


def _mean_of(model: nn.Module) -> Tensor:
    """What a normalisation in front takes away from the image: its bias, which belongs to the input here."""
    return model.mean if isinstance(model, Normalized) else torch.zeros(1)
