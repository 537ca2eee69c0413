"""Weights: state dicts from files, and into models; code in a file is never run."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import FoveateError


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a file, ``.safetensors`` or PyTorch's own format with ``weights_only``: code is never run.

    Raises:
        FoveateError: missing, unreadable, not a state dict, or a pickle with more than tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FoveateError(f"weights file {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FoveateError(
            f"weights file {str(path)!r} holds more than tensors, and code in it is not run: "
            "save model.state_dict() alone, best as .safetensors"
        ) from None
    except Exception as error:  # safetensors and torch raise many kinds for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FoveateError(f"weights file {str(path)!r} cannot be read: {type(error).__name__}: {reason}") from None
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise FoveateError(f"weights file {str(path)!r} holds no state dict")
    return dict(state)


def _all_start(state: Mapping[str, Tensor], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in state)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a state dict into a model; prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``) are taken off.

    Raises:
        FoveateError: names or shapes that do not fit, or NaN and infinity in a tensor; the model is then unchanged.
    """
    state = read_weights(path)
    own = model.state_dict()
    prefixes = ("module.", "_orig_mod.", "model.")
    while prefix := next((p for p in prefixes if _all_start(state, p) and not _all_start(own, p)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    surplus = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or surplus or shapes:
        parts = []
        if missing:
            parts.append(f"{len(missing)} of {len(own)} tensors are missing, such as {missing[0]!r}")
        if surplus:
            parts.append(f"{len(surplus)} have no place, such as {surplus[0]!r}")
        if shapes:
            key = shapes[0]
            parts.append(
                f"{len(shapes)} have another shape, such as {key!r}: {list(state[key].shape)} in the file, "
                f"{list(own[key].shape)} in the model"
            )
        raise FoveateError(f"weights file {str(path)!r} does not fit the model: {'; '.join(parts)}")
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise FoveateError(f"weights file {str(path)!r} holds NaN or infinity in {key!r}: it is not a usable model")
    model.load_state_dict(state, strict=False)
