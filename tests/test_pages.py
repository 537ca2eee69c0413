"""Pages as pages: read back by an HTML parser, and opened in a browser. Every page, from small runs, built once."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import html5lib
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import browser
import every_page
from foveate.cli import app
from foveate.evaluation import confidence_study as confidence
from foveate.evaluation.statistics import number
from foveate.registry import METHODS, METRICS, title_of
from pages import tables_of

NAMES = ("demo", "evaluation", "short", "comparison", "training", "trainings", "film", "confidence", "explained")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every page; built once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    return every_page.build(shared / "every_page")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser; continuous integration has one, and elsewhere these tests need one."""
    if browser.chromium() is None and "CI" not in os.environ:
        pytest.skip("no Chromium here: install it, or name one in the environment variable CHROMIUM")
    with browser.launched() as found:
        yield found


def parsed(path: Path) -> Any:
    """The tree of a page, by a parser that stops at the first fault of its HTML."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(path.read_text(encoding="utf-8"))


def text_of(element: Any) -> str:
    return " ".join("".join(element.itertext()).split())


@pytest.mark.parametrize("name", NAMES)
class TestEveryPage:
    def test_it_is_html_with_rectangular_tables(self, built: dict[str, Path], name: str) -> None:
        tree = parsed(built[name])
        assert tree.find(".").get("lang") == "en"
        assert (tree.findtext("head/title") or "").startswith("foveate: ")
        assert len(tree.findall(".//h1")) == 1
        tables = tables_of(built[name].read_text(encoding="utf-8"))
        assert all(len(table) > 1 for table in tables)
        assert all(heading for table in tables for heading in table[0]), "a column has no heading"

    def test_every_image_has_a_text(self, built: dict[str, Path], name: str) -> None:
        images = parsed(built[name]).findall(".//img")
        assert [image.get("src")[:60] for image in images if not (image.get("alt") or "").strip()] == []

    def test_nothing_is_loaded_from_elsewhere(self, built: dict[str, Path], name: str) -> None:
        page, tree = built[name].read_text(encoding="utf-8"), parsed(built[name])
        for element in tree.iter():
            for attribute in ("src", "href", "srcset", "action", "data", "poster"):
                value = element.get(attribute)
                if value is None or str(element.tag).endswith("}use") or element.tag == "use":
                    continue
                local = name == "explained" and element.tag == "a" and ":" not in value  # its pictures lie beside it
                assert value.startswith(("data:", "#")) or local, f"{element.tag} {attribute}={value[:80]}"
            assert not any(str(key).startswith("on") for key in element.attrib), f"{element.tag} has a handler"
        for style in tree.iter("style"):
            assert "@import" not in text_of(style)
        assert all(address.startswith(("#", "data:", "'#", '"#')) for address in re.findall(r"url\(([^)]*)\)", page))

    def test_hostile_names_are_text(self, built: dict[str, Path], name: str) -> None:
        tree = parsed(built[name])
        page = built[name].read_text(encoding="utf-8")
        assert "{{7*7}}" in page or name not in ("evaluation", "short", "explained")
        assert "{{ " not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
        for script in tree.iter("script"):
            assert not (script.text or "").strip().startswith("window.hostile")
        assert not [image for image in tree.iter("img") if image.get("src") == "x"]

    def test_no_column_has_a_name_that_only_its_author_knows(self, built: dict[str, Path], name: str) -> None:
        """A heading that is an abbreviation stands beside its title."""
        shorts = {
            short for record in METRICS.all().values() for short, column in record.columns.items() if short != column.name
        }
        for table in tables_of(built[name].read_text(encoding="utf-8")):
            for heading in table[0]:
                assert heading.rstrip(" ↑↓") not in shorts, f"{heading} is not spelled out"


@pytest.mark.parametrize("name", NAMES)
class TestInABrowser:
    @pytest.mark.parametrize("width", browser.WIDTHS.values(), ids=browser.WIDTHS)
    def test_nothing_overflows_or_fails(self, chromium: Any, built: dict[str, Path], name: str, width: int) -> None:
        assert browser.layout(chromium, built[name], width) == []

    @pytest.mark.parametrize("scheme", browser.SCHEMES)
    def test_axe_finds_nothing_serious(self, chromium: Any, built: dict[str, Path], name: str, scheme: str) -> None:
        assert browser.accessibility(chromium, built[name], scheme) == []

    def test_it_has_a_dark_side(self, chromium: Any, built: dict[str, Path], name: str) -> None:
        colours = []
        for scheme in browser.SCHEMES:
            with browser.opened(chromium, built[name], scheme=scheme) as (page, _):
                colours.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(245, 247, 248)", "rgb(14, 20, 25)"]


def test_the_checks_of_the_browser_find_faults(chromium: Any, tmp_path: Path) -> None:
    """A page with a fault of each kind; a check that finds nothing here would find nothing anywhere."""
    page = tmp_path / "faulty.html"
    page.write_text(
        "<!doctype html><html lang='en'><title>t</title><body>"
        "<p style='width:3000px'>wide</p><div style='overflow:hidden;width:20px;white-space:nowrap'>this is cut off</div>"
        "<svg width='100' height='40'><text x='90' y='20'>beyond the edge</text><text x='2' y='20'>one</text>"
        "<text x='4' y='20'>two</text></svg><img src='data:image/png;base64,AAAA' alt='broken'>"
        "<p style='color:#ccc'>pale</p><img src='http://127.0.0.1:9/x.png' alt='elsewhere'>"
        "<script>throw new Error('no')</script>"
    )
    found = "\n".join(browser.layout(chromium, page, 390))
    for fault in ("wider than the window", "is cut off by div", "cut off by its drawing", "lie on each other", "not shown"):
        assert fault in found
    assert "script: " in found and "request: http://127.0.0.1:9/x.png" in found
    assert "color-contrast" in "\n".join(browser.accessibility(chromium, page, "light"))


class TestValues:
    """Every number of a table is the one that the run's own files have for that row and that heading."""

    @pytest.mark.parametrize("name", ["evaluation", "short"])
    def test_of_an_evaluation(self, built: dict[str, Path], name: str) -> None:
        known = pd.read_csv(built[name].parent / "table.csv").set_index(["method", "column"])
        seen: set[tuple[str, str]] = set()
        for table in parsed(built[name]).findall(".//table[@class='methods']"):
            columns = [heading.get("data-column") for heading in table.findall("thead/tr/th")[1:]]
            assert [text_of(h).split(" ↑")[0].split(" ↓")[0] for h in table.findall("thead/tr/th")[1:]] == list(
                map(titled, columns)
            )
            for row in table.findall("tbody/tr"):
                method = row.get("data-method")
                assert text_of(row.find("th")).removesuffix("control") == title_of(method)
                for column, cell in zip(columns, row.findall("td"), strict=True):
                    if (method, column) not in known.index or not known.loc[(method, column), "n"]:
                        assert text_of(cell) == "–"
                        continue
                    line = known.loc[(method, column)]
                    seen.add((method, column))
                    mean, low, high = (number(line[part], column) for part in ("mean", "low", "high"))
                    assert (cell.text or "").strip() == mean
                    assert float(cell.get("data-value")) == pytest.approx(line["mean"], rel=1e-12)
                    interval, difference = cell.findall("small")
                    assert text_of(interval) == f"{low} to {high}"
                    if pd.notna(line["difference"]):
                        change = [number(line[part], column) for part in ("difference", "difference_low", "difference_high")]
                        sign = "" if change[0].startswith("-") else "+"
                        assert text_of(difference).startswith(f"{sign}{change[0]} [{change[1]}, {change[2]}]")
                    if line["rank"]:
                        last = f"-{line['rank_last']}" if line["rank_last"] > line["rank"] else ""
                        assert text_of(difference).endswith(f"#{line['rank']}{last}")
        there = known[known["n"] > 0].index
        assert seen == {(method, column) for method, column in there if method != "(model)"} and len(seen) > 20

    @pytest.mark.parametrize("name", ["evaluation", "short"])
    def test_of_the_model(self, built: dict[str, Path], name: str) -> None:
        known = pd.read_csv(built[name].parent / "table.csv").set_index(["method", "column"]).loc["(model)"]
        cards = parsed(built[name]).findall(".//div[@data-model]")
        assert {card.get("data-model") for card in cards} == set(known.index)
        for card in cards:
            column = card.get("data-model")
            mean, low, high = (number(known.loc[column, part], column) for part in ("mean", "low", "high"))
            assert text_of(card.find("b")).removesuffix(" %") == mean
            assert text_of(card.find("span")).endswith(f"[{low}, {high}]")

    def test_of_its_images(self, built: dict[str, Path]) -> None:
        """The values that the gallery and the scatter plot have are those of the rows, to four digits."""
        rows = pd.concat(map(pd.read_parquet, sorted((built["evaluation"].parent / "rows").glob("*.parquet"))))
        rows = rows.set_index(["id", "method", "column"])["value"]
        script = next(s for s in parsed(built["evaluation"]).iter("script") if s.get("id") == "data")
        images = json.loads(script.text)["images"]
        assert len(images) == 6
        for image in images:
            for method, values in image["values"].items():
                for column, value in zip(image["columns"], values, strict=True):
                    expected = rows.get((image["id"], method, column), float("nan"))
                    assert (value is None and pd.isna(expected)) or value == pytest.approx(expected, rel=1e-3)

    def test_of_the_demo(self, built: dict[str, Path]) -> None:
        tree, folder = parsed(built["demo"]), built["demo"].parent
        seen = 0
        for block in tree.findall(".//table[@data-table='demo']/tbody"):
            known = pd.read_csv(folder / block.get("data-run") / "table.csv").set_index(["method", "column"])
            for row in block.findall("tr[@data-method]"):
                assert text_of(row.find("th")).removesuffix("control") == title_of(row.get("data-method"))
                for column, cell in zip(("mass_inside", "AD", "AG", "AI"), row.findall("td"), strict=True):
                    line = known.loc[(row.get("data-method"), column)]
                    mean, low, high = (number(line[part], column) for part in ("mean", "low", "high"))
                    assert text_of(cell) == f"{mean} {low} to {high}"
                    seen += 1
        assert seen == 2 * 6 * 4
        headings = [text_of(heading) for heading in tree.findall(".//table[@data-table='demo']/thead/tr/th")]
        assert headings[1:] == ["Map on the animal ↑", "Average Drop ↓AD, %", "Average Gain ↑AG, %", "Average Increase ↑AI, %"]
        for panel in tree.findall(".//div[@data-run]"):
            record = json.loads((folder / panel.get("data-run") / "run.json").read_text())
            shown = [text_of(b) for b in panel.findall(".//b")]
            assert shown[:2] == [f"{100 * record['accuracy'][split]:.1f} %" for split in ("train", "val")]
            assert f"{100 * record['accuracy']['test']:.1f} %" in text_of(panel)
        counts = every_page.COUNTS["train"]
        assert f"{sum(counts.values())} pictures: {counts['leopard']} leopards, {counts['orca']} orcas" in text_of(tree)

    def test_of_a_training(self, built: dict[str, Path]) -> None:
        tree, record = parsed(built["training"]), json.loads((built["training"].parent / "run.json").read_text())
        titles = {"train": "training", "val": "validation", "test": "test"}
        cards = [text_of(card) for card in tree.findall(".//div[@class='card']")]
        for split, value in record["accuracy"].items():
            assert f"{100 * value:.1f} %{titles[split]} accuracy" in cards
        worst = record["worst_group"]
        assert f"{100 * worst['accuracy']:.1f} %worst group: {worst['name']} ({worst['count']} images)" in cards
        maps = tree.find(".//table[@data-table='maps']")
        headings = [text_of(heading.find("small")) for heading in maps.findall("thead/tr/th")[1:-1]]
        assert headings == ["AD", "AG", "AI", "mass_inside"]
        for row in maps.findall("tbody/tr"):
            split = next(key for key, title in titles.items() if title == text_of(row.find("th")))
            for column, cell in zip(headings, row.findall("td"), strict=False):
                mean, low, high = (number(record["maps"][split][column][part], column) for part in ("mean", "low", "high"))
                assert text_of(cell) == f"{mean} {low} to {high}"
        groups = tree.findall(".//table[@data-table='groups']/tbody/tr")
        known = [(s, n, g) for s, own in record["groups"].items() if s != "train" for n, g in own.items()]
        assert len(groups) == len(known)
        for row, (split, name, group) in zip(groups, known, strict=True):
            assert [text_of(cell) for cell in row] == [
                name,
                titles[split],
                str(group["count"]),
                f"{100 * group['accuracy']:.1f} %",
            ]

    def test_of_trainings_side_by_side(self, built: dict[str, Path]) -> None:
        tree, folder = parsed(built["trainings"]), built["trainings"].parent
        seen = 0
        for region in tree.findall(".//div[@role='region']"):
            table = region.find("table[@data-table='recipes']")
            if table is None:
                continue
            headings = [text_of(heading) for heading in table.findall("thead/tr/th")][1:]
            for row in table.findall("tbody/tr"):
                record = json.loads((folder / text_of(row.find("th")) / "run.json").read_text())
                for heading, cell in zip(headings, row.findall("td"), strict=True):
                    if heading == "test ↑":
                        assert (cell.text or "").strip().split(" [")[0] == f"{record['accuracy']['test']:.3f}"
                        seen += 1
                    if heading.startswith("Average Drop"):
                        split = {"Maps, validation": "val", "Maps, test": "test"}[region.get("aria-label")]
                        assert (cell.text or "").strip().split(" [")[0] == f"{record['maps'][split]['AD']['mean']:.1f}"
                        seen += 1
        assert seen == 6

    def test_of_a_comparison(self, built: dict[str, Path]) -> None:
        runs = [
            pd.read_csv(built[name].parent / "table.csv").set_index(["method", "column"]) for name in ("evaluation", "short")
        ]
        regions = parsed(built["comparison"]).findall(".//div[@role='region']")
        tables = {region.find("table").get("data-column"): region.find("table") for region in regions}
        assert set(tables) >= {"AD", "AG", "AI", "I", "D", "SM", "mass_inside"}
        for region, (column, table) in zip(regions, tables.items(), strict=True):
            assert region.get("aria-label") == titled(column)
            for row in table.findall("tbody/tr"):
                called = text_of(row.find("th"))
                method = "(model)" if called == "the model" else METHODS.get(called).name
                for run, cell in zip(runs, row.findall("td"), strict=True):
                    expected = run["mean"].get((method, column), float("nan"))
                    assert (cell.text or "").strip() == number(expected, column)

    def test_of_the_film(self, built: dict[str, Path]) -> None:
        from foveate.training.film import Film

        film = Film.load(built["training"].parent / "film.npz")
        for name in ("film", "training"):
            table = parsed(built[name]).find(".//table[@class='film']")
            epochs = [int(text_of(heading).removeprefix("epoch ")) for heading in table.findall("thead/tr/th")[1:]]
            assert epochs[-1] == film.frames[-1].epoch == 10 and len(epochs) == 8
            frames = {frame.epoch: frame for frame in film.frames}
            for index, row in enumerate(table.findall("tbody/tr")):
                for epoch, cell in zip(epochs, row.findall("td"), strict=True):
                    frame = frames[epoch]
                    inside = f" · {100 * float(frame.inside[index]):.1f} % on it"
                    assert text_of(cell) == f"p {float(frame.probability[index]):.2f}{inside}"
                    wrong = int(frame.predicted[index]) != int(film.batch.y[index])  # type: ignore[index]
                    assert (cell.find("img").get("class") == "no") == wrong

    def test_of_the_confidence_study(self, built: dict[str, Path]) -> None:
        row = parsed(built["confidence"]).find(".//table[@data-table='confidence']/tbody/tr")
        assert text_of(row.find("th")) == "small_cnn"
        known = confidence.trend(confidence.read_rows(built["confidence"].parent / "small_cnn.csv"))
        shown = [text_of(cell) for cell in row.findall("td")]
        spearman = lambda v: "{:+.2f} {:+.2f} to {:+.2f}".format(*v) if np.isfinite(v[0]) else "–"  # noqa: E731
        assert shown[:3] == [str(known.images), spearman(known.correlation), spearman(known.without_penalty)]
        assert shown[3:5] == [f"{known.cosine[0]:.4f}", f"{known.cosine[1]:.4f}"]
        assert shown[5] == f"{100 * known.matters:.0f} %" and shown[7] == spearman(known.ratio_correlation)

    def test_of_what_is_explained(self, built: dict[str, Path]) -> None:
        """Probabilities before and behind each map, of a document of another call of the same command."""
        folder = built["explained"].parent
        arguments = ("explain", folder.parent / "photos", "--model", f"{folder.parent / 'network.py'}:build")
        more = ("--method", ",".join(every_page.METHODS), "--pictures", "none", "--out", folder.parent / "again", "--json")
        document = json.loads(CliRunner().invoke(app, [str(word) for word in (*arguments, *more)]).stdout)
        script = next(s for s in parsed(built["explained"]).iter("script") if s.get("id") == "data")
        images = json.loads(script.text)["images"]
        assert [image["id"] for image in images] == [item["file"] for item in document["images"]]
        for image, item in zip(images, document["images"], strict=True):
            assert image["wrong"] == (item["right"] is False)
            assert [p for _, p in image["top"]] == pytest.approx([p for _, _, p in item["top"]], abs=1e-4)
            (answer,) = image["answers"]
            assert [cell["method"] for cell in answer["maps"]] == list(item["maps"])
            for cell, values in zip(answer["maps"], item["maps"].values(), strict=True):
                assert (cell["before"], cell["after"]) == pytest.approx((values["p_before"], values["p_after"]), rel=1e-3)
                assert not cell["picture"] or (folder / unquote(cell["picture"])).is_file()

    def test_a_spreadsheet_computes_nothing(self, built: dict[str, Path]) -> None:
        """Cells of what is written as CSV that a spreadsheet would take for a formula."""
        for path in built["evaluation"].parent.rglob("*.csv"):
            with path.open(encoding="utf-8", newline="") as file:
                for line in csv.reader(file):
                    assert not [cell for cell in line if cell[:1] in ("=", "@", "\t") or re.match(r"[+-][^\d.]", cell)]


def titled(column: str) -> str:
    return METRICS.get(column).columns[METRICS.get(column).column(column) or column].title


class TestControls:
    """Every control does what it says."""

    def test_sorting(self, chromium: Any, built: dict[str, Path]) -> None:
        with browser.opened(chromium, built["evaluation"]) as (page, wrong):
            order = "[...document.querySelectorAll('table[data-group=%s] tbody tr')].map(r => r.dataset.method)"
            rows = "[...document.querySelectorAll('table[data-group=faithfulness] tbody tr')]"
            values = f"{rows}.map(r => +r.children[1].dataset.value)"
            assert page.evaluate(order % "faithfulness") == list(every_page.METHODS)
            button = page.locator("th[data-column=AD] button")
            button.click()
            best_first = page.evaluate(values)
            assert best_first == sorted(best_first)  # Average Drop: lower is better
            assert page.get_attribute("th[data-column=AD]", "aria-sort") == "ascending"
            assert page.evaluate(order % "localization") == page.evaluate(order % "faithfulness")
            button.press("Enter")
            assert page.evaluate(values) == sorted(best_first, reverse=True)
            page.locator("th[data-column=AG] button").click()
            gains = page.evaluate(values.replace("children[1]", "children[2]"))
            assert gains == sorted(gains, reverse=True)
            assert page.get_attribute("th[data-column=AD]", "aria-sort") == "none"
            assert wrong == []

    def test_differences(self, chromium: Any, built: dict[str, Path]) -> None:
        with browser.opened(chromium, built["evaluation"]) as (page, _):
            cell = page.locator("tr[data-method=layer_cam] td").first
            assert cell.locator(".interval").is_visible() and not cell.locator(".difference").is_visible()
            page.check("#differences")
            assert cell.locator(".difference").is_visible() and not cell.locator(".interval").is_visible()
            assert re.match(r"[+-]\d", cell.locator(".difference").inner_text())

    def test_the_gallery(self, chromium: Any, built: dict[str, Path]) -> None:
        with browser.opened(chromium, built["evaluation"]) as (page, _):
            ids = "[...document.querySelectorAll('#gallery .image')].map(i => i.dataset.id)"
            data = json.loads(
                page.inner_text("#data", timeout=2000) or page.evaluate("document.getElementById('data').textContent")
            )
            assert page.evaluate(ids) == [image["id"] for image in data["images"]]
            for kind in ("wrong", "right"):
                page.select_option("#filter", kind)
                assert page.evaluate(ids) == [i["id"] for i in data["images"] if i["wrong"] == (kind == "wrong")]
            page.select_option("#filter", "all")
            page.select_option("#worstm", "grad_cam")
            page.select_option("#worstc", "AD")
            column = data["images"][0]["columns"].index("AD")
            drops = {image["id"]: image["values"]["grad_cam"][column] for image in data["images"]}
            shown = [drops[name] for name in page.evaluate(ids)]
            assert shown == sorted(shown, reverse=True)  # the worst first
            assert page.inner_text("#count") == "6 of 6 images"
            opacity = "getComputedStyle(document.querySelector('#gallery canvas')).opacity"
            assert page.evaluate(opacity) == "0.85"
            page.fill("#opacity", "20")
            assert page.evaluate(opacity) == "0.2"
            ratios = page.evaluate("[...document.querySelectorAll('.look')].map(l => l.clientWidth / l.clientHeight)")
            assert ratios == pytest.approx([1] * len(ratios), abs=0.02)  # what the network sees is square

    def test_the_scatter_plot(self, chromium: Any, built: dict[str, Path]) -> None:
        with browser.opened(chromium, built["evaluation"]) as (page, _):
            page.select_option("#sc", "AG")
            page.select_option("#sx", "gradient")
            assert page.get_attribute("#scatter svg", "aria-label") == "Average Gain of each image, Gradient against Layer-CAM"
            assert page.locator("#scatter circle").count() == 6

    def test_the_last_epoch_is_seen_on_a_phone(self, chromium: Any, built: dict[str, Path]) -> None:
        for name in ("film", "training"):
            with browser.opened(chromium, built[name], 390) as (page, _):
                last = page.locator("table.film thead th").last.bounding_box()
                assert last["x"] + last["width"] <= 390

    def test_keyboard(self, chromium: Any, built: dict[str, Path]) -> None:
        """Every control is reached with the tabulator key, and shows that it is."""
        with browser.opened(chromium, built["evaluation"]) as (page, _):
            controls = "[...document.querySelectorAll('a, button, select, input, summary')]"
            wanted = page.evaluate(f"{controls}.filter(e => e.checkVisibility()).length")
            reached = "(e => [e.tagName, e.id || e.textContent.slice(0, 30), getComputedStyle(e).outlineStyle])"
            seen = set()
            for _ in range(wanted + 40):
                page.keyboard.press("Tab")
                at = page.evaluate(f"{reached}(document.activeElement)")
                if at[0] == "BODY":
                    break
                seen.add(tuple(at[:2]))
                assert at[2] != "none", f"{at} does not show that it is reached"
            assert {"differences", "sc", "filter", "opacity"} <= {name for _, name in seen}

    def test_the_explained_page(self, chromium: Any, built: dict[str, Path]) -> None:
        with browser.opened(chromium, built["explained"]) as (page, wrong):
            ids = "[...document.querySelectorAll('#gallery .image')].map(i => i.dataset.id)"
            images = json.loads(page.evaluate("document.getElementById('data').textContent"))["images"]
            assert page.evaluate(ids) == [image["id"] for image in images][:10]
            page.click("#more")
            assert page.evaluate(ids) == [image["id"] for image in images] and page.locator("#more").is_hidden()
            page.select_option("#order", "most")
            page.select_option("#method", "gradient")
            left = {
                i["id"]: c["after"] / c["before"] for i in images for c in i["answers"][0]["maps"] if c["method"] == "gradient"
            }
            shown = [left[name] for name in page.evaluate(ids)]
            assert shown == sorted(shown, reverse=True)
            page.select_option("#order", "least")
            shown = [left[name] for name in page.evaluate(ids)]
            assert shown == sorted(shown)
            page.select_option("#filter", "wrong")
            assert set(page.evaluate(ids)) == {i["id"] for i in images if i["wrong"]}
            page.select_option("#filter", "all")
            looks = page.locator(".looks .look").count()
            page.select_option("#kinds", "methods")
            assert page.locator(".looks .look").count() == looks // 2  # three of the six methods are controls
            page.fill("#opacity", "20")
            assert page.evaluate("getComputedStyle(document.querySelector('#gallery canvas')).opacity") == "0.2"
            assert wrong == []
