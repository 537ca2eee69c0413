"""Randomise: copies of a model that forgot what it learnt, from the head down."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.runtime.model import Function

Mode = Literal["cascade", "independent"]
Init = Literal["reset", "normal", "permute"]


def stages_of(model: nn.Module, stages: int = 5) -> list[list[str]]:
    """Names of the modules that hold parameters themselves, from the output to the input, in stages.

    The first stage is the last such module, the head; the others are parted equally, as far as they go round. 0: one each.
    """
    names = [name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None][::-1]
    if any(isinstance(module, Function) for module in model.modules()):
        raise FoveateError("a function of images cannot be randomised, for it calls what it always called: give the module")
    if not names:
        raise FoveateError(f"{type(model).__name__} has no parameters that could be randomised")
    if stages < 0:
        raise FoveateError(f"stages {stages} is not a number of stages: use 1 or more, or 0 for one per layer")
    if stages == 0 or stages >= len(names):
        return [[name] for name in names]
    if stages == 1:
        return [names]
    rest = names[1:]
    edges = [round(i * len(rest) / (stages - 1)) for i in range(stages)]
    return [names[:1]] + [rest[a:b] for a, b in itertools.pairwise(edges)]


def randomized(
    model: nn.Module,
    mode: Mode = "cascade",
    stages: int = 5,
    init: Init = "reset",
    seed: int = 0,
    reset_buffers: bool = True,
) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a model with new parameters: ``(first module of the stage, model)``, from the head to the input.

    The model itself, the random state and gradients stay as they are. The same copy is handed out, changed, each time:
    use it before the next is asked for.

    Args:
        mode: ``cascade`` keeps what was randomised before, ``independent`` restores it.
        stages: see :func:`stages_of`.
        init: ``reset``: each module's own initialisation (a normal one with the parameter's standard deviation where it has
            none); ``normal``: mean and standard deviation of each parameter kept; ``permute``: its values shuffled.
        reset_buffers: running statistics of batch normalisation too; they know the features that are gone.

    Raises:
        FoveateError: no parameters, an unknown mode or init.
    """
    if mode not in ("cascade", "independent"):
        raise FoveateError(f"mode {mode!r} is unknown: use 'cascade' or 'independent'")
    if init not in ("reset", "normal", "permute"):
        raise FoveateError(f"init {init!r} is unknown: use 'reset', 'normal' or 'permute'")
    changed = copy.deepcopy(model).requires_grad_(False)
    modules = dict(changed.named_modules())
    for number, names in enumerate(stages_of(model, stages)):
        if mode == "independent" and number:
            changed.load_state_dict(model.state_dict())
        with torch.random.fork_rng(devices=_devices(model)), torch.no_grad():
            torch.manual_seed(seed + number)
            for name in names:
                _forget(modules[name], init, reset_buffers)
        yield names[0], changed


def _forget(module: nn.Module, init: Init, reset_buffers: bool) -> None:
    own = dict(module.named_parameters(recurse=False))
    running = {name: value.clone() for name, value in module.named_buffers(recurse=False)}
    reset = getattr(module, "reset_parameters", None)
    if init == "reset" and callable(reset):
        reset()
    else:
        for parameter in own.values():
            parameter.copy_(_permuted(parameter) if init == "permute" else _normal(parameter))
    if isinstance(module, nn.modules.batchnorm._NormBase) and reset_buffers:
        module.reset_running_stats()
    else:
        for name, value in running.items():
            getattr(module, name).copy_(value)


def _normal(parameter: Tensor) -> Tensor:
    spread = parameter.std(correction=0) if parameter.numel() > 1 else parameter.abs().mean()
    return torch.randn_like(parameter) * spread + (parameter.mean() if parameter.ndim == 1 else 0)


def _permuted(parameter: Tensor) -> Tensor:
    return parameter.flatten()[torch.randperm(parameter.numel(), device=parameter.device)].view_as(parameter)


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
