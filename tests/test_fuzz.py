"""Anything on the command line and in a recipe ends in an answer or in a sentence: no traceback, no hang."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from foveate import cli
from foveate.cli import options
from foveate.data.folder import read_labels
from foveate.disk.text import parse_yaml
from foveate.errors import FoveateError
from foveate.training.recipe import Recipe, read_recipe

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="hangs are ended by an alarm")]
LIMIT = 60  # seconds of one case, far above what any takes
HEALTH: Any = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}

ODD = st.sampled_from(
    [
        *("", " ", ",", ",,", "=", ".", "..", "/", "~", "@x", "{flip: true", "[1, 2", "]", "null", "none", "true", "no", "nan"),
        *(
            ".nan",
            "-.inf",
            "1e999",
            "-1",
            "0",
            "0.5",
            "9" * 5000,
            "4294967296",
            "[" * 3000,
            "&a [*a]",
            "*a",
            "!!int x",
            "2020-13-1",
        ),
        *(
            "a=b",
            "a.b=c",
            "all",
            "all,all",
            "label",
            "pred",
            "second",
            "../..",
            "x\ny",
            "\t",
            "é",
            "\udcff",
            "\u2028",
            "[red]",
            "%s",
        ),
        *(
            "meta",
            "cuda:9",
            "timm:",
            ":",
            "file.py:",
            "foveate:small_cnn",
            "-",
            "--",
            "{}",
            "[]",
            "a: 1",
            "x" * 300,
            "0x" + "f" * 5000,
        ),
    ]
)
TEXT = ODD | st.text(max_size=12).filter(lambda text: "\0" not in text)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
COUNTED: Counter[str] = Counter()


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    def hangs(*rest: object) -> None:
        raise AssertionError(f"it takes more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two photographs, which every case finds as it was; nothing is caught but what has its sentence."""
    folder, before = tmp_path_factory.mktemp("home"), Path.cwd()
    rng = np.random.default_rng(0)
    for number, name in enumerate(("leopard", "orca")):
        (folder / "data" / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / "data" / name / f"{number}.png")
    os.chdir(folder)
    options.NET = False
    yield folder
    options.NET = True
    os.chdir(before)
    print(f"\ncases: {dict(COUNTED)}")


def call(words: list[str]) -> None:
    """Run the command line in this process; the folder is then as it was."""
    kept = set(Path().iterdir())
    with alarm():
        done = CliRunner().invoke(cli.app, words)
    for path in set(Path().iterdir()) - kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    COUNTED[f"{words[0]} exits with {done.exit_code}"] += 1
    assert done.exception is None or isinstance(done.exception, SystemExit), (words, repr(done.exception))
    assert done.exit_code in (0, 1, 2), (words, done.exit_code)
    assert "Traceback" not in done.stderr + done.stdout
    if done.exit_code == 2:
        assert done.stderr.strip(), words


def calls(start: list[str], named: dict[str, Any], flags: tuple[str, ...] = ()) -> Any:
    """Words of a command: a few of its options with odd values or likely ones, in any order, some of them twice."""
    pairs = [st.tuples(st.just(name), TEXT if likely is None else TEXT | likely) for name, likely in named.items()]
    one = st.one_of(*pairs).map(list) | st.sampled_from([[flag] for flag in flags] or [[]])
    return st.lists(one, min_size=1, max_size=3).map(lambda many: [*start, *(word for pair in many for word in pair)])


MODEL: dict[str, Any] = {
    "--layer": st.sampled_from(["auto", "0", "features", "1,2"]),
    "--device": st.sampled_from(["cpu", "auto"]),
    "--size": st.integers(-1, 10**12).map(str),
    "--num-classes": st.integers(-3, 3).map(str),
    "--mean": st.sampled_from(["0.5", "nan", "1,2,3"]),
    "--std": st.sampled_from(["0", "-1", "inf", "0.5,0.5,0.5"]),
    "--classes": st.sampled_from([".", "/dev/null"]),
    "--encoding": st.sampled_from(["latin-1", "utf-16", "hex", "undefined"]),
    "--weights": None,
    "--head": st.sampled_from(["softmax", "binary", "multilabel"]),
    "--precision": st.sampled_from(["fp32", "bf16"]),
    "--set": st.sampled_from(["grad_cam.x=1", "opti_cam.steps=[", "rise.masks=.nan", "occlusion.size=-1", "random.seed=true"]),
}
SMALL = ["--model", "foveate:small_cnn"]


@settings(max_examples=450, **HEALTH)
@given(
    calls(
        ["explain", "data/orca/1.png", *SMALL, "--pictures", "none", "--method", "random"],
        {
            **MODEL,
            "--target": st.integers(-3, 3).map(str),
            "--against": None,
            "--fuse": None,
            "--method": None,
            "--pictures": None,
        },
        ("--errors", "--json", "--pretrained"),
    )
)
def test_explain(words: list[str]) -> None:
    call(words)


@settings(max_examples=350, **HEALTH)
@given(
    calls(
        ["evaluate", "data", *SMALL, "--limit", "1", "--methods", "random", "--metrics", "AD"],
        {
            **MODEL,
            "--methods": st.sampled_from(["centre,random", "controls", "random,,random"]),
            "--metrics": st.sampled_from(["AD,AD", "sparsity"]),
            **dict.fromkeys(("--target", "--protocol", "--baseline", "--limit", "--batch-size", "--devices")),
            "--model": st.sampled_from(["data", "foveate:small_cnn", "timm:resnet", "x.py:y", "ca_stream:foveate:small_cnn"]),
        },
        ("--resume", "--strict", "--json", "--no-controls"),
    )
)
def test_evaluate(words: list[str]) -> None:
    call(words)


@settings(max_examples=150, **HEALTH)
@given(
    st.lists(TEXT, max_size=3).map(lambda words: ["compare", *words])
    | st.lists(TEXT, max_size=2).map(lambda words: ["list", *words])
    | calls(
        ["compare", "data", "data"],
        {"--out": None, "--fail-under": st.sampled_from(["AG=-2", "AG=nan", "a.b.c=1"])},
        ("--json",),
    )
    | calls(["confidence", "data", *SMALL, "--limit", "0"], {"--name": None, "--unit": None, "--eta": None, "--out": None})
    | st.tuples(st.sampled_from(["explain", "evaluate", "train", "confidence"]), TEXT, TEXT).map(
        lambda three: [three[0], three[1], *(["--set", three[2]] if three[0] == "train" else ["--model", three[2]])]
    )
)
def test_every_command(words: list[str]) -> None:
    if words[0] == "train" and words[1] in ("data", "--"):
        return
    call(words)


KEYS = st.sampled_from(sorted(Recipe.model_fields))
PLACES = (
    KEYS
    | st.sampled_from(["augment.flip", "losses.0.weight", "losses.0.settings.form", "data.fold", "measure.x", "a.b", "."])
    | TEXT
)


@settings(max_examples=450, **HEALTH)
@given(st.dictionaries(KEYS | TEXT, VALUE, max_size=4), st.dictionaries(PLACES, VALUE, max_size=2), st.booleans())
def test_a_recipe(content: dict[str, Any], changes: dict[str, Any], small: bool) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump(content, allow_unicode=False), encoding="utf-8", errors="surrogatepass")
    with alarm():
        try:
            read_recipe("recipe.yaml", changes, small=small)
            COUNTED["recipes taken"] += 1
        except FoveateError:
            COUNTED["recipes refused"] += 1


@settings(max_examples=450, **HEALTH)
@given(st.text(max_size=60) | st.text("{}[]:,&*!|>-?#\n a1.0'\"%@`~", max_size=60) | ODD)
def test_yaml_of_any_text(text: str) -> None:
    with alarm(), contextlib.suppress(FoveateError):
        parse_yaml(text, "it")
    COUNTED["texts as YAML"] += 1


@settings(max_examples=450, **HEALTH)
@given(
    st.binary(max_size=80)
    | st.text(",;\t\"'\r\n 01.\\/é\ufeff\0", max_size=80).map(lambda text: ("file,class_index,boxes_xyxy\n" + text).encode())
    | st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=4).map(
        lambda rows: "\n".join(["file;name;boxes_xyxy", *(";".join(row) for row in rows)]).encode("utf-8", "surrogateescape")
    ),
    st.none() | st.sampled_from(["latin-1", "cp1252", "utf-16", "utf-7", "idna", "x"]),
)
def test_a_table_of_any_bytes(content: bytes, encoding: str | None) -> None:
    path = Path("labels.csv")
    path.write_bytes(content)
    try:
        with alarm(), contextlib.suppress(FoveateError):
            read_labels(path, encoding)
    finally:
        path.unlink()
    COUNTED["tables"] += 1
