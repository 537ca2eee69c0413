"""What a model of somebody's own says about itself: size, channels and normalisation of its images, names of its classes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from foveate.data.imagenet import imagenet_names
from foveate.data.images import Preprocess, floor_resize
from foveate.errors import FoveateError
from foveate.runtime.model import IMAGENET_MEAN, IMAGENET_STD, core, unwrap


def spread(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One value per channel: those given, or the mean of them for all where there are not so many."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def takes_images(factory: Any) -> bool:
    """Whether something in a file is no factory but a function of images: it cannot be called without one."""
    if isinstance(factory, type):
        return False
    try:
        given = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


def _config(model: nn.Module) -> Mapping[str, Any]:
    """What a model of somebody's own says about its input: a timm-like ``default_cfg``, or attributes of these names."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, Mapping):
        return config
    said = {key: getattr(model, key, None) for key in ("mean", "std", "input_size")}
    return {key: value for key, value in said.items() if value is not None}


def says_normalisation(model: nn.Module) -> bool:
    return {"mean", "std"} <= set(_config(model))


def says_size(model: nn.Module) -> bool:
    """Whether a model says which size of images it takes."""
    return bool(_config(model).get("input_size"))


def stated_preprocess(model: nn.Module) -> Preprocess:
    """Size, channels and normalisation as the model says them, each where it does."""
    config = _config(model)
    stated = config.get("input_size", ())
    size = (stated, stated) if isinstance(stated, int) else tuple(stated)[-2:] or (224, 224)
    if not 1 <= len(size) <= 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise FoveateError(f"the model's input_size {stated!r} is not a size: it is a side, (H, W) or (C, H, W)")
    height, width = size[0], size[-1]
    said = says_normalisation(model)
    mean, std = (torch.as_tensor(config[key]).flatten().tolist() if said else [] for key in ("mean", "std"))
    channels = _channels(model, config, mean, (height, width))
    if not said:
        plain = channels != 3
        mean, std = ([0.0], [1.0]) if plain else (list(IMAGENET_MEAN), list(IMAGENET_STD))
    return Preprocess(
        (height, width),
        floor_resize(min(height, width), config.get("crop_pct") or 0.875),
        mean=spread(mean, channels),
        std=spread(std, channels),
    )


def _channels(model: nn.Module, config: Mapping[str, Any], mean: Sequence[float], size: tuple[int, int]) -> int:
    """How many channels a model takes: as it says, or as it runs."""
    first = config.get("first_conv")  # timm's models keep three means also where in_chans is another number
    if isinstance(first, str) and hasattr(conv := dict(model.named_modules()).get(first), "in_channels"):
        return int(conv.in_channels)  # type: ignore[union-attr]
    stated = config.get("input_size")
    if not isinstance(stated, int) and stated is not None and len(stated) == 3:
        return int(stated[0])
    if len(mean) > 1:
        return len(mean)
    found = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), 3)
    if found == 3 or model.training:
        return 3
    try:  # the first convolution need not be the first thing that runs
        with torch.no_grad():
            model(torch.zeros(1, 3, *size, dtype=next(model.parameters()).dtype, device=next(model.parameters()).device))
        return 3
    except Exception:  # the user's own code may raise anything
        return found


def stated_names(model: nn.Module) -> list[str] | None:
    names = getattr(model, "class_names", None)
    if names is not None:
        return list(next(iter(names.values())) if isinstance(names, Mapping) else names)  # by output: of the first
    labels = getattr(getattr(model, "config", None), "id2label", None)  # Hugging Face
    if isinstance(labels, Mapping) and labels:
        return [str(labels[key]) for key in sorted(labels, key=int)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linear and linear[-1].out_features == 1000:
        with suppress(FoveateError):  # without torchvision they have no names
            return imagenet_names()
    return None


def preprocess_of(model: nn.Module) -> Preprocess:
    """From a photograph to what a model takes: a :class:`Classifier`'s own, what any other says of itself, or ImageNet's.

    A warning where ImageNet's sizes are assumed.
    """
    model = unwrap(model)
    known = getattr(model, "preprocess", None)
    if isinstance(known, Preprocess):
        return known
    inner = core(model)[0]
    known = stated_preprocess(inner)
    if not says_size(inner):
        height, width = known.crop
        warnings.warn(
            f"the model does not say which size of images it takes: photographs are cropped to {height} x {width}, as for "
            "ImageNet; foveate.load knows, or give a tensor of the size that it takes",
            stacklevel=2,
        )
    return known
