"""The embedded data set as a tfds data set, composed and rendered on first use.

    builder = synthetic.prepare()           # 40 minutes of training pieces, 5 each for validation and test
    builder.as_dataset(split="train")

Its size is its configuration: `synthetic/40min` (the default), `synthetic/400min`, `synthetic/5min-seed1`, any
number of minutes; `synthetic/120min-seed1-halfdry` has every other piece without reverb, for training inverters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from tqdm import tqdm

from music_synth.data import quiet_tensorflow  # noqa: F401  before tfds loads TensorFlow
from music_synth.data.data_dir import default_data_dir
from music_synth.data.datasets import record
from music_synth.data.datasets.corpus import SPLITS
from music_synth.data.synthetic import PieceSpec, make_pieces, plan_split
from music_synth.errors import UserError
from music_synth.midi.notes import read_midi

DEFAULT_MINUTES = 40


@dataclasses.dataclass
class SyntheticConfig(tfds.core.BuilderConfig):
    """Minutes of music in the training split (validation and test: an eighth each) and the composer's seed."""

    minutes: float = DEFAULT_MINUTES
    seed: int = 0
    half_dry: bool = False

    @classmethod
    def of(cls, minutes: float = DEFAULT_MINUTES, seed: int = 0, half_dry: bool = False) -> SyntheticConfig:
        """The configuration; its name says all of it."""
        plan_split("train", minutes, seed)  # complains about sizes that make no sense
        name = f"{minutes:g}min" + (f"-seed{seed}" if seed else "") + "-halfdry" * half_dry
        description = f"{minutes:g} minutes, seed {seed}" + ", half of it without reverb" * half_dry
        return cls(name=name, minutes=minutes, seed=seed, half_dry=half_dry, description=description)

    def plan(self, split: str) -> list[PieceSpec]:
        return plan_split(split, self.minutes, self.seed, self.half_dry)

    @classmethod
    def from_name(cls, name: str) -> SyntheticConfig | None:
        """The configuration of that name; None if it is none."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)min(?:-seed(\d+))?(-halfdry)?", name)
        return cls.of(float(match[1]), int(match[2] or 0), bool(match[3])) if match else None


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Pieces for piano, guitar, strings, winds, bands and mixed ensembles, composed and rendered by program.

    Records are those of `record.features`.
    """

    VERSION = tfds.core.Version("1.0.0")  # raise it when the composer, its sound or the record change
    BUILDER_CONFIGS = [SyntheticConfig.of()]
    bar: tqdm | None = None  # counts pieces, where `prepare` shows one

    @classmethod
    def get_builder_config(cls, name, version=None):
        """Any configuration that a name describes, besides those listed."""
        return super().get_builder_config(name, version) or SyntheticConfig.from_name(name)

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record.features(), description=type(self).__doc__, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        specs = self.builder_config.plan(split)
        workers = min(4, os.cpu_count() or 1)
        for index, (spec, midi, audio) in enumerate(make_pieces(specs, workers)):
            yield index, record.make_record(spec.id, read_midi(midi, as_published=True), audio)
            if self.bar is not None:
                self.bar.update()


def prepare(
    minutes: float = DEFAULT_MINUTES,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    progress: bool = True,
    half_dry: bool = False,
) -> Synthetic:
    """The builder of a data set that is on disk; what is not there yet is built now (a minute or two).

    A build takes its name only when it is whole: one that is killed leaves nothing to be mistaken for it.

    Args:
      minutes: of the training split.
      seed: of the composer; the same seed gives the same bytes.
      data_dir: folder of data sets; the default is `default_data_dir()`.
      progress: show a progress bar while building.
      half_dry: render every other piece without reverb.

    Raises:
      UserError: no room or no permission in `data_dir`, FluidSynth missing, or a size that makes no sense.
    """
    folder = Path(data_dir) if data_dir is not None else default_data_dir()
    config = SyntheticConfig.of(minutes, seed, half_dry)
    builder = Synthetic(config=config.name, data_dir=os.fspath(folder))
    if builder.data_path.exists():
        return builder
    total = sum(len(config.plan(split)) for split in SPLITS)
    description = f"composing and rendering synthetic/{config.name}"
    try:
        with _quiet_tfds(), tqdm(desc=description, total=total, unit="piece", disable=not progress) as builder.bar:
            with tempfile.TemporaryDirectory() as downloads:  # tfds makes the folder, though nothing goes there
                builder.download_and_prepare(download_dir=downloads)
    except OSError as error:
        if not builder.data_path.exists():  # else another process was faster
            raise UserError(f"cannot build the synthetic data set in {folder}: {error.strerror or error}") from error
        return Synthetic(config=config.name, data_dir=os.fspath(folder))
    finally:
        builder.bar = None
    return builder


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Without tfds's own bars, which know no total, and its talk of downloads."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
