"""Reads the recordings of a corpus, in several processes; what is read is kept, so that a run can be broken off.

No TensorFlow here: the processes start in a second.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from music_synth.data.datasets import tfrecords
from music_synth.data.datasets.corpus import Corpus, Found, Loaded, Reader, Recording
from music_synth.data.prepared import notes_from_array, notes_to_array
from music_synth.errors import UserError

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
}


@functools.cache
def corpus(name: str) -> Corpus:
    module, attribute = CORPORA[name].split(":")
    return getattr(importlib.import_module(f"music_synth.data.datasets.{module}"), attribute)


def find(name: str, root: Path) -> Found:
    """What is in `root` of a corpus: what its archives unpack into, or the TFRecords that were published of it."""
    if tfrecords.files(name, root):
        return tfrecords.find(name, corpus(name), root)
    return corpus(name).find(root)


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

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def load(self, number: int) -> str | None:
        """Makes the file of a recording, if it is not there yet; the complaint about a bad one."""
        path, item = self.file(number), self.recordings[number]
        if path.exists():
            return None
        try:
            notes, audio = reader(self.name, item).load(item)
        except UserError as error:
            return str(error)
        except Exception as error:  # a reader met what nobody foresaw: say where
            return f"{item.id}: {type(error).__name__}: {error}; leave it out with --skip_bad"
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as part:
            np.savez(part, notes=notes_to_array(notes), audio=audio)
        os.replace(part.name, path)
        return None

    def read(self, number: int) -> Loaded:
        with np.load(self.file(number)) as arrays:
            return Loaded(notes_from_array(arrays["notes"]), arrays["audio"])


def seconds(recording: Recording) -> float:
    """Length of a recording by the headers of its audio files, the longest of them. UserError if one has none."""
    import soundfile

    if isinstance(recording, tfrecords.Record):
        return tfrecords.seconds(recording)
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


def note_bad(folder: Path, number: int, complaint: str) -> None:
    (folder / f"{number:06d}.bad").write_text(complaint)


def fingerprint(recordings: Sequence[Recording]) -> str:
    """Changes with the recordings and the sizes of their files, so that a resumed build never mixes two sources."""
    digest = hashlib.sha256(VERSION.encode())
    for item in recordings:
        sizes = [(path.name, path.stat().st_size) for path in item.files]
        digest.update(repr((item.id, item.split, sizes)).encode())
    return digest.hexdigest()[:12]


def leave_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone: killed, it can end none of its own."""

    def leave():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def load_all(job: Job, workers: int, progress: bool) -> None:
    """Makes the file of every recording, in `workers` processes. UserError at the first bad one, if they count."""
    left = [n for n in range(len(job.recordings)) if not job.file(n).exists()]
    numbers, done = iter(left), len(job.recordings) - len(left)
    # Spawned, not forked: this process has threads of TensorFlow.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=leave_with_parent)
    bar = tqdm(desc=f"reading {job.name}", total=len(job.recordings), initial=done, unit="piece", disable=not progress)
    pending: dict = {}
    try:
        with bar:
            while True:
                while len(pending) < 2 * workers and (number := next(numbers, None)) is not None:
                    pending[pool.submit(job.load, number)] = number
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    number, complaint = pending.pop(future), future.result()
                    if complaint is not None:
                        note_bad(job.folder, number, complaint)
                        if not job.skip_bad:
                            raise UserError(complaint)
                    bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
