"""Identity: what a run is about: the call, the protocol, the weights, the list of images, and what each image is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

from foveate._version import __version__
from foveate.disk import files
from foveate.evaluation.evaluate import Plan

FILES = ("_image_files", "_images", "_samples", "samples", "_image_paths", "images")  # where torchvision keeps its paths


def fingerprint(model: nn.Module, listed: Sequence[str], plan: Plan, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on: the call, the protocol, the list of images and the model's weights.

    What the images *are* is not in it: that stands with the results of each batch, so that a batch whose images changed is
    measured again, and no other.

    Args:
        listed: what is said of each image, as :func:`listing` gives it.
    """
    own = {name: dict(values) for name, values in plan.own.items()}
    digests = {"images": short("\n".join(listed)), "weights": weights_of(model), "protocol": plan.protocol.record()}
    digests |= {"settings": own, "version": __version__}
    return json.loads(json.dumps({**arguments, **digests}, default=str))  # type: ignore[no-any-return]


def weights_of(model: nn.Module) -> str:
    """16 digits of a model: how it is built, its preprocessing, and every parameter and buffer."""
    weights = hashlib.blake2b(f"{model} {getattr(model, 'preprocess', '')}".encode(), digest_size=8)
    for name, value in (*model.named_parameters(), *model.named_buffers()):  # a normalisation is not in the state dict
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


def digest_of(identity: Mapping[str, Any]) -> str:
    """16 digits of a fingerprint, which every file of results has."""
    return short(json.dumps(identity, sort_keys=True, default=str))


def short(content: str | bytes) -> str:
    """16 digits of some text or bytes, by BLAKE2b."""
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def listing(source: Any) -> tuple[list[str], list[str]]:
    """The names of a data set's images, below its folder, and what is said of each: label, boxes, mask and background."""
    data, order = _inner(source)
    names = [_name(data, index) for index in order]
    if hasattr(data, "entries"):
        entries = [data.entries[index] for index in order]
        said: list[Any] = [
            (e.label, e.boxes, _below(e.mask, data.root), e.mask_value, e.background, data.clip_boxes) for e in entries
        ]
    else:
        known = data.labels() if callable(getattr(data, "labels", None)) else getattr(data, "labels", None)
        said = [type(data).__name__ if known is None else int(known[index]) for index in order]
    return names, [json.dumps([name, about], default=str) for name, about in zip(names, said, strict=True)]


def contents(source: Any, numbers: Iterable[int]) -> list[str]:
    """What images are, one text each: size and digest of the file and of its mask's, or a digest of the pixels.

    Reading a file for its digest costs little beside decoding it, and it is read from memory the second time.
    """
    data, order = _inner(source)
    return [_content(data, order[number]) for number in numbers]


def _inner(source: Any) -> tuple[Any, Sequence[int]]:
    if isinstance(source, Subset):
        data, order = _inner(source.dataset)
        return data, [order[index] for index in source.indices]
    return source, range(len(source))


def _name(data: Any, index: int) -> str:
    if callable(getattr(data, "name_of", None)):
        return str(data.name_of(index))
    ids = getattr(data, "ids", None)
    return str(index) if ids is None else str(ids[index])


def _below(path: Path | None, root: Path) -> str | None:
    if path is None:
        return None
    return str(path.relative_to(root)) if root in path.parents else str(path)


def _content(data: Any, index: int) -> str:
    if hasattr(data, "entries"):
        entry = data.entries[index]
        return " ".join(_file(path) for path in (entry.path, entry.mask) if path is not None)
    held = getattr(data, "source", None)  # torchvision's own: pixels in memory, or paths
    pixels = getattr(held, "data", None)
    if isinstance(pixels, (np.ndarray, torch.Tensor)) and len(pixels) == len(data):
        return short(np.ascontiguousarray(pixels[index]).tobytes())
    for name in FILES if held is not None else ():
        paths = getattr(held, name, None)
        if isinstance(paths, Sequence) and len(paths) == len(data):
            path = paths[index][0] if isinstance(paths[index], tuple) else paths[index]
            if isinstance(path, (str, Path)) and os.path.exists(path):
                return _file(path)
    batch = data[index]
    masks = b"" if batch.mask is None else batch.mask.numpy().tobytes()
    return short(batch.x.contiguous().numpy().tobytes() + masks)


def _file(path: str | Path) -> str:
    try:
        return f"{os.path.getsize(path)}:{files.digest(path)}" if files.is_regular(path) else "no file"
    except OSError:
        return "cannot be read"
