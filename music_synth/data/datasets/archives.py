"""Unpacks the archives that people download: whole or not at all, never outside their folder."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from music_synth.errors import UserError

SUFFIXES = (".zip", ".tar.gz", ".tgz", ".tar")


def unpacked(source: Path, names: Sequence[str], unpack_to: Path, progress: bool = True) -> Path:
    """The folder to read: `source` itself, or where its archives were unpacked, now or before.

    Args:
      source: an unpacked folder, an archive, or a folder that holds archives with the given `names`.
      unpack_to: where unpacked archives are kept, a folder each.

    Raises:
      UserError: there is no such path, an archive is damaged or of an unknown kind, or there is no room.
    """
    if source.is_file():
        return unpack(source, unpack_to, progress)
    if not source.is_dir():
        raise UserError(f"no file or folder {source}: give the archive or the folder it unpacks into")
    archives = [source / name for name in names if (source / name).is_file()]
    if not archives:
        return source
    folders = {unpack(archive, unpack_to, progress) for archive in archives}
    return folders.pop() if len(folders) == 1 else unpack_to


def unpack(archive: Path, unpack_to: Path, progress: bool = True) -> Path:
    """The folder unpack_to/<name of the archive> with what `archive` holds. It is there only when it is whole.

    What an archive holds in one folder of its own name is not nested twice.
    """
    stem = next((archive.name.removesuffix(suffix) for suffix in SUFFIXES if archive.name.endswith(suffix)), None)
    if stem is None:
        raise UserError(f"{archive} is no archive: its name must end in {', '.join(SUFFIXES)}; or give a folder")
    target = unpack_to / stem
    if target.is_dir():
        return target
    unpack_to.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{stem}.", dir=unpack_to))
    try:
        (_unpack_zip if archive.suffix == ".zip" else _unpack_tar)(archive, part, progress)
        part.chmod(0o755)
        own = part / stem
        os.replace(own if own.is_dir() and len(list(part.iterdir())) == 1 else part, target)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{archive} is damaged ({error}): download it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot unpack {archive} into {unpack_to}: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _bar(archive: Path, total: int, progress: bool) -> tqdm:
    return tqdm(desc=f"unpacking {archive.name}", total=total, unit="B", unit_scale=True, disable=not progress)


def _unpack_zip(archive: Path, folder: Path, progress: bool) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        with _bar(archive, sum(member.file_size for member in members), progress) as bar:
            for member in members:
                if ".." in PurePosixPath(member.filename).parts or member.filename.startswith("/"):
                    raise ValueError(f"it holds {member.filename}, a path outside it")
                opened.extract(member, folder)  # checks the CRC
                bar.update(member.file_size)


def _unpack_tar(archive: Path, folder: Path, progress: bool) -> None:
    with archive.open("rb") as raw, _bar(archive, archive.stat().st_size, progress) as bar:
        with tarfile.open(fileobj=raw, mode="r:*") as opened:
            for member in opened:
                opened.extract(member, folder, filter="data")  # refuses paths outside the folder
                bar.update(raw.tell() - bar.n)
