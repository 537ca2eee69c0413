"""Files: written whole or not at all, beside what they replace; folders held by one run; only what foveate wrote is deleted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from foveate.errors import FoveateError, WriteError

LOCK = ".foveate-lock"
WAITING = ".foveate-part"  # ends the name of every file that is being written: a run that was killed leaves no other
LONGEST = 150  # bytes of a name that are kept in that of the waiting file: a name has at most 255
_HELD: set[IO[str]] = set()


@contextmanager
def replacing(path: str | Path, *, flush: bool = True) -> Iterator[Path]:
    """A file to write instead of ``path``, in the same folder; it takes the place of ``path`` when the block ends well.

    Until then, and where the block fails or the process is killed, ``path`` is as it was. The bytes are on the disk before
    the name changes. A symbolic link stays one, and what it points to is replaced; a file keeps its permissions.

    Args:
        flush: wait for the disk. Without it a power cut may leave a damaged file, a kill may not: for what can be made again
            and is checked when it is read.

    Raises:
        WriteError: the folder cannot be written to, or the disk is full; the message has the path and the reason.
        FoveateError: a folder has this name.

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
    # Not by the process alone: two threads of one, or two machines on one folder, may write the same file.
    waiting = target.with_name(f".{_shortened(target.name)}.{os.getpid()}-{secrets.token_hex(4)}{WAITING}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        yield waiting
        if flush:
            with waiting.open("rb+") as file:
                os.fsync(file.fileno())
        waiting.chmod(mode)
        os.replace(waiting, target)
    except OSError as error:
        if error.filename is None or str(error.filename) in (str(waiting), str(target), str(target.parent)):
            raise WriteError(f"{str(path)!r} cannot be written: {(error.strerror or str(error)).lower()}") from error
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


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, flush: bool = True) -> None:
    """Write tensors as ``.safetensors``, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path, flush=flush) as waiting:
        try:
            save_file(dict(tensors), waiting)
        except SafetensorError as error:
            raise _as_os_error(error) from error


def write_checkpoint(path: str | Path, content: Any) -> None:
    """Write what ``torch.load(weights_only=True)`` reads, whole or not at all."""
    with replacing(path) as waiting:
        try:
            torch.save(content, waiting)
        except RuntimeError as error:  # a full disk ends in "file write failed", without a reason
            raise _as_os_error(error) from error


def _as_os_error(error: Exception) -> OSError:
    full = "no space left" in str(error).lower() or "file write failed" in str(error) or "unexpected pos" in str(error)
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(errno.EIO, str(error).splitlines()[0])


def delete(path: str | Path) -> None:
    """Delete a file that foveate wrote; nothing happens where there is none."""
    Path(path).unlink(missing_ok=True)


def move(path: str | Path, to: str | Path) -> None:
    """Give a file or folder that foveate wrote another name in its file system; a file of that name is replaced."""
    os.replace(path, to)


def mark(path: str | Path, kind: str, digest: str) -> None:
    """Write the file that makes its folder foveate's own, so that :func:`delete_marked` may delete from it."""
    write_json(path, {"kind": kind, "version": 1, "digest": digest})


def delete_marked(marker: str | Path, kind: str, naming: re.Pattern[str]) -> None:
    """Delete from the folder of a marker what foveate wrote there, and the folder where nothing is left in it.

    What goes are regular files whose whole name fits ``naming``, unfinished ones of those names, and the marker. Links,
    folders and other files stay, and everything does where the marker is missing, a link, of another kind, or of a folder
    with another name, as in a copy that somebody made.
    """
    marker = Path(marker)
    folder = marker.parent
    if folder.is_symlink() or marker.is_symlink() or not is_regular(marker):
        return
    try:
        said = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(said, dict) or (said.get("kind"), said.get("digest")) != (kind, folder.name):
        return
    clear_waiting(folder)
    for path in folder.iterdir():
        if naming.fullmatch(path.name) and is_regular(path) and not path.is_symlink():
            delete(path)
    if [path.name for path in folder.iterdir()] == [marker.name]:
        delete(marker)
        folder.rmdir()


def clear_waiting(*folders: str | Path) -> None:
    """Delete what killed runs were writing in these folders; its caller holds them, so that no live run writes there."""
    for folder in map(Path, folders):
        for path in folder.glob(f".*{WAITING}") if folder.is_dir() else ():
            if is_regular(path) and not path.is_symlink():
                delete(path)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a folder until the block ends, or this process does: two runs in one would take each other's files away.

    Of several processes of one run, the first holds it. A folder that was made for it, and has nothing in it then, goes again.

    Raises:
        FoveateError: another process holds it, or it cannot be written to.
    """
    folder = Path(folder)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    make_folder(folder)
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        yield
        return
    path = folder / LOCK
    while True:
        try:
            held = path.open("a", encoding="utf-8")
        except OSError as error:
            raise WriteError(f"{str(folder)!r} cannot be written to: {(error.strerror or str(error)).lower()}") from None
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
    _HELD.add(held)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        _HELD.discard(held)
        held.close()
        with suppress(OSError):  # not empty
            for place in made:
                place.rmdir()


def _let_go() -> None:
    """In a process that was forked, such as one that reads images: else it would hold the folder longer than its parent."""
    for held in _HELD:
        held.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def make_folder(folder: str | Path) -> Path:
    """The folder, made where it is not there.

    Raises:
        FoveateError: it cannot be made, or a file has its name.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file, or in one" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise FoveateError(f"the folder {str(folder)!r} cannot be made: {(reason or str(error)).lower()}") from None
    return Path(folder)


def digest(path: str | Path) -> str:
    """16 digits of what a file holds, by BLAKE2b, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def digest_of_bytes(content: bytes) -> str:
    """16 digits of some bytes, as :func:`digest` gives them of a file."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def is_regular(path: str | Path) -> bool:
    """Whether a path is a file with content: opening a named pipe would wait for ever."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # a NUL in the name is a ValueError
        return False


def _shortened(name: str) -> str:
    long = os.fsencode(name)
    return name if len(long) <= LONGEST else hashlib.blake2b(long, digest_size=8).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
