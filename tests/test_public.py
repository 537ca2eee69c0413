"""The public surface: what tab completion finds, what a type checker knows, and that the README's names are there."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import foveate
from foveate import evaluate, explain, measure, saliency
from foveate.evaluation.evaluate import Plan
from foveate.evaluation.protocol import Measuring, Planned

ROOT = Path(__file__).parents[1]
SOURCE = Path(foveate.__file__).parent


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True).stdout.strip()


def test_completion_finds_all_public_names_and_nothing_else() -> None:
    """In a new process: nothing was imported by a test before."""
    found = run("import foveate; print(*dir(foveate))").split()
    assert set(foveate.__all__) <= set(found)
    assert {"load", "read_explanation", "report", "methods", "torchmetrics"} <= set(found)
    assert not {"Any", "importlib", "annotations", "TYPE_CHECKING"} & set(found)
    assert all(hasattr(foveate, name) for name in found)
    rooms = run(
        "import foveate; print(*(n for r in (foveate.report, foveate.methods, foveate.losses) for n in dir(r)))"
    ).split()
    assert {"film", "pictures", "adapt", "cam", "centre"} <= set(rooms)


def test_names_in_full_work_after_import_alone() -> None:
    """Every ``foveate.a.b`` that the documents write, each in a process where nothing else was imported."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
    inside = "\n".join(part for text in texts for part in re.findall(r"```python\n(.*?)```", text, re.S)) + "\n".join(
        quoted for text in texts for quoted in re.findall(r"`(foveate\.[^`]*)`", text)
    )
    names = sorted(set(re.findall(r"(?<![\w./:])foveate(?:\.[A-Za-z_]+)+", inside)))
    assert {"foveate.explain", "foveate.report.film.write", "foveate.film.hugging_face_callback"} <= set(names)
    assert run(f"import foveate\nfor name in {names}: eval(name)\nprint('all')") == "all"


def test_no_package_claims_what_is_not_there() -> None:
    for package in (foveate, foveate.report, foveate.methods, foveate.models):
        with pytest.raises(AttributeError, match="has no attribute 'explode'"):
            _ = package.explode  # type: ignore[attr-defined]


CALLS = """
import torch
import foveate
from foveate import torchmetrics
model, x = foveate.load("foveate:small_cnn"), torch.rand(1, 3, 96, 96)
{call}
"""
WRONG = {
    "foveate.saliency(model, x, targt=1)": "targt",
    "foveate.explain(model, x, layers='a')": "layers",
    "foveate.explain_each(model, x, target=1)": "target",
    "foveate.measure(model, x, methods_=1)": "methods_",
    "foveate.evaluate(model, x, proticol='rise')": "proticol",
    "foveate.evaluate(model, x, batch_size='8')": "batch_size",
    "torchmetrics.SaliencyMetric(model, 'AD', setings={})": "setings",
    "foveate.salience(model, x)": "salience",
}
RIGHT = [
    "foveate.saliency(model, 'photo.jpg', target=[1], labels=[1], head='binary', normalised=True)",
    "foveate.explain(model, [x[0], 'photo.jpg'], ['cam'], layer='auto', settings={'cam': {}})['cam'].shape",
    "foveate.evaluate(model, 'folder', 'cam', 'AD', baseline='cam', protocol='rise', batch_size=2).index",
    "foveate.read_explanation('folder').overlay('cam', 0).size",
    "foveate.report.film.write",
    "foveate.Film(foveate.Batch(x, torch.tensor([0])))",
]


def test_a_misspelt_option_is_an_error_of_the_type_checker(tmp_path: Path) -> None:
    """All calls in one file, so that mypy reads PyTorch once."""
    pytest.importorskip("mypy")
    text = CALLS.format(call="\n".join([*WRONG, *RIGHT]))
    (tmp_path / "calls.py").write_text(text)
    call = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    environment = {"MYPYPATH": str(SOURCE.parent), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [*call, "--follow-imports=silent", str(tmp_path / "calls.py")],
        capture_output=True, text=True, timeout=580, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    lines = {int(line.split(":")[1]): line for line in done.stdout.splitlines() if "calls.py:" in line and ": error:" in line}
    first = text.split("\n").index(next(iter(WRONG))) + 1
    assert sorted(lines) == list(range(first, first + len(WRONG))), done.stdout + done.stderr
    for number, word in enumerate(WRONG.values(), first):
        assert f'"{word}"' in lines[number]


def test_options_that_are_handed_on_are_those_of_who_takes_them() -> None:
    def own(function: Any) -> set[str]:
        return {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}

    assert set(Measuring.__annotations__) == own(measure)
    assert set(get_type_hints(Measuring)) == own(measure)
    assert set(Planned.__annotations__) <= set(inspect.signature(Plan.of).parameters)
    explained = inspect.signature(explain).parameters
    for name, parameter in inspect.signature(saliency).parameters.items():
        if name != "method":
            assert (parameter.annotation, parameter.default) == (explained[name].annotation, explained[name].default), name
    assert "baseline" in inspect.signature(evaluate).parameters


def test_no_public_function_takes_anything_by_name() -> None:
    """Options have names: of functions, of what makes the classes, and of the metrics for other people's loops."""
    callables = [getattr(foveate, name) for name in foveate.__all__ if callable(getattr(foveate, name))]
    callables += [foveate.torchmetrics.SaliencyMetrics.__init__, foveate.torchmetrics.SaliencyMetric.__init__]
    assert len(callables) > 20
    for function in callables:
        if inspect.isclass(function) and issubclass(function, (Exception, dict)):
            continue  # Python's own
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                assert str(parameter.annotation).startswith("Unpack["), function
