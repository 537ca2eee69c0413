"""Load: ``timm:NAME``, ``torchvision:NAME``, ``foveate:NAME`` or ``file.py:factory`` as a classifier of images in [0, 1]."""

from __future__ import annotations

import difflib
import importlib.util
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate._torchvision import only_tensors, timm, torchvision
from foveate.data.imagenet import LINE, WORDNET_ID, imagenet_names, without_ids, wordnet_ids
from foveate.data.images import Preprocess, floor_resize
from foveate.errors import FoveateError
from foveate.models.stated import says_normalisation, says_size, spread, stated_names, stated_preprocess, takes_images
from foveate.models.weights import load_weights, read_weights
from foveate.runtime import layers
from foveate.runtime.model import IMAGENET_MEAN, IMAGENET_STD, Function, Normalized, core, one_output, read_logits, unwrap
from foveate.shown import listed

STREAM = "ca_stream:"


class Classifier(Normalized):
    """A model with its normalisation inside, and what is known about it.

    Attributes:
        name: how it was asked for.
        preprocess: from an image file to what it takes.
        class_names: one name a class, or None.
        wordnet_ids: other names of the classes, where they came with the names (``n01440764 tench``); ImageNet's own
            names need them not.
        notes: what was assumed while it was loaded, one sentence each.
        assumed: nobody said how the input is normalised, so that ImageNet's mean and std were taken.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocess: Preprocess,
        name: str = "",
        class_names: Sequence[str] | None = None,
        notes: Sequence[str] = (),
        assumed: bool = False,
    ) -> None:
        super().__init__(model, preprocess.mean, preprocess.std)
        self.name = name
        self.preprocess = preprocess
        self.class_names = list(class_names) if class_names is not None else None
        self.notes = list(notes)
        self.assumed = assumed

    @property
    def class_names(self) -> list[str] | None:
        """One name a class, in index order; ids of WordNet in front of them are taken off, and kept beside them."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: list[str] | None) -> None:
        self._class_names: list[str] | None = None
        self.wordnet_ids: list[str | None] | None = None
        if names is not None:
            self._class_names, ids = without_ids(names)
            self.wordnet_ids = ids if any(ids) else None

    def read(self, *images: Any) -> Tensor:
        """Photographs as this classifier takes them, ``[B,3,H,W]`` in [0, 1]: paths, folders, PIL images, arrays, tensors.

        Raises:
            FoveateError: see :func:`foveate.models.inputs.taken`.
        """
        from foveate.models.inputs import taken

        return taken(self, images[0] if len(images) == 1 else list(images)).x

    def __repr__(self) -> str:
        """A few lines for people; ``print(classifier.model)`` shows the modules."""
        height, width = self.preprocess.crop
        mean, std = (
            " ".join(f"{value:.3g}" for value in dict.fromkeys(values))
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        names, layer = self.class_names, layers.already_found(self, (self.mean.shape[1], height, width))
        first = next(self.parameters(), None)
        lines = [
            f"Classifier {self.name or type(self.model).__name__}" + ("" if first is None else f" on {first.device}"),
            f"  takes:   images in [0, 1], {height} x {width}; inside, mean {mean} and std {std}",
            "  classes: " + ("names are not known" if names is None else f"{len(names)}: {listed(names, 3)}"),
            f"  layer:   {layer or 'found when it is first asked for'}",
            *(f"  note:    {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def class_index(self, name: str) -> int:
        """The class of a name, or of one of its synonyms (``tabby`` for ``tabby, tabby cat``), or of a part of it.

        ImageNet's classes are known by their WordNet ids (``n02123045``) too.

        Raises:
            FoveateError: no class, or several, of that name; names are not known.
        """
        names = self.class_names
        if names is None:
            raise FoveateError(f"class {name!r} is a name, but this model's class names are not known: give them, or an index")
        wanted = _plain(name)
        found = self.classes_called(name) or [i for i, known in enumerate(names) if wanted in known.lower()]
        if len(found) == 1:
            return found[0]
        if found:
            some = ", ".join(f"{names[i]} ({i})" for i in found[:4])
            more = " and others" if len(found) > 4 else ""
            raise FoveateError(f"class {name!r} may be any of {len(found)} classes: {some}{more}; give the index")
        near = difflib.get_close_matches(wanted, [known.lower() for known in names], 3, 0.5)
        raise FoveateError(f"no class is called {name!r}" + (f": did you mean {' or '.join(near)}?" if near else ""))

    def classes_called(self, name: str) -> list[int]:
        """The classes that have exactly this name, this synonym or this WordNet id; none where names are not known."""
        line = LINE.fullmatch(name.strip())
        wanted = _plain(name if line is None else line[1])  # an id is surer than the name behind it
        parts = [(known.lower(), *map(str.strip, known.lower().split(","))) for known in self.class_names or ()]
        found = [index for index, synonyms in enumerate(parts) if wanted in synonyms]
        if found or not WORDNET_ID.fullmatch(wanted):
            return found
        ids = self.wordnet_ids or (wordnet_ids() if self.class_names == imagenet_names() else ())
        return [ids.index(wanted)] if wanted in ids else []

    def class_name(self, index: int) -> str:
        """The name of a class, or ``class 7`` where names are not known."""
        if self.class_names is not None and index < len(self.class_names):
            return self.class_names[index]
        return f"class {index}"


def _plain(name: str) -> str:
    return name.lower().strip().replace("_", " ")


Built = tuple[nn.Module, Preprocess, Sequence[str] | None]


def load(
    spec: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = False,
    num_classes: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    output: str | int | None = None,
    trust_code: bool = False,
) -> Classifier:
    """A classifier by name, in evaluation mode, with its own preprocessing and its normalisation inside.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``foveate:small_cnn`` or ``file.py:factory``: a function without
            arguments that returns a module in evaluation mode, or such a module, or a function of images. With ``ca_stream:``
            in front of any of them, that model with a CA-Stream instead of its pooling. Or the folder of a finished
            run of ``foveate train``: its model with its weights, whatever the recipe made of it.
        weights: a state dict, ``.safetensors`` or ``.pt``/``.pth``; code inside it is never run.
        pretrained: download the library's own weights.
        num_classes: for a head other than the library's.
        size: input size other than the model's own.
        mean, std: normalisation, where the model does not say.
        class_names: where they are not ImageNet's.
        output: of a model with several outputs, the one that is explained: a name, an index, or a dotted path such as
            ``heads.breed``. One black image is run to see that it is there.
        trust_code: run the Python file that the recipe of a run's folder names. A file that ``spec`` itself names is run
            without it.

    Raises:
        FoveateError: an unknown source, model or factory; weights that cannot be read, do not fit or hold NaN; a
            factory that returns a model in training mode; code that was not asked for.
    """
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": num_classes, "size": size, "mean": mean, "std": std}
    options |= {"class_names": class_names, "trust_code": trust_code}
    if output is not None:
        return _by_output(load(spec, weights=weights, **options), output, class_names is not None)
    if (Path(spec) / "recipe.yaml").is_file():
        return _from_run(Path(spec), Path(weights) if weights is not None else Path(spec) / "model.safetensors", trust_code)
    if spec.startswith(STREAM):
        from foveate.models.castream import ca_stream

        made: Classifier = ca_stream(load(spec.removeprefix(STREAM), **options))
        if weights is not None:
            load_weights(made.model, weights)
            made.notes = [note for note in made.notes if "random" not in note]
        elif not any("random" in note for note in made.notes):
            made.notes.insert(0, "the stream's weights are random: train it, or give a weights file")
        return made
    kind, _, name = spec.rpartition(":")
    if not kind or not name:
        raise FoveateError(
            f"model {spec!r} is not of the form timm:NAME, torchvision:NAME, foveate:NAME or file.py:factory: see "
            f"'foveate list models {spec}'"
        )
    if weights is not None and pretrained:
        raise FoveateError("weights from a file and pretrained weights were both asked for: choose one")
    notes: list[str] = []
    if kind in SOURCES:
        model, preprocess, names = SOURCES[kind](name, pretrained, num_classes)
        model.eval()
        if weights is None and not pretrained:
            notes.append("the weights are random: give a weights file or ask for the pretrained ones")
    elif kind.endswith(".py"):
        if pretrained or num_classes is not None:
            raise FoveateError(f"{spec!r} is your own factory: let it choose its pretrained weights and number of classes")
        model, preprocess, names = _from_file(Path(kind), name)
    else:
        raise FoveateError(f"model source {kind!r} is unknown: use timm, torchvision, foveate or a Python file")
    if weights is not None:
        load_weights(model, weights)
    assumed = kind not in SOURCES and not says_normalisation(model) and mean is None
    if assumed:
        plain = f"takes {preprocess.channels} channel(s), and does not say" if preprocess.channels != 3 else ""
        taken = "its images are given as they are, in [0, 1]" if plain else "ImageNet's mean and std are assumed"
        notes.append(
            f"the model {plain or 'does not say'} how its input is normalised, and {taken}: if its "
            "probabilities look wrong, give mean and std, or set them on the model as model.mean and model.std"
        )
    if mean is not None or std is not None:
        if mean is None or std is None:
            raise FoveateError("mean and std belong together: give both")
        if len(mean) != len(std) and 1 not in (len(mean), len(std)):
            raise FoveateError(f"mean has {len(mean)} numbers and std {len(std)}: give one number a channel, or one for all")
        channels = preprocess.channels if len(mean) == len(std) == 1 else max(len(mean), len(std))
        preprocess = replace(preprocess, mean=spread(mean, channels), std=spread(std, channels))
    if size is not None:
        preprocess = preprocess.sized(size)
    return Classifier(
        model, preprocess, spec, class_names if class_names is not None else names, notes, assumed and preprocess.channels == 3
    )


def code_of(spec: str) -> str | None:
    """The Python file that a model's name says to run, or None: ``net.py`` of ``ca_stream:net.py:factory``."""
    while spec.startswith(STREAM):
        spec = spec.removeprefix(STREAM)
    kind = spec.rpartition(":")[0]
    return kind if kind.endswith(".py") else None


def refuse_code(spec: str, where: str, trust_code: bool) -> None:
    """Code that a file names is run where that is asked for.

    Raises:
        FoveateError: it is not.
    """
    if (code := code_of(spec)) is not None and not trust_code:
        raise FoveateError(
            f"{where} names the Python file {code!r} as its model, and it is not run unasked: read it, then allow it with "
            "--trust-code (trust_code=True)"
        )


def _from_run(folder: Path, weights: Path, trust_code: bool) -> Classifier:
    """What a recipe has trained, with its weights, class names and input size."""
    import json

    import yaml

    from foveate.models.castream import ca_stream
    from foveate.models.surgery import contrastive_architecture

    try:
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if not record.get("finished", True):
            raise ValueError("--resume ends it")
        refuse_code(recipe["model"], repr(str(folder / "recipe.yaml")), trust_code)
        options = {"size": recipe.get("size"), "mean": recipe.get("mean"), "std": recipe.get("std"), "trust_code": trust_code}
        own = code_of(recipe["model"]) is not None
        model = load(recipe["model"], num_classes=None if own else record["outputs"], **options)
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as error:
        if isinstance(error, FoveateError):
            raise
        raise FoveateError(f"{str(folder)!r} holds no finished training run: {error}") from None
    if recipe.get("contrastive_architecture"):
        model = contrastive_architecture(model)
    if stages := recipe.get("ca_stream"):
        model = ca_stream(model, None if stages is True else stages)
    load_weights(model.model, weights)
    if record["class_names"]:
        model.class_names, model.wordnet_ids = record["class_names"], record.get("wordnet_ids")
    model.name, model.notes = str(folder), [note for note in model.notes if "random" not in note]
    return model.eval()


def _by_output(classifier: Classifier, output: str | int, named: bool) -> Classifier:
    """The classifier by one of its outputs; the names of another one's classes are none of its own.

    Raises:
        FoveateError: it has no such output; the message lists those that there are.
    """
    made: Classifier = one_output(classifier, output)
    first = next(made.parameters(), torch.zeros(()))
    black = torch.zeros(1, made.preprocess.channels, *made.preprocess.crop, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad():
            count = read_logits(made(black)).shape[1]
    except (RuntimeError, TypeError, IndexError) as error:
        raise FoveateError(f"the model cannot take images of shape {list(black.shape)}: {error}") from error
    names = getattr(classifier.model, "class_names", None)
    if not named and isinstance(names, Mapping) and output in names:
        made.class_names = list(names[output])
    elif not named and made.class_names is not None and len(made.class_names) != count:
        made.class_names = None
    return made


# -- sources -------------------------------------------------------------------------------------------------------


def _unknown(source: str, name: str, known: Sequence[str]) -> FoveateError:
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, and 'foveate list models' names them"
    return FoveateError(f"{source} has no model {name!r}: {hint}")


def _from_timm(name: str, pretrained: bool, num_classes: int | None) -> Built:
    library = timm()
    base = name.split(".")[0]
    if not library.is_model(base):
        raise _unknown("timm", name, library.list_models())
    try:
        with only_tensors():
            model = library.create_model(name, pretrained=pretrained, num_classes=num_classes)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise _not_downloaded(name, error) if pretrained else FoveateError(f"timm could not build {name!r}: {error}") from None
    config = library.data.resolve_model_data_config(model)
    crop = config["input_size"][-2:]
    preprocess = Preprocess(
        crop=tuple(crop),
        resize=None if config.get("crop_mode") == "squash" else floor_resize(min(crop), config["crop_pct"]),
        interpolation=config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic", "nearest") else "bicubic",
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    return model, preprocess, imagenet_names() if model.num_classes == 1000 else None


def _from_torchvision(name: str, pretrained: bool, num_classes: int | None) -> Built:
    models = torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise _unknown("torchvision", name, known)
    weights = models.get_model_weights(name).DEFAULT
    settings: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    if name in ("googlenet", "inception_v3") and not pretrained:
        # torchvision sets both only together with its own weights, and those, from a file, need the first as well.
        settings.update(transform_input=True, init_weights=False)
    try:
        with only_tensors():
            model = models.get_model(name, weights=weights if pretrained else None, **settings)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = FoveateError(f"torchvision could not build {name!r}: {error}")
        raise (_not_downloaded(name, error) if pretrained else reason) from None
    transforms = weights.transforms()
    preprocess = Preprocess(
        crop=(transforms.crop_size[0], transforms.crop_size[0]),
        resize=transforms.resize_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )
    return model, preprocess, weights.meta["categories"] if num_classes in (None, 1000) else None


def _small_cnn(num_classes: int | None) -> Built:
    from foveate.models.small import small_cnn

    names = ["leopard", "orca"] if num_classes in (None, 2) else None
    return small_cnn(num_classes or 2), Preprocess((96, 96), 96, "bilinear", (0.5,) * 3, (0.25,) * 3), names


def _cifar_resnet18(num_classes: int | None) -> Built:
    from foveate.models import cifar

    return cifar.cifar_resnet18(num_classes or 100), cifar.PREPROCESS, None


def _cifar_mobilenet_v2(num_classes: int | None) -> Built:
    from foveate.models import cifar

    return cifar.cifar_mobilenet_v2(num_classes or 100), cifar.PREPROCESS, None


OWN: dict[str, Callable[[int | None], Built]] = {
    "small_cnn": _small_cnn,
    "cifar_resnet18": _cifar_resnet18,
    "cifar_mobilenet_v2": _cifar_mobilenet_v2,
}


def _from_foveate(name: str, pretrained: bool, num_classes: int | None) -> Built:
    if name not in OWN:
        raise _unknown("foveate", name, list(OWN))
    if pretrained:
        raise FoveateError(f"{name} has no pretrained weights: train it with 'foveate demo' or 'foveate train'")
    return OWN[name](num_classes)


SOURCES: dict[str, Callable[[str, bool, int | None], Built]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "foveate": _from_foveate,
}


def _not_downloaded(name: str, error: Exception) -> FoveateError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return FoveateError(f"the pretrained weights of {name!r} could not be downloaded ({reason}): give a weights file instead")


def _from_file(path: Path, name: str) -> Built:
    if not path.is_file():
        raise FoveateError(f"model file {str(path)!r} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"foveate_model_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        if "torchvision" in path.read_text(encoding="utf-8") or "timm" in path.read_text(encoding="utf-8"):
            torchvision()  # beside a PyTorch build that it was not made for, a plain import would fail
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's own code may raise anything
        raise FoveateError(f"{path} could not be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if factory is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, names, 3, 0.4)
        raise FoveateError(f"{path} has no {name!r}" + (f": did you mean {' or '.join(near)}?" if near else ""))
    try:
        model = factory if isinstance(factory, nn.Module) or takes_images(factory) else factory()
    except Exception as error:  # likewise
        raise FoveateError(f"{path}:{name} raised {type(error).__name__}: {error}") from error
    if callable(model) and not isinstance(model, (nn.Module, type)):
        model = Function(model)
    if not isinstance(model, nn.Module):
        raise FoveateError(
            f"{path}:{name} returned a {type(model).__name__}, and a torch.nn.Module or a function of images is needed"
        )
    if model.training:
        raise FoveateError(f"the model of {path}:{name} is in training mode: return model.eval()")
    return model, stated_preprocess(model), stated_names(model)


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


__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Classifier", "imagenet_names", "load", "load_weights", "read_weights"]
