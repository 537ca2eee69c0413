"""Sources: models of timm, torchvision, foveate and your own files, as they are built, with what they say of themselves."""

from __future__ import annotations

import difflib
import importlib.util
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from foveate._torchvision import mend, only_tensors, timm, torchvision
from foveate.data.imagenet import imagenet_names
from foveate.data.images import Preprocess, floor_resize
from foveate.errors import FoveateError
from foveate.models.stated import stated_names, stated_preprocess, takes_images
from foveate.runtime.model import Function

Built = tuple[nn.Module, Preprocess, Sequence[str] | None]


def _unknown(source: str, name: str, known: Sequence[str]) -> FoveateError:
    near = difflib.get_close_matches(name, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, and 'foveate list models' names them"
    return FoveateError(f"{source} has no model {name!r}: {hint}")


def _from_timm(name: str, pretrained: bool, num_classes: int | None) -> Built:
    library = timm(f"the model {f'timm:{name}'!r}")
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
    models = torchvision(f"the model {f'torchvision:{name}'!r}").models
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


def from_file(path: Path, name: str) -> Built:
    if not path.is_file():
        raise FoveateError(f"model file {str(path)!r} does not exist")
    module_spec = importlib.util.spec_from_file_location(f"foveate_model_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    try:
        if "torchvision" in path.read_text(encoding="utf-8") or "timm" in path.read_text(encoding="utf-8"):
            mend()  # beside a PyTorch build that it was not made for, a plain import would fail
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
