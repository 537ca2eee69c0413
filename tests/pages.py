"""Pages: what a reader sees in the tables of a page, read by an HTML parser."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

Row = list[str]


@dataclass
class Tables(HTMLParser):
    """Every table as rows of texts; a cell that spans several columns stands in each of them."""

    tables: list[list[Row]] = field(default_factory=list)
    _open: list[list[Row]] = field(default_factory=list)
    _cell: list[str] | None = None
    _span: int = 1

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._open.append([])
            self.tables.append(self._open[-1])
        elif tag == "tr" and self._open:
            self._open[-1].append([])
        elif tag in ("td", "th") and self._open:
            given = dict(attrs)
            assert "rowspan" not in given, "this reader knows no rowspan"
            self._cell, self._span = [], int(given.get("colspan") or 1)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self._open[-1][-1] += [" ".join("".join(self._cell).split())] * self._span
            self._cell = None
        elif tag == "table":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def tables_of(page: str) -> list[list[Row]]:
    """The tables of a page.

    Raises:
        AssertionError: one has rows of several lengths.
    """
    reader = Tables()
    reader.feed(page)
    for table in reader.tables:
        assert len({len(row) for row in table}) <= 1, f"rows of {sorted({len(row) for row in table})} cells: {table[0]}"
    return reader.tables
