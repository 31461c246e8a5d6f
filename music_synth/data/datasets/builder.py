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
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from music_synth.data.datasets import record
from music_synth.data.datasets.corpus import SPLITS, Corpus, Found, Recording
from music_synth.data.datasets.reading import VERSION, Job, corpus, find, fingerprint, load_all, note_bad
from music_synth.data.quiet_tensorflow import tfds
from music_synth.errors import UserError


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A tfds data set of a corpus. Its class attributes and `job` say of what."""

    VERSION = tfds.core.Version(VERSION)
    corpus: Corpus
    job: Job | None = None  # while it builds

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record.features(), description=f"{self.name}: {self.corpus.title}", disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        there = {
            item.split
            for number, item in enumerate(self.job.recordings)
            if self.job.beam or self.job.file(number).exists()  # tfds knows no empty split
        }
        return {split: self._generate_examples(split) for split in SPLITS if split in there}

    def _generate_examples(self, split: str):
        numbered = [(i, item) for i, item in enumerate(self.job.recordings) if item.split == split]
        if not self.job.beam:
            return (stored(self.job, number, item) for number, item in numbered if self.job.file(number).exists())
        import apache_beam as beam

        return beam.Create(numbered) | beam.FlatMap(functools.partial(load_and_store, self.job))


@functools.cache
def builder_class(name: str) -> type[CorpusBuilder]:
    """The builder of a corpus; tfds takes its name from the class's."""
    return type(
        name.title().replace("_", ""), (CorpusBuilder,), {"corpus": corpus(name), "name": name, "__module__": __name__}
    )


def stored(job: Job, number: int, item: Recording) -> tuple[int, dict]:
    """Key and record of a recording that was read."""
    return number, record.make_record(item.id, *job.read(number))


def load_and_store(job: Job, numbered: tuple[int, Recording]) -> list[tuple[int, dict]]:
    """What a Beam worker does: none where the recording is bad and may be."""
    number, item = numbered
    complaint = job.load(number)
    if complaint is None:
        return [stored(job, number, item)]
    note_bad(job.folder, number, complaint)
    if not job.skip_bad:
        raise ValueError(complaint)
    return []


def scan(name: str, source: Path, unpack_to: Path, progress: bool = True) -> Found:
    """What `source` holds: the unpacked folder, one archive, or a folder of archives (unpacked once) or TFRecords."""
    from music_synth.data.datasets.archives import unpacked

    return find(name, unpacked(source, corpus(name).archives, unpack_to, progress))


def is_built(name: str, data_dir: Path) -> bool:
    return builder_class(name)(data_dir=os.fspath(data_dir)).data_path.exists()


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
            if not any(folder.glob("*.npz")):
                bad = [path.read_text() for path in sorted(folder.glob("*.bad"))]
                raise UserError(f"no recording of {name} can be read; the first of {len(bad)}: {bad[0]}")
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
        raise UserError(f"{told} (building {job.name} in {job.folder.parent}; what is done is kept)") from error
    finally:
        made.job = None
        tfds.enable_progress_bar()
        parent = Path(made.data_path).parent
        for part in parent.glob("*incomplete*"):  # which tfds leaves when Beam fails
            shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # it goes only when it is empty
            parent.rmdir()


def _download_config(beam_options: Sequence[str] | None) -> tfds.download.DownloadConfig:
    if beam_options is None:
        return tfds.download.DownloadConfig()
    import apache_beam as beam

    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what matters comes as an exception
    options = beam.options.pipeline_options.PipelineOptions(list(beam_options))
    return tfds.download.DownloadConfig(beam_options=options)
