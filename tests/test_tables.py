"""What people bring: tables of any spreadsheet, names of any bytes, masks and boxes of any form, damaged files."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from foveate import cli, maps
from foveate.batch import Batch, as_share
from foveate.cli import options
from foveate.data.folder import labels_beside, open_folder, read_labels
from foveate.data.images import Preprocess, read
from foveate.disk.text import parse_yaml, read_lines
from foveate.errors import FoveateError, ImageError, TableWarning, printable
from foveate.training.recipe import read_recipe

PLAIN = Preprocess((16, 16), 16)
ROWS = "file,name,boxes_xyxy\nblé.png,Zoë,1 2 8 9;3 3 6 6\nb.png,Bär,\n"


def photo(path: Path, size: tuple[int, int] = (20, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    with path.open("wb") as file:  # by its bytes: a name need not be UTF-8
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(file, "PNG")
    return path


def table(folder: Path, content: str | bytes) -> Path:
    path = folder / "labels.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def excel(text: str, delimiter: str) -> str:
    """The rows as a spreadsheet writes them: cells with the delimiter in quotation marks."""
    cells = [line.split(",") for line in text.splitlines()]
    return "\r\n".join(delimiter.join(f'"{c}"' if delimiter in c else c for c in row) for row in cells) + "\r\n"


class TestTables:
    @pytest.mark.parametrize(
        ("content", "encoding", "said"),
        [
            (ROWS.encode(), None, None),
            (ROWS.encode("utf-8-sig"), None, None),
            (ROWS.encode("utf-16"), None, "the encoding utf-16"),
            (ROWS.encode("utf-32"), None, "the encoding utf-32"),
            (ROWS.encode("utf-16-le"), "utf-16-le", "the encoding utf-16-le"),
            (ROWS.encode("cp1252"), "cp1252", "the encoding cp1252"),
            (ROWS.encode("latin-1"), "latin-1", "the encoding latin-1"),
            (ROWS.encode(), "latin-1", "is UTF-8, and was read so"),
            (excel(ROWS, ";").encode("cp1252"), "cp1252", "cp1252 and semicolons"),
            (excel(ROWS, ";").encode("utf-8-sig"), None, "semicolons"),
            (excel(ROWS, "\t").encode("utf-16"), None, "utf-16 and tabs"),
            (b"sep=;\r\n" + excel(ROWS, ";").encode(), None, "semicolons"),
            (ROWS.replace("file,name,boxes", " File , NAME,Boxes").encode(), None, None),
            (ROWS.replace("\n", "\r").encode(), None, None),
            (ROWS.replace("\n", "\n\n,,\n").encode(), None, None),
        ],
    )
    def test_every_spreadsheet(self, tmp_path: Path, content: bytes, encoding: str | None, said: str | None) -> None:
        path = table(tmp_path, content)
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            entries, names = read_labels(path, encoding)
        assert names == ("Bär", "Zoë")
        assert [entry.path.name for entry in entries] == ["blé.png", "b.png"]
        assert [entry.label for entry in entries] == [1, 0]
        assert entries[0].boxes == ((1, 2, 8, 9), (3, 3, 6, 6)) and entries[1].boxes is None
        sentences = [str(note.message) for note in noted if note.category is TableWarning]
        assert len(sentences) == (said is not None)
        assert said is None or said in sentences[0]

    @pytest.mark.parametrize(
        ("content", "encoding", "match"),
        [
            ("file,name\na.png,Zoë\n".encode("latin-1"), None, r"line 2: the byte 0xEB is not utf-8: .*--encoding cp1252"),
            (b"file,name\na.png,x\nb.png,\x81\n", "cp1252", r"line 3: the byte 0x81 is not cp1252"),
            (b"file,name\na.png,x\n", "klingon", "encoding 'klingon' is unknown"),
            (b"file,name\na.png,x\n", "rot13", "encoding 'rot13' is unknown"),
            ("file,class_index,mask\na.png,1,m.png\nb.png\n", None, "line 3: it has 1 cells, and the header has 3: is it cut"),
            ("file,name\na.png,cat, big\n", None, "line 2: it has 3 cells, and the header has 2: put a cell"),
            ('file,name\na.png,"cat\nb.png,dog\n', None, "line 2: its quotation marks do not fit"),
            ("file,name\n" + 'a.png,"' + "x" * 200_000 + '"\n', None, "line 2: a cell has more than 131072 characters"),
            ('file,name\n"a\n.png",x\nb.png\n', None, "line 4: it has 1 cells"),
            ("file,name\na.png,\0\n", None, "line 2: a NUL byte"),
            ("file,name\n,x\n", None, "line 2: the file has no name"),
            ("file,name\na.png,\n", None, "line 2: the class has no name"),
            ("file,class_index\na.png,²\n", None, "line 2: class_index '²' is not a number"),
            ("file,class_index\na.png," + "9" * 5000 + "\n", None, "line 2: class_index '9{40}' is not a number"),
            ("file,class_index\na.png,-1\n", None, "line 2: class_index '-1' is not a number"),
            ("file,class_index\na.png,nan\n", None, "line 2: class_index 'nan' is not a number"),
            ("file,file,class_index\na.png,a.png,1\n", None, "the column 'file' stands there twice"),
            (
                "file,class_index\na.png,1\n./a.png,2\n",
                None,
                "line 3: './a.png' stands in line 2 too, with the class_index '1' inst",
            ),
            ("file,name\na.png,x\na.png,y\n", None, "line 3: 'a.png' stands in line 2 too, with the name 'x' instead of 'y'"),
            ("file,name,mask\na.png,x,m\na.png,x,n\n", None, "line 3: .* with the mask 'm' instead of 'n'"),
            ("file,name,boxes_xyxy\na.png,x,one two three four\n", None, "line 2: a box is 'x0 y0 x1 y1'"),
            ("file,name,boxes_xyxy\na.png,x,.1 .2 .5 .9\nb.png,x,0 0 1 1\n", None, "line 2: boxes are pixels .* multiply x"),
            ("", None, "needs a header"),
        ],
    )
    def test_a_malformed_line_is_named(self, tmp_path: Path, content: str | bytes, encoding: str | None, match: str) -> None:
        path = table(tmp_path, content)
        with pytest.raises(FoveateError, match=match) as caught:
            read_labels(path, encoding)
        assert str(path) in str(caught.value) or encoding in ("klingon", "rot13")

    def test_an_image_counts_once(self, tmp_path: Path) -> None:
        path = table(tmp_path, "file,class_index,boxes_xyxy\na.png,1,1 1 5 5\n./a.png,1,1 1 5 5\na.png,1.0,6 6 9 9\nb.png,0,\n")
        with pytest.warns(TableWarning, match=r"line 3, 4 repeat an image that is listed above; each image counts once"):
            entries, _ = read_labels(path)
        assert [(entry.path.name, entry.boxes) for entry in entries] == [
            ("a.png", ((1, 1, 5, 5), (6, 6, 9, 9))),
            ("b.png", None),
        ]

    def test_decimal_commas(self, tmp_path: Path) -> None:
        path = table(tmp_path, "file;class_index;boxes_xyxy\na.png;1;1,5 2,5 8,5 9,5\nb.png;1;1, 2, 8, 9\nc.png;0;1,2,8,9\n")
        with pytest.warns(TableWarning, match="semicolons"):
            entries, _ = read_labels(path)
        assert [entry.boxes for entry in entries] == [((1.5, 2.5, 8.5, 9.5),), ((1, 2, 8, 9),), ((1, 2, 8, 9),)]

    @pytest.mark.skipif(os.name == "nt", reason="its own paths")
    def test_paths_of_windows(self, tmp_path: Path) -> None:
        photo(tmp_path / "in" / "a.png")
        photo(tmp_path / "odd\\name.png")
        path = table(tmp_path, "file,class_index\nin\\a.png,1\nC:\\Users\\me\\in\\a.png,1\nodd\\name.png,0\nD:\\gone.png,0\n")
        with pytest.warns(TableWarning) as noted:
            entries, _ = read_labels(path)
        assert [str(entry.path.relative_to(tmp_path)) for entry in entries] == ["in/a.png", "odd\\name.png", "D:\\gone.png"]
        assert any("1 path(s) are of another machine" in str(note.message) for note in noted)

    def test_labels_beside_take_the_encoding(self, tmp_path: Path) -> None:
        table(tmp_path, "file,name\na.png,Zoë\n".encode("latin-1"))
        assert labels_beside([photo(tmp_path / "a.png")], "latin-1") == [["Zoë"]]

    def test_class_files(self, tmp_path: Path) -> None:
        for content in ("cat\r\nBär\u2028dog\r\n\r\n".encode("utf-8-sig"), "cat\nBär\u2028dog".encode("utf-16")):
            (tmp_path / "names.txt").write_bytes(content)
            assert read_lines(tmp_path / "names.txt") == ["cat", "Bär\u2028dog"]


class TestBoxes:
    @pytest.mark.parametrize(
        ("box", "match"),
        [
            ("9 1 2 8", "line 3: the box '9 1 2 8' is turned round"),
            ("1 8 9 8", "line 3: the box '1 8 9 8' is turned round"),
            ("nan 1 9 8", "line 3: the box 'nan 1 9 8' holds no numbers"),
            ("1 1 inf 8", "line 3: the box '1 1 inf 8' holds no numbers"),
            ("20 1 30 8", "line 3: the box '20 1 30 8' lies outside of the image of 20x20"),
            ("-9 1 0 8", "line 3: the box '-9 1 0 8' lies outside"),
            ("0.1 0.1 0.9 0.9", "line 3: the box '0.1 0.1 0.9 0.9' looks like shares"),
        ],
    )
    def test_one_that_cannot_be_leaves_its_image_out_by_file_and_line(self, tmp_path: Path, box: str, match: str) -> None:
        for name in "ab":
            photo(tmp_path / f"{name}.png")
        table(tmp_path, f"file,class_index,boxes_xyxy\na.png,0,1 1 25 9\nb.png,0,{box}\n")
        folder = open_folder(tmp_path, PLAIN)
        assert folder[0].boxes is not None
        with pytest.raises(ImageError, match=match) as caught:
            folder[1]
        assert caught.value.path == str(tmp_path / "b.png") and "labels.csv" in str(caught.value)

    def test_a_box_of_which_a_corner_is_left_is_no_share_of_the_image(self, tmp_path: Path) -> None:
        photo(tmp_path / "a.png", (40, 20))
        table(tmp_path, "file,class_index,boxes_xyxy\na.png,0,1 0 10.5 1\n")
        boxes = open_folder(tmp_path, PLAIN)[0].boxes
        assert boxes is not None and boxes[0].tolist() == [[0, 0, 0, 0]]


class TestNames:
    def test_printable(self) -> None:
        assert printable(os.fsdecode("Zoë/a.jpg".encode())) == "Zoë/a.jpg"
        assert printable(b"Zo\xeb/a.jpg".decode("utf-8", "surrogateescape")) == "Zo\\xeb/a.jpg"
        assert printable("Zo\udcc3\udcab") == "Zoë"  # as Python reads it where the system's encoding is ASCII
        assert printable("\ud800").encode("utf-8") == b"\\ud800"
        assert str(FoveateError("a\udcff")) == str(ImageError("a\udcff")) == "a\\xff"

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
    def test_a_name_that_is_not_utf8_is_measured_and_explained(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(options, "NET", False)
        data = tmp_path / "data"
        for name in (b"leopard/Zo\xeb.png", b"orca/\xff.png", b"orca/plain.png"):
            photo(data / os.fsdecode(name))
        (data / "orca" / os.fsdecode(b"broken\xfe.png")).write_bytes(b"no image")
        out = tmp_path / "out"
        call = ["evaluate", str(data), "-m", "foveate:small_cnn", "--methods", "random", "--metrics", "AD", "--no-controls"]
        torch.manual_seed(0)  # the network's weights are random
        done = CliRunner().invoke(cli.app, [*call, "-o", str(out), "--json"])
        assert done.exit_code == 1, done.output
        assert json.loads(done.stdout)["table"]["random"]["AD"]["n"] == 3
        assert "broken\\xfe.png" in done.stderr
        for page in out.rglob("*.*"):
            if page.suffix in (".html", ".md", ".json", ".csv"):
                page.read_text(encoding="utf-8")
        torch.manual_seed(0)
        again = CliRunner().invoke(cli.app, [*call, "-o", str(out), "--resume", "--json"])
        assert again.exit_code == 1, again.output

    @pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes there")
    def test_a_strict_terminal_stops_nothing(self, tmp_path: Path) -> None:
        image = photo(tmp_path / os.fsdecode(b"Zo\xeb\xe2\x82\xac.png"))
        for coding in ("utf-8:strict", "ascii:strict"):
            out = tmp_path / coding.partition(":")[0]
            code = "import sys\nfrom foveate import cli\nfrom foveate.cli import options\noptions.NET = False\ncli.main()"
            call = ["explain", str(image), "-m", "foveate:small_cnn", "--method", "random", "-o", str(out)]
            done = subprocess.run(
                [sys.executable, "-c", code, *call],
                capture_output=True,
                env={**os.environ, "PYTHONIOENCODING": coding, "LC_ALL": "C.UTF-8"},
                timeout=300,
            )
            assert done.returncode == 0, done.stderr.decode()
            assert b"Zo\\xeb" in done.stdout
            assert len(list(out.iterdir())) == 3  # the overlay, the panels and the page


@pytest.mark.skipif(os.name == "nt", reason="has no named pipes")
class TestPipes:
    """Nothing but a regular file is opened: a pipe would wait for ever, and these tests with it."""

    def test_images_and_masks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        os.mkfifo(tmp_path / "x.jpg")
        with socket.socket(socket.AF_UNIX) as server:
            monkeypatch.chdir(tmp_path)  # a socket's path is short
            server.bind("s.png")
            for name in ("x.jpg", "s.png"):
                with pytest.raises(ImageError, match=f"{name} is a pipe or a device, not a file"):
                    read(tmp_path / name)
        (tmp_path / "d.png").mkdir()
        with pytest.raises(ImageError, match="is a folder"):
            read(tmp_path / "d.png")
        photo(tmp_path / "a.png")
        table(tmp_path, "file,class_index,mask\na.png,0,x.jpg\nx.jpg,1,\n")
        folder = open_folder(tmp_path, PLAIN)
        for index, match in ((0, r"the mask of .*a.png cannot be read: .*x.jpg is a pipe"), (1, "x.jpg is a pipe")):
            with pytest.raises(ImageError, match=match):
                folder[index]

    def test_tables_settings_and_weights(self, tmp_path: Path) -> None:
        from foveate.models.weights import read_weights
        from foveate.training import saved as trained
        from foveate.training.film import Film

        os.mkfifo(tmp_path / "labels.csv")
        for reading in (
            lambda path: open_folder(tmp_path, PLAIN),
            read_recipe,
            read_lines,
            read_weights,
            Film.load,
        ):
            with pytest.raises(FoveateError):
                reading(tmp_path / "labels.csv")
        for name in ("run.json", "recipe.yaml", "history.csv"):
            os.mkfifo(tmp_path / name)
        with pytest.raises(FoveateError, match=r"run\.json is a pipe"):
            trained.read(tmp_path)


class TestMasks:
    x = torch.rand(2, 3, 8, 8)
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[0, 2:5, 3:6] = True

    @pytest.mark.parametrize(
        "form",
        [
            lambda m: m,
            lambda m: m.float(),
            lambda m: m.long(),
            lambda m: m.to(torch.uint8) * 255,
            lambda m: m.double() * 255,
            lambda m: m[:, None],
            lambda m: m[:, None].to(torch.uint8) * 255,
            lambda m: m.tolist(),
            lambda m: m.int().tolist(),
            lambda m: m.numpy(),
            lambda m: list(m),
            lambda m: [own.numpy() for own in m],
        ],
    )
    def test_every_unambiguous_form_is_one(self, form) -> None:  # type: ignore[no-untyped-def]
        mask = Batch(self.x, mask=form(self.inside)).mask
        assert mask is not None and mask.dtype == torch.bool and torch.equal(mask, self.inside)

    @pytest.mark.parametrize(
        ("mask", "match"),
        [
            (torch.full((2, 8, 8), 1.5), r"other values \(1.5\): compare it"),
            (torch.arange(128).reshape(2, 8, 8), r"other values \(0, 1, 2"),
            (-torch.ones(2, 8, 8), "other values"),
            (torch.ones(2, 8, 7), r"\[2, 8, 7\] do not fit images of shape \[2, 8, 8\]"),
            (torch.ones(2, 3, 8, 8), "do not fit"),
            (torch.ones(8, 8), "do not fit"),
            ([[1, 2], [3]], "cannot be read as an array"),
            ("mask.png", "cannot be read as an array"),
        ],
    )
    def test_others_are_refused(self, mask: object, match: str) -> None:
        with pytest.raises(FoveateError, match=match):
            Batch(self.x, mask=mask)  # type: ignore[arg-type]

    def test_shares_of_pixels_are_for_losses_alone(self) -> None:
        import foveate
        from foveate.models.small import small_cnn

        soft = torch.rand(2, 8, 8)
        batch = Batch(self.x, torch.tensor([0, 1]), soft)
        assert batch.mask is soft
        with pytest.raises(FoveateError, match="no edge to measure at: compare it first"):
            foveate.measure(small_cnn(2).eval(), [batch], "random", "mass_inside")

    def test_a_share_is_between_0_and_1(self) -> None:
        S = torch.rand(2, 8, 8)
        expected = maps.mass_inside(S, self.inside)
        assert float(expected[0]) > 0
        for mask in (self.inside.to(torch.uint8) * 255, self.inside[:, None].float() * 255, self.inside.float()):
            assert torch.equal(maps.mass_inside(S, mask), expected)
            assert torch.equal(as_share(mask).float(), self.inside.float())
        with pytest.raises(FoveateError, match="values from 0 to 1, or 0 and 255, and this one has some from 0 to 3"):
            maps.mass_inside(S, self.inside.long() * 3)

    def test_the_losses_take_the_same(self) -> None:
        from foveate.losses.contrastive import ablated_cross_entropy, divergence, sliced_wasserstein
        from foveate.losses.outside import mass_outside

        K = torch.randn(2, 3, 8, 8)
        others = torch.ones(2, 3, dtype=torch.bool)
        for loss in (
            lambda mask: mass_outside(K[:, 0], mask),
            lambda mask: ablated_cross_entropy(K, mask),
            lambda mask: divergence(K, mask, others),
            lambda mask: sliced_wasserstein(K, mask, others),
        ):
            expected = loss(self.inside.float())
            assert torch.equal(loss(self.inside.to(torch.uint8) * 255), expected)
            assert torch.equal(loss(self.inside), expected)
            with pytest.raises(FoveateError, match="a mask has values"):
                loss(self.inside.float() * 7)

    @pytest.mark.parametrize(
        "boxes",
        [
            [[[1, 2, 5, 6]], []],
            ([[1, 2, 5, 6]], None),
            [torch.tensor([[1.0, 2, 5, 6]]), torch.zeros(0, 4)],
            [np.array([[1, 2, 5, 6]]), np.zeros((0, 4))],
            [[1, 2, 5, 6], []],
        ],
    )
    def test_boxes_of_any_form(self, boxes: object) -> None:
        found = Batch(self.x, boxes=boxes).boxes  # type: ignore[arg-type]
        assert found is not None and [own.tolist() for own in found] == [[[1, 2, 5, 6]], []]

    @pytest.mark.parametrize(
        ("boxes", "match"),
        [
            ([[[0.1, 0.2, 0.5, 0.6]], []], "look like shares of it"),
            ([[[1, 2, 5, 6]]], r"for 1 image\(s\), and there are 2"),
            ([[[1, 2, 5]], []], r"of shape \[1, 3\] of image 0 are not \[n,4\]"),
        ],
    )
    def test_boxes_that_cannot_be(self, boxes: object, match: str) -> None:
        with pytest.raises(FoveateError, match=match):
            Batch(self.x, boxes=boxes)  # type: ignore[arg-type]

    def test_what_is_measured_is_the_same(self) -> None:
        import foveate
        from foveate.models.small import small_cnn

        model = small_cnn(2).eval()
        x, inside = torch.rand(2, 3, 48, 48), torch.zeros(2, 48, 48, dtype=torch.bool)
        inside[:, 10:30, 12:40] = True
        found = [
            foveate.measure(model, [Batch(x, torch.tensor([0, 1]), mask)], "random", ["mass_inside", "OM"])
            .frame()["value"]
            .tolist()
            for mask in (inside, inside.to(torch.uint8)[:, None] * 255)
        ]
        assert found[0] == found[1] and len(found[0]) == 4


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("{flip: true", "is not YAML: line 1"),
            ("@x", "is not YAML: line 1, column 1: while scanning for the next token"),
            ("[" * 3000, "is nested too deeply"),
            ("9" * 5000, "line 1: '99999.* is too large a number"),
            ("0x" + "f" * 5000, "is too large a number"),
            (".nan", "line 1: .nan is not a finite number"),
            ("[1, -.inf]", "-.inf is not a finite number"),
            ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands there twice"),
            ("&a [*a]", "the anchor holds itself"),
            (
                "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]),
                "more than 100000",
            ),
            ("2020-13-45", "is not YAML: month must be"),
            ("!!timestamp x", "is not YAML"),
            ("!!python/object:os.system x", "could not determine a constructor"),
            ("\x00", "is not YAML: "),
            ("0x_", "is too large a number"),
        ],
    )
    def test_yaml(self, text: str, match: str, tmp_path: Path) -> None:
        with pytest.raises(FoveateError, match=match):
            parse_yaml(text, "it")
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(FoveateError, match=r"r\.yaml"):
            read_recipe(tmp_path / "r.yaml")

    def test_yaml_that_is_fine(self) -> None:
        assert parse_yaml("a: &x {b: 1e-3, c: [1, 2.5]}\nd: {<<: *x, e: 0x10}", "it") == {
            "a": {"b": "1e-3", "c": [1, 2.5]},
            "d": {"b": "1e-3", "c": [1, 2.5], "e": 16},
        }
        assert parse_yaml("", "it") is None

    @pytest.mark.parametrize(
        ("key", "value", "match"),
        [
            ("seed", 2**32, "less than or equal to 4294967295"),
            ("seed", -1, "greater than or equal to 0"),
            ("seed", True, "a number is needed, and it is True"),
            ("seed", 0.5, "seed: "),
            ("epochs", True, "epochs: a number is needed, and it is True"),
            ("milestones", [float("nan")], "milestones.0: input should be a finite number"),
            ("milestones", [True], "milestones: a number is needed"),
            ("learning_rate", float("inf"), "learning_rate: input should be a finite number"),
            ("learning_rate", "1e999", "learning_rate: input should be a finite number"),
            ("augment.rotation", float("nan"), "augment.rotation: "),
            ("augment", "@", "augment: "),
            ("milestones.0.x", 1, "has no place 'milestones.0.x'"),
            ("size", 10**9, "less than or equal to 16384"),
            ("data", {"train": "x", "fold": True}, "a number is needed"),
        ],
    )
    def test_recipes(self, key: str, value: object, match: str) -> None:
        content = {"milestones": [0.3]} if key == "milestones.0.x" else {}
        with pytest.raises(FoveateError, match=match):
            read_recipe("scenes_plain", {**content, key: value})

    def test_seeds_of_32_bits_and_ca_streams_are_fine(self) -> None:
        assert read_recipe("scenes_plain", {"seed": 2**32 - 1}).seed == 2**32 - 1
        assert read_recipe("scenes_plain", {"ca_stream": True, "augment.flip": True}).ca_stream is True

    @pytest.mark.parametrize(
        ("call", "match"),
        [
            ("evaluate scenes -m foveate:small_cnn --metrics", "--metrics '' names nothing"),
            ("evaluate scenes -m foveate:small_cnn --methods", "--methods '' names nothing"),
            ("evaluate scenes -m foveate:small_cnn --layer", "--layer '' names nothing"),
            ("evaluate scenes -m foveate:small_cnn --out", "--out '' names nothing"),
            ("evaluate scenes -m", "--model '' names nothing"),
            ("evaluate scenes -m foveate:small_cnn --set", "--set '' is not METHOD.SETTING=VALUE"),
            ("evaluate scenes -m foveate:small_cnn --classes", "--classes '' names nothing"),
            ("evaluate scenes -m foveate:small_cnn --weights", "--weights '' names nothing"),
            ("evaluate scenes --device meta -m foveate:small_cnn --layer=auto --set=grad_cam.x={", "is not YAML"),
            ("evaluate -m foveate:small_cnn", "DATA '' names nothing"),
            ("explain -m foveate:small_cnn", "IMAGE '' names nothing"),
            ("explain x -m foveate:small_cnn --target", "--target '' names nothing"),
            ("train scenes_plain --out", "--out '' names nothing"),
            ("train scenes_plain --set", "--set '' is not of the form"),
            ("train scenes_plain --data", "--data '' names nothing"),
            ("train scenes_plain --set=augment={flip:", "is not YAML"),
        ],
    )
    def test_what_is_empty_is_refused(self, call: str, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(options, "NET", False)
        words = call.split()
        done = CliRunner().invoke(cli.app, words if "YAML" in match else [*words, ""])
        assert done.exit_code == 2, done.output
        assert match in done.stderr
        assert not list(tmp_path.iterdir())

    def test_a_device_that_computes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(options, "NET", False)
        for device in ("meta", "cuda:-3", "xla", "cpu:99999999999999999999", "@"):
            call = ["explain", "x.png", "-m", "foveate:small_cnn", "--device", device, "-o", str(tmp_path)]
            done = CliRunner().invoke(cli.app, call)
            assert done.exit_code == 2, done.output
            assert f"--device '{device}' cannot be used here" in done.stderr

    def test_what_nobody_thought_of_is_a_sentence_and_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fault(kind: str) -> None:
            raise ZeroDivisionError("of all things")

        monkeypatch.setattr("foveate.cli.listing._listing", fault)
        done = CliRunner().invoke(cli.app, ["list", "methods"])
        assert done.exit_code == 2 and "ZeroDivisionError: of all things: foveate did not expect this" in done.stderr
        assert isinstance(CliRunner().invoke(cli.app, ["list", "methods", "--debug"]).exception, ZeroDivisionError)
        monkeypatch.setattr(options, "NET", False)
        assert isinstance(CliRunner().invoke(cli.app, ["list", "methods"]).exception, ZeroDivisionError)
