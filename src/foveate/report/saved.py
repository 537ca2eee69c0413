"""Saved: an explanation as a folder of pictures, ``maps.npz`` and ``manifest.json``, and back."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import foveate
from foveate.data.images import Preprocess, to_image
from foveate.disk import files
from foveate.disk.files import is_regular
from foveate.disk.written import is_written, write_picture
from foveate.errors import FoveateError, ImageError, printable
from foveate.explanation.answers import Explanation, Seen, bare, bound
from foveate.overlay import overlay
from foveate.registry import METHODS
from foveate.report.explanation import overlaid

if TYPE_CHECKING:
    from foveate.targets import Head, Target

KIND = "foveate explanation"
MANIFEST, MAPS = "manifest.json", "maps.npz"
PICTURE = re.compile(r"[\w.-]{1,200}\.png")


def write(explanation: Explanation, folder: str | Path) -> Path:
    """See :meth:`foveate.Explanation.save`."""
    folder = Path(folder)
    if not str(folder).strip() or str(folder) == ".":
        raise FoveateError(f"an explanation is written to a folder of its own, and {str(folder)!r} is none: name a new one")
    files.make_folder(folder)
    with files.locked(folder):
        _clear(folder)
        files.write_json(folder / MANIFEST, {"kind": KIND, "finished": False})
        arrays: dict[str, Any] = _arrays(explanation)
        images, written = list[dict[str, Any]](), list[str]()
        for index, stem in enumerate(_stems(explanation.seen.names)):
            images.append(_image(explanation, index, stem, folder, written))
        with files.replacing(folder / MAPS) as waiting, waiting.open("wb") as file:
            np.savez_compressed(file, **arrays)
        files.write_json(folder / MANIFEST, {"kind": KIND, "finished": True, **_about(explanation, images, written)})
    return folder


def _clear(folder: Path) -> None:
    """Take away what this wrote before; a folder with anything else in it is somebody's."""
    there = [path.name for path in folder.iterdir() if path.name != files.LOCK]
    if not there:
        return
    said = _manifest(folder)
    if said is None:
        raise FoveateError(f"{str(folder)!r} has files in it and is no folder of an explanation: name another, or a new one")
    for name in said.get("files", []):
        path = folder / str(name)
        if PICTURE.fullmatch(str(name)) and is_regular(path) and not path.is_symlink() and is_written(path):
            files.delete(path)


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        said = json.loads(path.read_text(encoding="utf-8")) if is_regular(path) else None
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) and said.get("kind") == KIND else None


def _stems(names: tuple[str, ...]) -> list[str]:
    """Names of files, none twice, of any names of images."""
    taken: dict[str, None] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem).strip("_")[:80] or "image"
        stem, number = plain, 2
        while stem in taken:
            stem, number = f"{plain}_{number}", number + 1
        taken[stem] = None
    return list(taken)


def _image(explanation: Explanation, index: int, stem: str, folder: Path, written: list[str]) -> dict[str, Any]:
    """The pictures of one image are written; what is said of it is returned."""
    seen, kept = explanation.seen, explanation.seen.photographs[index]
    try:
        photograph = explanation.photograph(index)
    except ImageError:
        photograph = None  # its file is gone: what the network saw is drawn
    whole = to_image(seen.x[index].cpu()) if photograph is None else photograph
    made = {}
    for name in explanation.maps:
        made[name] = f"{stem}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}.png"
        shown = overlaid(explanation, name, index, photograph) if photograph is not None else _on_seen(explanation, name, index)
        write_picture(shown, folder / made[name])
    place = None if kept is None else str(kept.resolve()) if isinstance(kept, Path) else f"{stem}_photograph.png"
    if photograph is not None and not isinstance(kept, Path):
        write_picture(whole, folder / str(place))
    written += [*made.values(), *([str(place)] if kept is not None and not isinstance(kept, Path) else [])]
    best, p, asked = explanation.said(index)
    return {
        "name": printable(seen.names[index]),
        "photograph": place,
        "says": {"index": best, "name": seen.class_name(best), "p": p},
        "why": explanation.question(index),
        "p": asked,
        "pictures": made,
    }


def _on_seen(explanation: Explanation, name: str, index: int) -> Image.Image:
    return to_image(overlay(explanation.seen.x[index].cpu(), explanation.maps[name][index].cpu()))


def _arrays(explanation: Explanation) -> dict[str, np.ndarray]:
    """Every tensor by a path, such as ``maps/grad_cam``; images that have 256 values are kept in 8 bits."""
    seen = explanation.seen
    x = seen.x.float().cpu()
    small = (x * 255).round()
    exact = bool(((small / 255 - x).abs() <= 1e-7).all()) and bool(((small >= 0) & (small <= 255)).all())
    found: dict[str, Tensor | None] = {"images": small.byte() if exact else x, "logits": seen.logits}
    for kind in ("maps", "raw", "degenerate", "completeness_error"):
        found |= {f"{kind}/{name}": value for name, value in getattr(explanation, kind).items()}
    for name, facts in explanation.facts.items():
        found |= {f"facts/{name}/{key}": value for key, value in facts.items()}
    for name, target in (("", explanation.target), *explanation.targets.items()):
        found |= {f"target/{name}/{part}": value for part, value in bare(target).items() if isinstance(value, Tensor)}
    return {key: _numpy(value) for key, value in found.items() if isinstance(value, Tensor)}


def _numpy(value: Tensor) -> np.ndarray:
    value = value.detach().cpu()
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).numpy()


def _about(explanation: Explanation, images: list[dict[str, Any]], written: list[str]) -> dict[str, Any]:
    seen = explanation.seen
    methods = {
        name: {
            "title": record.title if (record := METHODS.known(name)) is not None else name,
            "score": explanation.targets[name].name if name in explanation.targets else explanation.target.name,
            "settings": dict(seen.settings.get("methods", {}).get(name, {})),
            "seconds": explanation.seconds.get(name),
            "remarks": explanation.remarks.get(name, []),
        }
        for name in explanation.maps
    }
    return {
        "version": 1,
        "versions": {"foveate": foveate.__version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "model": printable(seen.model),
        "layer": explanation.layer,
        "head": seen.head,
        "score": explanation.target.name,
        "settings": {key: value for key, value in seen.settings.items() if key != "methods"},
        "methods": methods,
        "left_out": explanation.left_out,
        "class_names": None if seen.class_names is None else list(seen.class_names),
        "preprocess": None if seen.preprocess is None else asdict(seen.preprocess),
        "images": images,
        "files": [MAPS, *written],
    }


def read(folder: str | Path) -> Explanation:
    """See :func:`foveate.read_explanation`."""
    folder = Path(folder)
    said = _manifest(folder)
    if said is None:
        raise FoveateError(f"{str(folder)!r} is no folder of an explanation: explanation.save(folder) writes one")
    if not said.get("finished"):
        raise FoveateError(f"the explanation in {str(folder)!r} was not written to its end: save it again")
    try:
        with np.load(folder / MAPS, allow_pickle=False) as file:
            known = {key: torch.from_numpy(np.ascontiguousarray(file[key])) for key in file.files}
        return _explanation(folder, said, known)
    except Exception as error:  # numpy, zipfile and zlib raise many kinds for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FoveateError(f"the explanation in {str(folder)!r} is damaged: {reason}") from None


def _explanation(folder: Path, said: Mapping[str, Any], known: Mapping[str, Tensor]) -> Explanation:
    head: Head = said["head"]
    x, images, names = known["images"], said["images"], list(said["methods"])
    x = x.float() / 255 if x.dtype == torch.uint8 else x
    places = [None if image["photograph"] is None else folder / image["photograph"] for image in images]  # absolute ones stay
    if len(images) != len(x) or any(len(known[f"maps/{name}"]) != len(x) for name in names):
        raise ValueError(f"it has {len(x)} images, and {len(images)} in its manifest")
    preprocess = None
    if (stated := said["preprocess"]) is not None:
        own: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in stated.items()}
        preprocess = Preprocess(**own)
    own_settings = {name: said["methods"][name]["settings"] for name in names if said["methods"][name]["settings"]}
    settings = {**said["settings"], "methods": own_settings}
    classes = None if said["class_names"] is None else tuple(said["class_names"])
    about = (tuple(image["name"] for image in images), tuple(places), preprocess, said["model"], classes, settings)

    def target(name: str, score: str) -> Target:
        own = {"name": score, "y": known[f"target/{name}/y"], "other": known.get(f"target/{name}/other")}
        return bound(own, head)

    def under(kind: str) -> dict[str, Tensor]:
        return {name: known[f"{kind}/{name}"] for name in names if f"{kind}/{name}" in known}

    facts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in known.items():
        if key.startswith("facts/"):
            name, _, fact = key.removeprefix("facts/").rpartition("/")
            facts[name][fact] = value
    return Explanation(
        under("maps"),
        under("raw"),
        target("", said["score"]),
        said["layer"],
        Seen(x, known["logits"], head, *about),
        targets={name: target(name, said["methods"][name]["score"]) for name in names},
        completeness_error={name: known.get(f"completeness_error/{name}") for name in names},
        seconds={name: said["methods"][name]["seconds"] for name in names},
        degenerate=under("degenerate"),
        facts=facts,
        remarks={name: said["methods"][name]["remarks"] for name in names},
        left_out=said["left_out"],
    )
