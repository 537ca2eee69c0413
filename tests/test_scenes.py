"""Scenes: the talk's numbers, the same bytes from the same seed, and masks that fit."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from foveate import FoveateError
from foveate.data import scenes


@pytest.fixture(scope="module")
def val() -> scenes.Scenes:
    return scenes.make("val", 0, 64)


def test_the_talks_numbers() -> None:
    assert scenes.COUNTS["train"] == {"leopard": 188, "orca": 89}
    assert scenes.CLASSES == ("leopard", "orca")


def test_what_an_image_has(val: scenes.Scenes) -> None:
    batch = val[3]
    assert batch.x.shape == (1, 3, 64, 64)
    assert batch.mask.shape == (1, 64, 64)
    assert 0 <= float(batch.x.min()) < float(batch.x.max()) <= 1
    assert len({batch.id for batch in val}) == len(val)
    with pytest.raises(IndexError):
        val[len(val)]


def test_habitats_in_validation_and_swapped_in_the_test() -> None:
    val, test = scenes.make("val", 1, 32), scenes.make("test", 1, 32)
    for split, pairs in ((val, {(0, "grass"), (1, "water")}), (test, {(0, "water"), (1, "grass")})):
        assert set(zip(split.labels.tolist(), split.backgrounds, strict=True)) == pairs


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(val: scenes.Scenes) -> None:
    again, other = scenes.make("val", 0, 64), scenes.make("val", 1, 64)
    assert torch.equal(val.images, again.images)
    assert torch.equal(val.masks, again.masks)
    assert not torch.equal(val.images[0], other.images[0])


def test_the_bytes_do_not_depend_on_the_process(val: scenes.Scenes) -> None:
    code = "import hashlib; from foveate.data import scenes; s = scenes.make('val', 0, 64)"
    code += "; print(hashlib.sha256(s.images.numpy().tobytes() + s.masks.numpy().tobytes()).hexdigest())"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert result.stdout.strip() == hashlib.sha256(val.images.numpy().tobytes() + val.masks.numpy().tobytes()).hexdigest()


def test_images_do_not_depend_on_their_number() -> None:
    """Each image has a generator of its own: drawing more of a class would not change the first ones."""
    one, _ = scenes.draw("leopard", "grass", np.random.default_rng([0, 0, 0, 5]), 48)
    assert np.array_equal(one, scenes.make("train", 0, 48).images[5].permute(1, 2, 0).numpy())


def test_animals_stand_near_the_centre_and_fill_a_part(val: scenes.Scenes) -> None:
    share = val.masks.float().mean((1, 2))
    assert float(share.min()) > 0.06
    assert float(share.max()) < 0.4
    rows = torch.arange(64).float() + 0.5
    mass = val.masks.float()
    across = (mass.sum(1) * rows).sum(1) / mass.sum((1, 2)) / 64
    down = (mass.sum(2) * rows).sum(1) / mass.sum((1, 2)) / 64
    for centre in (across, down):
        assert float(centre.min()) > 0.3
        assert float(centre.max()) < 0.7


def test_the_mask_is_where_the_animal_is() -> None:
    """The same generator with the other background: pixels inside the mask come from the same animal."""
    for animal in scenes.CLASSES:
        inside = []
        for ground in ("water", "grass"):
            image, mask = scenes.draw(animal, ground, np.random.default_rng(3), 96)
            inside.append(image[mask].astype(float).mean(0))
            outside = image[~mask].astype(float).mean(0)
            assert np.abs(inside[-1] - outside).max() > 15


def test_refusals() -> None:
    with pytest.raises(FoveateError, match="split 'dev' is unknown"):
        scenes.make("dev")
    with pytest.raises(FoveateError, match="size 16 is too small"):
        scenes.make("val", 0, 16)
