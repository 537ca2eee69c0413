"""Wrappers: any method under noise, under test-time augmentation, or over several layers, as a method of its own.

By name, wherever a method is named: ``grad_cam:smooth``, ``score_cam:augmented``, ``layer_cam:fused``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from foveate import maps
from foveate.errors import FoveateError
from foveate.methods.cam import contrast_of
from foveate.registry import METHODS, Method
from foveate.runtime.capture import Capture
from foveate.runtime.noise import gaussian, width
from foveate.targets import Target

Fusion = Literal["mean", "max", "product", "tanh_max"]


@dataclass(frozen=True)
class Transform:
    """A change of images and its way back for maps: ``images [N,C,H,W] -> [N,C,H,W]`` and ``maps [N,h,w] -> [N,h,w]``."""

    images: Callable[[Tensor], Tensor]
    maps: Callable[[Tensor], Tensor]


def _light(factor: float, mirrored: bool) -> Transform:
    def images(x: Tensor) -> Tensor:
        x = (x * factor).clamp(0, 1)
        return x.flip(-1) if mirrored else x

    return Transform(images, lambda S: S.flip(-1) if mirrored else S)


FLIP_AND_LIGHT = tuple(_light(factor, mirrored) for mirrored in (False, True) for factor in (1.0, 0.9, 1.1))


def smooth(
    method: str | Method, *, copies: int = 16, noise: float = 0.15, noise_seed: int = 0, name: str | None = None
) -> Method:
    """A method averaged over noisy copies of the image: ``S = mean_i S(x + e_i)``, ``e_i ~ N(0, (noise (max x - min x))^2)``.

    Raw maps are averaged, so that a copy of which the map is faint counts little. All images share the noise: a batch
    gives what single images give. The explained class is that of the clean image.

    Args:
        copies, noise, noise_seed: defaults of the new method's own settings; those of ``method`` stay settable.
        name: in tables; ``METHOD:smooth`` where it is None.
    """
    base = METHODS.get(method)

    def function(
        capture: Capture, layer: str | None, target: Target, *, copies: int, noise: float, noise_seed: int, **own: Any
    ) -> Tensor:
        if copies < 1 or noise < 0:
            raise FoveateError(f"copies {copies} must be 1 or more, and noise {noise} not below 0")
        x = capture.images
        size = width(x, noise)
        target = contrast_of(capture, target, own.get("against")) if base.contrasts else target

        def noisy(number: int) -> Transform:
            return Transform(lambda images: images + size * gaussian(noise_seed, [number], x.shape[1:], x), lambda S: S)

        return _mean_over(base, capture, layer, target, [noisy(i) for i in range(copies)], own)

    def around(other: Method) -> Method:
        return smooth(other, copies=copies, noise=noise, noise_seed=noise_seed)

    defaults = {"copies": copies, "noise": noise, "noise_seed": noise_seed}
    return _wrapped(base, function, name, "smooth", "under noise", around, **defaults)


def augmented(method: str | Method, *, transforms: Sequence[Transform] = FLIP_AND_LIGHT, name: str | None = None) -> Method:
    """A method averaged over transformed copies of the image, each map brought back; mirrored and three lights by default."""
    base = METHODS.get(method)

    def function(capture: Capture, layer: str | None, target: Target, *, transforms: Sequence[Transform], **own: Any) -> Tensor:
        target = contrast_of(capture, target, own.get("against")) if base.contrasts else target
        return _mean_over(base, capture, layer, target, transforms, own)

    def around(other: Method) -> Method:
        return augmented(other, transforms=transforms)

    return _wrapped(base, function, name, "augmented", "augmented", around, transforms=transforms)


def fused(method: str | Method, *, over: Sequence[str] | None = None, how: Fusion = "mean", name: str | None = None) -> Method:
    """A method over several captured layers: its maps, positive parts scaled to [0, 1], as one on the largest grid.

    Args:
        over: paths of layers; all that the capture has where it is None.
        how: ``mean``, ``max``, ``product`` (the geometric mean: what all layers agree on), or ``tanh_max``:
            ``max_l tanh(2 S_l / max S_l)``, the fusion of Layer-CAM.
    """
    base = METHODS.get(method)

    def function(
        capture: Capture, layer: str | None, target: Target, *, over: Sequence[str] | None, how: Fusion, **own: Any
    ) -> Tensor:
        check_fusion(how)
        each = [maps.relu(base(capture, path, target, **own)) for path in (over or capture.layers)]
        height, width = (max(S.shape[i] for S in each) for i in (-2, -1))
        stack = torch.stack([maps.scale(maps.upsample(S, (height, width)), "max") for S in each])  # [L,B,h,w]
        if how == "mean":
            return stack.mean(0)
        if how == "max":
            return stack.amax(0)
        if how == "product":
            return stack.prod(0) ** (1 / len(each))
        return (2 * stack).tanh().amax(0)

    def around(other: Method) -> Method:
        return fused(other, over=over, how=how)

    return _wrapped(base, function, name, "fused", "over layers", around, over=over, how=how, signed=False)


def check_fusion(how: str) -> None:
    """Raise a FoveateError unless there is such a fusion."""
    if how not in get_args(Fusion):
        raise FoveateError(f"fusion {how!r} is unknown: use {', '.join(get_args(Fusion))}")


def over_layers(method: Method, how: Fusion) -> Method:
    """A method as one of all captured layers: itself where it knows several; wrapped, what is inside, each copy run once."""
    if knows_layers(method):
        return method
    if method.inner is None or method.around is None:
        return fused(method, how=how)
    return method.around(over_layers(method.inner, how))


def knows_layers(method: Method) -> bool:
    """Whether a method takes several layers by itself, or is a fusion of them."""
    return method.whole or method.several is not None


def _mean_over(
    base: Method, capture: Capture, layer: str | None, target: Target, transforms: Sequence[Transform], own: dict[str, Any]
) -> Tensor:
    """Mean raw map of a method over transformed copies, as many at once as memory allows."""
    x, count = capture.images, len(capture.x)
    group = max(1, capture.chunk_size("backward") // count)
    total: Tensor | None = None
    for start in range(0, len(transforms), group):
        part = transforms[start : start + group]
        again = capture.again(torch.cat([transform.images(x) for transform in part]))
        rows = torch.arange(count, device=x.device).repeat(len(part))
        raw = base(again, layer, target.rows(rows), **own).split(count)
        for transform, S in zip(part, raw, strict=True):
            restored = transform.maps(S)
            total = restored if total is None else total + restored
    if total is None:
        raise FoveateError(f"{base.name} cannot be averaged over no copies: give at least one transform")
    return total / len(transforms)


def _wrapped(
    base: Method,
    function: Callable[..., Tensor],
    name: str | None,
    suffix: str,
    words: str,
    around: Callable[[Method], Method],
    **defaults: Any,
) -> Method:
    """The record of a wrapped method; its settings are those of the wrapper, and the method's own."""
    signed = bool(defaults.pop("signed", base.signed))
    hints = get_type_hints(function)

    def call(capture: Capture, layer: str | None, target: Target, **settings: Any) -> Tensor:
        return function(capture, layer, target, **{**defaults, **settings})

    parameters = list(inspect.signature(base.function).parameters.values())
    if twice := [p.name for p in parameters if p.name in defaults]:
        raise FoveateError(f"{base.name} has the setting {twice[0]!r} already, and cannot be wrapped by {suffix!r} again")
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in defaults.items()]
    call.__signature__ = inspect.Signature(parameters + own)  # type: ignore[attr-defined]
    call.__annotations__ = {**get_type_hints(base.function), **{p.name: hints[p.name] for p in own}}
    call.__doc__ = f"{base.title} {words}."
    return replace(
        base,
        name=name or f"{base.name}:{suffix}",
        title=f"{base.title}, {words}",
        function=call,
        signed=signed,
        complete=None,
        inner=base,
        around=around,
        needs=tuple(need for need in base.needs if need != "gradient"),  # of other captures than the one at hand
        aliases=(),
    )


WRAPPERS: dict[str, Callable[[str | Method], Method]] = {"smooth": smooth, "augmented": augmented, "fused": fused}


def by_name(name: str) -> Method | None:
    """The method that ``grad_cam:smooth`` names; None for a name without a colon.

    Raises:
        FoveateError: no such wrapper.
    """
    inner, colon, suffix = name.rpartition(":")
    if not colon:
        return None
    if suffix not in WRAPPERS:
        raise FoveateError(f"{name!r} asks for a wrapper {suffix!r}, and there are {', '.join(WRAPPERS)}")
    return WRAPPERS[suffix](inner)


METHODS.fallbacks.append(by_name)
