"""Tables: CSV as people and their spreadsheets write it; what is wrong with a line is said by file and line."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.disk.text import decode, quoted, read_bytes
from foveate.errors import FoveateError, TableWarning, printable

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SEPARATOR = re.compile(r'"?sep=([,;\t|])"?\s*', re.IGNORECASE)  # the first line that Excel writes and reads


@dataclass(frozen=True)
class Line:
    """One line of a table: its number in the file, and its cells by column, without blanks around them."""

    number: int
    cells: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table as it was read.

    Attributes:
        columns: names in lower case, without blanks around them.
        lines: those with something in them.
    """

    path: Path
    columns: tuple[str, ...]
    lines: tuple[Line, ...]

    def place(self, line: Line) -> str:
        """Where a line is, for a sentence."""
        return f"{self.path}, line {line.number}"


def read_table(path: Path, known: Sequence[str], needs: str, encoding: str | None = None) -> Table:
    """A table with a header of columns of which some are ``known``, the first of them always: CSV in any encoding.

    Commas, semicolons or tabs are between the columns, which are known by their names whatever their case; empty lines are
    passed over, and quoted cells may hold line ends. The encoding is that of the byte-order mark, else UTF-8, else
    ``encoding``. What is not commas in UTF-8 is said.

    Raises:
        FoveateError: it cannot be read, has no such header, or a line has too few or too many cells, or quotes that do not
            end; with file and line.
    """
    key, text = known[0], decode(read_bytes(path), path, encoding)
    content = text.content
    if (place := content.find("\0")) >= 0:
        line = content.count("\n", 0, place) + 1
        raise FoveateError(f"{path}, line {line}: a NUL byte is no text: is it UTF-16? Then give --encoding utf-16-le")
    first, _, rest = content.partition("\n")
    skipped = 0
    if marked := SEPARATOR.fullmatch(first):
        content, skipped, delimiter = rest, 1, marked[1]
    else:
        delimiter = _delimiter(content, key)
    rows = _rows(path, content, delimiter, skipped)
    header = next(rows, None)
    columns = tuple(name.strip().lower() for name in header[1]) if header else ()
    if key not in columns:
        shown = quoted(content.lstrip().partition("\n")[0].strip())
        raise FoveateError(f"{path} needs a header with {needs}, and at least one line; its first line is {shown}")
    if twice := next((name for name in known if columns.count(name) > 1), None):
        raise FoveateError(f"{path}, line {header[0] if header else 1}: the column {twice!r} stands there twice: leave one out")
    lines = tuple(_line(path, number, cells, columns) for number, cells in rows)
    if not lines:
        raise FoveateError(f"{path} needs a header with {needs}, and at least one line; it has the header alone")
    taken = [] if text.encoding.startswith("utf-8") else [f"the encoding {text.encoding}"]
    taken += [] if delimiter == "," else [f"{DELIMITERS.get(delimiter, repr(delimiter))} between its columns"]
    if taken:
        warnings.warn(f"{printable(path)} was read with {' and '.join(taken)}", TableWarning, stacklevel=3)
    elif encoding is not None and not content.isascii() and text.encoding == "utf-8":
        warnings.warn(f"{printable(path)} is UTF-8, and was read so, not as {encoding}", TableWarning, stacklevel=3)
    return Table(path, columns, lines)


def _delimiter(content: str, key: str) -> str:
    """The one that makes most columns of the header, among those that find the column wanted."""
    header = next((line for line in content.splitlines() if line.strip()), "")
    found: dict[str, list[str]] = {}
    for delimiter in DELIMITERS:
        cells = header.split(delimiter)
        found[delimiter] = [cell.strip().strip('"').strip().lower() for cell in cells]
    return max(found, key=lambda delimiter: (key in found[delimiter], len(found[delimiter])))


def _rows(path: Path, content: str, delimiter: str, skipped: int) -> Iterator[tuple[int, list[str]]]:
    """The rows with something in them, each with the number of its first line."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    number = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield number + skipped, cells
            number = reader.line_num + 1
    except csv.Error as error:
        reason = "its quotation marks do not fit, or one is not closed"
        if "field limit" in str(error):
            reason = f"a cell has more than {csv.field_size_limit()} characters: is a quotation mark not closed?"
        raise FoveateError(f"{path}, line {number + skipped}: {reason}") from None


def _line(path: Path, number: int, cells: Sequence[str], columns: Sequence[str]) -> Line:
    more = cells[len(columns) :]
    if len(cells) < len(columns) or any(cell.strip() for cell in more):
        advice = "is it cut off?" if len(cells) < len(columns) else "put a cell with the delimiter in it into quotation marks"
        raise FoveateError(f"{path}, line {number}: it has {len(cells)} cells, and the header has {len(columns)}: {advice}")
    return Line(number, {name: cell.strip() for name, cell in zip(columns, cells, strict=False) if name})
