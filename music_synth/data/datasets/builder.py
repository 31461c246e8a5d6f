"""tfds data sets of the corpora that people download: from a folder or archives to records, once.

    found = reading.scan("maestro", source, place)          # what is there, what is missing
    built = builder.build("maestro", found, data_dir)     # records in data_dir/maestro/1.0.0

A build has two steps. Every recording becomes a file in a working folder beside the data set, in several processes,
by itself: a build that is broken off goes on with those that are left. Then tfds gathers the files. With a Beam
runner both happen inside one pipeline, on any number of machines that see `source` and `data_dir` under one path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from music_synth.data.datasets import record
from music_synth.data.datasets.corpus import SPLITS, Corpus, Found, Recording
from music_synth.data.datasets.reading import VERSION, Job, check_found, corpus, keep, load_all, read_kept
from music_synth.data.quiet_tensorflow import tfds
from music_synth.errors import UserError, telling
from music_synth.files import locked, whole_folder

Builder = TypeVar("Builder", bound=tfds.core.DatasetBuilder)


class CorpusBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A tfds data set of a corpus. Its class attributes and `job` say of what."""

    VERSION = tfds.core.Version(VERSION)
    corpus: Corpus
    job: Job  # set before it builds

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record.features(), description=f"{self.name}: {self.corpus.title}", disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        # tfds knows no empty split.
        there = {item.split for _, item, path in self._numbered() if self.job.beam or path.exists()}
        return {split: self._generate_examples(split) for split in SPLITS if split in there}

    def _generate_examples(self, split: str):
        numbered = [one for one in self._numbered() if one[1].split == split]
        if not self.job.beam:
            return (stored(*one) for one in numbered if one[2].exists())
        import apache_beam as beam

        job = dataclasses.replace(self.job, recordings=())  # workers are sent it again and again
        return beam.Create(numbered) | beam.FlatMap(functools.partial(keep_and_store, job))

    def _numbered(self) -> list[tuple[int, Recording, Path]]:
        return list(zip(itertools.count(), self.job.recordings, self.job.files))


@functools.cache
def builder_class(name: str) -> type[CorpusBuilder]:
    """The builder of a corpus; tfds takes its name from the class's."""
    return type(
        name.title().replace("_", ""), (CorpusBuilder,), {"corpus": corpus(name), "name": name, "__module__": __name__}
    )


def stored(number: int, item: Recording, path: Path) -> tuple[int, dict]:
    """Gives key and record of a recording that is kept in a file."""
    return number, record.make_record(item.id, *read_kept(path), item.timbre)


def keep_and_store(job: Job, numbered: tuple[int, Recording, Path]) -> list[tuple[int, dict]]:
    """Does a Beam worker's part: no record where the recording is bad and may be."""
    number, item, path = numbered
    complaint = keep(job.name, item, path)
    if complaint is None:
        return [stored(*numbered)]
    job.complain(number, complaint)
    if not job.skip_bad:
        raise ValueError(complaint)
    return []


def is_built(name: str, data_dir: Path) -> bool:
    """Says whether a corpus was built in `data_dir`."""
    return _open_builder(name, data_dir).data_path.exists()


def open_built(name: str, data_dir: Path) -> CorpusBuilder:
    """Gives the builder of a corpus that was built. UserError if it was not."""
    made = _open_builder(name, data_dir)
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
    check_found(name, found, skip_bad)
    folder = data_dir / f".{name}-{VERSION}"
    job = Job(name, tuple(found.recordings), folder, skip_bad, beam_options is not None)
    with telling(f"cannot build {name} in {data_dir}", "; what is done is kept"):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):  # another process may build the same
            if is_built(name, data_dir):
                return open_built(name, data_dir)
            made = _build(job, data_dir, workers or os.cpu_count() or 1, beam_options)
            left_out = [*found.missing, *job.complaints()]
            if left_out:
                print(f"{len(left_out)} items of {name} were left out:")
                for line in left_out:
                    print(f"  {line}")
            shutil.rmtree(folder, ignore_errors=True)
    return made


def _build(job: Job, data_dir: Path, workers: int, beam_options: Sequence[str] | None) -> CorpusBuilder:
    """Reads the recordings and lets tfds gather them; what Beam wraps in many lines comes out as one complaint."""
    for stale in (*job.folder.glob("*.bad"), *job.folder.glob(".*")):
        stale.unlink()
    if beam_options is None:
        load_all(job, workers)
        if not any(path.exists() for path in job.files):
            bad = job.complaints()
            raise UserError(f"no recording of {job.name} can be read; the first of {len(bad)}: {bad[0]}")
    try:
        return build_whole(functools.partial(_open_builder, job.name), data_dir, beam_options, job=job)
    except (UserError, OSError):
        raise
    except Exception as error:
        bad = [] if job.skip_bad else job.complaints()
        told = bad[0] if bad else f"{type(error).__name__}: {error}"
        raise UserError(f"{told} (building {job.name} in {data_dir}; what is done is kept)") from error


def _open_builder(name: str, data_dir: Path) -> CorpusBuilder:
    return builder_class(name)(data_dir=os.fspath(data_dir))


def build_whole(
    open_builder: Callable[[Path], Builder],
    data_dir: Path,
    beam_options: Sequence[str] | None = None,
    **attributes: Any,
) -> Builder:
    """Lets tfds build a data set, quietly, on the disk before it takes its name; what a killed build left is removed.

    Args:
      open_builder: of the data set in a folder of data sets.
      beam_options: see `build`.
      attributes: what the builder is given while it builds.

    Raises:
      OSError: it cannot be written. Nothing is left under the data set's name.
    """
    target = Path(open_builder(data_dir).data_path)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()), whole_folder(target) as part:
            made = open_builder(part)
            for name, value in attributes.items():
                setattr(made, name, value)
            made.download_and_prepare(download_config=_download_config(beam_options))
            others = list(part.iterdir())
            for path in Path(made.data_path).iterdir():
                path.rename(part / path.name)
            for path in others:
                shutil.rmtree(path)
    except OSError:
        if not target.exists():  # else another process was faster
            raise
    finally:
        tfds.enable_progress_bar()
        with contextlib.suppress(OSError):  # it goes only when it is empty
            target.parent.rmdir()
    return open_builder(data_dir)


def _download_config(beam_options: Sequence[str] | None) -> tfds.download.DownloadConfig:
    if beam_options is None:
        return tfds.download.DownloadConfig()
    import apache_beam as beam

    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what matters comes as an exception
    options = beam.options.pipeline_options.PipelineOptions(list(beam_options))
    return tfds.download.DownloadConfig(beam_options=options)
