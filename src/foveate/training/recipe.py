"""Recipe: everything that a training run depends on, in YAML."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from foveate.disk.files import is_regular
from foveate.disk.text import quoted, read_yaml
from foveate.errors import FoveateError
from foveate.models.load import refuse_code
from foveate.registry import LOSSES, METHODS, check_settings

RECIPES = Path(__file__).parent / "recipes"


LARGEST_SEED = 2**32 - 1  # that every generator takes


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """``epochs: true`` is no number, although Python counts it as 1."""
        field = cls.model_fields[info.field_name or ""]
        if any(isinstance(part, bool) for part in (value if isinstance(value, list) else [value])):
            kinds = _kinds(field.annotation)
            if bool not in kinds and kinds & {int, float}:
                raise ValueError("a number is needed")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    parts = typing.get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


class Phase(_Strict):
    """A part of a run with weights of its own."""

    until: float = Field(gt=0, le=1, description="share of the epochs at which it ends; the last one ends at 1")
    cross_entropy: float = Field(1.0, ge=0)
    added: float = Field(1.0, ge=0)
    learning_rate: float = Field(1.0, ge=0, description="factor")


class LossTerm(_Strict):
    """One loss of the sum."""

    name: str
    weight: float = Field(1.0, ge=0)
    schedule: Literal["constant", "linear", "three_phase", "inverse_fit"] | list[Phase] = "constant"
    settings: dict[str, Any] = {}


class Augment(_Strict):
    """Changes to training images; each is off by default."""

    flip: bool = False
    rotation: float = Field(0.0, ge=0, le=180, description="largest angle in degrees, either way")
    color_jitter: float = Field(0.0, ge=0, le=1, description="strength for brightness, contrast and saturation")
    crop_padding: int = Field(0, ge=0, description="pixels around the image, of which a random part of its size is taken")
    resized_crop: float = Field(1.0, gt=0, le=1, description="a random part of at least this area, enlarged to the whole")


UNCHANGED = Augment(rotation=0.0, color_jitter=0.0, crop_padding=0, resized_crop=1.0)


class Data(_Strict):
    """Custom data, each as ``foveate evaluate`` takes it: a folder, ``pets:FOLDER``, ``torchvision:CIFAR100:FOLDER``."""

    train: str
    val: str | None = Field(None, description="hold_out of train where it is not named")
    test: str | None = None
    hold_out: float = Field(0.2, gt=0, lt=1, description="share of every class of train, for validation")
    folds: int | None = Field(None, ge=2, description="cross-validation: one of so many parts of train is the test data")
    fold: int = Field(0, ge=0, description="which one, from 0")
    split_seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of these divisions; seed does not change them")
    encoding: str | None = Field(None, description="of labels.csv, where it is not UTF-8: cp1252, latin-1")

    @field_validator("train", "val", "test", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _possible(self) -> Data:
        if self.folds is not None and self.test is not None:
            raise ValueError("test data is named, and folds divides it off train: leave one of them out")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} is not one of {self.folds} folds, which count from 0")
        return self


class Measure(_Strict):
    """What is measured on validation and test images when training has ended."""

    method: str = "contrastive_cam"
    images: int = Field(200, ge=0, description="at most so many of each split; 0 for none")


class FilmSettings(_Strict):
    """The film strip: maps of a few validation images after every epoch."""

    images: int = Field(6, ge=0, description="0 for no film")
    method: str = "contrastive_cam"


class Recipe(_Strict):
    """Everything that a training run depends on."""

    name: str = "run"
    model: str = "foveate:small_cnn"
    weights: Path | None = None
    pretrained: bool = False
    contrastive_architecture: bool = Field(False, description="last stride 1 and a head without bias")
    ca_stream: bool | list[str] = Field(False, description="a CA-Stream instead of pooling: true, or the stages it reads")
    freeze_backbone: bool = Field(True, description="of a CA-Stream: the stream alone learns")
    cache_features: bool = Field(False, description="of the frozen backbone, computed once and kept beside the run")
    mean: list[float] | None = Field(None, description="normalisation, where the model does not say")
    std: list[float] | None = None
    head: Literal["softmax", "binary", "multilabel"] | None = Field(None, description="by the labels where it is not given")
    data: Literal["scenes"] | Data = "scenes"
    size: int | None = Field(None, ge=16, le=16384, description="input size, where it is not the model's own")
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1, description="of all devices together")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0)
    gradient_clip: float | None = Field(None, gt=0, description="largest norm of the gradient of all parameters")
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the steps")
    decay: Literal["cosine", "steps", "none"] = Field("cosine", description="of the learning rate after the warm-up")
    milestones: list[float] = Field([0.3, 0.6, 0.8], description="shares of the run, for decay: steps")
    factor: float = Field(0.2, gt=0, lt=1, description="at each milestone")
    early_stop: int | None = Field(None, ge=1, description="epochs without a better validation accuracy")
    keep: Literal["last", "best"] = Field("last", description="which epoch's weights: best is by validation accuracy")
    cross_entropy: float | None = Field(None, ge=0, description="its weight; 0 where a loss replaces it, else 1")
    losses: list[LossTerm] = []
    rebalance: bool = Field(False, description="draw every class equally often")
    augment: Augment = UNCHANGED
    freeze_batch_norm: bool = Field(False, description="running statistics and affine weights of batch norms stay as they are")
    layer: str = "auto"
    measure: Measure = Measure(images=200)
    film: FilmSettings = FilmSettings(images=6)
    seed: int = Field(0, ge=0, le=LARGEST_SEED)

    @field_validator("data", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) and value != "scenes" else value

    @property
    def weight_of_cross_entropy(self) -> float:
        """As given, or by whether one of the losses is a cross-entropy itself."""
        if self.cross_entropy is not None:
            return self.cross_entropy
        return 0.0 if any(LOSSES.get(term.name).replaces for term in self.losses) else 1.0


def read_recipe(
    source: str | Path, changes: Mapping[str, Any] | None = None, *, small: bool = False, trust_code: bool = False
) -> Recipe:
    """A recipe from a YAML file, or one of foveate's own by name; ``changes`` replace values (``augment.flip``: True).

    ``extends: NAME`` in a file takes everything from another recipe first; ``small:`` holds changes for a machine without
    a GPU, which count where ``small`` is asked for.

    Args:
        trust_code: take a model that the file, and not ``changes``, says is made by a Python file: training runs that file.

    Raises:
        FoveateError: no such recipe, broken YAML, an unknown key or a value out of range, each with its place; a Python
            file that is not trusted.
    """
    content, reduced = _content(source, ())
    if small and not reduced:
        raise FoveateError(f"recipe {str(source)!r} has no small variant")
    for key, value in {**(reduced if small else {}), **(changes or {})}.items():
        _put(content, key, value, str(source))
    content.setdefault("name", Path(source).stem)
    recipe = _validated(content, f"recipe {str(source)!r}")
    if "model" not in (changes or {}):
        refuse_code(recipe.model, f"recipe {str(source)!r}", trust_code)
    return recipe


def completed(content: Any, where: str) -> dict[str, Any]:
    """A recipe as a run was made with it: what its version did not know has its default, what this one does not, stays.

    Raises:
        FoveateError: it is no recipe.
    """
    if not isinstance(content, dict) or not {"name", "model", "data"} <= set(content):
        raise FoveateError(f"{where} is no whole recipe: it holds {quoted(content)}")
    known = {key: value for key, value in content.items() if key in Recipe.model_fields}
    try:
        return {**content, **Recipe.model_validate(known).model_dump(mode="json")}
    except ValidationError as error:
        raise FoveateError(f"{where}: {_sentence(error)}") from None


def _content(source: str | Path, seen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe says, with what it extends, and the changes of its small variant."""
    path = Path(source)
    if not is_regular(path):
        own = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        if str(source) not in own:
            near = difflib.get_close_matches(str(source), own, 3, 0.5)
            known = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(own)}"
            raise FoveateError(f"recipe {str(source)!r} is neither a file nor one of foveate's own: {known}")
        path = RECIPES / f"{source}.yaml"
    content = read_yaml(path, f"recipe {str(path)!r}")
    if not isinstance(content, dict):
        raise FoveateError(f"recipe {str(path)!r} is not a list of 'key: value' lines")
    base: dict[str, Any] = {}
    reduced: dict[str, Any] = {}
    if (parent := content.pop("extends", None)) is not None:
        if str(parent) in seen:
            raise FoveateError(f"recipe {str(source)!r} extends itself: {' from '.join([*seen, str(parent)])}")
        beside = path.parent / f"{parent}.yaml"
        base, reduced = _content(beside if is_regular(beside) else str(parent), (*seen, str(parent)))
    own_small = content.pop("small", {})
    if not isinstance(own_small, dict):
        raise FoveateError(f"recipe {str(source)!r}: small is a list of 'key: value' lines, and it is {quoted(own_small)}")
    if wrong := next((key for key in (*content, *own_small) if not isinstance(key, str)), None):
        raise FoveateError(f"recipe {str(source)!r}: a key is text, and {quoted(wrong)} is none")
    return _merged(base, content), {**reduced, **own_small}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Both, the second where they disagree; what is a mapping in both is merged likewise."""
    merged = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], dict) and isinstance(over[key], dict):
            merged[key] = _merged(base[key], over[key])
    return merged


def _put(content: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a value by its path, such as ``losses.0.weight``."""
    place: Any = content
    *parents, last = key.split(".")
    try:
        for parent in parents:
            if isinstance(place, list):
                place = place[int(parent)]
                continue
            if not isinstance(place.get(parent, {}), (dict, list)):
                place[parent] = {"train": place[parent]} if parent == "data" and place[parent] != "scenes" else {}
            place = place.setdefault(parent, {})
        place[int(last) if isinstance(place, list) else last] = value
    except (ValueError, IndexError, AttributeError, TypeError):
        raise FoveateError(f"recipe {where!r} has no place {key!r} for {quoted(value)}") from None


def _validated(content: Mapping[str, Any], where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise FoveateError(f"{where}: {_sentence(error)}") from None
    names: set[str] = set()
    for term in recipe.losses:
        try:
            record = LOSSES.get(term.name)
            check_settings(record, term.settings)
        except FoveateError as error:
            raise FoveateError(f"{where}: losses: {error}") from None
        if record.name in names:
            raise FoveateError(f"{where}: losses: {record.name} stands there twice")
        names.add(record.name)
        if isinstance(term.schedule, list):
            ends = [phase.until for phase in term.schedule]
            if not ends or ends != sorted(set(ends)) or ends[-1] != 1:
                raise FoveateError(f"{where}: losses: the phases of {record.name} must end one after the other, at last at 1")
        if term.schedule == "inverse_fit" and not record.share:
            shares = ", ".join(name for name, known in LOSSES.all().items() if known.share)
            raise FoveateError(
                f"{where}: losses: the schedule inverse_fit needs a loss that is a share of the map, and {record.name} is "
                f"none: {shares} are"
            )
        if "guided" in record.needs and recipe.precision == "fp16":
            raise FoveateError(
                f"{where}: {record.name} takes a gradient at the image, which is too small for precision fp16: use bf16 or fp32"
            )
    for key, method in (("measure", recipe.measure.method), ("film", recipe.film.method)):
        try:
            METHODS.get(method)
        except FoveateError as error:
            raise FoveateError(f"{where}: {key}: {error}") from None
    streams = bool(recipe.ca_stream) or recipe.model.startswith("ca_stream:")
    if recipe.cache_features and not (streams and recipe.freeze_backbone):
        raise FoveateError(f"{where}: cache_features keeps what a frozen backbone gives, and without ca_stream none is frozen")
    if recipe.cache_features and (recipe.losses or recipe.augment != UNCHANGED):
        raise FoveateError(f"{where}: cache_features goes with plain cross-entropy on images that no augmentation changes")
    if not recipe.losses and recipe.weight_of_cross_entropy == 0:
        raise FoveateError(f"{where}: cross_entropy is 0 and there are no losses: nothing would be trained")
    return recipe


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong with a recipe: where, why, what was given, and what there is."""
    problems = [p for p in error.errors() if p["loc"][-1:] != ("literal['scenes']",)] or error.errors()
    first = problems[0]
    place = [str(part) for part in first["loc"] if "Data" not in str(part)]
    message = first["msg"].removeprefix("Value error, ")
    model: type[BaseModel] = Recipe
    inside: dict[str, type[BaseModel]] = {
        "data": Data,
        "losses": LossTerm,
        "augment": Augment,
        "measure": Measure,
        "film": FilmSettings,
    }
    if len(place) > 1 and place[0] in inside:
        model = inside[place[0]]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], model.model_fields, 1, 0.6)
        known = f"did you mean {near[0]}?" if near else f"known are {', '.join(model.model_fields)}"
        return f"{'.'.join(place)} is no key of a recipe: {known}"
    return f"{'.'.join(place)}: {message[0].lower() + message[1:]}, and it is {quoted(first['input'])}"
