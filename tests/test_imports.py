"""A library that is there, and cannot be imported because something else is missing, is not called missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.errors import FoveateError, not_imported
from foveate.methods.adapt import by_name

MISSING = ModuleNotFoundError("No module named 'captum'", name="captum")
WITHIN = ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
BROKEN = ImportError("cannot import name 'x' from 'numpy'\nmore of it", name="numpy")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MISSING, r"'captum\.Lime' needs captum, which is not installed: pip install 'foveate\[captum\]'$"),
        (WITHIN, r"captum, which is installed and cannot be imported: No module named 'tqdm'$"),
        (BROKEN, r"captum, which is installed and cannot be imported: cannot import name 'x' from 'numpy'$"),
    ],
)
def test_the_reason_is_the_real_one(error: ImportError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(FoveateError, match=said):
        by_name("captum.Lime")


def test_an_error_without_a_message_has_its_kind() -> None:
    assert str(not_imported("this", "that", ImportError())).endswith("cannot be imported: ImportError")


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from foveate.training.lightning import made_loggers, ready
from foveate.training.film import hugging_face_callback
ready()
try:
    {call}
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "call"),
    [("transformers", "hugging_face_callback(None)"), ("tensorboard", "made_loggers(['tensorboard'], Path(sys.argv[1]))")],
)
def test_optional_libraries_of_training(package: str, call: str, tmp_path: Path) -> None:
    for name in (package, f"{package}X"):  # Lightning takes either
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("import a_library_that_nobody_has")
    command = [sys.executable, "-c", SCRIPT.format(call=call), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "which is installed and cannot be imported: No module named 'a_library_that_nobody_has'" in found.stdout, found
