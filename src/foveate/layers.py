"""Layers: which layer to look at, and how its output becomes a grid ``[B,K,h,w]``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.classifier import core, eager, evaluating, modules_of, read_logits
from foveate.errors import FoveateError, LayerError
from foveate.memo import Memo

INPUT = "input"  # the name of the image itself where a layer is asked for
MOST_PREFIX_TOKENS = 9


@dataclass(frozen=True)
class Layout:
    """How the output of a layer lies in memory: ``nchw``, ``nhwc`` or ``tokens`` (with ``prefix`` tokens in front)."""

    kind: Literal["nchw", "nhwc", "tokens"]
    height: int
    width: int
    prefix: int = 0

    def __str__(self) -> str:
        grid = f"{self.height}x{self.width}"
        if self.kind == "tokens":
            return f"{grid} tokens" + (f" after {self.prefix} prefix token(s)" if self.prefix else "")
        return grid if self.kind == "nchw" else f"{grid} channels-last"


def to_grid(raw: Tensor, layout: Layout) -> Tensor:
    """The output of a layer as a grid, ``[B,K,h,w]``; prefix tokens are left out."""
    if layout.kind == "nchw":
        return raw
    if layout.kind == "nhwc":
        return raw.permute(0, 3, 1, 2)
    grid = raw[:, layout.prefix :].transpose(1, 2)  # [B,K,N]
    return grid.reshape(*grid.shape[:2], layout.height, layout.width)


def from_grid(grid: Tensor, raw: Tensor, layout: Layout) -> Tensor:
    """The reverse of :func:`to_grid`; prefix tokens come from ``raw``, the layer's own output for the same images."""
    if layout.kind == "nchw":
        return grid
    if layout.kind == "nhwc":
        return grid.permute(0, 2, 3, 1)
    return torch.cat([raw[:, : layout.prefix], grid.flatten(2).transpose(1, 2)], 1)


def get(model: nn.Module, name: str) -> nn.Module:
    """The module at a dotted path, with or without the ``model.`` of a normalisation wrapper.

    Raises:
        LayerError: no such path; the message has the nearest ones.
    """
    inner, _ = core(model)
    for root in (inner, model):
        with suppress(AttributeError):
            if name:
                return root.get_submodule(name)
    names = [known for known, _ in inner.named_modules() if known]
    near = difflib.get_close_matches(name, names, 4, 0.6)
    parts = [part for part in names if "." not in part]
    hint = f"did you mean {', '.join(near)}?" if near else f"its parts are {', '.join(parts[:12])}"
    raise LayerError(f"layer {name!r} is not in the model: {hint}")


def resolve(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], Any], given: str | nn.Module | Sequence[str | nn.Module]
) -> list[tuple[str, nn.Module | None]]:
    """What a person writes for a layer, or several, as paths and modules; no module for the image itself.

    Raises:
        LayerError: none was given, or one that the model does not have.
    """
    items = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, nn.Module)) else [given]
    if not items:
        raise LayerError("no layer was given: name one, or 'auto'")
    if wrong := [item for item in items if not isinstance(item, (str, nn.Module))]:
        raise LayerError(f"a layer is a path such as 'layer4', a module or 'auto', and this is {wrong[0]!r}")
    resolved: list[tuple[str, nn.Module | None]] = []
    for item in items:
        if isinstance(item, nn.Module):
            resolved.append((name_of(model, item), item))
        elif item == INPUT:
            resolved.append((item, None))
        else:
            name = find(model, x, run) if item == "auto" else item
            resolved.append((name, get(model, name)))
    return resolved


def name_of(model: nn.Module, module: nn.Module) -> str:
    """The dotted path of a module in the user's own model.

    Raises:
        LayerError: the module is not part of the model.
    """
    inner, _ = core(model)
    for name, candidate in inner.named_modules():
        if candidate is module:
            return name
    raise LayerError(f"the layer given, a {type(module).__name__}, is not a module of this model: name it by its path")


def first_tensor(output: Any) -> Tensor | None:
    """The tensor in what a layer returns: itself, or the first of a tuple or list."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    return None


def with_first(output: Any, tensor: Tensor) -> Any:
    """What a layer returned, with its tensor replaced."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple) and hasattr(output, "_replace"):
        return type(output)(tensor, *output[1:])
    return type(output)([tensor, *output[1:]])


def layout_of(shape: torch.Size, image: tuple[int, int], module: nn.Module, model: nn.Module) -> Layout | None:
    """How an output of ``shape`` maps onto an image of ``image`` pixels; None where it has no spatial grid.

    Four dimensions are read as channels-first or channels-last, whichever keeps the image's proportions; where both
    do, by the kind of the module. Three dimensions are tokens: the number of prefix tokens comes from the model
    (``num_prefix_tokens``), else from the patch grids that fit.
    """
    if len(shape) == 4:
        first = _proportional(shape[2], shape[3], image)
        last = _proportional(shape[1], shape[2], image)
        if first == last:
            last = _channels_last(module)
        if last:
            return Layout("nhwc", shape[1], shape[2])
        return Layout("nchw", shape[2], shape[3])
    if len(shape) == 3:
        return token_layout(shape[1], image, model)
    return None


def _proportional(height: int, width: int, image: tuple[int, int]) -> bool:
    if not (1 <= height <= image[0] and 1 <= width <= image[1]):
        return False
    stride = (image[0] * image[1] / (height * width)) ** 0.5
    return abs(height - image[0] / stride) < 1.01 and abs(width - image[1] / stride) < 1.01


def _channels_last(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if not any(True for _ in m.children())]
    return bool(leaves) and isinstance(leaves[-1], (nn.LayerNorm, nn.Linear))


def token_layout(count: int, image: tuple[int, int], model: nn.Module) -> Layout | None:
    """The one grid of square patches that fits; None where none does, or several do and none of them tiles the image."""
    inner, _ = core(model)
    known = getattr(inner, "num_prefix_tokens", None)
    fitting: dict[tuple[int, int, int], bool] = {}
    for patch in range(1, max(image) + 1):
        for up in (0, patch - 1):  # a last patch that is cut off or padded
            height, width = (image[0] + up) // patch, (image[1] + up) // patch
            prefix = count - height * width
            if height * width >= 2 and 0 <= prefix <= MOST_PREFIX_TOKENS and (known is None or prefix == known):
                tiles = image[0] % patch == 0 and image[1] % patch == 0
                fitting[height, width, prefix] = fitting.get((height, width, prefix), False) or tiles
    tiling = [grid for grid, tiles in fitting.items() if tiles]
    sure = tiling if tiling else list(fitting)
    return Layout("tokens", *sure[0]) if len(sure) == 1 else None


@dataclass
class _Event:
    """One module that has run: its place in the model and what it gave."""

    name: str
    module: nn.Module
    output: Tensor
    layout: Layout | None
    source: Tensor | None  # what it was given


_found = Memo()


def find(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any] | None = None) -> str:
    """The layer that a class activation map should look at: the last one with a grid that the logits depend on.

    One image runs forward and backward once with a look at every layer. Of all layers before the classifier, the last
    grid is taken that what the classifier reads depends on; pooling layers are passed over (a map behind a max-pool is
    full of holes), and the outermost module is named: ``layer4``, not ``layer4.2.relu``, which runs three times. In a
    transformer that classifies from its class token, the patches of the last block's output have a gradient of
    exactly 0: the choice is then the last norm in front of an attention. It is kept for as long as the model lives.

    Raises:
        LayerError: no layer has a grid and a gradient.
    """
    key = (*x.shape[1:],)
    known: dict[tuple[int, ...], str] = _found.of(model)
    if key in known:
        return known[key]
    events, logits = _trace(model, x[:1], forward or model)
    owners = [i for i, event in enumerate(events) if any(p is not None for p in event.module._parameters.values())]
    read = logits
    if owners:
        source = events[owners[-1]].source
        # What the classifier reads, not what it says: networks are often initialised with a classifier of zeros.
        read = source if source is not None and source.requires_grad and source.ndim == 2 else logits
        events = events[: owners[-1]]
    pooled = [event.output for event in events if _passes_over(event.module)]
    candidates = [
        event
        for event in events
        if event.layout is not None
        and event.layout.height * event.layout.width > 1
        and event.output.requires_grad
        and not any(event.output is output for output in pooled)
        and not _beside_the_stream(event)
    ]
    if candidates:
        generator = torch.Generator().manual_seed(0)
        score = (read * torch.randn(read.shape, generator=generator).to(read)).sum()
        gradients = torch.autograd.grad(score, [event.output for event in candidates], allow_unused=True)
        for event, gradient in zip(reversed(candidates), reversed(gradients), strict=True):
            if event.layout is None or gradient is None or not to_grid(gradient, event.layout).any():
                continue
            same = [other for other in candidates if other.output is event.output]
            depth = min(other.name.count(".") for other in same)
            known[key] = [other.name for other in same if other.name.count(".") == depth][-1]
            return known[key]
    raise LayerError(
        f"no layer of this {type(core(model)[0]).__name__} has both a spatial grid and a gradient at the image size "
        f"{x.shape[-2]}x{x.shape[-1]}: name a layer yourself"
    )


def _trace(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Any]) -> tuple[list[_Event], Tensor]:
    """Run one image with a look at every module; what each gave, in the order in which they finished."""
    inner, _ = core(model)
    image = (x.shape[-2], x.shape[-1])
    events: list[_Event] = []
    handles = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None and tensor.is_floating_point():
                layout = layout_of(tensor.shape, image, module, model)
                events.append(_Event(name, module, tensor, layout, first_tensor(inputs)))

        return hook

    try:
        for name, module in inner.named_modules():
            if name:
                handles.append(module.register_forward_hook(look(name)))
        with torch.enable_grad(), eager(modules_of(model)), evaluating(model):  # batch norm must not learn from a look
            logits = read_logits(forward(x.detach().clone().requires_grad_(True)))
    finally:
        for handle in handles:
            handle.remove()
    return events, logits


def _passes_over(module: nn.Module) -> bool:
    name = type(module).__name__
    return "Pool" in name and next(module.parameters(), None) is None


def _beside_the_stream(event: _Event) -> bool:
    """Whether an event is a side path or a part of a block, not the stream of features itself."""
    parts = event.name.lower().split(".")
    name = type(event.module).__name__.lower()
    if isinstance(event.module, nn.Identity) or "dropout" in name or "droppath" in name:
        return True
    if event.output.ndim == 4 and not any(word in part for part in parts for word in ("attn", "attention", "mlp")):
        return False
    if any(word in part for part in parts[:-1] for word in ("attn", "attention", "mlp")):
        return True
    if any(word in parts[-1] for word in ("attn", "attention", "mlp")):
        return True
    return not ("norm" in name or any(True for _ in event.module.children()))


def describe(layer: str, layout: Layout, channels: int) -> str:
    """One line on a layer for reports: ``layer4 (2048 x 7x7)``."""
    return f"{layer} ({channels} x {layout})"


def check_grid(layer: str, raw: Tensor, layout: Layout | None, suggestion: Callable[[], str]) -> Layout:
    """The layout of a layer that was named, when it has a grid of more than one cell.

    Raises:
        LayerError: it has none; the message quotes the shape and names a layer that has.
    """
    if layout is not None and layout.height * layout.width > 1:
        return layout
    try:
        instead = f"try {suggestion()!r}"
    except FoveateError:
        instead = "name an earlier one"
    raise LayerError(
        f"layer {layer!r} has no spatial grid that can be told from its shape {list(raw.shape)}: {instead}, or give its layout"
    )
