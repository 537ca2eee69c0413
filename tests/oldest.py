"""Constraints for ``make test-oldest``: of every direct dependency, the oldest version that pyproject.toml allows.

    python tests/oldest.py > constraints.txt

PyTorch and torchvision are left to constraints.txt: their oldest builds on PyPI bring gigabytes of CUDA. So are the tools of
the extra ``dev``, which foveate does not import. A bound such as ``>=1.0`` may name a version that was never uploaded: the
oldest one that pip finds is taken.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
OTHERWISE = {"torch", "torchvision"}
EXTRAS = ("cli", "evaluate", "train", "models", "report")


def bounds() -> dict[str, str]:
    """The lower bound of each dependency, by its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    found = dict(re.fullmatch(r"([\w.-]+)\s*>=\s*([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    return {name: bound for name, bound in found.items() if name not in OTHERWISE}


def release(version: str) -> tuple[int, ...]:
    """A version's numbers without zeros at the end, so that 1.0 is 1.0.0."""
    return tuple(map(int, re.sub(r"(\.0)+$", "", version).split(".")))


def oldest(name: str, bound: str) -> str:
    """The oldest final release, not below the bound, that pip finds for this Python."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "index", "versions", name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (listed,) = re.findall(r"^Available versions: (.*)$", said, re.M)
    final = [version for version in listed.split(", ") if re.fullmatch(r"[\d.]+", version)]
    return min((version for version in final if release(version) >= release(bound)), key=release)


if __name__ == "__main__":
    for name, bound in bounds().items():
        print(f"{name}=={oldest(name, bound)}")
