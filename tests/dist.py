"""The wheel as a stranger has it: all files inside, in an empty environment, run outside of the repository.

    python tests/dist.py dist [--no-demo]

The dependencies come from the environment that runs this: the wheel is installed without them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def missing(wheel: Path, sdist: Path) -> list[str]:
    """The files of the package that an archive lacks."""
    source = ROOT / "src"
    wanted = {path.relative_to(source).as_posix() for path in (source / "foveate").rglob("*") if path.is_file()}
    wanted = {name for name in wanted if "__pycache__" not in name}
    with zipfile.ZipFile(wheel) as archive:
        lost = [f"{wheel.name}: {name}" for name in wanted - set(archive.namelist())]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return sorted(lost + [f"{sdist.name}: src/{name}" for name in wanted if f"src/{name}" not in names])


def run(command: list[str], folder: Path) -> str:
    """What a command prints, run in a folder without the paths of this repository; it may not fail."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    begun = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    said = done.stdout.strip()
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed ({done.returncode}):\n{said}\n{done.stderr}")
    print(f"{time.perf_counter() - begun:5.1f} s  {' '.join(command[:1] + command[1:5])[-70:]}", flush=True)
    return said


def main(folder: Path, demo: bool = True) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    if lost := missing(wheel, sdist):
        sys.exit("missing in the archives:\n" + "\n".join(lost))
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        venv.create(place / "env", with_pip=False, symlinks=True)
        python = place / "env" / "bin" / "python"
        packages = place / "env" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel.resolve())], place)
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # behind the wheel's own folder
        at = run([str(python), "-c", "import foveate; print(foveate.__file__)"], place)
        if not Path(at).is_relative_to(packages):
            sys.exit(f"the wheel is not what is imported, but {at}")
        command = str(python.parent / "foveate")
        version, methods = run([command, "--version"], place), run([command, "list", "methods"], place)
        if version.split()[-1] != wheel.name.split("-")[1] or "grad_cam" not in methods:
            sys.exit(f"{wheel.name} is of another version, or lists no methods: {version}")
        run([command, "list", "recipes"], place)
        if demo:
            run([command, "demo", "--out", "demo"], place)
            if not list((place / "demo").glob("*.html")):
                sys.exit("the demo has no page")


if __name__ == "__main__":
    main(Path(sys.argv[1]), demo="--no-demo" not in sys.argv)
