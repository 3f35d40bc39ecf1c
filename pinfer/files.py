"""Files that appear whole or not at all: a temporary file beside them, on the disk before it is renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
import time
from pathlib import Path
from typing import IO

STALE_TEMPORARY_S = 3600  # a writer touches its file every few seconds


def temporary(path: Path) -> IO[bytes]:
    """A new file to be renamed to `path`; those that a killed process left behind go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in leftovers(path.parent, path.name):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > STALE_TEMPORARY_S:
                old.unlink()
    return tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False)


def leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Temporary files in a folder, of one file or of any."""
    return sorted(folder.glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was before, also after a loss of power. OSError names it and says why
    not."""
    try:
        _write(path, content)
    except OSError as problem:  # which names the temporary file
        raise OSError(problem.errno, problem.strerror, str(path)) from problem
    _sync_folder(path.parent)


def _write(path: Path, content: bytes) -> None:
    file = temporary(path)
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(file.name, 0o666 & ~_umask())  # temporary files are for their owner alone
        os.replace(file.name, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(file.name)


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
