"""Feature cache: what a frozen backbone gives of each image, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from foveate.disk import files
from foveate.errors import FoveateError

SPARE = 0.8  # share of the free disk that features may take
MARKER, KIND = "foveate-features.json", "features"
NAMING = re.compile(r"[0-9a-f]{24}\.safetensors")


class FeatureCache:
    """Features of images by their pixels, one file per image, in float32.

    What another model made is never read: its features lie in a folder of their own, named by a digest of its weights, and
    are deleted to make room. Nothing else in ``folder`` is touched: see :func:`foveate.disk.files.delete_marked`.

    Args:
        folder: where they are kept; one process holds it.
        compute: from images ``[B,C,H,W]`` to a list of features, ``[B,...]`` each; called once an image.
        model: what they depend on: its weights and structure.
    """

    def __init__(self, folder: str | Path, compute: Callable[[Tensor], Sequence[Tensor]], model: nn.Module) -> None:
        digest = hashlib.blake2b(str(model).encode(), digest_size=8)
        for name, value in model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.folder = Path(folder) / digest.hexdigest()
        self.compute = compute
        for marker in Path(folder).glob(f"*/{MARKER}"):
            if marker.parent.name != self.folder.name:
                files.delete_marked(marker, KIND, NAMING)
        files.make_folder(self.folder)
        if not (self.folder / MARKER).exists():
            files.mark(self.folder / MARKER, KIND, self.folder.name)

    def check_room(self, x: Tensor, count: int) -> None:
        """Refuse what the disk cannot hold.

        Args:
            x: one image, ``[1,3,H,W]``.
            count: how many of them there will be.

        Raises:
            FoveateError: there is too little room; the message has both sizes.
        """
        needed = count * sum(4 * F_l[0].numel() for F_l in self.compute(x))
        free = shutil.disk_usage(self.folder).free
        if needed > SPARE * free:
            raise FoveateError(
                f"the features of {count} images would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in "
                f"{str(self.folder.parent)!r}: train without cache_features, or on fewer images"
            )

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The features of a batch; those that are not known yet are computed together and kept."""
        pixels = x.detach().cpu().contiguous()
        names = [hashlib.blake2b(image.numpy().tobytes(), digest_size=12).hexdigest() for image in pixels]
        places = [self.folder / f"{name}.safetensors" for name in names]
        known = [_read(place) for place in places]
        missing = [i for i, one in enumerate(known) if one is None]
        if missing:
            with torch.no_grad():
                found = self.compute(x[missing])
            for row, i in enumerate(missing):
                known[i] = {str(k): F_l[row].float().cpu().contiguous() for k, F_l in enumerate(found)}
                files.write_tensors(places[i], known[i] or {}, flush=False)  # a damaged one is computed again
        rows = [one for one in known if one is not None]
        return [torch.stack([one[str(k)] for one in rows]).to(x.device) for k in range(len(rows[0]))]


def _read(place: Path) -> dict[str, Tensor] | None:
    """The features of an image; None where they are not there, or damaged."""
    try:
        return load_file(place) if files.is_regular(place) else None
    except (OSError, SafetensorError):
        return None
