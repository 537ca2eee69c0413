"""Feature cache: what a frozen backbone gives of each image, computed once and kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class FeatureCache:
    """Features of images by their names, one file an image, in float32.

    Args:
        folder: where they are kept.
        compute: from images ``[B,3,H,W]`` to a list of features, ``[B,...]`` each; called once an image.
    """

    def __init__(self, folder: str | Path, compute: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.folder = Path(folder)
        self.compute = compute
        self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, x: Tensor, ids: Sequence[str]) -> list[Tensor]:
        """The features of a batch; those that are not known yet are computed together and kept."""
        files = [self.folder / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.safetensors" for name in ids]
        missing = [i for i, file in enumerate(files) if not file.is_file()]
        if missing:
            with torch.no_grad():
                found = self.compute(x[missing])
            for row, i in enumerate(missing):
                part = files[i].with_suffix(".part")  # a run that is killed here leaves no half a file
                save_file({str(k): F_l[row].float().cpu().contiguous() for k, F_l in enumerate(found)}, part)
                part.rename(files[i])
        known = [load_file(file) for file in files]
        return [torch.stack([one[str(k)] for one in known]).to(x.device) for k in range(len(known[0]))]
