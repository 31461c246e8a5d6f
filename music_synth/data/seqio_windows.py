"""The training windows in seqio tasks and mixtures, and the converter of their features to those of a batch."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from music_synth.audio.mel import MIN_LOG_MEL
from music_synth.data import tasks
from music_synth.data.examples import Batch, Piece, SegmentSettings, data_set_of, num_strata
from music_synth.data.preprocessors import BLOCK_STARTS
from music_synth.data.quiet_tensorflow import closed_at_exit, seqio, tf
from music_synth.errors import UserError

ROUND_EXAMPLES = 2048  # training examples of a round at least, see SeqioWindows
IN_MEMORY_BYTES = 2**31  # data sets up to this size on disk are held in memory as mel, in less than half of it
ROUND_STREAM, ORDER_STREAM = 0, 1  # random streams of a seed: within a round, and which files it is about
PREFETCH_BATCHES = 4


class NoteToMelFeatureConverter(seqio.FeatureConverter):
    """Task features to the features of a batch.

    inputs [n] -> note_tokens [N], zeros appended. targets [t, M] -> mel [T, M], silence appended, and mel_mask [T]
    (True throughout: in training silence is a target too). targets_context [c, M], if the task has it ->
    context_mel [C, M], the frames at the front, and context_mask [C].
    """

    def __init__(self, context: bool = True):
        spec = seqio.FeatureConverter.FeatureSpec
        self.TASK_FEATURES = {"inputs": spec(tf.int32), "targets": spec(tf.float32, rank=2)}
        self.MODEL_FEATURES = {
            "note_tokens": spec(tf.int32),
            "mel": spec(tf.float32, rank=2),
            "mel_mask": spec(tf.bool),
        }
        if context:
            self.TASK_FEATURES["targets_context"] = spec(tf.float32, rank=2)
            self.MODEL_FEATURES["context_mel"] = spec(tf.float32, rank=2)
            self.MODEL_FEATURES["context_mask"] = spec(tf.bool)
        self._context = context
        super().__init__(pack=False, apply_length_check=False)  # `pad` checks lengths, at no cost

    def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]) -> Mapping[str, int]:
        lengths = {"note_tokens": task_feature_lengths["inputs"]}
        lengths["mel"] = lengths["mel_mask"] = task_feature_lengths["targets"]
        if self._context:
            lengths["context_mel"] = lengths["context_mask"] = task_feature_lengths["targets_context"]
        return lengths

    def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]) -> tf.data.Dataset:
        def convert(example):
            mel, present = pad_frames(example["targets"], task_feature_lengths["targets"])
            batch = {
                "note_tokens": pad(example["inputs"], task_feature_lengths["inputs"], 0),
                "mel": mel,
                "mel_mask": tf.ones_like(present),
            }
            if self._context:
                context = pad_frames(example["targets_context"], task_feature_lengths["targets_context"])
                batch["context_mel"], batch["context_mask"] = context
            return batch

        return ds.map(convert, tf.data.AUTOTUNE)


def pad(tensor: tf.Tensor, length: int, value) -> tf.Tensor:
    """`tensor` [n, ...] with `value` appended along its first axis, [length, ...]."""
    paddings = [[0, length - tf.shape(tensor)[0]]] + [[0, 0]] * (tensor.shape.rank - 1)
    padded = tf.pad(tensor, paddings, constant_values=value)
    return tf.ensure_shape(padded, [length, *tensor.shape[1:]])


def pad_frames(frames: tf.Tensor, length: int) -> tuple[tf.Tensor, tf.Tensor]:
    """frames [t, M] with silence appended, [length, M], and a mask [length] of the frames proper."""
    return pad(frames, length, MIN_LOG_MEL), tf.range(length) < tf.shape(frames)[0]


@dataclass(frozen=True)
class Stream:
    """A task as a part of the training data."""

    task: seqio.Task
    share: float  # of all examples
    num_windows: int  # of an epoch, at most
    num_files: int  # into which its blocks are divided, or may be


def plan_rounds(streams: Sequence[Stream], min_examples: int) -> tuple[int, list[int]]:
    """Plans how long a round is, and into how many groups of files each task falls.

    A round draws, from each task, as many examples as one group of its files has, or more; so everything is seen
    equally often in the long run. Groups are as many as that allows, lest rounds become long.

    Returns:
      Examples of a round, and the number of groups of each stream.
    """
    smallest = [stream.num_windows / stream.num_files / stream.share for stream in streams]
    examples = max(min_examples, math.ceil(max(smallest)))
    return examples, [
        min(stream.num_files, math.ceil(stream.num_windows / (stream.share * examples))) for stream in streams
    ]


def seed_of(*numbers: int) -> int:
    """One seed of 32 bits, for tf.data, from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def readable(elements: Iterator, name: str) -> Iterator:
    """Elements of a dataset; what goes wrong in its graph becomes one line of a `UserError`."""
    try:
        yield from elements
    except tf.errors.OpError as error:
        said = re.sub(r"{{.*?}}|\[Op:.*|\[\[.*", "", error.message)  # nodes of the graph
        reason = next((line.strip() for line in said.splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"task {name!r} cannot be read: {reason} (a damaged cache can be written anew)") from error


def open_provider(settings: SegmentSettings, on_skip: tasks.SkipHook) -> tasks.Provider:
    """Registers a task of this package, or one of its mixtures, builds what can be built of it, and returns it.

    on_skip: as of `tasks.register_tasks`.

    Raises:
      UserError: as of `tasks.registered` and `tasks.build`; somebody else registered the task for another tokenizer.
    """
    name, tokenizer = settings.task, settings.tokenizer
    data_set = data_set_of(name)
    tasks.register_tasks(
        tokenizer,
        names=[data_set] if tasks.is_data_set(data_set) else list(tasks.DATA_SETS),
        empty_context=settings.empty_context,
        data_dir=settings.data_dir,
        on_skip=on_skip,
    )
    provider = tasks.registered(name, settings.context)
    vocabulary = provider.output_features["inputs"].vocabulary
    if vocabulary.vocab_size != tokenizer.vocabulary.num_embeddings:
        raise UserError(
            f"task {name!r} was registered for {vocabulary.vocab_size} token ids, the tokenizer has "
            f"{tokenizer.vocabulary.num_embeddings}: register it with the same Tokenizer settings"
        )
    for data_set in {data_set_of(task.name) for task in seqio.get_subtasks(provider)}:
        if tasks.is_data_set(data_set):
            tasks.build(data_set, settings.data_dir)
    return provider


class SeqioWindows:
    """The training windows, and the pieces, of a seqio task or mixture.

    Training runs in rounds of a few thousand examples. A round is a pipeline of its own over a part of every task's
    files, seeded by (seed, number of the round); a task's parts take turns in a random order. So batch k is a
    function of (seed, k), and to resume means to begin the step's round and to pass over at most a round: seconds,
    however long the run was. seqio shuffles examples that are complete; there is no cheaper place to skip at.

    A task that is small and not cached offline is turned into mel once and stays in memory. A large one must be
    cached: its mel would be computed anew in every epoch.
    """

    def __init__(self, settings: SegmentSettings, on_skip: Callable[[str, float], None]):
        """Opens the task, building its data set if it can.

        Args:
          on_skip: told (piece id, seconds) of windows that are passed over for having too many tokens; the pipeline
            works ahead, so a few of them may be of batches to come.
        """
        self._settings = settings
        self._provider = open_provider(settings, on_skip)
        if settings.cache_dir:
            tasks.use_cache(self._provider, settings.cache_dir)
        self._streams: list[Stream] = []  # filled when training begins

    @closed_at_exit
    def train_batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, ... without end; each is a function of (seed, number)."""
        self._streams = self._streams or self._make_streams()
        examples, groups = plan_rounds(self._streams, ROUND_EXAMPLES)
        steps = -(-examples // self._settings.batch_size)
        first_round, skip = divmod(start_step, steps)
        batches = self._round(first_round, groups, skip, steps)
        for number in itertools.count(first_round + 1):
            following: Iterator[Batch] | None = None
            count = skip
            for batch in batches:
                yield batch
                count += 1
                if following is None and 2 * count >= steps:  # early enough for its first batches to be ready
                    following = self._round(number, groups, 0, steps)
            if count < steps:
                raise UserError(
                    f"{self._provider.name!r} ran out of training examples after {count} of {steps} batches: it found "
                    "only empty files; cache it in fewer files"
                )
            batches, skip = following or self._round(number, groups, 0, steps), 0

    def pieces(self, split: str, audio: bool = True) -> Iterator[Piece]:
        """Reads the whole pieces of `split`, with audio: of each task in order of their names, as they are stored."""
        return tasks.pieces(self._provider, split)

    def _make_streams(self) -> list[Stream]:
        subtasks = seqio.get_subtasks(self._provider)
        rates = [1.0] if subtasks == [self._provider] else [self._provider.get_rate(task) for task in subtasks]
        return [self._make_stream(task, rate / sum(rates)) for task, rate in zip(subtasks, rates, strict=True)]

    def _make_stream(self, task: seqio.Task, share: float) -> Stream:
        windows_per_block = num_strata(BLOCK_STARTS, self._settings.tokenizer.segment_frames)
        if self._settings.cache_dir:
            num_blocks = task.get_cached_stats("train")["examples"]
            files = tf.io.gfile.glob(f"{task.cache_dir}/train.tfrecord-*")
            return Stream(task, share, num_blocks * windows_per_block, max(1, len(files)))
        if tasks.stored_bytes(task) > IN_MEMORY_BYTES:
            raise UserError(
                f"task {task.name!r} is too large to be read without a cache: write one, or a prepared folder, with "
                "python -m music_synth.prepare_data"
            )
        task = tasks.in_memory(task)
        num_blocks = task.num_input_examples("train")
        return Stream(task, share, num_blocks * windows_per_block, num_blocks)

    def _round(self, number: int, groups: Sequence[int], skip: int, steps: int) -> Iterator[Batch]:
        """Batches `skip` .. `steps` of round `number`. They are worked on from now on."""
        lengths = {"inputs": self._settings.tokenizer.max_tokens, "targets": self._settings.tokenizer.segment_frames}
        if self._settings.context_frames:
            lengths["targets_context"] = self._settings.context_frames
        seed = seed_of(self._settings.seed, ROUND_STREAM, number)
        datasets = []
        for stream, num_groups in zip(self._streams, groups, strict=True):
            epoch, position = divmod(number, num_groups)
            order = np.random.default_rng([self._settings.seed, ORDER_STREAM, epoch]).permutation(num_groups)
            dataset = stream.task.get_dataset(
                lengths,
                split="train",
                use_cached=bool(self._settings.cache_dir),
                shuffle=True,
                shuffle_buffer_size=1,  # examples are shuffled below, where the round's end is known
                seed=seed,
                shard_info=seqio.ShardInfo(int(order[position]), num_groups),
                num_epochs=None,
                trim_output_features=False,  # there is nothing to trim
                try_in_mem_cache=False,  # it would keep up to 10,000 records, whatever their size
            )
            datasets.append(dataset.map(lambda example: {name: example[name] for name in lengths}))
        shares = [stream.share for stream in self._streams]
        dataset = tf.data.Dataset.sample_from_datasets(datasets, shares, seed) if len(datasets) > 1 else datasets[0]
        rows = self._settings.batch_size
        dataset = dataset.take(steps * rows).shuffle(tasks.SHUFFLE_WINDOWS, seed).skip(skip * rows)
        dataset = NoteToMelFeatureConverter(context=bool(self._settings.context_frames))(dataset, lengths)
        dataset = dataset.batch(rows, drop_remainder=True).prefetch(PREFETCH_BATCHES)
        options = tf.data.Options()
        options.experimental_warm_start = True
        return readable(dataset.with_options(options).as_numpy_iterator(), self._provider.name)
