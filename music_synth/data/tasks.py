"""seqio tasks over the data sets, with and without context, and mixtures of them.

Nothing is registered on import: call `register_tasks`. For seqio's own tools, which find tasks by importing a
module, there is `music_synth.data.seqio_tasks`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from music_synth.data import preprocessors
from music_synth.data.data_dir import default_data_dir
from music_synth.data.datasets import builder, embedded_tfds, reading
from music_synth.data.datasets.corpus import SPLITS
from music_synth.data.examples import NO_CONTEXT, Piece, data_set_of
from music_synth.data.note_sequences import timbre_of_note_sequence
from music_synth.data.quiet_tensorflow import closed_at_exit, seqio, tf, tfds
from music_synth.data.synthetic import Edition
from music_synth.errors import UserError
from music_synth.evaluation import segment_metrics
from music_synth.midi.tokenizer import Tokenizer

MEGA = ("maestro", "slakh", "cerberus4", "guitarset", "musicnet", "urmp")  # the mixture of the published models
MIXING_EXPONENT = 0.3  # published: a task of n examples is drawn with probability proportional to n^0.3
SHUFFLE_RECORDS = 32  # buffer of whole pieces, 10 MB for five minutes of each
SHUFFLE_WINDOWS = 512  # buffer of windows, up to 134 MB; a block gives about eight neighbors

MAX_AUDIO_BYTES = 2**32  # of a split that is held in memory to train an inverter, 37 hours
Provider: TypeAlias = "seqio.Task | seqio.Mixture"
SkipHook = Callable[[str, float], None]


def build_synthetic(config: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    return embedded_tfds.prepare(Edition.named(config), data_dir)


@dataclass(frozen=True)
class DataSet:
    """A data set of this package."""

    version: str  # of its tfds builder
    build: Callable[[str, Path], tfds.core.DatasetBuilder]  # (configuration or "", data_dir); builds what it can
    trim: bool = False  # cut overlapping notes of one pitch in training


def open_corpus(name: str, config: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    if config:
        raise UserError(f"{name} comes in one size: leave out {config!r}")
    return builder.open_built(name, data_dir)


DATA_SETS = {"synthetic": DataSet(str(embedded_tfds.Synthetic.VERSION), build_synthetic)} | {
    name: DataSet(reading.VERSION, functools.partial(open_corpus, name), reading.corpus(name).trim)
    for name in reading.CORPORA
}


def build(name: str, data_dir: str | Path | None = None) -> tfds.core.DatasetBuilder:
    """The builder of a data set that is on disk; what is not there yet is built now, with a progress bar.

    Args:
      name: of a data set, "synthetic", or with a configuration of its builder, "synthetic:5min". seqio has no
        hyphens in names, so an underscore stands for them.
      data_dir: where data sets live (default: `default_data_dir()`).

    Raises:
      UserError: there is no such data set, or it cannot be built.
    """
    if not is_data_set(name):
        raise UserError(f"unknown data set {name!r}: choose from {', '.join(DATA_SETS)}")
    data_set, _, config = name.partition(":")
    return DATA_SETS[data_set].build(config.replace("_", "-"), Path(data_dir or default_data_dir()))


def is_data_set(name: str) -> bool:
    """Whether `name` is that of a data set of this package, perhaps with a configuration."""
    return name.partition(":")[0] in DATA_SETS


def register_tasks(
    tokenizer: Tokenizer | None = None,
    *,
    names: Sequence[str] | None = None,
    empty_context: float = 0.1,
    data_dir: str | Path | None = None,
    on_skip: SkipHook | None = None,
) -> list[str]:
    """Registers `<name>` and `<name>_nocontext` for data sets of this package, anew if they are there already.

    Nothing is built or read yet. A task or mixture that was fetched from seqio's registry before keeps the
    settings that it was made with.

    Args:
      tokenizer: default settings if None.
      names: as of `build`; every data set of this package if None.
      empty_context: share of training windows without context, see `music_synth.data.examples.SegmentSettings`.
      data_dir: see `build`.
      on_skip: told (piece id, seconds) of every window that has too many tokens.

    Returns:
      The names of the tasks.
    """
    registered = []
    folder = Path(data_dir or default_data_dir())
    for name in DATA_SETS if names is None else names:
        data_set, _, config = name.partition(":")
        source = RecordSource(
            tfds_name="/".join([data_set, *config.replace("_", "-").split()]) + f":{DATA_SETS[data_set].version}",
            tfds_data_dir=str(folder),
            splits=splits_of(data_set, folder),
            read_only=True,
        )
        registered += register_data_set(
            name, source, tokenizer, empty_context=empty_context, trim=DATA_SETS[data_set].trim, on_skip=on_skip
        )
    for suffix in ("", NO_CONTEXT):
        members = [name + suffix for name in MEGA]
        if set(members) <= set(registered):
            register_mixture("mega" + suffix, members)
            registered.append("mega" + suffix)
    return registered


def splits_of(data_set: str, data_dir: Path) -> tuple[str, ...]:
    """The splits of a data set: those that were built, or all if nothing was."""
    if data_set not in reading.CORPORA:
        return SPLITS
    made = builder.builder_class(data_set)(data_dir=str(data_dir))
    return tuple(split for split in SPLITS if split in (made.info.splits or SPLITS))


class RecordSource(seqio.TfdsDataSource):
    """A tfds data set, of which records are shuffled where tfds refuses to shuffle files.

    It does where the builder keeps the records in order.
    """

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> tf.data.Dataset:
        ordered = self.tfds_dataset.info.disable_shuffling
        dataset = super().get_dataset(split, shuffle and not ordered, seed, shard_info)
        return dataset.shuffle(SHUFFLE_RECORDS, seed=seed) if shuffle and ordered else dataset


def register_data_set(
    name: str,
    source: seqio.DataSource,
    tokenizer: Tokenizer | None = None,
    *,
    empty_context: float = 0.1,
    trim: bool = False,
    on_skip: SkipHook | None = None,
) -> list[str]:
    """Registers the tasks `name` and `name`_nocontext over a source of records {id, audio, sequence}.

    Their features are inputs (tokens), targets (log-mel) and, with context, targets_context (log-mel).

    Args:
      trim: cut overlapping notes of one pitch (Slakh and Cerberus4, as published).

    Returns:
      The two names.
    """
    tokenizer = tokenizer or Tokenizer()
    frames, margin = tokenizer.segment_frames, preprocessors.MARGIN_FRAMES
    if frames > margin:
        raise UserError(f"Tokenizer.segment_frames = {frames}: seqio tasks take at most {margin}")
    vocabulary = seqio.PassThroughVocabulary(size=tokenizer.vocabulary.num_embeddings)
    tokens = seqio.Feature(vocabulary=vocabulary, add_eos=False, dtype=tf.int32)  # they come with their EOS
    mel = seqio.ContinuousFeature(dtype=tf.float32, rank=2)
    features = {"inputs": tokens, "targets": mel}
    for suffix, context_frames in (("", frames), (NO_CONTEXT, 0)):
        task = seqio.Task(
            name + suffix,
            source=source,
            preprocessors=[
                preprocessors.add_mel,
                functools.partial(preprocessors.cut_blocks, trim=trim),
                seqio.CacheDatasetPlaceholder(),
                preprocessors.draw_windows(frames, empty_context if context_frames else 0.0),
                preprocessors.cut_windows(tokenizer, context_frames, on_skip),
            ],
            output_features=features | ({"targets_context": mel} if context_frames else {}),
            postprocess_fn=segment_metrics.target_of,
            metric_fns=[segment_metrics.distances, functools.partial(segment_metrics.note_f1, tokenizer=tokenizer)],
            shuffle_buffer_size=SHUFFLE_WINDOWS,
        )
        if task.name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(task.name)
        seqio.TaskRegistry.add_provider(task.name, task)
    return [name, name + NO_CONTEXT]


def register_mixture(name: str, tasks: Sequence[str]) -> None:
    """Registers a mixture in which a task of n training records is drawn with a rate of n^MIXING_EXPONENT."""

    def rate(task: seqio.Task) -> float:
        return float(task.num_input_examples("train")) ** MIXING_EXPONENT

    if name in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove(name)
    seqio.MixtureRegistry.add(name, [(task, rate) for task in tasks])


def registered(name: str, context: bool = True) -> Provider:
    """Gives the registered task or mixture `name`, or the variant of it without context.

    Raises:
      UserError: there is none of that name, or it has no context although context is asked for.
    """
    names = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
    if not context and not name.endswith(NO_CONTEXT):
        name += NO_CONTEXT
    if name not in names:
        raise UserError(f"no task or mixture {name!r}: choose from {', '.join(names)}, or a prepared folder")
    provider = seqio.get_mixture_or_task(name)
    check_built(provider)
    if context and "targets_context" not in provider.output_features:
        raise UserError(f"task {name!r} has no context: set Feed.context = False, or choose another task")
    return provider


def check_built(provider: Provider) -> None:
    """UserError where a task of `provider` is about a corpus that was not built."""
    for task in seqio.get_subtasks(provider):
        name = data_set_of(task.name)
        if name in reading.CORPORA and isinstance(task.source, seqio.TfdsDataSource):
            builder.open_built(name, Path(task.source.tfds_dataset.data_dir or default_data_dir()))


def use_cache(provider: Provider, cache_dir: str | Path) -> None:
    """Lets seqio read the offline cache in `cache_dir`. UserError where a task of `provider` is not in it."""
    look_first_in(cache_dir)
    for task in seqio.get_subtasks(provider):
        if not (task.cache_dir or "").startswith(str(cache_dir)):
            raise UserError(
                f"task {task.name!r} is not cached in {cache_dir}: python -m music_synth.prepare_data writes the "
                "cache, or leave Feed.cache_dir out"
            )


def look_first_in(cache_dir: str | Path) -> None:
    """Puts a folder in front of those in which seqio looks for cached tasks."""
    others = [folder for folder in seqio.get_global_cache_dirs() if folder != str(cache_dir)]
    seqio.set_global_cache_dirs([str(cache_dir), *others])


def in_memory(task: seqio.Task) -> seqio.Task:
    """`task` with its training blocks held in memory. Their mel is computed here, once instead of every epoch."""
    records = task.source.get_dataset(split="train", shuffle=False)
    kinds = [type(step) for step in task.preprocessors]
    return task.replace(
        source=InMemorySource(task.preprocess_precache(records)),
        preprocessors=task.preprocessors[kinds.index(seqio.CacheDatasetPlaceholder) + 1 :],
    )


def stored_bytes(task: seqio.Task) -> int:
    """Size of the training records on disk; 0 if the source is not a tfds data set."""
    if not isinstance(task.source, seqio.TfdsDataSource):
        return 0
    return task.source.tfds_dataset.info.splits["train"].num_bytes


class InMemorySource(seqio.DataSource):
    """A training split that was read to its end once and stays in memory."""

    def __init__(self, dataset: tf.data.Dataset):
        self._dataset = dataset.cache()
        self._size = sum(1 for _ in self._dataset)  # a complete pass fills the cache
        super().__init__(splits=["train"], num_input_examples={"train": self._size})

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> Sequence[str]:
        return [str(index) for index in range(self._size)]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
    ) -> tf.data.Dataset:
        dataset = self._dataset
        if shard_info is not None:
            dataset = dataset.shard(shard_info.num_shards, shard_info.index)
        return dataset.shuffle(self._size, seed=seed) if shuffle else dataset


def pieces(provider: Provider, split: str) -> Iterator[Piece]:
    """The whole pieces of a split, with audio: task by task in order of their names, as they are stored.

    Raises:
      UserError: no task of `provider` has such a split.
    """
    holders = [task for task in seqio.get_subtasks(provider) if split in task.splits]
    if not holders:
        raise UserError(f"{provider.name!r} has no split {split!r}: choose from {', '.join(provider.splits)}")
    return itertools.chain.from_iterable(map(functools.partial(_pieces_of_task, split=split), holders))


@closed_at_exit
def _pieces_of_task(task: seqio.Task, split: str) -> Iterator[Piece]:
    if task.preprocessors[0] is not preprocessors.add_mel:
        raise ValueError(f"task {task.name!r} was not made by register_data_set: its first step is not add_mel")
    trim = task.preprocessors[1].keywords["trim"]
    dataset = preprocessors.add_mel(task.source.get_dataset(split=split, shuffle=False))
    for piece in dataset.as_numpy_iterator():
        notes = preprocessors.notes_of_sequence(piece["sequence"], trim)
        timbre = timbre_of_note_sequence(piece["sequence"])
        yield Piece(piece["id"].decode(), notes, piece["mel"], piece["audio"], timbre)


def pieces_in_memory(name: str, split: str, data_dir: str | Path | None = None) -> Iterator[Piece]:
    """`pieces` of a data set, built first if it can be. UserError if it is too large to hold."""
    data_set = build(data_set_of(name), data_dir).info
    if split in data_set.splits and data_set.splits[split].num_bytes > MAX_AUDIO_BYTES:
        raise UserError(
            f"the audio of {name!r} is too large to be held in memory: train on a folder written by"
            f" python -m music_synth.prepare_data {name} --audio --out FOLDER"
        )
    register_tasks(names=[data_set_of(name)], data_dir=data_dir)
    return pieces(registered(data_set_of(name)), split)
