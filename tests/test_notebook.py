"""Notebooks: what a kernel shows of an explanation, a film, a table and a classifier; and the example runs."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import foveate

pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

EXAMPLE = Path(__file__).parents[1] / "examples" / "look.ipynb"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each cell of the example shows, by kind, run in a kernel of this Python with this foveate."""
    root = tmp_path_factory.mktemp("kernel")
    (root / "kernels" / "this").mkdir(parents=True)
    command = f'{{"argv": ["{sys.executable}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"], '
    (root / "kernels" / "this" / "kernel.json").write_text(command + '"display_name": "this", "language": "python"}')
    notebook = nbformat.read(EXAMPLE, as_version=4)
    paths = os.pathsep.join(filter(None, [str(Path(foveate.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(root))
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("OMP_NUM_THREADS", "1")
        client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="this", resources={"metadata": {"path": str(root)}})
        client.execute()
    found: list[dict[str, Any]] = []
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        shown: dict[str, Any] = {"source": cell.source}
        for output in cell.outputs:
            assert output.get("name") != "stderr", output.get("text")
            shown |= output.get("data", {}) or {"text/plain": output.get("text", "")}
        found.append(shown)
    return found


def of(outputs: list[dict[str, Any]], words: str) -> dict[str, Any]:
    return next(shown for shown in outputs if words in shown["source"])


def test_the_example_is_kept_without_outputs_and_small() -> None:
    notebook = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert EXAMPLE.stat().st_size < 20_000


def test_each_thing_shows_itself(outputs: list[dict[str, Any]]) -> None:
    why = of(outputs, "photographs = ")
    assert why["text/plain"].startswith(
        "Explanation of 3 images of 64 x 64 by foveate:small_cnn\n  maps:   grad_cam, hires_cam,"
    )
    assert why["text/html"].count("<img ") == 3 * 5
    assert why["text/html"].count('type="radio"') == 5
    model = of(outputs, "torch.manual_seed")
    assert model["text/plain"].startswith("Classifier foveate:small_cnn on cpu\n  takes:   images in [0, 1], 64 x 64")
    assert "Conv2d" not in model["text/plain"]
    assert of(outputs, "film = ")["text/html"].count("<img ") == 4 * 5
    assert "epoch 3: p of the label" in of(outputs, "film = ")["text/plain"]
    answers = of(outputs, "explain_each")
    assert [key in answers["text/html"] for key in ("<b>pred</b>", "<b>label</b>", "<b>pred-label</b>")] == [True] * 3
    assert "image/png" in of(outputs, "why.overlay")
    assert "image/png" in of(outputs, "why.figure")
    assert of(outputs, "tempfile")["text/plain"] == "True"
    table = of(outputs, "foveate.evaluate")["text/html"]
    assert re.findall(r'<th scope="row">([^<]+?)\s*<', table) == ["Grad-CAM", "HiResCAM", "Fake-CAM", "Centre"]
    assert "mass_inside ↑" in table


def test_outputs_share_no_names_on_the_page(outputs: list[dict[str, Any]]) -> None:
    names = [set(re.findall(r' id="([^"]+)"', shown.get("text/html", ""))) for shown in outputs]
    assert sum(map(len, names)) == len(set().union(*names)) > 5
