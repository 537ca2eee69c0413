"""Load: ``timm:NAME``, ``torchvision:NAME``, ``foveate:NAME`` or ``file.py:factory`` as a classifier of images in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foveate.errors import FoveateError
from foveate.models.classifier import Classifier
from foveate.models.sources import SOURCES, from_file
from foveate.models.stated import says_normalisation, spread
from foveate.models.weights import load_weights
from foveate.runtime.model import one_output, read_logits

STREAM = "ca_stream:"


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
        model, preprocess, names = from_file(Path(kind), name)
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
            raise FoveateError("mean and std (--mean, --std) belong together: give both")
        if len(mean) != len(std) and 1 not in (len(mean), len(std)):
            raise FoveateError(f"mean has {len(mean)} numbers and std {len(std)}: give one number per channel, or one for all")
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
