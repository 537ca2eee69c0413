"""Guided backpropagation as a context: every ReLU inside passes positive gradients of positive inputs, and nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from foveate.errors import FoveateError
from foveate.runtime.second_derivatives import Phase, batch_norm, convolution

_PLAIN = (torch.relu, F.relu, torch.Tensor.relu)
_INPLACE = (torch.relu_, torch.Tensor.relu_, F.relu_)
_CLIPPED = (F.hardtanh, F.hardtanh_, F.relu6)
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OTHERS = (
    *(F.gelu, F.silu, F.hardswish, F.leaky_relu, F.elu, F.selu, F.celu, F.mish, F.softplus, F.prelu, F.rrelu),
    *(F.hardswish, F.leaky_relu_, F.elu_, F.selu_, F.celu_, F.rrelu_, torch.prelu, torch.selu, torch.celu, torch.rrelu),
)


class _GuidedReLU(torch.autograd.Function):
    """``clamp(x, 0, high)``, whose backward is ``relu(gradient) * [0 < x < high]`` while its context is open."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float, inplace: bool, mode: _Guided) -> Tensor:
        if high == float("inf"):
            y = torch.relu_(x) if inplace else torch.relu(x)
        else:
            y = x.clamp_(0, high) if inplace else x.clamp(0, high)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.high = high
        ctx.mode = mode
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None]:
        (y,) = ctx.saved_tensors
        # The derivative of a guided gradient by the parameters runs through here too, later, and is a plain one.
        gradient = gradients[0].clamp(min=0) if ctx.mode.open else gradients[0]
        if ctx.high == float("inf"):
            gradient = torch.ops.aten.threshold_backward(gradient, y.detach(), 0.0)
        else:
            gradient = torch.ops.aten.hardtanh_backward(gradient, y.detach(), 0.0, ctx.high)
        return gradient, None, None, None


class _Guided(TorchFunctionMode):
    """Puts the guided rule where the model calls a ReLU, as module, function, method, in place or not, or as ReLU6."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.open = True
        self.twice = twice
        self.phase = Phase()
        self.relus = 0
        self.others: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and self.twice:
            given = {**dict(zip(_NORM, args, strict=False)), **kwargs}
            if given["training"]:
                affine = (given.get("weight"), given.get("bias"), given["momentum"], given["eps"])
                return batch_norm(given["input"], given["running_mean"], given["running_var"], *affine, self.phase)
        if func is F.conv2d and self.twice:
            given = {**dict(zip(_CONVOLUTION, args, strict=False)), **kwargs}
            if (how := _numbers(given)) is not None:
                return convolution(given["input"], given["weight"], given.get("bias"), *how, self.phase)
        if func in _PLAIN or func in _INPLACE:
            x = args[0] if args else kwargs["input"]
            inplace = func in _INPLACE or bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
            return self._apply(x, float("inf"), inplace)
        if func in _CLIPPED:
            low, high, inplace = _clip_of(func, args, kwargs)
            if low == 0:
                return self._apply(args[0] if args else kwargs["input"], high, inplace)
        if func in _OTHERS:
            self.others.add(func.__name__.rstrip("_"))
        return func(*args, **kwargs)

    def _apply(self, x: Tensor, high: float, inplace: bool) -> Tensor:
        self.relus += 1
        return _GuidedReLU.apply(x, high, inplace, self)  # type: ignore[no-any-return, no-untyped-call]


def _numbers(given: dict[str, Any]) -> tuple[Any, Any, Any, int] | None:
    """Stride, padding, dilation and groups of a call of conv2d; None where the padding differs from side to side."""
    pairs = {}
    for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)):
        value = given.get(name, default)
        pairs[name] = (value, value) if isinstance(value, int) else value
    if isinstance(pairs["padding"], str):
        spans = [d * (k - 1) for d, k in zip(pairs["dilation"], given["weight"].shape[2:], strict=True)]
        if pairs["padding"] == "same" and any(span % 2 for span in spans):
            return None
        pairs["padding"] = [span // 2 if pairs["padding"] == "same" else 0 for span in spans]
    return pairs["stride"], pairs["padding"], pairs["dilation"], given.get("groups", 1)


def _clip_of(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, float, bool]:
    """Lower bound, upper bound and whether in place, of a call of hardtanh or relu6."""
    names = ("input", "inplace") if func is F.relu6 else ("input", "min_val", "max_val", "inplace")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    low, high = (0.0, 6.0) if func is F.relu6 else (given.get("min_val", -1.0), given.get("max_val", 1.0))
    return low, high, func is F.hardtanh_ or bool(given.get("inplace", False))


@contextmanager
def guided(twice: bool = False) -> Iterator[_Guided]:
    """Inside, backpropagation through a ReLU is guided: ``g_in = g_out * [x > 0] * [g_out > 0]``.

    What runs forward inside is guided when it runs backward inside, and plain when it runs backward afterwards: one
    forward pass gives both gradients, and a guided gradient can be differentiated by the parameters. It catches
    ``nn.ReLU``, in-place ReLUs, ``F.relu``, ``torch.relu``, ``x.relu()`` and ReLU6 (``[0 < x < 6]``); no module is
    replaced and the model is not touched.

    Args:
        twice: gradients will be differentiated again: batch norms and convolutions get second derivatives that are faster.

    Raises:
        FoveateError: no ReLU ran inside, so that nothing was guided and the gradient is the plain one.

    Source: Springenberg et al., ICLR workshops 2015. Activations without a hard zero (GELU, SiLU) have no such rule:
    where some run beside ReLUs, they keep their own gradient, and a warning says so.
    """
    mode = _Guided(twice)
    try:
        with mode:
            yield mode
    finally:
        mode.open = False
    if not mode.relus:
        has = f": it has {', '.join(sorted(mode.others))}, for which no such rule exists" if mode.others else ""
        raise FoveateError(f"guided backpropagation guided nothing, because no ReLU of this model ran{has}: use 'gradient'")
    if mode.others:
        warnings.warn(
            f"guided backpropagation guided {mode.relus} ReLUs; {', '.join(sorted(mode.others))} keep their own gradient",
            stacklevel=3,
        )


class Guide:
    """One forward pass whose backward passes are plain, and guided where they run inside of :meth:`backward`.

    Args:
        twice: gradients will be differentiated again, as :func:`guided` says.
    """

    def __init__(self, twice: bool = True) -> None:
        self._twice = twice
        self._mode: _Guided | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass; raises as :func:`guided` does."""
        with guided(self._twice) as self._mode:
            self._mode.open = False
            yield

    @contextmanager
    def backward(self, guided: bool = True) -> Iterator[None]:
        """Around a backward pass to features or the image, and not to parameters: a guided one, or a plain one."""
        assert self._mode is not None  # the forward pass has been run
        self._mode.open, self._mode.phase.inner = guided, True
        try:
            yield
        finally:
            self._mode.open = self._mode.phase.inner = False
