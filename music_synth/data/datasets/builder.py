"""tfds data sets of the corpora that people download: from a folder or archives to records, once.

    summary = builder.scan("maestro", source)              # what is there, what is missing
    built = builder.build("maestro", source, data_dir)     # records in data_dir/maestro/1.0.0

A build has two steps. Every recording becomes a file in a working folder beside the data set, in several processes,
by itself: a build that is broken off goes on with those that are left. Then tfds gathers the files. With a Beam
runner both happen inside one pipeline, on any number of machines that see `source` and `data_dir` under one path.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import io
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from music_synth.data import quiet_tensorflow
from music_synth.data.datasets.corpus import SPLITS, Corpus, Found, Recording
from music_synth.errors import UserError

with quiet_tensorflow.silent_stderr():
    import tensorflow_datasets as tfds

from music_synth.data.datasets import record

VERSION = "1.0.0"  # of all corpora; raise it when a reader or the record changes
CORPORA = {  # name -> module and what it is called there
    "maestro": "maestro:CORPUS",
    "slakh": "slakh:CORPUS",
    "babyslakh": "slakh:BABY",
    "cerberus4": "cerberus4:CORPUS",
    "guitarset": "guitarset:CORPUS",
    "musicnet": "musicnet:CORPUS",
    "musicnet_em": "musicnet:EM",
    "urmp": "urmp:CORPUS",
}


@functools.cache
def corpus(name: str) -> Corpus:
    module, attribute = CORPORA[name].split(":")
    return getattr(importlib.import_module(f"music_synth.data.datasets.{module}"), attribute)


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds data set of a corpus. Its class attributes and `job` say of what."""

    VERSION = tfds.core.Version(VERSION)
    corpus: Corpus
    job: Job | None = None  # while it builds

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record.features(), description=self.corpus.title, disable_shuffling=self._ordered
        )

    _ordered = True  # records stay in the order of `find`; Beam keeps none

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        splits = [split for split in SPLITS if any(split == item.split for item in self.job.recordings)]
        return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str):
        numbered = [(i, item) for i, item in enumerate(self.job.recordings) if item.split == split]
        if not self.job.beam:
            return self.job.stored(numbered)
        import apache_beam as beam

        return beam.Create(numbered) | beam.FlatMap(self.job.load_and_read)


@functools.cache
def builder_class(name: str) -> type[CorpusBuilder]:
    """The builder of a corpus; tfds takes its name from the class's."""
    return type(name.title().replace("_", ""), (CorpusBuilder,), {"corpus": corpus(name), "name": name})


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
            notes, audio = corpus(self.name).load(item)
        except UserError as error:
            return str(error)
        except Exception as error:  # a reader met what nobody foresaw: say where
            return f"{item.id}: {type(error).__name__}: {error}"
        made = record.make_record(item.id, notes, audio)
        made["sequence"] = np.frombuffer(made["sequence"], np.uint8)
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as part:
            np.savez(part, **made)
        os.replace(part.name, path)
        return None

    def read(self, number: int) -> dict:
        with np.load(self.file(number)) as arrays:
            made = dict(arrays)
        return made | {"id": str(made["id"]), "sequence": made["sequence"].tobytes()}

    def stored(self, numbered: Iterable[tuple[int, Recording]]) -> Iterator[tuple[int, dict]]:
        return ((number, self.read(number)) for number, _ in numbered if self.file(number).exists())

    def load_and_read(self, numbered: tuple[int, Recording]) -> list[tuple[int, dict]]:
        complaint = self.load(numbered[0])
        if complaint is None:
            return [(numbered[0], self.read(numbered[0]))]
        note_bad(self.folder, numbered[0], complaint)
        if not self.skip_bad:
            raise ValueError(complaint)
        return []


def note_bad(folder: Path, number: int, complaint: str) -> None:
    (folder / f"{number:06d}.bad").write_text(complaint)


def scan(name: str, source: Path, unpack_to: Path, progress: bool = True) -> Found:
    """What `source` holds: the unpacked folder, one archive, or a folder of archives (unpacked once)."""
    from music_synth.data.datasets.archives import unpacked

    return corpus(name).find(unpacked(source, corpus(name).archives, unpack_to, progress))


def open_built(name: str, data_dir: Path) -> CorpusBuilder:
    """The builder of a corpus that was built. UserError if it was not."""
    made = builder_class(name)(data_dir=os.fspath(data_dir))
    if not made.data_path.exists():
        raise UserError(
            f"{name} is not in {data_dir}: python -m music_synth.prepare_data {name} --source PATH builds it from"
            f" {' or '.join(corpus(name).archives) or 'its folder'}"
        )
    return made


def build(
    name: str,
    found: Found,
    data_dir: Path,
    *,
    skip_bad: bool = False,
    workers: int | None = None,
    beam_options: Sequence[str] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> CorpusBuilder:
    """Builds the recordings of `found`; what was left out is said at the end.

    Args:
      skip_bad: go on without recordings that cannot be read, and without those that are missing.
      workers: processes; None: one a core. Not with Beam.
      beam_options: as of Apache Beam, "--runner=FlinkRunner" among them; None: no Beam.

    Raises:
      UserError: recordings are missing or cannot be read, no room, or the pipeline failed. Nothing half-built is
        left under the data set's name; recordings that are done are kept for the next try.
    """
    made = builder_class(name)(data_dir=os.fspath(data_dir))
    if made.data_path.exists():
        return made
    if found.missing and not skip_bad:
        raise UserError(
            f"{len(found.missing)} items of {name} are missing, the first: {found.missing[0]};"
            " --dry_run lists all, --skip_bad goes on without them"
        )
    if not found.recordings:
        raise UserError(f"no recordings of {name} found: --dry_run lists what is missing")
    folder = data_dir / f".{name}-{fingerprint(found.recordings)}"
    job = Job(name, tuple(found.recordings), folder, skip_bad, beam_options is not None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (*folder.glob("*.bad"), *folder.glob("*.part")):
            stale.unlink()
        if beam_options is None:
            load_all(job, workers or os.cpu_count() or 1, progress)
        with _gathering(made, job):
            made.download_and_prepare(download_config=_download_config(beam_options))
    except OSError as error:
        raise UserError(
            f"cannot build {name} in {data_dir}: {error.strerror or error}; what is done is kept"
        ) from error
    left_out = [*found.missing, *(path.read_text() for path in sorted(folder.glob("*.bad")))]
    if left_out:
        say(f"{len(left_out)} items of {name} were left out:")
        for line in left_out:
            say(f"  {line}")
    shutil.rmtree(folder, ignore_errors=True)
    return made


def fingerprint(recordings: Sequence[Recording]) -> str:
    """Changes with the recordings and the sizes of their files, so that a resumed build never mixes two sources."""
    digest = hashlib.sha256(VERSION.encode())
    for item in recordings:
        sizes = [(path.name, path.stat().st_size) for path in item.files]
        digest.update(repr((item.id, item.split, sizes)).encode())
    return digest.hexdigest()[:12]


def load_all(job: Job, workers: int, progress: bool) -> None:
    """Makes the file of every recording, in `workers` processes. UserError at the first bad one, if they count."""
    numbers = iter([n for n in range(len(job.recordings)) if not job.file(n).exists()])
    done = sum(job.file(n).exists() for n in range(len(job.recordings)))
    # Spawned, not forked: this process has threads of TensorFlow.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
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
                            raise UserError(f"{complaint} (--skip_bad goes on without such items)")
                    bar.update()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _gathering(made: CorpusBuilder, job: Job) -> Iterator[None]:
    """tfds at work on `job`, quietly; what Beam wraps in many lines comes out as the complaint itself."""
    made.job = job
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (UserError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:
        bad = sorted(job.folder.glob("*.bad"))
        told = bad[0].read_text() if bad and not job.skip_bad else f"{type(error).__name__}: {error}"
        raise UserError(f"{told} (building {job.name})") from error
    finally:
        made.job = None
        tfds.enable_progress_bar()


def _download_config(beam_options: Sequence[str] | None) -> tfds.download.DownloadConfig:
    if beam_options is None:
        return tfds.download.DownloadConfig()
    import apache_beam as beam

    options = beam.options.pipeline_options.PipelineOptions(list(beam_options))
    return tfds.download.DownloadConfig(beam_options=options)
