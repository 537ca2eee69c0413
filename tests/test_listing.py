"""What ``foveate list`` says: filters, settings, needs and cost; and where names of other libraries are."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import typer.main
from torch import nn
from typer.testing import CliRunner

from foveate import FoveateError, explain
from foveate.cli import app, completion
from foveate.cli.listing import passes
from foveate.peers import CAPTUM, GRAD_CAM, OURS, hint
from foveate.registry import METHODS, METRICS


def listed(*words: str) -> list[dict[str, object]]:
    result = CliRunner().invoke(app, ["list", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_words_filter() -> None:
    names = [line["name"] for line in listed("models", "vit", "384", "tiny")]
    assert "timm:vit_tiny_patch16_384" in names and all("384" in str(name) for name in names)
    assert {line["name"] for line in listed("methods", "gradcam")} >= {"grad_cam", "grad_cam_pp", "eigen_grad_cam"}
    assert [line["name"] for line in listed("methods", "RISE")] == ["rise"]
    result = CliRunner().invoke(app, ["list", "methods", "lime"])
    assert result.exit_code == 2 and "no method has 'lime' in it: captum.Lime" in result.stderr
    assert "'foveate list models' shows all" in CliRunner().invoke(app, ["list", "models", "vit", "xyz"]).stderr


def test_methods_and_metrics_show_their_settings_as_they_are() -> None:
    for kind, register in (("methods", METHODS), ("metrics", METRICS)):
        for line in listed(kind):
            record = register.get(str(line["name"]))
            parameters = inspect.signature(record.function).parameters
            settings = line["settings"]
            assert isinstance(settings, dict)
            for name, default in settings.items():
                given = parameters[name].default
                assert default == (list(given) if isinstance(given, tuple) else given)
    assert {line["name"]: line["settings"] for line in listed("methods", "rise")}["rise"]["masks"] == 4000  # type: ignore[index]


def test_the_passes_of_methods_are_those_that_they_take() -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 5),
    )
    model, x = nn.Sequential(*layers).eval(), torch.rand(2, 3, 24, 24)
    for record in METHODS.all().values():
        if (
            record.control
            or record.repeats
            or record.name == "full_grad"
            or {"linear_head", "attention", "stream"} & set(record.needs)
        ):
            continue
        done = explain(model, x, record.name).capture.passes
        forward, _, backward = passes(record).partition(" + ")
        assert (done.forward, done.backward) == (2 * int(forward), 2 * int(backward or 0)), record.name


def test_methods_that_run_often_say_how_often() -> None:
    assert all(passes(record) not in ("0", "1", "1 + 1") for record in METHODS.all().values() if record.repeats)


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("kind", ["methods", "metrics", "losses", "recipes"])
def test_nothing_is_cut_off(kind: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = CliRunner().invoke(app, ["list", kind]).stdout
    assert "…" not in shown and all(str(line["name"]) in shown for line in listed(kind))


@pytest.mark.parametrize("command", ["explain", "evaluate", "compare", "confidence", "train", "demo", "list"])
def test_help_is_readable_at_80_columns(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    shown = CliRunner().invoke(app, [command, "--help"]).stdout
    assert "…" not in shown and all(len(line) <= 80 for line in shown.splitlines())
    own = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    missing = [name for option in own for name in option.opts if name.startswith("--") and name not in shown]
    assert not missing


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("lime", "captum.Lime"), ("LIME", "captum.Lime"), ("shap", "captum.GradientShap"), ("SHAP", "captum.KernelShap")),
        *(("lrp", "captum.LRP"), ("deep_lift", "captum.DeepLift"), ("attention", "attention_rollout"), ("sidu", "rise")),
        *(("kpca_cam", "pytorch_grad_cam.KPCA_CAM"), ("smooth_grad_cam_pp", "grad_cam:smooth")),
    ],
)
def test_names_of_other_libraries_point_to_what_there_is(name: str, place: str) -> None:
    with pytest.raises(FoveateError, match=f"method '{name}' is unknown: .*{place}"):
        METHODS.get(name)
    assert METHODS.get("eigencam").name == "eigen_cam"


def test_what_they_point_to_is_there() -> None:
    pytest.importorskip("captum")
    pytest.importorskip("pytorch_grad_cam")
    for library, names in (("captum", CAPTUM), ("pytorch_grad_cam", GRAD_CAM)):
        for kind in set(names.values()):
            assert METHODS.get(f"{library}.{kind}").name == f"{library}.{kind}"
    assert all(not known.startswith(" ") and hint("method", known) for known in OURS["method"])
    for place in OURS["metric"].values():
        assert METRICS.known(place.split()[0]) is not None
    for place in OURS["method"].values():
        assert METHODS.known(place.split(",")[0].split()[0]) is not None


def test_names_are_completed() -> None:
    assert completion.methods("rise,grad_cam_") == ["rise,grad_cam_pp"] and "all-fast" in completion.methods("")
    assert completion.metrics("AD,a") and all(name.startswith("AD,") for name in completion.metrics("AD,a"))
    assert "timm:" in completion.models("") and completion.models("foveate:small") == ["foveate:small_cnn"]
    assert "timm:vit_tiny_patch16_224" in completion.models("timm:vit_tiny") and "scenes_plain" in completion.recipes(
        "scenes_p"
    )
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout
