"""Text: what people bring as text, in whatever encoding, and the JSON and YAML in it; a fault is a sentence with its place."""

from __future__ import annotations

import codecs
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.disk.files import is_regular
from foveate.errors import FoveateError

if TYPE_CHECKING:
    import yaml

MARKS = (  # of byte order; UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MOST_NODES = 100_000  # of YAML, anchors written out
LARGEST = 2**63  # of an integer in a setting: what a tensor holds


@dataclass(frozen=True)
class Text:
    """What a text file says, and the encoding that it was read in."""

    content: str
    encoding: str


def quoted(value: object, most: int = 80) -> str:
    """A value as a sentence quotes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, a nesting of thousands
        text = f"a {type(value).__name__} too large to be shown"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def read_bytes(path: str | Path) -> bytes:
    """What a file holds; nothing but a regular file is opened: a named pipe would wait for ever.

    Raises:
        FoveateError: missing, a folder, a pipe or a device, or not to be read by this user.
    """
    path = Path(path)
    try:
        if not is_regular(path):
            kind = "is a folder, not a file" if path.is_dir() else "is a pipe or a device, not a file"
            raise FoveateError(f"{path} {kind if path.exists() else 'does not exist'}")
        return path.read_bytes()
    except OSError as error:
        raise FoveateError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}") from None


def decode(raw: bytes, where: object, encoding: str | None = None) -> Text:
    """Bytes as text: in the encoding of their byte-order mark, else in UTF-8, else in ``encoding``.

    Raises:
        FoveateError: an unknown encoding; bytes that are no text in it, with the line.
    """
    if encoding is not None:
        try:
            known = codecs.lookup(encoding)
            if not getattr(known, "_is_text_encoding", True):
                raise LookupError
        except (LookupError, ValueError):
            raise FoveateError(f"encoding {encoding!r} is unknown: use cp1252, latin-1 or another of Python's") from None
    marked = next((name for mark, name in MARKS if raw.startswith(mark)), None)
    bare = b"\0" not in raw and b"\x1b" not in raw  # bytes below 128 may be UTF-16 and ISO-2022 too
    for name in [marked] if marked else ["utf-8"] if encoding is None else ["utf-8", encoding] if bare else [encoding]:
        try:
            return Text(raw.decode(name), name)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            reason = f"{where}, line {line}: the byte 0x{raw[error.start]:02X} is not {name}"
        except UnicodeError as error:
            reason = f"{where} is no text in {name}: {error}"
    advice = ": name the encoding, as with --encoding cp1252 (Excel on Windows) or --encoding latin-1"
    raise FoveateError(reason + (advice if marked is None and encoding is None else ""))


def read_text(path: str | Path, encoding: str | None = None) -> str:
    """What a text file says, see :func:`decode`.

    Raises:
        FoveateError: it cannot be read, or is no text.
    """
    return decode(read_bytes(path), path, encoding).content


def read_lines(path: str | Path, encoding: str | None = None) -> list[str]:
    """The lines of a text file, of any system's line ends; empty ones at its end do not count.

    Raises:
        FoveateError: it cannot be read, is no text, or holds a NUL byte.
    """
    lines = read_text(path, encoding).replace("\r\n", "\n").replace("\r", "\n").rstrip("\n").split("\n")
    if number := next((number for number, line in enumerate(lines, 1) if "\0" in line), 0):
        raise FoveateError(f"{path}, line {number}: a NUL byte is no text: is it UTF-16? Then give --encoding utf-16-le")
    return lines if lines != [""] else []


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        FoveateError: it cannot be read, is no JSON, or not an object.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise FoveateError(f"{path} is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise FoveateError(f"{path} is not a JSON object: it holds {quoted(content)}")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """A value in YAML: plain data, every key once, numbers that a computer holds.

    Raises:
        FoveateError: no YAML, a key that stands twice, NaN or infinity, an integer of more than 64 bits, anchors that
            grow without bounds, or a nesting of hundreds; the message begins with ``where``.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check(node, loader, {}, set())
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise FoveateError(f"{where} is not YAML: {_reason(error)}") from None
    except RecursionError:
        raise FoveateError(f"{where} is nested too deeply") from None
    except FoveateError as error:
        raise FoveateError(f"{where}: {error}") from None
    except Exception as error:  # a date of month 13, !!int x, !!timestamp x: the library lets through what Python says
        raise FoveateError(f"{where} is not YAML: {error}") from None


def read_yaml(path: str | Path, where: str) -> Any:
    """What a YAML file says, see :func:`parse_yaml`.

    Raises:
        FoveateError: it cannot be read, or is no YAML.
    """
    return parse_yaml(read_text(path), where)


def _reason(error: yaml.YAMLError) -> str:
    """What PyYAML says, on one line and without the drawing of the place."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    context = getattr(error, "context", None)
    return f"line {mark.line + 1}, column {mark.column + 1}: {f'{context}, ' if context else ''}{problem}"


def _check(node: Any, loader: Any, sizes: dict[int, int], above: set[int]) -> int:
    """The number of values below a node with its anchors written out; an anchor that holds itself has none."""
    if id(node) in above:
        raise FoveateError(f"line {node.start_mark.line + 1}: the anchor holds itself")
    if id(node) in sizes:
        return sizes[id(node)]
    line = node.start_mark.line + 1
    parts: list[Any] = []
    if node.id == "scalar":
        _check_number(node, loader, line)
    elif node.id == "sequence":
        parts = node.value
    else:
        seen: set[tuple[str, str]] = set()
        for key, value in node.value:
            parts += [key, value]
            if key.id != "scalar":
                continue
            if (key.tag, key.value) in seen:
                raise FoveateError(f"line {key.start_mark.line + 1}: the key {key.value!r} stands there twice: leave one out")
            seen.add((key.tag, key.value))
    size = 1
    for part in parts:
        size += _check(part, loader, sizes, above | {id(node)})
    if size > MOST_NODES:
        raise FoveateError(f"line {line}: with its anchors written out it has more than {MOST_NODES} values")
    sizes[id(node)] = size
    return size


def _check_number(node: Any, loader: Any, line: int) -> None:
    kind = node.tag.rpartition(":")[2]
    if kind == "float" and not math.isfinite(loader.construct_yaml_float(node)):
        raise FoveateError(f"line {line}: {node.value} is not a finite number")
    if kind == "int":
        try:
            number = loader.construct_yaml_int(node)
        except ValueError:  # more digits than Python reads
            number = LARGEST
        if abs(number) >= LARGEST:
            raise FoveateError(f"line {line}: {quoted(node.value, 30)} is too large a number")
