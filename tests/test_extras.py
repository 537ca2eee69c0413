"""What works without the optional libraries, and the one sentence that names the extra where one is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from foveate.errors import EXTRAS

ROOT = Path(__file__).parents[1]
ALL = ("cli", "evaluate", "train", "models", "report")
DISTRIBUTIONS = {"pytorch_grad_cam": "grad-cam"}

# Every finder is asked through one that knows nothing of the libraries named on the command line, nor of their metadata.
SCRIPT = """
import contextlib, io, json, re, sys
from pathlib import Path

missing, cases, out = set(json.loads(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[3])

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in missing else self.finder.find_spec(name, path, target)
    def find_distributions(self, *context):
        found = getattr(self.finder, "find_distributions", lambda *context: ())(*context)
        return [one for one in found if re.sub("[-_.]+", "_", one.name).lower() not in missing]
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)

import torch
from torch import nn
import foveate
from foveate.errors import FoveateError

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
x = torch.rand(2, 3, 24, 24)

def command(*arguments):
    from foveate.__main__ import main
    sys.argv = ["foveate", *arguments]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as exit:
            return f"{exit.code or 0}: {said.getvalue().strip()}"

found = []
for case in cases:
    try:
        found.append(str(eval(case)))
    except FoveateError as error:
        found.append(str(error))
print(json.dumps(found))
"""


def tried(missing: list[str], cases: list[str], tmp_path: Path) -> list[str]:
    """What each expression gives, or the sentence of its error, in a process without some libraries."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(missing), json.dumps(cases), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def sentence(what: str, package: str, extra: str) -> str:
    return f"{what} needs {package}, which is not installed: pip install 'foveate[{extra}]'"


EVALUATE = "foveate.evaluate(net, (x, torch.tensor([0, 1])), 'grad_cam', ['AD'])"
MEASURE = "len(foveate.measure(net, (x, torch.tensor([0, 1])), 'grad_cam', ['AD']))"
EXPLAIN = "[tuple(m.shape) for m in foveate.explain(net, x, ['grad_cam', 'layer_cam']).maps.values()]"
EXPLAINED = "[(2, 24, 24), (2, 24, 24)]"
SALIENCY = {
    f"tuple(foveate.saliency(net, x, {name!r}).shape)": "(2, 24, 24)"
    for name in ("cam", "grad_cam", "grad_cam_pp", "hires_cam", "layer_cam", "eigen_cam", "score_cam")
}
CORE = {
    EXPLAIN: EXPLAINED,
    "tuple(foveate.Capture(net, x).activations().shape)": "(2, 8, 22, 22)",
    **SALIENCY,
    MEASURE: "2",
    "foveate.load('foveate:small_cnn', num_classes=3).preprocess.crop": "(96, 96)",
    "foveate.cam_loss.__name__": "cam_loss",
}
# For each extra that is missing: what still works, and what it says where it does not.
CASES: dict[str, dict[str, str]] = {
    "cli": {
        EXPLAIN: EXPLAINED,
        "command('--version')": "2: foveate: " + sentence("the command foveate", "typer", "cli"),
        "len(foveate.evaluate(net, (x, torch.tensor([0, 1])), 'grad_cam', ['AD']))": "1",
    },
    "evaluate": {
        EXPLAIN: EXPLAINED,
        MEASURE: "2",
        EVALUATE: sentence("evaluate", "pandas", "evaluate"),
        "foveate.measure(net, (x, torch.tensor([0, 1])), 'grad_cam', ['AD']).frame()": sentence(
            "a table of every value", "pandas", "evaluate"
        ),
        "command('evaluate', 'scenes', '--model', 'foveate:small_cnn')": "2: foveate: "
        + sentence("evaluate", "pandas", "evaluate"),
        "command('compare', 'a', 'b')": "2: foveate: " + sentence("compare", "pandas", "evaluate"),
        "command('list', 'methods')": "0: ",
    },
    "train": {
        EXPLAIN: EXPLAINED,
        "foveate.training.train.train": sentence("train", "lightning", "train"),
        "foveate.torchmetrics.SaliencyMetrics": sentence("foveate.torchmetrics", "torchmetrics", "train"),
        "command('train', 'scenes_plain')": "2: foveate: " + sentence("train", "lightning", "train"),
        "command('demo')": "2: foveate: " + sentence("demo", "lightning", "train"),
        "command('list', 'recipes')": "0: ",
    },
    "models": {
        EXPLAIN: EXPLAINED,
        "foveate.load('timm:resnet18')": sentence("the model 'timm:resnet18'", "timm", "models"),
        "foveate.load('torchvision:resnet18')": sentence("the model 'torchvision:resnet18'", "torchvision", "models"),
        "command('list', 'models')": "2: foveate: " + sentence("list models", "torchvision", "models"),
        "foveate.training.train.train.__name__": "train",
        "foveate.torchmetrics.SaliencyMetrics.__name__": "SaliencyMetrics",
    },
    "report": {
        EXPLAIN: EXPLAINED,
        "len(foveate.evaluate(net, (x, torch.tensor([0, 1])), 'grad_cam', ['AD']))": "1",
        "foveate.explain(net, x).figure()": sentence("a map in colours", "matplotlib", "report"),
        "foveate.report.page.filled('x', {})": sentence("a page", "jinja2", "report"),
        "command('explain', 'a.jpg', '--model', 'foveate:small_cnn')": "2: foveate: "
        + sentence("explain", "matplotlib", "report"),
    },
    "captum grad-cam": {
        "foveate.saliency(net, x, 'captum.Lime')": sentence("'captum.Lime'", "captum", "captum"),
        "foveate.saliency(net, x, 'pytorch_grad_cam.GradCAM')": sentence(
            "'pytorch_grad_cam.GradCAM'", "pytorch_grad_cam", "grad-cam"
        ),
    },
}


@pytest.mark.parametrize("extra", CASES)
def test_without_one_extra(extra: str, tmp_path: Path) -> None:
    assert tried([package for name in extra.split() for package in EXTRAS[name]], list(CASES[extra]), tmp_path) == list(
        CASES[extra].values()
    )


def test_the_hard_dependencies_are_enough_to_explain(tmp_path: Path) -> None:
    missing = [package for packages in EXTRAS.values() for package in packages]
    assert tried(missing, list(CORE), tmp_path) == list(CORE.values())


def test_every_extra_is_declared_with_its_libraries() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        extra: {re.split("[<>=~! \\[]", line)[0].lower() for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    for extra, packages in EXTRAS.items():
        assert {DISTRIBUTIONS.get(package, package) for package in packages} == declared[extra], extra
    assert project["optional-dependencies"]["all"] == [f"foveate[{','.join(ALL)}]"]
