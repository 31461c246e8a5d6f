"""Unpacks the archives that people download: whole or not at all, never outside their folder.

Read to its end, an archive says whether it is whole: zip, gzip, bzip2 and xz have checksums of what they hold, tar of
its headers only. So damage inside the files of a plain .tar cannot be seen, and a warning says so.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import functools
import gzip
import json
import lzma
import os
import shutil
import stat
import struct
import tarfile
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Self

from tqdm import tqdm

from music_synth.errors import UserError
from music_synth.files import whole_folder

SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar")
COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by how the file begins
UNPACKED = ".unpacked.json"  # in a folder that was unpacked: what archive it was
MAX_MEMBERS = 1_000_000  # Slakh2100 has 100,000
MAX_RATIO, MAX_SMALL = 100, 2**30  # bytes unpacked for one of the archive, above a gigabyte; audio comes to ten
MAX_PADDING = 2**19  # zeros that a tar ends with: up to the size of its records, mostly 10,240
BLOCK = 2**20  # bytes that are read at a time
ZIP_HEADER = struct.Struct("<4s 2x H")  # how a member begins: its signature and flags
ENCODING_FLAG = 0x800


class Member(NamedTuple):
    """A file in an archive, or a folder."""

    name: str
    size: int = 0
    open: Callable[[], Any] | None = None  # gives its content, a binary file; None: a folder


class Refused(ValueError):
    """What an archive holds may be whole, but is not unpacked."""


def unpacked(source: Path, names: Sequence[str], unpack_to: Path) -> Path:
    """Gives the folder to read: `source` itself, or where its archives were unpacked, now or before.

    Args:
      source: an unpacked folder, an archive, or a folder that holds archives with the given `names`.
      unpack_to: where unpacked archives are kept, a folder each.

    Raises:
      UserError: there is no such path; or as `unpack`.
    """
    if source.is_file():
        return unpack(source, unpack_to)
    if not source.is_dir():
        raise UserError(f"no file or folder {source}: give the archive or the folder it unpacks into")
    archives = [source / name for name in names if (source / name).is_file()]
    if not archives:
        return source
    folders = {unpack(archive, unpack_to) for archive in archives}
    return folders.pop() if len(folders) == 1 else unpack_to


def unpack(archive: Path, unpack_to: Path) -> Path:
    """Unpacks into the folder unpack_to/<name of the archive>, which is there only when it is whole.

    What was unpacked before is kept, if it came from this very archive. What an archive holds in one folder of its own
    name is not nested twice.

    Raises:
      UserError: the archive is damaged, encrypted, of an unknown kind, larger than can be true, or holds a path outside
        it, a link or a device; or it cannot be read, or there is no room.
    """
    stem = next((archive.name.removesuffix(suffix) for suffix in SUFFIXES if archive.name.endswith(suffix)), None)
    if not stem:
        raise UserError(f"{archive} is no archive: its name must end in {', '.join(SUFFIXES)}; or give a folder")
    target = unpack_to / stem
    at = ""  # which member
    try:
        identity = _identity(archive)
        if _read_identity(target) == identity:
            return target
        with (
            archive.open("rb") as raw,
            whole_folder(target) as part,
            contextlib.closing(_zip_members(raw) if archive.suffix == ".zip" else _tar_members(raw)) as members,
            tqdm(desc=f"unpacking {archive.name}", total=identity["size"], unit="B", unit_scale=True) as bar,
        ):
            total = 0
            for number, member in enumerate(members):
                at = f" at {member.name}"
                total += member.size
                if number >= MAX_MEMBERS:
                    raise Refused(f"it holds more than {MAX_MEMBERS:,} files")
                if total > max(MAX_SMALL, MAX_RATIO * identity["size"]):
                    raise Refused(f"it would fill more than {MAX_RATIO} times its size")
                _write(member, part)
                bar.update(raw.tell() - bar.n)
                at = ""
            _lift(part, stem)
            (part / UNPACKED).write_text(json.dumps(identity))
            if target.exists():  # from another archive
                shutil.rmtree(target)
    except Refused as error:
        raise UserError(f"{archive} is not unpacked{at}: {error}") from error
    except Exception as error:  # what Python's readers make of damage is of every kind
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"cannot unpack {archive} into {unpack_to}{at}: {error.strerror}") from error
        raise UserError(
            f"{archive} is damaged{at} ({str(error) or type(error).__name__}): download it again"
        ) from error
    return target


def _identity(archive: Path) -> dict[str, int]:
    """What tells an archive from another of its name: size, time, and a checksum of its beginning and end."""
    with archive.open("rb") as file:
        status = os.fstat(file.fileno())
        checksum = zlib.crc32(file.read(BLOCK))
        file.seek(max(0, status.st_size - BLOCK))
        checksum = zlib.crc32(file.read(BLOCK), checksum)
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "checksum": checksum}


def _read_identity(folder: Path) -> dict[str, int] | None:
    try:
        return json.loads((folder / UNPACKED).read_text())
    except (OSError, ValueError):
        return None


def _write(member: Member, folder: Path) -> None:
    """Copies a member to where it belongs below `folder`. ValueError: that is elsewhere, or it is cut off."""
    name = PurePosixPath(member.name)
    if ".." in name.parts or name.is_absolute() or "\\" in member.name:
        raise Refused("a path outside it")
    if member.open is None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        return
    if member.size > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for its {member.size:,} bytes")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise ValueError("a second file of this name")
    with member.open() as content, path.open("xb") as file:
        shutil.copyfileobj(content, file, BLOCK)
        if file.tell() != member.size:
            raise ValueError(f"{file.tell():,} bytes instead of {member.size:,}")


def _lift(folder: Path, stem: str) -> None:
    """Moves what lies in folder/`stem` up into `folder`, if there is nothing else."""
    if [path.name for path in folder.iterdir()] != [stem] or not (folder / stem).is_dir():
        return
    inner = (folder / stem).rename(folder / f".{uuid.uuid4().hex}")
    for path in list(inner.iterdir()):
        path.rename(folder / path.name)
    inner.rmdir()


def _zip_members(raw: IO[bytes]) -> Generator[Member]:
    """The files in a zip; zipfile checks their CRC where they end."""
    with zipfile.ZipFile(raw) as opened:
        for info in opened.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise Refused(f"{info.filename} is a link or a device")
            if info.is_dir():
                yield Member(info.filename)
            else:
                yield Member(info.filename, info.file_size, functools.partial(_open_zip_member, raw, opened, info))


def _open_zip_member(raw: IO[bytes], opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    raw.seek(info.header_offset)
    _, flags = ZIP_HEADER.unpack(raw.read(ZIP_HEADER.size))
    if (flags ^ info.flag_bits) & ENCODING_FLAG:  # zipfile would read the name in another encoding
        raise ValueError("its two headers differ")
    try:
        return opened.open(info)
    except (RuntimeError, NotImplementedError) as error:
        raise Refused(str(error)) from error  # encrypted, or of an unknown kind of compression


def _tar_members(raw: IO[bytes]) -> Generator[Member]:
    """The files in a tar, compressed or not. Read to the end, where compressed files have their checksums."""
    decompress = COMPRESSED.get(raw.read(2))
    raw.seek(0)
    plain: Any = decompress(raw) if decompress else raw
    with tarfile.open(fileobj=plain, mode="r:", tarinfo=CheckedHeader) as opened:
        while info := opened.next():
            opened.members.clear()  # type: ignore[attr-defined] # which would keep all
            if info.size < 0:
                raise ValueError(f"{info.name} has {info.size} bytes")
            if not (info.isreg() or info.isdir()):
                raise Refused(f"{info.name} is a link or a device")
            if info.isdir():
                yield Member(info.name)
            else:
                yield Member(info.name, info.size, functools.partial(opened.extractfile, info))
        end = plain.tell()
    while block := plain.read(BLOCK):
        if any(block):
            raise ValueError("something follows its end")
    if plain.tell() % tarfile.BLOCKSIZE:
        raise ValueError("cut off")
    if plain.tell() - end > MAX_PADDING:  # a download that was broken off may have its full length
        raise ValueError("zeros follow its end")
    if not decompress:
        warnings.warn(f"{raw.name} has no checksums of its files: damage inside them cannot be seen", stacklevel=2)


class CheckedHeader(tarfile.TarInfo):
    """The header of a member. One that cannot be read is an error; tarfile would take it for the end."""

    @classmethod
    def fromtarfile(cls, opened: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(opened)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined] # zeros: the end indeed
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header cannot be read: {error}") from error

    def _proc_member(self, opened: tarfile.TarFile) -> tarfile.TarInfo:
        if self.size > BLOCK and not (self.isreg() or self.isdir()):  # a long name, which tarfile reads at once
            raise ValueError(f"a header of {self.size:,} bytes")
        return super()._proc_member(opened)  # type: ignore[misc]
