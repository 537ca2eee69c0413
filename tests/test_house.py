"""The house: what imports what, what is loaded when, and that the lists follow from the registry."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate.runtime import memory

SOURCE = Path(foveate.__file__).parent
# A room imports from lines above its own, and never from another room of its line.
FLOORS: list[set[str]] = [
    {"_version", "_lazy", "errors", "peers", "shown"},
    {"_torchvision", "batch", "disk", "precision"},
    {"targets", "maps", "missing"},
    {"records", "runtime"},
    {"registry", "data", "guided"},
    {"overlay", "models", "methods"},
    {"metrics", "losses", "explanation"},
    {"evaluation"},
    {"training", "testing", "torchmetrics"},
    {"film", "report"},
    {"cli"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if path.name not in ("__main__.py",) and path != SOURCE / "__init__.py"]


def named(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def imports(path: Path) -> set[str]:
    """The parts of foveate that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "foveate" else [f"foveate.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("foveate.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert part in FLOOR, f"{part} has no floor: put it into the list"
    for other in imports(path) - {part, *foveate.__all__}:
        assert other in FLOOR, f"{other} has no floor: put it into the list"
        assert FLOOR[other] < FLOOR[part], f"{part} imports {other}, which does not stand above it in the list"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_says_what_lives_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert len(text.splitlines()) <= 500, "too long: look for the second thing it does"


WRITERS = {
    "to_csv",
    "to_parquet",
    "to_json",
    "savez",
    "savez_compressed",
    "save_file",
    "savefig",
    "write_table",
    "dump",
    "save",
}
TAKERS = {"unlink", "rename", "rmdir", "rmtree", "removedirs", "renames", "symlink_to", "hardlink_to", "truncate"}
OF_MODULES = {"os.replace", "os.remove", "shutil.move", "shutil.copy", "shutil.copyfile", "shutil.copytree"}
OWN = {"film.save", "trained.save", "answer.save"}  # which keep to it themselves
ELSEWHERE = {"disk/files.py": "what all others use", "runtime/memory.py": "a switch of the kernel"}


def writes(text: str) -> list[str]:
    """The lines of a file's text that write, rename or delete without ``foveate.disk.files``."""
    tree, safe = ast.parse(text), set()
    for node in ast.walk(tree):
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.With):
            pairs = [(item.context_expr, item.optional_vars) for item in node.items if item.optional_vars is not None]
        elif isinstance(node, ast.Assign):
            pairs = [(node.value, target) for target in node.targets]
        for value, target in pairs:
            made = ast.unparse(value)
            if "replacing(" in made or "saving(" in made or made in ("io.BytesIO()", "io.StringIO()"):
                safe |= {name.id for name in ast.walk(target) if isinstance(name, ast.Name)}
    for node in ast.walk(tree):
        for item in node.items if isinstance(node, ast.With) else ():
            opened = ast.unparse(item.context_expr).partition(".open(")
            if opened[1] and opened[0] in safe and item.optional_vars is not None:
                safe.add(ast.unparse(item.optional_vars))
    found = []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(node.func)
        owner, _, last = name.rpartition(".")
        given = {argument.id for argument in node.args if isinstance(argument, ast.Name)}
        constants = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        mode = next((c for c in constants if isinstance(c, str) and c and set(c) <= set("rwaxbt+")), "r")
        bad = (
            (bool(owner) and last in TAKERS)
            or name in OF_MODULES
            or (bool(owner) and last == "replace" and len(node.args) == 1 and not node.keywords)  # of a path; text takes two
            or (last in WRITERS and bool(owner) and name not in OWN and not given & safe)
            or (last in ("write_text", "write_bytes", "touch") and owner not in ("", "files", *safe))
            or (last == "open" and set(mode) & set("wax+") and owner not in safe and not given & safe)
        )
        if bad:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", [path for path in FILES if named(path) not in ELSEWHERE], ids=named)
def test_files_are_written_and_deleted_in_one_place(path: Path) -> None:
    """Beside their target, then replaced, and nothing of the user's deleted: through ``foveate.disk.files``."""
    assert not writes(path.read_text(encoding="utf-8")), (
        "write through foveate.disk.files.replacing, delete through files.delete"
    )


@pytest.mark.parametrize(
    "line",
    [
        "Path(a).write_text(b)", "frame.to_csv(folder / 'x.csv')", "open(path, 'w')", "path.open('ab')", "path.open(mode='w')",
        "np.savez(path, a=a)", "torch.save(a, path)", "image.save(path)", "shutil.rmtree(folder)", "path.unlink()",
        "a.rename(b)", "os.replace(a, b)", "part.replace(path)", "figure.savefig(path)", "st.save_file(a, path)",
        "json.dump(a, file)", "with replacing(p) as q:\n    other.write_text('')",
    ],
)  # fmt: skip
def test_writing_elsewhere_is_seen(line: str) -> None:
    assert len(writes(line)) == 1
    assert not writes(
        "with files.replacing(p) as q, q.open('wb') as f:\n    np.savez(f, a=a)\n    x.to_csv(q)\nt.replace('a', 'b')"
    )


def test_public_names_are_explicit_sorted_and_there() -> None:
    assert sorted(foveate.__all__) == foveate.__all__
    for name in foveate.__all__:
        value = getattr(foveate, name)
        assert name.startswith("_") or value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'explode'"):
        _ = foveate.explode
    assert callable(foveate.evaluate)
    assert callable(foveate.explain)


def run(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("GLIBC_TUNABLES", *memory.ENVIRONMENT)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_foveate_loads_nothing_heavy() -> None:
    heavy = {
        "lightning",
        "pandas",
        "matplotlib",
        "timm",
        "torchvision",
        "jinja2",
        "pydantic",
        "typer",
        "rich",
        "pyarrow",
        "PIL",
    }
    assert run(f"import sys, foveate; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_torchvision_can_be_imported_beside_any_torch() -> None:
    """In a new process, twice, and timm after it; where torchvision's own operators load, nothing is declared."""
    code = """
from foveate._torchvision import timm, torchvision
first = torchvision()
assert torchvision() is first
print(timm().is_model("resnet18"), first.models.resnet18(weights=None).fc.out_features)
"""
    assert run(code) == "True 1000"


def test_other_errors_of_torchvision_are_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('something else')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from foveate._torchvision import torchvision
try:
    torchvision()
except RuntimeError as error:
    print(error)
"""
    assert run(code) == "something else"


def test_every_registered_thing_says_where_it_comes_from() -> None:
    from foveate.registry import LOSSES, METHODS, METRICS

    for register in (METHODS, METRICS, LOSSES):
        for name, record in register.all().items():
            assert record.paper, name
            assert record.title, name
            assert record.function.__doc__, name


def test_a_new_method_is_one_decorated_function() -> None:
    from foveate.registry import METHODS, method

    @method("activation_sum", title="Sum of activations", paper="none")
    def activation_sum(capture, layer, target):  # type: ignore[no-untyped-def]
        """The sum of all channels."""
        return capture.activations(layer).sum(1)

    try:
        from foveate.testing import check_method

        check_method("activation_sum")
        assert METHODS.get("Activation-Sum").function is activation_sum
        with pytest.raises(foveate.FoveateError, match="'grad_cam' is registered already"):
            method("grad_cam", title="x", paper="x")(activation_sum)

        def layer_cam(capture, layer, target):  # type: ignore[no-untyped-def]
            """Another function of that name."""

        with pytest.raises(foveate.FoveateError, match="'layer_cam' is registered already"):
            method("layer_cam", title="x", paper="x")(layer_cam)
    finally:
        METHODS._records.pop("activation_sum")


GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import os, resource, torch, foveate
os.environ.update({environment!r})
kept = {keep} and foveate.keep_memory()
layer = lambda: torch.ones(16 * 2**20).sum()  # 64 MB, freed at once
cleared = []
for _ in range(8):  # the first ones make the heap what it has to be
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layer()
    cleared.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(cleared), foveate.Capture(
    torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval(),
    torch.rand(1, 3, 224, 224), "0").chunk_size())
"""


@pytest.mark.skipif(not GLIBC, reason="glibc alone gives memory back and takes it again")
@pytest.mark.parametrize(
    ("keep", "environment", "cleared", "at_once"),
    [
        (False, {}, True, 4),
        (True, {}, False, 8),
        (True, {"MALLOC_TRIM_THRESHOLD_": "1000"}, True, 4),
        (True, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}, True, 4),
    ],
)
def test_kept_memory_is_not_cleared_again(keep: bool, environment: dict[str, str], cleared: bool, at_once: int) -> None:
    """Where it is kept, a layer like those before it meets no page to clear; a wish in the environment stands."""
    lines = run(FAULTS.format(keep=keep, environment=environment)).split()
    assert lines[0] == str(keep and not environment)
    assert (int(lines[1]) > 20) == cleared
    assert int(lines[2]) == at_once


def test_the_command_line_keeps_memory() -> None:
    code = "import sys; sys.argv = ['foveate', '--version']; from foveate import cli; from foveate.runtime import memory\n"
    assert run(code + "try: cli.main()\nexcept SystemExit: print(memory.kept())").split()[-1] == str(GLIBC)
    assert run("import foveate; from foveate.runtime import memory; print(memory.kept())").split() == ["False"]
