"""What a user owns: files replaced as a whole, runs that are killed or meet a full disk, and folders that hold other things."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from foveate import Batch, FoveateError
from foveate.cli import app
from foveate.data import scenes
from foveate.disk import files
from foveate.disk.written import write_picture
from foveate.errors import WriteError
from foveate.evaluation.confidence_study import study
from foveate.models.small import small_cnn
from foveate.models.weights import read_weights
from foveate.training import checkpoints
from foveate.training import saved as trained
from foveate.training.features import MARKER, FeatureCache
from foveate.training.film import Film
from foveate.training.recipe import Recipe, read_recipe
from foveate.training.train import train


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COUNTS", {split: {"leopard": 6, "orca": 4} for split in scenes.SPLITS})


def tiny(**changes: object) -> Recipe:
    small = {"size": 32, "epochs": 2, "batch_size": 8, "measure.images": 0, "film.images": 2}
    return read_recipe("scenes_plain", {**small, **changes})


def full(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class TestReplacing:
    def test_a_failure_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a.txt", "b.safetensors", "c.ckpt"):
            (tmp_path / name).write_text("before")
        before = state(tmp_path)
        with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "a.txt") as waiting:
            waiting.write_text(f"half {1 / 0}")
        monkeypatch.setattr(os, "fsync", full)
        for write, name in (
            (files.write_text, "a.txt"),
            (files.write_tensors, "b.safetensors"),
            (files.write_checkpoint, "c.ckpt"),
        ):
            content: Any = "now" if write is files.write_text else {"a": torch.ones(2)}
            with pytest.raises(WriteError, match=f"{name}' cannot be written: no space left on device"):
                write(tmp_path / name, content)
        assert state(tmp_path) == before

    def test_links_permissions_and_long_names(self, tmp_path: Path) -> None:
        (tmp_path / "target").write_text("before")
        (tmp_path / "target").chmod(0o600)
        (tmp_path / "link").symlink_to("target")
        files.write_text(tmp_path / "link", "now")
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == "now"
        assert (tmp_path / "target").stat().st_mode & 0o777 == 0o600
        files.write_text(tmp_path / ("ü" * 127), "a name of 254 bytes")
        assert len(list(tmp_path.iterdir())) == 3

    def test_waiting_files_of_killed_runs_alone_are_cleared(self, tmp_path: Path) -> None:
        code = "import os, sys; from foveate.disk import files\nwith files.replacing(sys.argv[1]) as f:\n"
        code += "    f.write_text('half')\n    os._exit(9)"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=False, timeout=100)
        (tmp_path / ".mine").write_text("")
        assert len(list(tmp_path.iterdir())) == 2
        files.clear_waiting(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".mine"]


class TestLock:
    def test_a_lock_of_somebody_else_stays(self, tmp_path: Path) -> None:
        (tmp_path / ".lock").write_text("mine")
        with files.locked(tmp_path), pytest.raises(FoveateError, match="another process is writing"), files.locked(tmp_path):
            pass
        with files.locked(tmp_path / "made" / "for it"):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
    def test_a_process_that_was_forked_does_not_hold_it(self, tmp_path: Path) -> None:
        """As one that reads images: after a kill it would hold the folder until it sees that its parent is gone."""
        code = """
import os, sys, time
from foveate.disk import files
with files.locked(sys.argv[1]):
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    os.kill(os.getpid(), 9)
"""
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], start_new_session=True)
        try:
            assert child.wait(timeout=100) == -signal.SIGKILL
            with files.locked(tmp_path):
                pass
        finally:
            os.killpg(child.pid, signal.SIGKILL)

    def test_a_second_run_in_a_folder_is_refused(self, few_images: None, tmp_path: Path) -> None:
        with files.locked(tmp_path), pytest.raises(FoveateError, match="another process is writing to"):
            train(tiny(), tmp_path)
        call = ("--out", str(tmp_path))
        with files.locked(tmp_path):
            for command in (("demo",), ("confidence", "scenes", "--model", "foveate:small_cnn", "--limit", "1")):
                result = CliRunner().invoke(app, [*command, *call])
                assert result.exit_code == 2
                assert "another process is writing to" in result.stderr

    def test_the_other_processes_of_a_run_are_not_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOCAL_RANK", "1")
        with files.locked(tmp_path), checkpoints.held(tmp_path):
            pass


class TestFeatureCache:
    def cache(self, folder: Path, weight: float) -> FeatureCache:
        model = nn.Conv2d(3, 3, 1)
        nn.init.constant_(model.weight, weight)
        nn.init.zeros_(model.bias)
        return FeatureCache(folder, lambda x: [x * 2], model)

    def test_nothing_else_in_the_folder_is_deleted(self, tmp_path: Path) -> None:
        (tmp_path / "my_photos" / "deep").mkdir(parents=True)
        (tmp_path / "my_photos" / "deep" / "a.jpg").write_text("a photo")
        (tmp_path / "notes.txt").write_text("notes")
        (tmp_path / ("ab" * 8)).mkdir()  # the name of a cache, but not marked as one
        (tmp_path / ("ab" * 8) / f"{'0' * 24}.safetensors").write_text("somebody's")
        elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
        elsewhere.mkdir()
        old = self.cache(elsewhere, 1)
        old(torch.rand(1, 3, 4, 4))
        (tmp_path / old.folder.name).symlink_to(old.folder)
        copy = tmp_path / "a copy"
        shutil.copytree(old.folder, copy)
        before, there = state(tmp_path), state(elsewhere)
        self.cache(tmp_path, 2)
        after = state(tmp_path)
        assert {name: after[name] for name in before} == before
        assert state(elsewhere) == there
        assert (tmp_path / old.folder.name).is_symlink()

    def test_its_own_files_go_and_foreign_ones_among_them_stay(self, tmp_path: Path) -> None:
        first = self.cache(tmp_path, 1)
        first(torch.rand(2, 3, 4, 4))
        second = self.cache(tmp_path, 2)
        assert not first.folder.exists()
        second(torch.rand(1, 3, 4, 4))
        (second.folder / "mine.txt").write_text("mine")
        (second.folder / f"{'0' * 24}.safetensors").symlink_to(second.folder / "mine.txt")
        self.cache(tmp_path, 3)
        assert {path.name for path in second.folder.iterdir()} == {"mine.txt", f"{'0' * 24}.safetensors", MARKER}

    def test_a_damaged_file_is_computed_again(self, tmp_path: Path) -> None:
        cache, x = self.cache(tmp_path, 1), torch.rand(2, 3, 4, 4)
        cache(x)
        path = next(cache.folder.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:20])
        torch.testing.assert_close(cache(x)[0], 2 * x)
        torch.testing.assert_close(self.cache(tmp_path, 1)(x)[0], 2 * x)


@pytest.mark.usefixtures("few_images")
class TestTrain:
    def test_a_full_disk_keeps_the_last_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the second epoch, at each file: one sentence, and --resume ends where an uninterrupted run does."""
        whole = train(tiny(), tmp_path / "whole")
        for name in ("film.npz", "last.ckpt", "model.safetensors", "run.json"):
            out = tmp_path / name
            seen, sync = [], os.fsync

            def fails(number: int, name: str = name, seen: list[str] = seen, sync: Any = sync) -> None:
                path = os.readlink(f"/proc/self/fd/{number}")
                seen.append(path)
                count = sum(f".{name}." in other for other in seen)
                if f".{name}." in path and count == (1 if name == "model.safetensors" else 2):
                    full()
                sync(number)

            monkeypatch.setattr(os, "fsync", fails)
            match = rf"{name}' cannot be written: no space left on device; the last finished epoch is kept in .*last.ckpt'"
            with pytest.raises(WriteError, match=match):
                train(tiny(), out)
            monkeypatch.setattr(os, "fsync", sync)
            resumed = train(tiny(), out, resume=True)
            for a, b in zip(whole.classifier.parameters(), resumed.classifier.parameters(), strict=True):
                assert torch.equal(a, b), name
            assert not list(out.rglob(f"*{files.WAITING}"))

    @pytest.mark.usefixtures("few_images")
    def test_a_finished_run_is_not_written_again(self, tmp_path: Path) -> None:
        words = ["train", "scenes_plain", "--set", "epochs=1", "--set", "measure.images=0", "--out", str(tmp_path / "run")]
        first = CliRunner().invoke(app, [*words, "--json"])
        assert first.exit_code == 0, first.output
        before = state(tmp_path)
        again = CliRunner().invoke(app, [*words, "--resume", "--json"])
        assert again.exit_code == 0, again.output
        assert "is finished: nothing is left to train" in again.stderr
        assert json.loads(again.stdout) == json.loads(first.stdout)
        assert state(tmp_path) == before
        other = CliRunner().invoke(app, [*words, "--resume", "--set", "seed=1"])
        assert other.exit_code == 2 and "was started with seed 0, and now it is 1" in other.stderr

    def test_a_kill_before_the_first_epoch(self, tmp_path: Path) -> None:
        """Nothing is lost with it: the same call starts anew, and so does --resume; another recipe is refused."""
        trained.begin(tmp_path, tiny().model_dump(mode="json"))
        (tmp_path / "film.npz").write_text("of the first epoch")
        with pytest.raises(FoveateError, match="was started with seed 0, and now it is 1"):
            train(tiny(seed=1), tmp_path, resume=True)
        with pytest.raises(FoveateError, match="it is not finished; --resume ends it"):
            trained.read(tmp_path)
        assert len(train(tiny(), tmp_path, resume=True).history) == 2
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "model.safetensors").unlink()
        trained.begin(tmp_path, tiny().model_dump(mode="json"))
        assert len(train(tiny(), tmp_path).history) == 2

    def test_overwriting_costs_nothing_until_there_is_something_else(self, tmp_path: Path) -> None:
        from lightning.pytorch.callbacks import Callback

        class Stop(Callback):
            def __init__(self, epoch: int) -> None:
                self.epoch = epoch

            def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
                if trainer.current_epoch == self.epoch:
                    raise RuntimeError("stopped")

        train(tiny(), tmp_path)
        before = state(tmp_path)
        wrong = Recipe(**{**tiny().model_dump(), "model": "timm:resnet5"})
        with pytest.raises(FoveateError, match="timm has no model"):
            train(wrong, tmp_path, overwrite=True)
        with pytest.raises(RuntimeError, match="stopped"):
            train(tiny(seed=1), tmp_path, overwrite=True, callbacks=[Stop(0)])
        assert state(tmp_path) == before
        with pytest.raises(RuntimeError, match="stopped"):
            train(tiny(seed=1), tmp_path, overwrite=True, callbacks=[Stop(1)])
        with pytest.raises(FoveateError, match="it is not finished; --resume ends it"):
            trained.read(tmp_path)  # not the outcome of one run and the curves of another
        train(tiny(seed=1), tmp_path, resume=True)
        assert trained.read(tmp_path).recipe["seed"] == 1

    def test_a_kill_while_overwriting_is_no_run_to_resume(self, tmp_path: Path) -> None:
        train(tiny(), tmp_path)
        (tmp_path / "checkpoints" / "overwriting").touch()
        with pytest.raises(FoveateError, match="was to be overwritten, and that was stopped in its first epoch"):
            train(tiny(), tmp_path, resume=True)
        train(tiny(), tmp_path, overwrite=True)
        assert len(train(tiny(), tmp_path, resume=True).history) == 2

    @pytest.mark.parametrize("name", ["recipe.yaml", "model.safetensors", "report.html", "film.npz", "run.json"])
    def test_files_that_no_run_wrote_are_not_replaced(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("{}" if name == "run.json" else "mine")
        before = state(tmp_path)
        with pytest.raises(FoveateError, match=f"holds a run already .{name}.: name another folder"):
            train(tiny(), tmp_path)
        assert state(tmp_path) == before

    def test_an_evaluation_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text('{"finished": true, "identity": {}}')
        with pytest.raises(FoveateError, match=r"run.json' is not of a training run: name another folder"):
            train(tiny(), tmp_path, overwrite=True)

    @pytest.mark.parametrize("damage", ["empty", "half", "text", "weights"])
    def test_a_damaged_checkpoint_is_a_sentence(self, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "checkpoints" / "last.ckpt"
        path.parent.mkdir()
        if damage == "weights":
            torch.save({"a": torch.ones(1)}, path)
        elif damage == "half":
            torch.save({"a": torch.ones(1000)}, path)
            path.write_bytes(path.read_bytes()[:1000])
        else:
            path.write_text("" if damage == "empty" else "not a checkpoint")
        call = ("train", "scenes_plain", "--resume", "--out", str(tmp_path))
        result = CliRunner().invoke(app, call)
        assert result.exit_code == 2
        assert "Aborted" not in result.output
        assert "put a copy in its place, or start the run again with --overwrite" in result.stderr

    def test_the_figures_of_a_logger_are_kept(self, tmp_path: Path) -> None:
        train(tiny(), tmp_path, loggers=["csv"])
        before = (tmp_path / "logs" / "metrics.csv").read_text()
        train(tiny(), tmp_path, loggers=["csv"], overwrite=True)
        assert (tmp_path / "logs" / "metrics.csv").read_text() == before
        assert (tmp_path / "logs" / "part_2" / "metrics.csv").is_file()

    def test_the_demo_replaces_its_own_runs_alone(self, tmp_path: Path) -> None:
        train(tiny(name="mine"), tmp_path / "plain")
        before = state(tmp_path)
        result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
        assert result.exit_code == 2
        assert "holds the run 'mine', which is not the demo's" in result.stderr
        assert state(tmp_path) == before


def test_a_film_is_replaced_as_a_whole_and_a_damaged_one_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film, path = Film(Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))), tmp_path / "film.npz"
    film.shoot(small_cnn(), 1)
    film.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    film.shoot(small_cnn(), 2)
    with pytest.raises(WriteError, match=r"film.npz' cannot be written: no space left"):
        film.save(path)
    assert path.read_bytes() == before
    generator = np.random.default_rng(0)
    for number in range(60):
        content = bytearray(before[: len(before) if number % 2 else generator.integers(len(before))])
        for place in generator.integers(0, max(1, len(content)), 8) if content else ():
            content[place] ^= 255
        path.write_bytes(content)
        with pytest.raises(FoveateError, match=r"film.npz' is not a film"):
            Film.load(path)


class TestConfidence:
    def call(self, out: Path, *more: str) -> Any:
        call = ["confidence", "scenes", "--model", "foveate:small_cnn", "--size", "32", "--batch-size", "2", "--out", str(out)]
        torch.manual_seed(0)  # the same weights each time
        return CliRunner().invoke(app, [*call, "--name", "one", *more])

    @pytest.mark.usefixtures("few_images")
    def test_a_line_that_was_cut_short_is_measured_anew(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """At any byte: never another value, also where half a number is a number."""
        torch.manual_seed(0)
        model = small_cnn().eval()
        data = [Batch(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]), id=(f"{i}a", f"{i}b")) for i in range(2)]
        file = tmp_path / "net.csv"
        whole, text = study(model, data, file, unit="image").drop(columns="seconds"), file.read_text()
        last = text.rstrip("\n").rfind("\n") + 1
        for cut in (0, 5, last, last + 1, last + 10, len(text) - 12, len(text) - 1):
            file.write_text(text[:cut])
            pd.testing.assert_frame_equal(
                study(model, data, file, unit="image").drop(columns="seconds"), whole, check_exact=False, rtol=1e-4
            )
        before = file.read_text()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"net.csv' cannot be written: no space left on device"):
            study(model, [*data, Batch(torch.rand(1, 3, 32, 32), torch.tensor([0]), id=("c",))], file, unit="image")
        assert file.read_text() == before

    @pytest.mark.parametrize("name", ["one.csv", "one.json", "confidence.png"])
    def test_files_of_somebody_else_are_not_touched(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_text("{}" if name == "one.json" else "id,price\n1,2\n")
        (tmp_path / "package.json").write_text("[1]")
        (tmp_path / "package.csv").write_text("a,b\n")
        before = state(tmp_path)
        result = self.call(tmp_path, "--limit", "1")
        assert result.exit_code == 2
        assert f"{name}' is" in result.stderr and "foveate confidence: give another" in result.stderr
        assert state(tmp_path) == before
        if name == "one.csv":
            (tmp_path / name).unlink()
            assert self.call(tmp_path, "--limit", "1").exit_code == 0
            assert self.call(tmp_path, "--limit", "1").exit_code == 0


def test_a_picture_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    from foveate.data.images import to_image

    image = to_image(torch.rand(3, 8, 8))
    image.save(tmp_path / "mine.png")
    before = state(tmp_path)
    with pytest.raises(FoveateError, match=r"mine.png' is there, and foveate did not write it"):
        write_picture(image, tmp_path / "mine.png")
    assert state(tmp_path) == before
    for _ in range(2):
        write_picture(image, tmp_path / "own.png")


# -- full disks and kills of whole processes -----------------------------------------------------------------------

COUNTS = "from foveate.data import scenes; scenes.COUNTS = {split: {'leopard': 6, 'orca': 4} for split in scenes.SPLITS}\n"
KILLS = (
    COUNTS
    + """
# Kills this process where a file is written, replaced or copied: the so-manieth time, before or in the middle of it.
import os, shutil, signal, sys
place, number = sys.argv[1], int(sys.argv[2])
sys.argv[1:3] = []
count = 0
def killing(function, half):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == number:
            half(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped
def halved(source, target, **_):
    content = open(source, "rb").read()
    open(target, "wb").write(content[: len(content) // 2])
if place == "flush":
    os.fsync = killing(os.fsync, lambda number: os.ftruncate(number, os.fstat(number).st_size // 2))
elif place == "replace":
    os.replace = killing(os.replace, lambda *args: None)
elif place == "replaced":
    os.replace = killing(os.replace, os.replace)
elif place == "copy":
    shutil.copyfile = killing(shutil.copyfile, halved)
from foveate.cli import main
main()
"""
)
RECIPE = "model: foveate:small_cnn\ndata: scenes\nsize: 32\nepochs: 5\nbatch_size: 8\nmeasure: {images: 0}\nfilm: {images: 2}\n"


def mounted(folder: Path, megabytes: int, call: str, *args: object) -> str:
    """What a function of this file prints that is called where a small file system is mounted, seen by its process alone."""
    if shutil.which("unshare") is None or os.getuid() != 0:
        pytest.skip("a file system can be mounted by root alone")
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs {folder}"
    if (tried := subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, text=True)).returncode:
        pytest.skip(f"no file system can be mounted here: {tried.stderr.strip()}")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_disk; test_disk.{call}(*sys.argv[1:])"
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", code, folder, *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def large_tensors(folder: str) -> None:
    """Writers that raise kinds of their own: safetensors and PyTorch, by header and by content."""
    place = Path(folder) / "x"
    for tensors in ({"a": torch.rand(2_000_000)}, {str(i): torch.rand(1000) for i in range(2000)}):
        for write in (files.write_tensors, files.write_checkpoint):
            with pytest.raises(WriteError, match=r"x' cannot be written: no space left on device"):
                write(place, tensors)
    assert not list(Path(folder).iterdir())


def filled_up(folder: str, recipe: str) -> None:
    """The disk fills up after an epoch; with room again, --resume goes on."""
    out, ballast = Path(folder) / "run", Path(folder) / "ballast"
    fill = """
import foveate.training.train
from lightning.pytorch.callbacks import Callback
class Fill(Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2:
            try:
                with open(%r, "wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
            except OSError:
                pass
before = foveate.training.train._trainer
foveate.training.train._trainer = lambda recipe, devices, loggers, callbacks, *rest: before(
    recipe, devices, loggers, [*callbacks, Fill()], *rest)
"""
    command = [sys.executable, "-c", COUNTS + fill % str(ballast) + "from foveate.cli import main\nmain()"]
    command += ["train", recipe, "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = " ".join(done.stderr.split())
    print("full:", done.returncode, said[-300:])
    assert ballast.stat().st_size > 0
    assert done.returncode == 2
    assert "cannot be written: no space left on device; the last finished epoch is kept in" in said
    assert checkpoints.read_checkpoint(out / "checkpoints" / "last.ckpt")["epoch"] == 1
    ballast.unlink()
    command[2] = COUNTS + "from foveate.cli import main\nmain()"
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(trained.read(out).history) == 5


def killed_again_and_again(folder: str, recipe: str, whole: str, kills: str) -> None:
    """SIGKILL at random times and in the middle of writing, each followed by --resume, with the temporary folder elsewhere."""
    out, generator, epochs, lost = Path(folder) / "run", random.Random(0), [0], 0
    last = out / "checkpoints" / "last.ckpt"
    call = ["train", recipe, "--out", str(out), "--json"]
    for number in range(int(kills)):
        kind = ("flush", "replace", "time", "replaced", "copy")[number % 5]
        begin = [sys.executable, "-c", KILLS, kind, str(generator.randint(1, 4))]
        process = subprocess.Popen([*begin, *call, *["--resume"] * (number > 0)], stderr=subprocess.PIPE, text=True, stdout=-3)
        if kind in ("time", "copy"):
            time.sleep(generator.uniform(3, 9))
            process.kill()
        _, said = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 0), said
        epoch = checkpoints.read_checkpoint(last)["epoch"] + 1 if last.exists() else 0
        lost += epoch < epochs[-1]
        epochs.append(epoch)
    command = [sys.executable, "-c", KILLS, "never", "0", *call, "--resume"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (read_weights(Path(place) / "model.safetensors") for place in (whole, out))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list(out.rglob(f"*{files.WAITING}"))
    assert not list(out.rglob(files.LOCK))
    print(f"{kills} kills, epochs on disk after each {epochs[1:]}, lost {lost}, weights equal")
    assert not lost


def test_a_disk_that_is_full_is_a_sentence(tmp_path: Path) -> None:
    mounted(tmp_path / "disk", 4, "large_tensors")


def test_a_disk_that_fills_up_while_training(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    mounted(tmp_path / "disk", 6, "filled_up", tmp_path / "recipe.yaml")


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_of_train_on_another_file_system_lose_nothing(tmp_path: Path, kills: int) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("epochs: 5", f"epochs: {kills}"))
    command = [
        sys.executable,
        "-c",
        KILLS,
        "never",
        "0",
        "train",
        tmp_path / "recipe.yaml",
        "--out",
        tmp_path / "whole",
        "--json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(mounted(tmp_path / "disk", 64, "killed_again_and_again", tmp_path / "recipe.yaml", tmp_path / "whole", kills))
