"""Twice: batch norm and convolution with second derivatives written by hand, for losses on input gradients.

PyTorch's second derivative of a batch norm takes a hundred passes over memory, that of a convolution's weight a
convolution in which batch and channels trade places; both are one call of a kernel that is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Phase:
    """Which backward pass is running; custom functions cannot know what their caller asks for.

    Attributes:
        inner: one to features or the image, so that gradients of weights need not be computed.
    """

    inner: bool = False


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    phase: Phase,
) -> Tensor:
    """Batch norm in training mode, ``y = w x^ + b`` with ``x^ = (x - mean) r``: values, running statistics as PyTorch's.

    With ``R(u) = r (u - mean u - x^ mean(u x^))``, one fused kernel of PyTorch's, its backward is ``dx = w R(g)``, and for a
    cotangent v of ``dx``, with ``s = sum v R(g) / count``, ``p = mean(v x^)``, ``q = mean(g x^)`` over a channel:
    ``d/dg = w R(v)``, ``d/dx = -w r (x^ s + q R(v) + p R(g))``, ``d/dw = count s``.
    """
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, phase)  # type: ignore[no-any-return, no-untyped-call]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        phase: Phase,
    ) -> Tensor:
        y, mean, rstd = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.phase = eps, phase
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        wanted = (True, False, False) if ctx.phase.inner else ctx.needs_input_grad[:3]
        dx, dw, db = _BatchNormBackward.apply(gradients[0], x, weight, mean, rstd, ctx.eps, wanted)  # type: ignore[no-untyped-call]
        return dx, dw, db, None, None, None, None, None


class _BatchNormBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float, wanted: tuple[bool, ...]
    ) -> Any:
        ctx.set_materialize_grads(False)
        dx, along, total = _project(g, x, weight, mean, rstd, eps)
        ctx.save_for_backward(g, dx, along, x, weight, mean, rstd)
        ctx.eps = eps
        return dx, along.clone() if wanted[1] else None, total if wanted[2] else None

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, given, along, x, weight, mean, rstd = ctx.saved_tensors  # given: w R(g)
        v, of_weight, of_bias = cotangents
        shape = (1, -1, *[1] * (x.ndim - 2))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        count = x.numel() // x.shape[1]
        dg = dx = dw = None
        if v is not None:
            v = _laid_out_as(x, v)
            dg, along_v, _ = _project(v, x, weight, mean, rstd, ctx.eps)
            s = (v * given).sum(axes)  # w sum v R(g)
            tilt = -s * rstd**2 / count  # of x itself: x^ = (x - mean) r
            dx = torch.addcmul(-(tilt * mean).view(shape), x, tilt.view(shape))
            dx.addcmul_(dg, (-rstd / count * along).view(shape))
            dx.addcmul_(given, (-rstd / count * along_v).view(shape))
            if weight is not None:
                zero = weight == 0
                dw = s / torch.where(zero, torch.ones_like(weight), weight)
                if zero.any():  # as networks begin whose last batch norms are 0
                    R = _project(g, x, None, mean, rstd, ctx.eps)[0]
                    dw = torch.where(zero, (v * R).sum(axes), dw)
        if of_weight is not None:  # the gradient of the weight is sum(g x^), a function of g and x
            normal = (x - mean.view(shape)) * rstd.view(shape)
            dg = _sum(dg, normal * of_weight.view(shape))
            dx = _sum(dx, _project(g, x, None, mean, rstd, ctx.eps)[0] * of_weight.view(shape))
        if of_bias is not None:  # and that of the bias sum(g)
            dg = _sum(dg, of_bias.view(shape).expand_as(x))
        return dg, dx, dw, None, None, None, None


def _project(u: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, eps: float) -> Any:
    """``w R(u)``, ``sum u x^`` and ``sum u`` over each channel; in the layout of x, or the kernel takes its slow path."""
    u, ones, mask = _laid_out_as(x, u), torch.ones_like(rstd), [True, True, True]
    return torch.ops.aten.native_batch_norm_backward(
        u, x, ones if weight is None else weight, None, None, mean, rstd, True, eps, mask
    )


def _laid_out_as(x: Tensor, u: Tensor) -> Tensor:
    """u with its channels where those of x lie."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return u.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    phase: Phase,
) -> Tensor:
    """Convolution of images, ``[B,C,H,W]``. For a cotangent v of its input gradient: ``d/dg = conv(v, W)``, and ``d/dW`` is
    the weight gradient of the same convolution with v as its input."""
    how = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    return _Convolution.apply(x, weight, bias, how, phase)  # type: ignore[no-any-return, no-untyped-call]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: Any, phase: Phase) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how, ctx.phase, ctx.bias = how, phase, bias is not None
        return torch.ops.aten.convolution(x, weight, bias, *how)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight = ctx.saved_tensors
        outer = not ctx.phase.inner
        wanted = (ctx.needs_input_grad[0], outer and ctx.needs_input_grad[1], outer and ctx.bias and ctx.needs_input_grad[2])
        return *_ConvolutionBackward.apply(gradients[0], x, weight, ctx.how, wanted), None, None  # type: ignore[no-untyped-call]


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, how: Any, wanted: tuple[bool, bool, bool]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight)
        ctx.how = how
        return _convolution_backward(g, x, weight, how, wanted)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = cotangents
        dg = dx = dw = None
        if of_x is not None:
            dg = torch.ops.aten.convolution(of_x, weight, None, *ctx.how)
            dw = _convolution_backward(g, of_x, weight, ctx.how, (False, True, False))[1]
        if of_weight is not None:
            dg = _sum(dg, torch.ops.aten.convolution(x, of_weight, None, *ctx.how))
            dx = _convolution_backward(g, x, of_weight, ctx.how, (True, False, False))[0]
        if of_bias is not None:
            dg = _sum(dg, of_bias.view(1, -1, 1, 1).expand_as(g))
        return dg, dx, dw, None, None


def _convolution_backward(g: Tensor, x: Tensor, weight: Tensor, how: Any, wanted: tuple[bool, bool, bool]) -> Any:
    return torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *how, list(wanted))
