"""Files that are there whole or not at all, whatever ends the process or the machine meanwhile."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a new path beside `path`, of the same suffix; what the block writes there then takes the name `path`.

    It is on the disk (fsync) before it takes the name. If the block raises, it is removed, and what `path` held
    stays. Links are followed. A device or a pipe (/dev/stdout) is yielded itself.

    Raises:
        OSError: the file, or the folder that it lies in, cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield part
        _sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder; the file is whole either way
        _sync(path.parent)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file of bytes, or of UTF-8 text, that appears or replaces another when it is whole; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
