"""Files and folders that are there whole or not at all, whatever ends the process or the machine meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

from music_synth.errors import UserError


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
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


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file of bytes, or of UTF-8 text, that appears or replaces another when it is whole; see `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new folder beside `path`; what the block puts there then takes the name `path`, on the disk by then.

    If the block raises, it is removed; what a killed process left of the same folder goes first. There may be an
    empty folder at `path`, but no other.

    Raises:
        OSError: the folder, or the one that it lies in, cannot be written.
    """
    path = Path(os.path.abspath(path))
    # By the hash of the name: a long name with something added would be too long.
    prefix = f".part-{zlib.crc32(os.fsencode(path.name)):08x}-"
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), locked(left, wait=False):  # refused where a living process writes it
            shutil.rmtree(left)
    part = path.with_name(f"{prefix}{uuid.uuid4().hex}")
    part.mkdir()
    try:
        with locked(part):
            yield part
            sync_folder(part)
            os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):
        _sync(path.parent)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], wait: bool = True) -> Iterator[None]:
    """Keeps other processes that ask for the same folder out of it, where the file system knows locks.

    Raises:
        OSError: there is no such folder, or (without `wait`) another process has it or it cannot be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(descriptor)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Returns when a folder and all that lies in it is on the disk."""
    for folder, _, names in os.walk(path):
        for name in (*names, "."):
            _sync(Path(folder, name))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def most_unpacked(folder: Path) -> int:
    """Bytes that the arrays in a folder can reasonably have: weights hardly pack, whatever their files say of them."""
    return 2**28 + 100 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_new(target: Path) -> None:
    """Raises UserError if `target` is there already; a folder may be, if it is empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "not empty" if target.is_dir() else "is a file"
        raise UserError(f"{target} is there already and {what}: name another, or remove it")


def check_inside(folder: Path, *names: str) -> None:
    """Raises a UserError if what has one of these names in `folder`, or anything in it, is a link that leads out of it.

    In the cache of the Hugging Face hub files are links to the folder `blobs` of the same repository.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parents[1]
    for name in names:
        for path in _walk(folder / name):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise UserError(f"{path} is a link that leads out of {folder}: put there what it stands for")
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(f"{path} is neither a file nor a folder, and is not read")


def _walk(path: Path) -> Iterator[Path]:
    yield path
    for folder, folders, files in os.walk(path):
        yield from (Path(folder, name) for name in (*folders, *files))
