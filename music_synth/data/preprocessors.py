"""The steps from a stored record to a training example: pure NumPy functions, and the tf.data steps made of them.

    record   {id, audio, sequence}                            what every tfds builder stores
      add_mel
    piece    {id, audio [S] f32, sequence, mel [T, M] f32}    evaluation takes whole pieces from here
      cut_blocks
    block    {id, mel, events, first_frame, first_start, num_starts}
      (offline cache: nothing up to here depends on the tokenizer or on chance)
      draw_windows(segment_frames, empty_context)
             {..., starts [w], use_context [w]}               the windows of the block
      cut_windows(tokenizer, context_frames, on_skip)
    example  {inputs [n] i32, targets [t, M] f32, targets_context [c, M] f32}

Notes change their form four times from record to batch: NoteSequence, `Note`s, `Events` (whose array a block stores),
tokens, padded tokens.

A block is a stretch of a piece that is read, and cached, in one bite: up to 2,048 frames at which a window may
start, and 512 before and after them for context and target. Pieces are cut into blocks only so that a symphony
is not read for the sake of five seconds of it; every block is cut from the mel of the whole piece, so windows
that cross a border are the same as if there were none. Published, pieces of 2,000 frames know nothing beyond
their borders.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np

from music_synth.audio.io import audio_from_int16
from music_synth.audio.mel import NUM_MELS, log_mel
from music_synth.data.examples import num_strata, stratified_start
from music_synth.data.note_sequences import parse_note_sequence
from music_synth.data.quiet_tensorflow import seqio, tf
from music_synth.midi.notes import Note, apply_sustain, trim_overlaps
from music_synth.midi.segments import FRAME_RATE, STEPS_PER_FRAME, SegmentTooLong
from music_synth.midi.tokenizer import Events, Tokenizer
from music_synth.midi.vocabulary import NUM_PITCHES

BLOCK_STARTS = 2048  # frames of a block at which a window may start
MARGIN_FRAMES = 512  # frames of a block before the first start and after the last; the longest segment
MAX_SKIPPED = 1000  # windows with too many tokens, one after the other
EVENT_COLUMNS = len(dataclasses.fields(Events))
FRAME_BYTES = 2 * NUM_MELS  # of a mel in float16

Dataset: TypeAlias = "tf.data.Dataset"


# --- NumPy ---


def notes_of_sequence(sequence: bytes, trim: bool = False) -> list[Note]:
    """Notes of a serialized NoteSequence; pedal movements, if it holds any, are applied.

    Args:
      trim: cut an earlier note of the same pitch, program and drum flag where the next one begins.
    """
    notes, pedals = parse_note_sequence(sequence)
    if pedals:
        notes = apply_sustain(notes, pedals)
    return trim_overlaps(notes) if trim else notes


def float_audio(audio: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] from floats or 16-bit integers."""
    if np.issubdtype(audio.dtype, np.integer):
        return audio_from_int16(audio)
    return audio.astype(np.float32)


def events_between(events: Events, first_frame: int, end_frame: int) -> np.ndarray:
    """Gives those events of a piece that the windows inside [first_frame, end_frame) need, in order, int32 [E, 6].

    Besides the events in that stretch, the last earlier one of every program and pitch: it says what sounds on.
    """
    first, end = np.searchsorted(events.step, [first_frame * STEPS_PER_FRAME, end_frame * STEPS_PER_FRAME])
    pitched = np.flatnonzero(events.is_drum[:first] == 0)[::-1]  # latest first
    key = events.program[pitched] * NUM_PITCHES + events.pitch[pitched]
    _, latest = np.unique(key, return_index=True)
    return events.to_array()[np.concatenate([np.sort(pitched[latest]), np.arange(first, end)])]


def blocks_of_piece(mel: np.ndarray, events: Events) -> Iterator[tuple[bytes, bytes, int, int, int]]:
    """Cuts a piece, of mel [T, M], into equal blocks of at most BLOCK_STARTS possible starts.

    Yields:
      mel (float16 bytes) of frames first_frame and on, events (int32 bytes), first_frame, the first possible
      start (counted in the block's frames), the number of possible starts.
    """
    num_blocks = -(-len(mel) // BLOCK_STARTS)
    bounds = [len(mel) * i // num_blocks for i in range(num_blocks + 1)] if num_blocks else []
    for start, end in itertools.pairwise(bounds):
        first_frame = max(0, start - MARGIN_FRAMES)
        part = mel[first_frame : end + MARGIN_FRAMES].astype(np.float16)
        needed = events_between(events, start, end + MARGIN_FRAMES)
        yield part.tobytes(), needed.tobytes(), first_frame, start - first_frame, end - start


def window_starts(
    seed: Sequence[int] | np.ndarray, first_start: int, num_starts: int, segment_frames: int
) -> np.ndarray:
    """One random start from each part of a block that is about a segment long; int32 [number of parts]."""
    rng = np.random.default_rng(seed)
    strata = num_strata(num_starts, segment_frames)
    starts = [stratified_start(rng, stratum, strata, num_starts) for stratum in range(strata)]
    return np.array(starts, np.int32) + np.int32(first_start)


# --- tf.data ---

AUDIO_SPEC = tf.TensorSpec([None], tf.float32)
MEL_SPEC = tf.TensorSpec([None, NUM_MELS], tf.float32)
BLOCK_SPEC = {
    "mel": tf.TensorSpec([None], tf.string),
    "events": tf.TensorSpec([None], tf.string),
    "first_frame": tf.TensorSpec([None], tf.int32),
    "first_start": tf.TensorSpec([None], tf.int32),
    "num_starts": tf.TensorSpec([None], tf.int32),
}


def in_graph(function: Callable, specs: Sequence[tf.TensorSpec], *tensors: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Calls a NumPy function inside a tf.data graph; its results have the dtypes and shapes of `specs`."""
    results = tf.numpy_function(function, tensors, [spec.dtype for spec in specs], stateful=False)
    for result, spec in zip(results, specs, strict=True):
        result.set_shape(spec.shape)
    return tuple(results)


def add_mel(dataset: Dataset) -> Dataset:
    """Records to pieces: audio as floats, and its log-mel by the definition that everything else uses too."""

    def measure(audio: np.ndarray):
        audio = float_audio(audio)
        return audio, log_mel(audio, xp=np)

    def step(record):
        audio, mel = in_graph(measure, [AUDIO_SPEC, MEL_SPEC], record["audio"])
        return {"id": record["id"], "sequence": record["sequence"], "audio": audio, "mel": mel}

    return dataset.map(step, tf.data.AUTOTUNE)


def cut_blocks(dataset: Dataset, trim: bool = False) -> Dataset:
    """Pieces to blocks (see above); the audio ends here."""

    def cut(mel: np.ndarray, sequence: bytes):
        blocks = blocks_of_piece(mel, Events.from_notes(notes_of_sequence(sequence, trim)))
        mels, events, *numbers = zip(*blocks, strict=True) if len(mel) else [()] * 5
        return np.array(mels, object), np.array(events, object), *(np.array(n, np.int32) for n in numbers)

    def step(piece):
        results = in_graph(cut, list(BLOCK_SPEC.values()), piece["mel"], piece["sequence"])
        columns = dict(zip(BLOCK_SPEC, results, strict=True))
        return columns | {"id": tf.fill(tf.shape(columns["first_frame"]), piece["id"])}

    return dataset.map(step, tf.data.AUTOTUNE).unbatch()


def draw_windows(segment_frames: int, empty_context: float) -> Callable[[Dataset], Dataset]:
    """Step: adds to blocks their windows, about one a segment, at random starts; a share is to have no context."""

    def draw(seed: np.ndarray, first_start: np.ndarray, num_starts: np.ndarray):
        starts = window_starts(seed, int(first_start), int(num_starts), segment_frames)
        use_context = np.random.default_rng([*seed, 1]).random(len(starts)) >= empty_context
        return starts, use_context

    @seqio.map_over_dataset(num_seeds=1)
    def step(block, seed):
        seed = tf.bitcast(tf.cast(seed, tf.int32), tf.uint32)
        specs = [tf.TensorSpec([None], tf.int32), tf.TensorSpec([None], tf.bool)]
        starts, use_context = in_graph(draw, specs, seed, block["first_start"], block["num_starts"])
        return block | {"starts": starts, "use_context": use_context}

    return step


def cut_windows(
    tokenizer: Tokenizer, context_frames: int, on_skip: Callable[[str, float], None] | None = None
) -> Callable[[Dataset], Dataset]:
    """Step: blocks to examples with the features `inputs`, `targets` and (context_frames > 0) `targets_context`.

    Windows with more than max_tokens tokens are left out, after on_skip(piece id, seconds) has been told. Should
    that happen MAX_SKIPPED times in a row, it is an error, lest an endless dataset be searched for ever.

    Python's lock is taken for the tokens alone, once a block: TensorFlow's threads cut the mel, and they may be many.
    """
    skipped = 0  # in a row

    def tokenize(piece, events, first_frame, starts):
        nonlocal skipped
        events = Events.from_array(np.frombuffer(events, np.int32).reshape(-1, EVENT_COLUMNS))
        tokens = []
        for start in (first_frame + starts).tolist():
            try:
                tokens.append(tokenizer.encode_window(events, start, tokenizer.segment_frames, "error").tobytes())
                skipped = 0
            except SegmentTooLong:
                tokens.append(b"")
                skipped += 1
                if skipped > MAX_SKIPPED:
                    raise ValueError(
                        f"{skipped} windows in a row have more than {tokenizer.max_tokens} tokens: raise max_tokens"
                    ) from None
                if on_skip is not None:
                    on_skip(piece.decode(), start / FRAME_RATE)
        return np.array(tokens, object)

    def cut(block):
        starts = block["starts"]  # [w]
        given = (block[name] for name in ("id", "events", "first_frame", "starts"))
        (tokens,) = in_graph(tokenize, [tf.TensorSpec([None], tf.string)], *given)
        num_context = tf.where(block["use_context"], tf.minimum(starts, context_frames), 0)
        frames = num_context + tokenizer.segment_frames  # substr stops where the block does
        mel = tf.strings.substr(block["mel"], FRAME_BYTES * (starts - num_context), FRAME_BYTES * frames)
        return {"tokens": tokens, "mel": mel, "num_context": num_context}

    def decode(window):
        mel = tf.reshape(tf.io.decode_raw(window["mel"], tf.float16), [-1, NUM_MELS])
        context, target = mel[: window["num_context"]], mel[window["num_context"] :]
        features = {"inputs": tf.io.decode_raw(window["tokens"], tf.int32), "targets": tf.cast(target, tf.float32)}
        return features | ({"targets_context": tf.cast(context, tf.float32)} if context_frames else {})

    def step(dataset: Dataset) -> Dataset:
        windows = dataset.map(cut, tf.data.AUTOTUNE).unbatch()
        return windows.filter(lambda window: window["tokens"] != b"").map(decode, tf.data.AUTOTUNE)

    return step
