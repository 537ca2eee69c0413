"""What a table is about: rows that belong to their run and their images, damage that is seen, files of others let be."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate import FoveateError
from foveate.cli import app
from foveate.data.folder import open_folder
from foveate.data.images import Preprocess
from foveate.evaluation import identity, runs
from foveate.evaluation.compare import compare
from foveate.evaluation.evaluate import Plan
from foveate.evaluation.results import Origin, Results, origin_of, read, write

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 5, 4), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

def net():
    torch.manual_seed({seed})
    return Net().eval()
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Seven pictures with boxes in three batches, and two networks."""
    rng = np.random.default_rng(0)
    lines = ["file,class_index,boxes_xyxy"]
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{i % 3},{i} 4 {i + 20} 30")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    for name, seed in (("nets.py", 0), ("other.py", 1)):
        (tmp_path / name).write_text(NET.replace("{seed}", str(seed)))
    return tmp_path


def evaluate(place: Path, out: str = "out", *more: str, net: str = "nets.py") -> Any:
    call = ["evaluate", str(place), "--model", f"{place / net}:net", "--out", str(place / out), "--batch-size", "3"]
    call += ["--methods", "grad_cam,random", "--metrics", "AD,LE", "--size", "32"]
    return CliRunner().invoke(app, [*call, *more])


def values(folder: Path) -> pd.DataFrame:
    return runs.load(folder).frame()


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the batches that are measured."""
    plain, numbers = Plan.run, list[int]()
    monkeypatch.setattr(Plan, "run", lambda *a: numbers.append(a[3]) or plain(*a))  # type: ignore[func-returns-value]
    return numbers


class TestBits:
    def part(self) -> Results:
        rng = np.random.default_rng(0)
        names = ["a", "foveate.blake2b=" + "0" * 32, "c\udcff.png"]
        columns = {("m", "AD"): rng.normal(size=3), ("m", "I_curve"): rng.normal(size=(3, 29)).astype(np.float32)}
        return Results(names, columns, np.arange(3), np.arange(3), rng.random(3), failures=[("d.png", "cut off")])

    def test_none_changes_in_silence(self, tmp_path: Path) -> None:
        """Four hundred single bits, anywhere in the file: values, metadata, padding."""
        path = tmp_path / "000000.parquet"
        write(self.part(), path, Origin("run", (("a", "1", "2"),)))
        np.testing.assert_array_equal(read(path).values["m", "AD"], self.part().values["m", "AD"])
        assert read(path).ids == self.part().ids
        for bit in np.random.default_rng(1).choice(8 * path.stat().st_size, 400, replace=False).tolist():
            flip(path, bit)
            for look in (read, origin_of):
                with pytest.raises(FoveateError, match=r"damaged one: foveate evaluate \.\.\. --resume measures"):
                    look(path)
            flip(path, bit)
        read(path)

    def test_other_files_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "000000.parquet"
        pd.DataFrame({"id": ["a"], "value": [1.0]}).to_parquet(path)
        for content in (path.read_bytes(), b"", b"foveate.blake2b=", b"PAR1" * 20):
            path.write_bytes(content)
            with pytest.raises(FoveateError, match=r"000000\.parquet is not a file of results"):
                read(path)
        with pytest.raises(FoveateError, match=r"000001\.parquet cannot be read"):
            read(tmp_path / "000001.parquet")

    def test_others_can_read_it(self, tmp_path: Path) -> None:
        import pyarrow.parquet as pq

        write(self.part(), tmp_path / "000000.parquet")
        table = pq.read_table(tmp_path / "000000.parquet", page_checksum_verification=True)
        assert table.num_rows == 6

    def test_a_finished_run_with_a_damaged_file(self, place: Path, measured: list[int]) -> None:
        evaluate(place)
        before = values(place / "out")
        path = place / "out" / "rows" / "000001.parquet"
        flip(path, 8 * 400)
        for look in (runs.load, lambda out: compare([out, out])):
            with pytest.raises(FoveateError, match=re.escape(str(path))):
                look(place / "out")
        measured.clear()
        again = evaluate(place, "out", "--resume")
        assert again.exit_code == 0
        assert measured == [1]
        assert "1 of 3 batches are measured again: their files are damaged" in again.stderr
        assert "000001.parquet" in again.stderr
        pd.testing.assert_frame_equal(values(place / "out"), before)

    def test_a_finished_run_with_a_file_too_few_or_of_another(self, place: Path) -> None:
        evaluate(place)
        evaluate(place, "other", net="other.py")
        shutil.copy(place / "other" / "rows" / "000001.parquet", place / "out" / "rows")
        with pytest.raises(FoveateError, match=r"000001.parquet is of another run than the run.json beside it"):
            runs.load(place / "out")
        (place / "out" / "rows" / "000001.parquet").unlink()
        with pytest.raises(FoveateError, match=r"000001.parquet is missing: foveate evaluate ... --resume"):
            runs.load(place / "out")


class TestWithoutARecord:
    """``run.json`` is gone or damaged: rows are taken for what they are, not for where they lie."""

    @pytest.mark.parametrize("record", [None, "{", "[]", '{"seed": 1}', "\0", '{"identity": []}', "[" * 5000])
    def test_other_rows_are_not_adopted(self, place: Path, record: str | None, measured: list[int]) -> None:
        evaluate(place)
        evaluate(place, "fresh", net="other.py")
        path = place / "out" / "run.json"
        path.unlink() if record is None else path.write_text(record)
        refused = evaluate(place, net="other.py")
        assert refused.exit_code == 2
        assert "go on with --resume, which keeps what fits" in refused.stderr
        assert "take it away" not in refused.stderr
        kept = {path.name: path.read_bytes() for path in (place / "out" / "rows").iterdir()}
        measured.clear()
        result = evaluate(place, "out", "--resume", net="other.py")
        assert result.exit_code == 0, result.stderr
        assert measured == [0, 1, 2]
        assert "3 of 3 batches are measured again: their files are of another run" in result.stderr
        pd.testing.assert_frame_equal(values(place / "out"), values(place / "fresh"))
        aside = place / "out" / "previous-1"
        assert {path.name: path.read_bytes() for path in (aside / "rows").iterdir()} == kept
        assert (aside / "table.csv").exists()

    def test_own_rows_are_kept(self, place: Path, measured: list[int]) -> None:
        evaluate(place)
        before = values(place / "out")
        (place / "out" / "run.json").write_text("{")
        measured.clear()
        result = evaluate(place, "out", "--resume")
        assert result.exit_code == 0
        assert measured == []
        assert "results that fit this call are taken" in result.stderr
        pd.testing.assert_frame_equal(values(place / "out"), before)

    def test_rows_of_another_run_in_this_one(self, place: Path, measured: list[int]) -> None:
        evaluate(place)
        before = values(place / "out")
        evaluate(place, "other", net="other.py")
        shutil.copy(place / "other" / "rows" / "000002.parquet", place / "out" / "rows")
        shutil.copy(place / "out" / "rows" / "000000.parquet", place / "out" / "rows" / "000001.parquet")
        measured.clear()
        evaluate(place, "out", "--resume")
        assert measured == [1, 2]
        pd.testing.assert_frame_equal(values(place / "out"), before)


class TestFilesOfOthers:
    def test_they_are_never_touched(self, place: Path) -> None:
        rows = place / "out" / "rows"
        rows.mkdir(parents=True)
        mine = {"notes.parquet": b"mine", "00.parquet": b"too", ".hidden": b"hidden", "read me.txt": b"text"}
        for name, content in mine.items():
            (rows / name).write_bytes(content)
        for more in ((), ("--overwrite",), ("--resume",), ("--metrics", "AD", "--overwrite")):
            assert evaluate(place, "out", *more).exit_code == 0
            assert {name: (rows / name).read_bytes() for name in mine} == mine
        assert {path.name for path in (place / "out" / "previous-1" / "rows").iterdir()} == {
            f"{i:06d}.parquet" for i in range(3)
        }

    @pytest.mark.parametrize("name", ["rows/000000.parquet", "table.csv", "report.html", "run.json"])
    def test_they_are_not_replaced(self, place: Path, name: str) -> None:
        path = place / "out" / name
        path.parent.mkdir(parents=True)
        path.write_text('{"kind": "train"}')
        for more in ((),) if name.startswith("rows") else ((), ("--resume",)):
            result = evaluate(place, "out", *more)
            assert result.exit_code == 2, more
            assert "another --out" in result.stderr
            assert path.read_text() == '{"kind": "train"}'

    def test_rows_that_is_a_file(self, place: Path) -> None:
        (place / "out").mkdir()
        (place / "out" / "rows").write_text("mine")
        result = evaluate(place)
        assert result.exit_code == 2
        assert "rows is a file" in result.stderr


class TestImages:
    def test_turned_upside_down_under_the_same_names(self, place: Path, measured: list[int]) -> None:
        evaluate(place)
        for path in place.glob("*.png"):
            Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
        measured.clear()
        result = evaluate(place, "out", "--resume")
        assert result.exit_code == 0
        assert measured == [0, 1, 2]
        assert "3 of 3 batches are measured again: images have changed since (the first: 0.png)" in result.stderr
        evaluate(place, "fresh")
        pd.testing.assert_frame_equal(values(place / "out"), values(place / "fresh"))

    def test_one_of_them(self, place: Path, measured: list[int]) -> None:
        evaluate(place)
        shutil.copy(place / "1.png", place / "4.png")
        measured.clear()
        result = evaluate(place, "out", "--resume")
        assert measured == [1]
        assert "1 of 3 batches are measured again: images have changed since (the first: 4.png)" in result.stderr
        assert not (place / "out" / "previous-1").exists()

    def test_another_label_is_another_run(self, place: Path) -> None:
        evaluate(place)
        text = (place / "labels.csv").read_text()
        (place / "labels.csv").write_text(text.replace("5.png,2", "5.png,1"))
        result = evaluate(place, "out", "--resume")
        assert result.exit_code == 2
        assert "1 of 7 that were measured have another name, label or box, the first: 5.png" in result.stderr

    def test_two_files_of_one_name_are_two(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            Image.new("RGB", (16, 16), "red" if name == "a" else "blue").save(tmp_path / name / "x.png")
        data = open_folder(tmp_path, Preprocess((16, 16), None))
        names, listed = identity.listing(data)
        assert names == ["a/x.png", "b/x.png"]
        first, second = identity.contents(data, [0, 1])
        assert first != second
        assert len(set(listed)) == 2
        mask = tmp_path / "b" / "x.png"
        assert len(identity.contents(data, [1])[0].split()) == 1
        mask.unlink()
        assert identity.contents(data, [1]) == ["no file"]

    def test_one_comparison_says_where_images_differ(self, place: Path) -> None:
        evaluate(place, "one")
        shutil.copy(place / "1.png", place / "4.png")
        evaluate(place, "two")
        notes = compare([place / "one", place / "two"]).notes
        assert any("1 of 7 images that both have are other files under the same name, the first: 4.png" in n for n in notes)


def test_accuracy_is_always_printed(place: Path) -> None:
    printed = evaluate(place, "out", "--metrics", "AD")
    assert "the model's accuracy: " in printed.stdout
    document = json.loads(evaluate(place, "out", "--metrics", "AD", "--overwrite", "--json").stdout)
    results = runs.load(place / "out")
    right = 100 * float((results.labels == results.predicted).mean())
    assert document["accuracy"]["mean"] == pytest.approx(right)
    assert document["accuracy"]["n"] == 7
    assert document["accuracy"]["low"] <= right <= document["accuracy"]["high"]
    assert any(sentence.startswith(f"The model gets {right:.1f} % [") for sentence in document["findings"])
