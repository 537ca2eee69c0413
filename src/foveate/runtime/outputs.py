"""Outputs: what a model returns beside its logits; each tensor by a name, and the one that is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, fx

from foveate.errors import FoveateError

DEEPEST = 4  # tuples in dictionaries in tuples
MOST = 12  # outputs that a sentence lists
NAMES = ("logits", "out", "output")  # under which the logits of a classifier stand


def parts(output: Any) -> list[tuple[str, Any]]:
    """What a model's output is made of, by name, or by index where it has none; nothing of a tensor."""
    if isinstance(output, Tensor):
        return []
    if isinstance(output, Mapping):
        return [(str(key), value) for key, value in output.items()]
    if is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in fields(output)]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return list(zip(output._fields, output, strict=True))
    if isinstance(output, Sequence) and not isinstance(output, str):
        return [(str(i), value) for i, value in enumerate(output)]
    return list(vars(output).items()) if hasattr(output, "__dict__") else []


def tensors(output: Any, depth: int = DEEPEST) -> dict[str, Tensor]:
    """Every tensor in a model's output, by dotted path: ``breed``, ``0``, ``heads.breed``."""
    found: dict[str, Tensor] = {}
    for name, value in parts(output):
        if isinstance(value, Tensor):
            found[name] = value
        elif depth > 1:
            found |= {f"{name}.{path}": tensor for path, tensor in tensors(value, depth - 1).items()}
    return found


def listed(output: Any) -> str:
    """The outputs with their shapes, for a sentence: ``breed [2, 37], species [2, 2]``."""
    found = [f"{name} {list(tensor.shape)}" for name, tensor in tensors(output).items()]
    return ", ".join(found[:MOST]) + (f" and {len(found) - MOST} others" if len(found) > MOST else "")


def of_logits(output: Any, count: int) -> list[str]:
    """The outputs that may each be logits of ``count`` images, where none of them has the name of such; the one taken first."""
    found = tensors(output)
    if isinstance(output, Tensor) or any(name in found for name in NAMES):
        return []
    names = [name for name, tensor in found.items() if tensor.ndim in (1, 2) and len(tensor) == count]
    return sorted(names, key=lambda name: name not in dict(parts(output)))


def select(output: Any, wanted: str | int) -> Any:
    """One of the outputs of a model: by its name, its index, or the dotted path to it.

    Raises:
        FoveateError: there is no such tensor; the message lists those that there are, with their shapes.
    """
    value, rest = output, str(wanted)
    while rest:
        own = dict(parts(value))
        name = rest if rest in own else rest.partition(".")[0]
        number = int(name) if name.lstrip("-").isdigit() else None
        if name in own:
            value = own[name]
        elif number is not None and -len(own) <= number < len(own):
            value = list(own.values())[number]
        else:
            raise _unknown(output, wanted)
        rest = rest[len(name) + 1 :]
    if not isinstance(value, (Tensor, fx.Proxy)):  # a proxy while the model is traced
        raise _unknown(output, wanted)
    return value


def _unknown(output: Any, wanted: str | int) -> FoveateError:
    if isinstance(output, Tensor):
        return FoveateError(f"there is no output {wanted!r}: the model returns one tensor, {list(output.shape)}")
    names = tensors(output)
    near = difflib.get_close_matches(str(wanted), names, 2, 0.6)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    there = f"the model returns {listed(output)}" if names else "the model returns no tensor"
    return FoveateError(f"there is no output {wanted!r}{hint}: {there}")
