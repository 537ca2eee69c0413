"""Fixtures: real networks and photographs, skipped with a reason where they are not on this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from foveate._torchvision import torchvision

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share two cores
torchvision()  # before pytorch-grad-cam imports it


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real weights and photographs that FOVEATE_DATA names."""
    root = Path(os.environ.get("FOVEATE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "weights").is_dir():
        pytest.skip(f"no real data in {root}: set FOVEATE_DATA")
    return root
