"""Elsewhere: maps that another library computed, beside ours in a table: arrays, or files by the names of the images."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from foveate.disk import files
from foveate.disk.text import read_bytes
from foveate.errors import FoveateError, MapsWarning, printable
from foveate.maps import upsample
from foveate.registry import METHODS, Method
from foveate.runtime.capture import Capture
from foveate.targets import Target

Of = Literal["auto", "crop", "file"]
SUFFIXES = (".npy", ".npz", ".png", ".safetensors")
MOST_NAMED = 3  # files that a sentence names


@dataclass
class Elsewhere:
    """The maps of one column of a table.

    Attributes:
        name: of the column.
        source: an array ``[N,h,w]`` in the order of the images, or where maps are by name: a folder, or one file of several.
        of: what a map covers: the ``crop`` that the network sees, the stored ``file``, or whichever its shape fits: ``auto``.
    """

    name: str
    source: Tensor | Path
    of: Of = "auto"
    _by_key: dict[str, Any] = field(default_factory=dict, repr=False)
    _by_stem: dict[str, list[str]] = field(default_factory=dict, repr=False)
    _rows: dict[str, int] = field(default_factory=dict, repr=False)
    _paths: dict[str, Path] = field(default_factory=dict, repr=False)
    _taken: dict[str, str] = field(default_factory=dict, repr=False)  # of each map, the image that it is of
    _seen: int = 0
    _bound: bool = False
    preprocess: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.source, Path):
            self._by_key = _listed(self.source)
            for key in self._by_key:
                self._by_stem.setdefault(key.rpartition("/")[2], []).append(key)

    @property
    def record(self) -> Method:
        """What stands for them among the methods: it needs no layer, and cannot make a map again."""

        def function(capture: Capture, layer: str | None, target: Target) -> Tensor:
            raise FoveateError(f"{self.name} are maps from elsewhere, which cannot be made again")

        return Method(self.name, self.name, function, "maps from elsewhere", signed=True, whole=True)

    def digest(self) -> str:
        """16 digits of what the maps are."""
        if isinstance(self.source, Tensor):
            return files.digest_of_bytes(self.source.contiguous().numpy().tobytes())
        paths = sorted({place if isinstance(place, Path) else place[0] for place in self._by_key.values()})
        return files.digest_of_bytes("\n".join(f"{path.name} {files.digest(path)}" for path in paths).encode())

    def bind(self, data: Any, names: Sequence[str]) -> None:
        """Say which images there will be, by name; what has no map and what is of no image is said in a warning.

        Args:
            data: a folder, whose files and preprocessing tell what a map covers; anything else without.

        Raises:
            FoveateError: an array of another length, or not one map of any image.
        """
        self._bound = True
        while hasattr(data, "dataset"):  # a Subset
            data = data.dataset
        if hasattr(data, "entries"):
            self.preprocess = data.preprocess
            self._paths = {data.name_of(i): entry.path for i, entry in enumerate(data.entries)}
        if isinstance(self.source, Tensor):
            if len(self.source) != len(names):
                raise FoveateError(f"{self.name}: {len(self.source)} maps are given, and there are {len(names)} images")
            self._rows = {name: row for row, name in enumerate(names)}
            return
        lost = [name for name in names if self._key(name) is None]
        left = [key for key in self._by_key if key not in self._taken]
        if len(lost) == len(names) and names:
            raise FoveateError(
                f"{self.name}: no map in {str(self.source)!r} has the name of an image: there is {_some(left)}, and the images "
                f"are {_some(names)}"
            )
        for some, sentence in ((lost, "image(s) without a map"), (left, "map(s) of no image, passed over")):
            if some:
                warnings.warn(f"{self.name}: {len(some)} {sentence}: {_some(some)}", MapsWarning, stacklevel=2)

    def maps(self, ids: Sequence[str], size: tuple[int, int]) -> list[Tensor | None]:
        """The map of each image, ``[h,w]``, as the network sees the image; None where there is none.

        Raises:
            FoveateError: a file cannot be read, is no map, or covers neither the crop nor the file.
        """
        found: list[Tensor | None] = []
        for place, name in enumerate(ids, self._seen):
            if isinstance(self.source, Tensor):
                row = self._rows.get(name, place)
                if row >= len(self.source):
                    raise FoveateError(f"{self.name}: {len(self.source)} maps are given, and there are more images")
                found.append(self._framed(self.source[row], name, size, f"{self.name}[{row}]"))
                continue
            key = self._key(name)
            found.append(None if key is None else self._framed(_read(self._by_key[key]), name, size, f"the map of {name}"))
        self._seen += len(ids)
        return found

    def settle(self, ids: Sequence[str]) -> None:
        """:meth:`bind` for data whose images are only known once all of them were seen.

        Raises:
            FoveateError: as there.
        """
        if not self._bound:
            self.bind(None, ids)

    def _key(self, name: str) -> str | None:
        """The map of an image: of its name with or without the ending, below the folder; else of the file's name alone."""
        whole = name.replace("\\", "/")
        key = next((key for key in (whole, _bare(whole)) if key in self._by_key), None)
        if key is None:
            last = whole.rpartition("/")[2]
            several = [*self._by_stem.get(last, []), *(self._by_stem.get(_bare(last), []) if _bare(last) != last else [])]
            if len(several) > 1:
                raise FoveateError(f"{self.name}: {_some(several)} are all called as the image {name}: keep its folders' names")
            key = several[0] if several else None
        if key is not None and self._taken.setdefault(key, name) != name:
            raise FoveateError(
                f"{self.name}: {key} is called as two images, {self._taken[key]} and {name}: keep their folders' names"
            )
        return key

    def _framed(self, saliency: Tensor, name: str, size: tuple[int, int], where: str) -> Tensor:
        height, width = saliency.shape
        path = self._paths.get(name)
        stored = None if path is None else _size_of(path)
        if self.of == "file" and stored is None:
            raise FoveateError(
                f"{where} is said to cover the stored file, and these images are no files: give maps of the crop"
            )
        crop = (height, width) == size or ((height, width) != stored and _alike((height, width), size))
        if self.of == "crop" or (self.of == "auto" and crop):
            return saliency
        if stored is None or not (self.of == "file" or _alike((height, width), stored)):
            files_too = "" if stored is None else f", nor the stored file of {stored[0]}x{stored[1]}"
            raise FoveateError(
                f"{where} has {height}x{width} values, which is not the shape of the image of {size[0]}x{size[1]} that the "
                f"network sees{files_too}: say what it covers, crop or file"
            )
        from PIL import Image

        left, top, right, bottom = self.preprocess.frame((stored[1], stored[0]))
        across, down = width / stored[1], height / stored[0]
        box = (max(0.0, left * across), max(0.0, top * down), min(width, right * across), min(height, bottom * down))
        cut = Image.fromarray(saliency.numpy(), "F").resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.array(cut))


def elsewhere(maps: Any, of: Of = "auto") -> list[Elsewhere]:
    """Maps as people give them: an array ``[N,h,w]``, a folder or file, or several of these by name.

    Raises:
        FoveateError: neither; a name that is a method's; an array of another shape.
    """
    if of not in get_args(Of):
        raise FoveateError(f"maps cover the {' or the '.join(get_args(Of)[1:])}, or auto, and not {of!r}")
    if maps is None:
        return []
    named = maps if isinstance(maps, Mapping) else {None: maps}
    found = [_one(name, own, of) for name, own in named.items()]
    for one in found:
        if METHODS.known(one.name) is not None:
            raise FoveateError(
                f"maps are called {one.name!r}, which is a method here: give them another name, such as 'their_{one.name}'"
            )
        if [other.name for other in found].count(one.name) > 1:
            raise FoveateError(f"maps are called {one.name!r} twice: give each a name of its own")
    return found


def together(maps: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Maps ``[h,w]`` of a batch as one ``[B,h,w]``, as large as the images where shapes differ; NaN where there is none."""
    shapes = {m.shape for m in maps if m is not None} or {torch.Size((1, 1))}
    height, width = shapes.pop() if len(shapes) == 1 else like.shape[-2:]
    nothing = like.new_full((height, width), torch.nan)
    rows = [nothing if m is None else upsample(m[None].to(like), (height, width))[0] for m in maps]
    return torch.stack(rows)


def alone(maps: Sequence[Tensor | None], raw: Tensor) -> list[Tensor]:
    """The maps of a batch, each ``[1,h,w]`` in its own shape."""
    return [raw[i : i + 1] if m is None else m[None].to(raw) for i, m in enumerate(maps)]


def _one(name: Any, given: Any, of: Of) -> Elsewhere:
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not path.exists():
            raise FoveateError(f"there are no maps in {str(given)!r}: name a folder, or a file of {', '.join(SUFFIXES)}")
        if path.is_file() and path.suffix.lower() == ".npy":
            return _one(path.stem if name is None else name, _numbers(path), of)
        return Elsewhere(_called(path.resolve().stem if name is None else name), path, of)
    array: Tensor | None
    try:
        array = given.detach().cpu() if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
        array = array.float() if not array.is_complex() else None
    except (TypeError, ValueError):
        array = None
    if array is not None and array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array is None or array.ndim != 3 or 0 in array.shape:
        shape = "" if array is None else f" of shape {list(array.shape)}"
        raise FoveateError(f"maps are an array [N,h,w], one map per image, or a folder, and not {type(given).__name__}{shape}")
    return Elsewhere(_called("maps" if name is None else name), array, of)


def _called(name: Any) -> str:
    text = printable(name)
    if not text.strip() or text.startswith("("):
        raise FoveateError(f"{text!r} is no name for maps: it stands in the table, such as 'theirs'")
    return text


def _listed(root: Path) -> dict[str, Any]:
    """Every map by its name, without the ending: a path, or a path and what the map is called in that file."""
    if root.is_file():
        return {_bare_map(key): (root, key) for key in _names_in(root)}
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.suffix.lower() not in SUFFIXES or not path.is_file() or any(part.startswith(".") for part in below.parts):
            continue
        key = below.with_suffix("").as_posix()
        if key in found:
            raise FoveateError(f"{found[key]} and {path} are both the map of {key}: keep one")
        found[key] = path
    if not found:
        raise FoveateError(f"{str(root)!r} holds no maps: files of {', '.join(SUFFIXES)} are looked for, called as the images")
    return found


def _names_in(path: Path) -> list[str]:
    if path.suffix.lower() not in (".npz", ".safetensors"):
        raise FoveateError(f"{path} is one file: maps of several images are a folder, an .npz, or .safetensors")
    return list(_arrays(path))


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of an ``.npz`` or ``.safetensors``; no object in them is built."""
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load

            return dict(load(read_bytes(path)))
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    except FoveateError:
        raise
    except Exception as error:  # of zip files, headers and objects: each reader has its own
        raise FoveateError(f"{path} holds no maps that can be read: {' '.join(str(error).split())[:120]}") from None


def _numbers(path: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise FoveateError(f"{path} holds no map that can be read: {' '.join(str(error).split())[:120]}") from None


def _read(place: Any) -> Tensor:
    """One map, ``[h,w]`` float32: PNG as shares of the largest value that its type can have."""
    path, key = place if isinstance(place, tuple) else (place, None)
    suffix = path.suffix.lower()
    if suffix == ".png":
        array: Any = _grey(path)
    elif suffix == ".npy":
        array = _numbers(path)
    else:
        held = _arrays(path)
        if key is None and len(held) != 1:
            raise FoveateError(f"{path} holds {len(held)} arrays, and is the map of one image: keep one in it")
        array = next(iter(held.values())) if key is None else held[key]
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "fiub":
            raise FoveateError(f"{path} holds {array.dtype}, which is no map: numbers are")
        array = torch.from_numpy(np.array(array, np.float32))
    saliency = array.float().squeeze() if array.ndim > 2 else array.float()
    if saliency.ndim != 2 or 0 in saliency.shape:
        raise FoveateError(f"{path} has the shape {list(array.shape)}, and a map is [h,w]: sum over colours and classes first")
    result: Tensor = saliency.contiguous()
    return result


def _grey(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.load()
            mode, deep = opened.mode, np.asarray(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FoveateError(f"{path} is no picture that can be read: {' '.join(str(error).split())[:120]}") from None
    if mode in ("RGB", "RGBA") and (deep[..., :1] == deep[..., :3]).all():
        mode, deep = "L", deep[..., 0]
    if mode not in ("L", "1") and not mode.startswith("I"):
        raise FoveateError(f"{path} is a picture in colours ({mode}), and a map is grey: of a colour nobody knows the value")
    return deep.astype(np.float32) / {"1": 1, "L": 255}.get(mode, 65535)


def _size_of(path: Path) -> tuple[int, int] | None:
    """Height and width of a stored image as it is shown, or None: who reads it says what is wrong."""
    from foveate.data.images import read

    try:
        width, height = read(path).size
    except FoveateError:
        return None
    return height, width


def _alike(shape: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether a map has the proportions of an image; one of its sides may be rounded."""
    (height, width), (down, across) = shape, other
    return min(abs(width - height * across / down), abs(height - width * down / across)) < 1


def _bare(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    return f"{folder}{slash}{stem}"


def _bare_map(key: str) -> str:
    return key.replace("\\", "/").removesuffix(".npy")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:MOST_NAMED]) + (f" and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else "")
