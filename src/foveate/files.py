"""Files: written whole or not at all, beside what they replace; folders held by one run; only what foveate wrote is deleted."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveate.errors import FoveateError

LOCK = ".lock"
WAITING = ".foveate-part"  # ends the name of every file that is being written: a run that was killed leaves no other


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A file to write instead of ``path``, in the same folder; it takes the place of ``path`` when the block ends well.

    Until then, and where the block fails or the process is killed, ``path`` is as it was. The bytes are on the disk before
    the name changes. A symbolic link stays one, and what it points to is replaced; a file keeps its permissions.

    Raises:
        FoveateError: the folder cannot be written to, or the disk is full; the message has the path and the reason.

    Example:
        >>> with replacing("table.csv") as waiting:
        ...     frame.to_csv(waiting)  # doctest: +SKIP
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        if target.is_dir():
            raise FoveateError(f"{str(path)!r} is a folder, and a file is to be written there: name another")
        yield target  # a pipe or a device: there is nothing to keep
        return
    waiting = target.with_name(f".{target.name[:150]}.{os.getpid()}{WAITING}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        yield waiting
        with waiting.open("rb+") as file:
            os.fsync(file.fileno())
        waiting.chmod(mode)
        os.replace(waiting, target)
    except OSError as error:
        if error.filename is None or str(error.filename) in (str(waiting), str(target), str(target.parent)):
            raise FoveateError(f"{str(path)!r} cannot be written: {(error.strerror or str(error)).lower()}") from error
        raise
    finally:
        waiting.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all: see :func:`replacing`."""
    with replacing(path) as waiting:
        waiting.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, indented, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def clear_waiting(folder: str | Path) -> None:
    """Delete what killed runs were writing in a folder; its caller holds the folder, so that no live run writes there."""
    folder = Path(folder)
    for path in folder.glob(f".*{WAITING}") if folder.is_dir() else ():
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder until the block ends, or this process does: two runs in one would take each other's files away.

    Raises:
        FoveateError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    path = folder / LOCK
    while True:
        held = path.open("a", encoding="utf-8")
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held.close()
            raise FoveateError(f"another process is writing to {folder}: wait for it, or use another --out") from None
        except OSError:  # a file system without locks
            break
        try:
            if os.path.samestat(os.fstat(held.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        held.close()  # its holder took the file away between the two: this lock holds nothing
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        held.close()


def digest(path: str | Path) -> str:
    """16 digits of what a file holds, by BLAKE2b, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def is_regular(path: str | Path) -> bool:
    """Whether a path is a file with content: opening a named pipe would wait for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # a NUL in the name is a ValueError
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
