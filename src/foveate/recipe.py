"""Recipe: everything that a training run depends on, in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from foveate.errors import FoveateError
from foveate.registry import LOSSES, check_settings

RECIPES = Path(__file__).parent / "recipes"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LossTerm(_Strict):
    """One loss that is added to cross-entropy."""

    name: str
    weight: float = Field(1.0, ge=0)
    schedule: Literal["constant", "three_phase"] = "constant"
    settings: dict[str, Any] = {}


class Augment(_Strict):
    """Changes to training images; each is off by default."""

    flip: bool = False
    rotation: float = Field(0.0, ge=0, le=180, description="largest angle in degrees, either way")
    color_jitter: float = Field(0.0, ge=0, le=1, description="strength for brightness, contrast and saturation")


class Splits(_Strict):
    """Folders of a data set of one's own."""

    train: Path
    val: Path
    test: Path | None = None


class Recipe(_Strict):
    """Everything that a training run depends on."""

    name: str = "run"
    model: str = "foveate:small_cnn"
    weights: Path | None = None
    pretrained: bool = False
    data: Literal["scenes"] | Splits = "scenes"
    size: int | None = Field(None, ge=16, description="input size, where it is not the model's own")
    epochs: int = Field(12, ge=1)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.02, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    warmup: float = Field(0.2, ge=0, lt=1, description="share of the steps; a cosine to 0 follows")
    losses: list[LossTerm] = []
    rebalance: bool = Field(False, description="draw every class equally often")
    augment: Augment = Augment(rotation=0.0, color_jitter=0.0)
    layer: str = "auto"
    seed: int = Field(0, ge=0)


def read_recipe(source: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file, or one of foveate's own by name; ``changes`` replace values (``augment.flip``: True).

    Raises:
        FoveateError: no such recipe, broken YAML, an unknown key or a value out of range; each with its place.
    """
    path = Path(source)
    if not path.is_file():
        own = sorted(file.stem for file in RECIPES.glob("*.yaml"))
        if str(source) not in own:
            raise FoveateError(f"recipe {str(source)!r} is neither a file nor one of foveate's own: {', '.join(own)}")
        path = RECIPES / f"{source}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FoveateError(f"recipe {str(path)!r} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise FoveateError(f"recipe {str(path)!r} is not a list of 'key: value' lines")
    for key, value in (changes or {}).items():
        place = content
        *parents, last = key.split(".")
        for parent in parents:
            step = (
                place.setdefault(int(parent) if isinstance(place, list) and parent.isdigit() else parent, {})
                if isinstance(place, dict)
                else place[int(parent)]
            )
            place = step
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    content.setdefault("name", path.stem)
    return _validated(content, f"recipe {str(source)!r}")


def _validated(content: Mapping[str, Any], where: str) -> Recipe:
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = ", ".join(Recipe.model_fields) if first["type"] == "extra_forbidden" and len(first["loc"]) == 1 else ""
        raise FoveateError(
            f"{where}: {key}: {first['msg'].lower()}, and it is {first['input']!r}" + (f"; known are {known}" if known else "")
        ) from None
    for term in recipe.losses:
        try:
            check_settings(LOSSES.get(term.name), term.settings)
        except FoveateError as error:
            raise FoveateError(f"{where}: losses: {error}") from None
    return recipe
