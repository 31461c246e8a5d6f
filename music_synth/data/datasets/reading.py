"""Reads the recordings of a corpus, in several processes; what is read is kept, so that a run can be broken off.

No TensorFlow here: the processes start in a second.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from music_synth.data.datasets import tfrecords
from music_synth.data.datasets.archives import unpacked
from music_synth.data.datasets.corpus import SPLITS, Content, Corpus, Found, Measured, Reader, Recording
from music_synth.data.examples import Piece
from music_synth.data.prepared import notes_from_array, notes_to_array, write_folder
from music_synth.errors import UserError, telling
from music_synth.files import locked, replacing

Result = TypeVar("Result")
VERSION = "1.0.0"  # of all corpora; raise it when a reader or the record changes
CORPORA = {  # name -> module and what it is called there
    "maestro": "maestro:CORPUS",
    "maestro_v2": "maestro:CORPUS_V2",
    "slakh": "slakh:CORPUS",
    "slakh_sounding_bass": "slakh:SOUNDING_BASS",
    "babyslakh": "slakh:BABY",
    "cerberus4": "cerberus4:CORPUS",
    "cerberus4_sounding_bass": "cerberus4:SOUNDING_BASS",
    "guitarset": "guitarset:CORPUS",
    "musicnet": "musicnet:CORPUS",
    "musicnet_official": "musicnet:CORPUS_OFFICIAL",
    "musicnet_em": "musicnet:CORPUS_EM",
    "urmp": "urmp:CORPUS",
    "rendered": "rendered:CORPUS",
    "pairs": "pairs:CORPUS",
}


@functools.cache
def corpus(name: str) -> Corpus:
    module, attribute = CORPORA[name].split(":")
    return getattr(importlib.import_module(f"music_synth.data.datasets.{module}"), attribute)


def recordings_in(name: str, root: Path) -> Found:
    """What is in `root` of a corpus: what its archives unpack into, or the TFRecords that were published of it."""
    if tfrecords.files(name, root):
        return tfrecords.recordings_in(name, corpus(name), root)
    return corpus(name).recordings_in(root)


def scan(name: str, source: Path, unpack_to: Path) -> Found:
    """Lists what `source` holds: an unpacked folder, an archive, or a folder of archives or TFRecords."""
    return recordings_in(name, unpacked(source, corpus(name).archives, unpack_to))


def reader(name: str, recording: Recording) -> Reader:
    return tfrecords if isinstance(recording, tfrecords.Record) else corpus(name)


@dataclass(frozen=True)
class Job:
    """The recordings to build and the folder where each is kept as soon as it is done."""

    name: str
    recordings: tuple[Recording, ...]
    folder: Path
    skip_bad: bool
    beam: bool

    @functools.cached_property
    def files(self) -> list[Path]:
        """Where each recording is kept. It is another file once one that the recording is made from changes."""
        return [self.folder / f"{fingerprint(item)}.npz" for item in self.recordings]

    def complain(self, number: int, complaint: str) -> None:
        """Notes what is wrong with a recording, for `complaints`."""
        (self.folder / f"{number:06d}.bad").write_text(complaint)

    def complaints(self) -> list[str]:
        """Lists what was wrong, in the order of recordings."""
        return [path.read_text() for path in sorted(self.folder.glob("*.bad"))]


def seconds(recording: Recording) -> float:
    """Length of a recording by the headers of its audio files, the longest of them. UserError if one has none."""
    import soundfile

    if isinstance(recording, tfrecords.Record):
        return tfrecords.seconds(recording)
    if isinstance(recording, Measured):
        return recording.seconds
    longest = 0.0
    for path in recording.files:
        if path.suffix in (".wav", ".flac"):
            try:
                longest = max(longest, soundfile.info(path).duration)
            except (soundfile.LibsndfileError, OSError) as error:
                raise UserError(f"{recording.id}: cannot read {path} as audio ({error})") from error
    return longest


def pieces(name: str, recordings: Sequence[Recording]) -> tuple[int, tuple[int, ...]]:
    """How many pieces there are, and how many there should be: a number for each edition, none where none is known."""
    if recordings and isinstance(recordings[0], tfrecords.Record):
        return len(recordings), tfrecords.KINDS[name].pieces
    return len({item.files[0] for item in recordings}), corpus(name).pieces


def keep(name: str, item: Recording, path: Path) -> str | None:
    """Makes the file of a recording of a corpus, if it is not there yet; the complaint about a bad one."""
    if path.exists():
        return None
    try:
        notes, audio = reader(name, item).read(item)
    except UserError as error:
        return str(error)
    except Exception as error:  # a reader met what nobody foresaw: say where
        return f"{item.id}: {type(error).__name__}: {error}; leave it out with --skip_bad"
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, notes=notes_to_array(notes), audio=audio)
    return None


def read_kept(path: Path) -> Content:
    """Reads what `keep` made."""
    with np.load(path) as arrays:
        return Content(notes_from_array(arrays["notes"]), arrays["audio"])


def fingerprint(item: Recording) -> str:
    """Changes with a recording, the sizes of its files and when they were written, and with the readers here."""
    stats = [(path.name, status.st_size, status.st_mtime_ns) for path in item.files for status in [path.stat()]]
    return hashlib.sha256(repr((VERSION, item.id, item.split, item.settings, stats)).encode()).hexdigest()[:16]


def leave_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone: killed, it can end none of its own."""

    def leave(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=leave, args=(parent,), daemon=True).start()


def load_all(job: Job, workers: int) -> None:
    """Makes the file of every recording, in `workers` processes. UserError at the first bad one, if they count."""
    left = [n for n, path in enumerate(job.files) if not path.exists()]
    done = len(job.recordings) - len(left)
    bar = tqdm(desc=f"reading {job.name}", total=len(job.recordings), initial=done, unit="piece")
    arguments = ((job.name, job.recordings[number], job.files[number]) for number in left)
    with bar, contextlib.closing(in_processes(keep, arguments, workers)) as results:
        for index, complaint in results:
            if complaint is not None:
                job.complain(left[index], complaint)
                if not job.skip_bad:
                    raise UserError(complaint)
            bar.update()


def in_processes(
    function: Callable[..., Result], arguments: Iterable[tuple], workers: int
) -> Generator[tuple[int, Result]]:
    """Yields (number, function(*arguments)) of each in turn, as they are done; no more are begun once it is closed."""
    # Spawned, not forked: this process has threads of TensorFlow.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=leave_with_parent)
    numbered = enumerate(arguments)
    pending: dict[Future, int] = {}
    try:
        while True:
            while len(pending) < 2 * workers and (following := next(numbered, None)) is not None:
                pending[pool.submit(function, *following[1])] = following[0]
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def check_found(name: str, found: Found, skip_bad: bool) -> None:
    """Refuses, before work begins, what lacks recordings, unless that may be, and what has none."""
    if found.missing and not skip_bad:
        raise UserError(
            f"{len(found.missing)} items of {name} are missing, the first: {found.missing[0]};"
            " --dry_run lists all, --skip_bad goes on without them"
        )
    if not found.recordings:
        raise UserError(f"no recordings of {name} found: --dry_run lists what is missing")


def write_arrays(name: str, found: Found, out: Path, skip_bad: bool, workers: int) -> None:
    """Writes recordings as a prepared folder with audio, without TensorFlow; one that is broken off goes on.

    Raises:
      UserError: as `check_found`; a recording that cannot be read, unless that may be; a split of training without any.
    """
    check_found(name, found, skip_bad)
    folder = out.with_name(f".{out.name}-{VERSION}")  # what is done is kept there until all is
    job = Job(name, tuple(found.recordings), folder, skip_bad, beam=False)
    with telling(f"cannot write {out}", "; what is done is kept"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            load_all(job, workers)
            splits = {
                split: [(item, path) for item, path in zip(job.recordings, job.files, strict=True)
                        if item.split == split and path.exists()]
                for split in SPLITS
            }  # fmt: skip
            for split, items in splits.items():
                if not items:
                    raise UserError(f"{name} has no recordings for {split}: give it more, or say which in a manifest")
            pieces = {
                split: (Piece.of_audio(item.id, *read_kept(path)) for item, path in items)
                for split, items in splits.items()
            }
            write_folder(out, pieces, name, VERSION, audio=True)
            shutil.rmtree(folder, ignore_errors=True)
