"""Files that appear whole or not at all: a temporary file beside them, on the disk before it is renamed."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

STALE_TEMPORARY_S = 3600  # a writer touches its file every few seconds


def temporary(path: Path) -> IO[bytes]:
    """A new file to be renamed to `path`; those that a killed process left behind go. ValueError for a device there."""
    check_replaceable(path)
    _make_parent(path)
    for old in leftovers(path.parent, path.name):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_TEMPORARY_S:
                old.unlink()
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False)


def check_replaceable(path: Path) -> None:
    """ValueError where something lies at `path` that is no file: a rename would put a file in the place of /dev/null."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: this is no regular file, and would be replaced by one")


def _make_parent(path: Path) -> None:
    """NotADirectoryError where a part of the way to `path` is a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as problem:
        raise NotADirectoryError(errno.ENOTDIR, f"{problem.filename} is no folder", str(path)) from problem


def leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Temporary files in a folder, of one file or of any."""
    return sorted(folder.glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was before, also after a loss of power. OSError names it and says why
    not."""
    with appearing(path) as file:
        file.write(content)


@contextmanager
def appearing(path: Path, n_bytes: int = 0) -> Iterator[IO[bytes]]:
    """A temporary file that becomes `path` where the block ends without an error, and otherwise goes.

    OSError names `path` and says why not: no room for the `n_bytes` that are to come (checked first), a full disk.
    """
    try:
        file = temporary(path)
        try:
            with file:
                check_room(path, n_bytes)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())  # temporary files are for their owner alone
            os.replace(file.name, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
    except OSError as problem:  # which names the temporary file
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    _sync_folder(path.parent)


@contextmanager
def appearing_folder(path: Path, n_bytes: int = 0, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` where the block ends without an error, and otherwise goes.

    Another folder there is replaced only where `replace` says so, and is as it was until then. OSError names `path`.
    """
    _make_parent(path)
    if os.path.lexists(path) and not replace:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    check_room(path, n_bytes)
    _drop_stale_folders(path)
    try:
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    except OSError as problem:  # which names the temporary folder
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    old = made.with_name(made.name + ".old")
    try:
        yield made
        for file in made.iterdir():
            os.chmod(file, 0o666 & ~_umask())
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        os.chmod(made, 0o777 & ~_umask())
        if os.path.lexists(path):
            os.rename(path, old)
        os.rename(made, path)
    except OSError as problem:
        raise type(problem)(problem.errno, problem.strerror, str(path)) from problem
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def _drop_stale_folders(path: Path) -> None:
    """Temporary folders that a killed process left behind: a writer touches a file in its own every few seconds."""
    for old in leftovers(path.parent, path.name):
        with contextlib.suppress(OSError):
            if old.is_dir() and time.time() - max(one.stat().st_mtime for one in (old, *old.iterdir())) > (
                STALE_TEMPORARY_S
            ):
                shutil.rmtree(old)


def check_room(path: Path, n_bytes: int) -> None:
    """OSError (ENOSPC) where the disk that `path` is to lie on has less than `n_bytes` free."""
    free = shutil.disk_usage(path.parent).free
    if free < n_bytes:
        unit, scale = ("GB", 1e9) if n_bytes >= 1e9 else ("MB", 1e6)
        figures = f"no room for {n_bytes / scale:.2f} {unit}, {free / scale:.2f} {unit} are free"
        raise OSError(errno.ENOSPC, figures, str(path))


def _sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
