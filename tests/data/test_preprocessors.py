"""The steps from record to example, alone on NumPy and inside tf.data."""

import numpy as np
import pytest

from music_synth.data import preprocessors
from music_synth.data.examples import cut_window
from music_synth.data.note_sequences import write_note_sequence
from music_synth.data.quiet_tensorflow import seqio, tf
from music_synth.midi.notes import Note, Pedal, apply_sustain, trim_overlaps
from music_synth.midi.tokenizer import Events, Tokenizer

SLAKH = Tokenizer(granularity="slakh")
OVERLAPPING = [  # one pitch struck again while it sounds; two programs of one Slakh class; a drum
    Note(60, 80, 0, 1.0, 30.0),
    Note(60, 80, 0, 8.0, 12.0),
    Note(60, 70, 1, 9.0, 14.0),
    Note(64, 70, 48, 0.5, 41.0),
    Note(36, 90, 0, 2.0, 2.1, is_drum=True),
]


def test_notes_of_sequence():
    assert preprocessors.notes_of_sequence(write_note_sequence("x", OVERLAPPING)) == OVERLAPPING
    trimmed = preprocessors.notes_of_sequence(write_note_sequence("x", OVERLAPPING), trim=True)
    assert trimmed == trim_overlaps(OVERLAPPING) != OVERLAPPING


def test_pedal_of_a_sequence_is_applied():
    from note_seq.protobuf import music_pb2

    message = music_pb2.NoteSequence.FromString(write_note_sequence("x", OVERLAPPING))
    message.control_changes.add(time=0.9, instrument=0, control_number=64, control_value=100)
    message.control_changes.add(time=35.0, instrument=0, control_number=64, control_value=0)
    message.control_changes.add(time=1.0, instrument=0, control_number=7, control_value=100)
    expected = apply_sustain(OVERLAPPING, [Pedal(0.9, 0, 100), Pedal(35.0, 0, 0)])
    assert preprocessors.notes_of_sequence(message.SerializeToString()) == expected != OVERLAPPING


@pytest.mark.parametrize("dtype", [np.int16, np.int64])
def test_float_audio_from_integers(dtype):
    audio = preprocessors.float_audio(np.array([-32768, 0, 16384], dtype))
    assert audio.dtype == np.float32
    np.testing.assert_array_equal(audio, np.array([-1, 0, 0.5], np.float32))


def test_float_audio_leaves_floats():
    np.testing.assert_array_equal(preprocessors.float_audio(np.array([0.5, -1.0])), np.array([0.5, -1.0], np.float32))


def test_blocks_are_equal_and_cover_the_piece(made):
    piece = made["train"][2]  # 4750 frames
    blocks = list(preprocessors.blocks_of_piece(piece.mel, Events.from_notes(piece.notes)))
    starts = [first_frame + first_start for _, _, first_frame, first_start, _ in blocks]
    ends = [start + block[4] for start, block in zip(starts, blocks, strict=True)]
    assert len(blocks) == 3
    assert starts == [0, *ends[:-1]] and ends[-1] == len(piece.mel)
    assert max(b[4] for b in blocks) - min(b[4] for b in blocks) <= 1
    for mel, _, first_frame, *_ in blocks:
        frames = np.frombuffer(mel, np.float16).reshape(-1, 128)
        np.testing.assert_array_equal(frames, piece.mel[first_frame : first_frame + len(frames)].astype(np.float16))


@pytest.mark.parametrize(
    "tokenizer", [Tokenizer(), SLAKH, Tokenizer(ties=False, granularity="flat", segment_frames=512)]
)
@pytest.mark.parametrize("notes", [None, OVERLAPPING], ids=["random", "overlapping"])
def test_windows_of_blocks_are_those_of_the_piece(made, tokenizer, notes):
    """At every start near a border and many others: tokens, target and context know nothing of blocks."""
    piece = made["train"][2]
    notes, mel = notes or piece.notes, piece.mel.astype(np.float16)
    events = Events.from_notes(notes)
    checked = 0
    for block_mel, block_events, first_frame, first_start, num_starts in preprocessors.blocks_of_piece(
        piece.mel, events
    ):
        part = np.frombuffer(block_mel, np.float16).reshape(-1, 128)
        part_events = Events.from_array(np.frombuffer(block_events, np.int32).reshape(-1, 6))
        assert len(part_events) <= len(events)
        starts = np.arange(first_start, first_start + num_starts)
        for start in np.unique(np.concatenate([starts[:20], starts[::97], starts[-20:]])):
            window = cut_window(part, part_events, tokenizer, start, 256, first_frame=first_frame)
            expected = cut_window(mel, events, tokenizer, first_frame + start, 256)
            for a, b in zip(window, expected, strict=True):
                np.testing.assert_array_equal(a, b)
            checked += 1
    assert checked > 150


def test_a_block_holds_only_the_events_it_needs(made):
    events = Events.from_notes(made["train"][2].notes)
    part = preprocessors.events_between(events, 3000, 3500)
    inside = ((events.step >= 6000) & (events.step < 7000)).sum()
    keys = len(np.unique(events.program * 128 + events.pitch))
    assert inside <= len(part) <= inside + keys < len(events) / 2


def test_empty_piece_has_no_blocks():
    nothing = np.zeros((0, 128), np.float32)
    assert list(preprocessors.blocks_of_piece(nothing, Events.from_notes([]))) == []


def test_window_starts_depend_on_the_seed_alone():
    starts = preprocessors.window_starts([1, 2], 512, 2048, 256)
    assert len(starts) == 8
    np.testing.assert_array_equal(starts, preprocessors.window_starts([1, 2], 512, 2048, 256))
    assert (starts != preprocessors.window_starts([1, 3], 512, 2048, 256)).any()
    np.testing.assert_array_equal((starts - 512) // 256, np.arange(8))


# --- inside tf.data ---


@pytest.fixture(scope="module")
def records(made):
    pieces = made["train"]
    sequences = [write_note_sequence(piece.id, piece.notes) for piece in pieces]

    def generate():
        for piece, sequence in zip(pieces, sequences, strict=True):
            yield {"id": piece.id, "audio": (piece.audio * 32768).astype(np.int64), "sequence": sequence}

    signature = {
        "id": tf.TensorSpec([], tf.string),
        "audio": tf.TensorSpec([None], tf.int64),
        "sequence": tf.TensorSpec([], tf.string),
    }
    return tf.data.Dataset.from_generator(generate, output_signature=signature)


@pytest.fixture(scope="module")
def blocks(records):
    return preprocessors.cut_blocks(preprocessors.add_mel(records)).cache()


def test_pieces_in_graph(records, made):
    pieces = list(preprocessors.add_mel(records).as_numpy_iterator())
    for piece, expected in zip(pieces, made["train"], strict=True):
        assert piece["id"].decode() == expected.id
        assert preprocessors.notes_of_sequence(piece["sequence"]) == expected.notes
        np.testing.assert_array_equal(piece["audio"], expected.audio)
        np.testing.assert_array_equal(piece["mel"], expected.mel)


def test_blocks_in_graph(blocks, made):
    expected = [
        (piece.id.encode(), *block)
        for piece in made["train"]
        for block in preprocessors.blocks_of_piece(piece.mel, Events.from_notes(piece.notes))
    ]
    names = ("id", "mel", "events", "first_frame", "first_start", "num_starts")
    assert [tuple(block[name] for name in names) for block in blocks.as_numpy_iterator()] == expected


def examples(blocks, seed, tokenizer=None, context_frames=256, empty_context=0.0, on_skip=None):
    tokenizer = tokenizer or Tokenizer()
    with seqio.map_seed_manager(seed):
        windows = preprocessors.draw_windows(tokenizer.segment_frames, empty_context)(blocks)
    return list(preprocessors.cut_windows(tokenizer, context_frames, on_skip)(windows).as_numpy_iterator())


def test_examples_in_graph(blocks, made, find_window):
    pieces = [piece.mel for piece in made["train"]]
    events = [Events.from_notes(piece.notes) for piece in made["train"]]
    drawn = examples(blocks, seed=3)
    assert len(drawn) == sum(max(1, round(block["num_starts"] / 256)) for block in blocks.as_numpy_iterator())
    for example in drawn:
        piece, start = find_window(example["targets"], pieces)
        window = cut_window(pieces[piece].astype(np.float16), events[piece], Tokenizer(), start, 256)
        np.testing.assert_array_equal(example["inputs"], window.tokens)
        np.testing.assert_array_equal(example["targets"], window.target)
        np.testing.assert_array_equal(example["targets_context"], window.context)


def test_examples_depend_on_the_seed(blocks):
    first, again, other = (examples(blocks, seed) for seed in (3, 3, 4))
    same = [np.array_equal(a["targets"], b["targets"]) for a, b in zip(first, again, strict=True)]
    assert all(same)
    assert sum(np.array_equal(a["targets"][:50], b["targets"][:50]) for a, b in zip(first, other, strict=True)) < 3


def test_empty_context_and_none(blocks):
    assert all(len(example["targets_context"]) == 0 for example in examples(blocks, 3, empty_context=1.0))
    assert all(set(example) == {"inputs", "targets"} for example in examples(blocks, 3, context_frames=0))


def test_long_windows_are_left_out_and_told(blocks):
    told = []
    everything = examples(blocks, 3)
    limit = int(np.median([len(example["inputs"]) for example in everything]))
    kept = examples(
        blocks, 3, Tokenizer(max_tokens=limit), on_skip=lambda piece, seconds: told.append((piece, seconds))
    )
    assert len(kept) == sum(len(example["inputs"]) <= limit for example in everything)
    assert len(kept) + len(told) == len(everything)
    assert told[0][0].startswith("train-") and 0 <= told[0][1] < 95
