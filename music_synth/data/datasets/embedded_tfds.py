"""The embedded data set as a tfds data set, composed and rendered on first use.

    builder = embedded_tfds.prepare(Edition())  # 40 minutes of training pieces, 5 each for validation and test
    builder.as_dataset(split="train")

Its size is its configuration: `synthetic/40min` (the default), `synthetic/400min`, `synthetic/5min-seed1`, any
number of minutes; `synthetic/120min-seed1-halfdry` has every other piece without reverb, for training inverters.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from music_synth.data.data_dir import default_data_dir
from music_synth.data.datasets import record
from music_synth.data.datasets.builder import build_whole
from music_synth.data.datasets.corpus import SPLITS
from music_synth.data.quiet_tensorflow import tfds
from music_synth.data.synthetic import VERSION, Edition
from music_synth.errors import UserError, telling


@dataclasses.dataclass
class SyntheticConfig(tfds.core.BuilderConfig):
    """An edition, as tfds names it."""

    edition: Edition = dataclasses.field(default_factory=Edition)

    @classmethod
    def of(cls, edition: Edition) -> SyntheticConfig:
        return cls(name=edition.name, edition=edition, description=edition.description)


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Pieces for piano, guitar, strings, winds, bands and mixed ensembles, composed and rendered by program.

    Records are those of `record.features`.
    """

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [SyntheticConfig.of(Edition())]
    bar: tqdm = tqdm(disable=True)  # counts pieces

    @classmethod
    def get_builder_config(cls, name, version=None):
        """Any configuration that a name describes, besides those listed."""
        try:
            return super().get_builder_config(name, version) or SyntheticConfig.of(Edition.named(name))
        except UserError:
            return None

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=record.features(), description=type(self).__doc__, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        for index, piece in enumerate(self.builder_config.edition.pieces(split, self.bar)):
            yield index, record.make_record(*piece)


def prepare(edition: Edition, data_dir: str | os.PathLike | None = None) -> Synthetic:
    """Gives the builder of a data set that is on disk; what is not there yet is built now (a minute or two).

    A build takes its name only when it is whole: one that is killed leaves nothing to be mistaken for it.

    Args:
      data_dir: folder of data sets; the default is `default_data_dir()`.

    Raises:
      UserError: no room or no permission in `data_dir`, or FluidSynth missing.
    """
    folder = Path(data_dir) if data_dir is not None else default_data_dir()

    def open_builder(folder: Path) -> Synthetic:
        return Synthetic(config=edition.name, data_dir=os.fspath(folder))

    if (made := open_builder(folder)).data_path.exists():
        return made
    with telling(f"cannot build the synthetic data set in {folder}"), edition.bar() as bar:
        return build_whole(open_builder, folder, bar=bar)
