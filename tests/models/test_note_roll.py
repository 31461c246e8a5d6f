"""The note roll: what it reads off the tokens, the envelopes, and the networks that have one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from music_synth.audio.mel import log_mel
from music_synth.midi.notes import Note, trim_overlaps
from music_synth.midi.tokenizer import Tokenizer, Vocabulary
from music_synth.models import note_roll
from music_synth.models.layers import NetworkConfig
from music_synth.models.transformer import MelTransformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

FRAMES = 32
CONFIG = NetworkConfig(
    model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1,
    max_tokens=64, target_frames=FRAMES, context_frames=0, note_roll=True,
)  # fmt: skip
read_notes = jax.jit(note_roll.read_notes, static_argnums=(1, 2))

NOTES = st.lists(
    st.builds(
        lambda pitch, velocity, program, onset, length, is_drum: Note(
            pitch, velocity, 0 if is_drum else program, onset / 100, (onset + length) / 100, is_drum
        ),
        st.integers(30, 40), st.integers(1, 127), st.sampled_from([0, 1, 40]), st.integers(0, 120), st.integers(1, 90),
        st.booleans(),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@pytest.mark.parametrize("velocity_bins", [1, 127])
@settings(max_examples=40, deadline=None)
@given(notes=NOTES)
def test_reads_what_the_tokenizer_wrote(velocity_bins, notes):
    """Second segment of a piece: pitch, program, drum, velocity, onset and offset of every note in it."""
    tokenizer = Tokenizer(velocity_bins, segment_frames=FRAMES)
    vocabulary, start, end = tokenizer.vocabulary, FRAMES / 50, 2 * FRAMES / 50
    notes = list(trim_overlaps([note._replace(offset=note.onset + 0.01) if note.is_drum else note for note in notes]))
    tokens = tokenizer.encode(notes, num_frames=3 * FRAMES)[1]
    padded = np.zeros((1, 256), np.int32)
    padded[0, : len(tokens)] = tokens
    read = jax.tree.map(lambda a: np.asarray(a)[0], read_notes(jnp.asarray(padded), vocabulary, FRAMES))

    expected = []
    for note in notes:
        if note.is_drum and start <= note.onset < end:
            bin = vocabulary.velocity_to_bin(note.velocity)
            expected.append((True, vocabulary.drum_id + note.pitch, 0, bin, round(50 * (note.onset - start), 1)))
        if not note.is_drum and note.onset < end and round(note.offset, 2) >= start:
            tied = round(note.onset, 2) < start
            onset = -note_roll.TIED_AGE if tied else round(50 * (note.onset - start), 1)
            offset = min(round(50 * (note.offset - start), 1), FRAMES)
            bin = None if tied else vocabulary.velocity_to_bin(note.velocity)
            expected.append((False, vocabulary.pitch_id + note.pitch, note.program, bin, onset, offset))
    found = []
    for i in np.flatnonzero(read.is_note):
        bin = int(read.velocity[i]) - vocabulary.velocity_id
        onset, offset = (round(float(a[i]), 1) for a in (read.onset, read.offset))
        if read.is_drum[i]:
            found.append((True, int(padded[0, i]), 0, bin, onset))
        else:
            bin = None if onset == -note_roll.TIED_AGE else bin
            program = int(read.program[i]) - vocabulary.program_id
            found.append((False, int(padded[0, i]), program, bin, onset, min(offset, FRAMES)))
    assert sorted(found, key=str) == sorted(expected, key=str)


def timed(onset, offset, is_drum=False, is_note=True):
    def one(value, dtype):
        return jnp.full((1, 1), value, dtype)

    ids = one(0, jnp.int32)
    return note_roll.TimedNotes(
        one(is_note, bool), one(is_drum, bool), ids, ids, ids, one(onset, jnp.float32), one(offset, jnp.float32), ids
    )


def envelopes_of(*args, **kwargs):
    constants = jnp.exp(note_roll.log_frames_init(None, (note_roll.NUM_ENVELOPES - 2,)))
    return np.asarray(note_roll.envelopes(timed(*args, **kwargs), 12, constants))[0, :, :, 0].T  # [E, T]


def test_envelopes_of_a_note():
    sustain, *decays, release, _, _, lead = envelopes_of(3.5, 7.0)
    np.testing.assert_allclose(sustain, [0, 0, 0, 0.5, 1, 1, 1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(decays[0][4:7], np.exp(-np.array([0.5, 1.5, 2.5]) / 2), rtol=1e-6)
    np.testing.assert_allclose(release[6:9], [0, 1, np.exp(-1 / 4)], rtol=1e-6)
    np.testing.assert_allclose(lead, [0, 0, 0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 0])


def test_envelopes_of_a_drum_and_of_no_note():
    sustain, decay, *_, release, _ = envelopes_of(4.0, 4.0, is_drum=True)
    assert not sustain.any() and not release.any()
    np.testing.assert_allclose(decay[3:7], [0, 1, np.exp(-1 / 2), np.exp(-1)], rtol=1e-6)
    assert not envelopes_of(4.0, 8.0, is_note=False).any()


# A quarter second of program 40, pitch 60 from 0.1 s; then a drum.
IDS = Vocabulary()
TOKENS = np.zeros((2, 16), np.int32)
TOKENS[0, :10] = [
    IDS.tie_id, IDS.shift_id + 10, IDS.program_id + 40, IDS.velocity_id + 1, IDS.pitch_id + 60,
    IDS.shift_id + 35, IDS.velocity_id, IDS.pitch_id + 60, IDS.drum_id + 36, 1,
]  # fmt: skip
TOKENS[1, :2] = [IDS.tie_id, 1]
FRAMES_IN = np.random.default_rng(0).normal(size=(2, FRAMES, 128)).astype(np.float32)


def network(config, autoregressive):
    module = MelTransformer(config, 128, autoregressive, corrects_roll=True)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(0), jnp.asarray(TOKENS), FRAMES_IN, jnp.zeros(2)))["params"]
    return module.bind({"params": params}), params


def test_a_segment_without_notes_has_an_empty_roll():
    net, _ = network(CONFIG, False)
    roll = np.asarray(net.encode(jnp.asarray(TOKENS), jnp.asarray(TOKENS > 0), None, None, True).roll)
    assert roll[0, 5:17].min() > 0.1 and np.abs(roll[1]).max() < 1e-6
    padded = np.pad(TOKENS, ((0, 0), (0, 16)))
    longer = net.encode(jnp.asarray(padded), jnp.asarray(padded > 0), None, None, True).roll
    np.testing.assert_allclose(longer, roll, atol=1e-6)


def test_rows_beyond_the_cache_hear_no_notes():
    """Batched guidance with a note roll equals a second call without notes."""
    net, _ = network(CONFIG, False)
    none = jnp.zeros_like(TOKENS[:1])
    tokens, film = jnp.asarray(TOKENS[:1]), net.condition_time(jnp.zeros(1))
    cache, empty = (net.encode(t, t > 0, None, None, True) for t in (tokens, none))
    both = net.decode(FRAMES_IN, film, cache)
    np.testing.assert_allclose(both[1:], net.decode(FRAMES_IN[1:], film, empty), atol=1e-5)
    np.testing.assert_allclose(both[:1], net.decode(FRAMES_IN[:1], film, cache), atol=1e-5)


def test_cached_decoding_equals_full_decoding():
    net, _ = network(CONFIG, True)
    cache = net.encode(jnp.asarray(TOKENS), jnp.asarray(TOKENS > 0), None, None, True)
    caches, steps = net.decoder.empty_caches(2, FRAMES), []
    for index in range(8):
        frame, caches = net.decode_step(FRAMES_IN[:, index : index + 1], jnp.int32(index), cache, caches)
        steps.append(frame)
    full = net.decode(jnp.asarray(FRAMES_IN), None, cache)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), full[:, :8], atol=1e-5)


def test_every_parameter_of_the_roll_learns():
    net, params = network(CONFIG, False)
    module = net.clone(parent=None)

    def loss(p):
        return jnp.sum(module.apply({"params": p}, jnp.asarray(TOKENS), FRAMES_IN, jnp.zeros(2)) ** 2)

    gradients = jax.jit(jax.grad(loss))(params)
    learned = jax.tree.leaves([gradients["note_roll"], gradients["decoder"]["roll_projection"]])
    assert len(learned) == 3 and all(np.any(leaf) for leaf in learned)


def test_a_note_sounds_as_loud_as_a_soundfont_plays_its_velocity():
    """40 log10(127 / velocity) dB below full, to begin with; a tied note, whose velocity is not told, in between."""
    ids = Vocabulary(velocity_bins=32)
    notes = jax.tree.map(lambda a: jnp.asarray(a)[None], note_roll.TimedNotes(
        np.ones(3, bool), np.zeros(3, bool), np.zeros(3, np.int32), ids.velocity_id + np.array([32, 16, 0], np.int32),
        np.zeros(3, np.int32), np.zeros(3, np.float32), np.ones(3, np.float32), np.zeros(1, np.int32),
    ))  # fmt: skip
    gains = note_roll.gains(notes, jnp.full(note_roll.NUM_ENVELOPES, note_roll.VELOCITY_EXPONENT), ids)
    expected = 1, 10 ** (-40 * np.log10(2) / 20), note_roll.TIED_VELOCITY**2
    np.testing.assert_allclose(gains[0], np.tile(expected, (note_roll.NUM_ENVELOPES, 1)), rtol=1e-5)


def test_harmonics_lie_where_a_tone_of_their_frequency_has_its_mel():
    mels = note_roll.harmonic_mels(8)
    for pitch, number in ((45, 1), (69, 3), (100, 2)):
        hz = 440 * 2 ** ((pitch - 69) / 12) * number
        tone = np.exp(log_mel(np.sin(2 * np.pi * hz * np.arange(16_000) / 16_000).astype(np.float32), np)[10:40])
        of_tone = tone.mean(axis=0) / tone.mean(axis=0).max()
        np.testing.assert_allclose(mels[pitch, number - 1], of_tone, atol=0.02)
    assert not mels[127, 1:].any()  # beyond 8 kHz


def test_harmonics_sound_at_the_pitch_of_their_note_and_not_in_drums():
    notes, encoded = timed(0.0, 8.0)._replace(pitch=jnp.full((1, 1), 69)), jnp.zeros((1, 1, CONFIG.model_dim))
    drum = notes._replace(is_drum=jnp.full((1, 1), True))
    roll = note_roll.NoteRoll(dataclasses.replace(CONFIG, roll_harmonics=4))
    params = roll.init(jax.random.key(0), encoded, notes)
    free = note_roll.NoteRoll(CONFIG)
    added = np.asarray(roll.apply(params, encoded, notes).mel - free.apply(params, encoded, notes).mel)[0, 4]
    peaks = note_roll.harmonic_mels(4)[69].argmax(axis=1)
    assert added.argmax() == peaks[0] and all(added[peak] > added[peak + 4] for peak in peaks)
    np.testing.assert_array_equal(roll.apply(params, encoded, drum).mel, free.apply(params, encoded, drum).mel)


def test_each_pitch_of_each_program_and_each_drum_has_an_embedding_of_its_own():
    ids = Vocabulary()
    piano, flute = ids.program_id, ids.program_id + 73
    program = jnp.asarray([[piano, piano, flute, piano, flute]])
    notes = timed(0.0, 8.0)._replace(
        program=program, pitch=jnp.asarray([[60, 61, 60, 60, 60]]), is_drum=jnp.asarray([[False] * 3 + [True] * 2])
    )
    numbers = np.asarray(note_roll.kinds(notes, ids))[0]
    assert numbers[3] == numbers[4] and len(set(numbers)) == 4 and numbers.max() < note_roll.KINDS
    roll = note_roll.NoteRoll(dataclasses.replace(CONFIG, roll_table=True))
    notes, encoded = timed(0.0, 8.0), jnp.zeros((1, 1, CONFIG.model_dim))
    params = roll.init(jax.random.key(0), encoded, notes)
    plain = roll.apply(params, encoded, notes).mel
    table = nn.unbox(params)["params"]["table"]
    assert not table.any()
    here = int(note_roll.kinds(notes, CONFIG.vocabulary)[0, 0])
    moved = {"params": nn.unbox(params)["params"] | {"table": table.at[here].set(0.5)}}
    elsewhere = {"params": nn.unbox(params)["params"] | {"table": table.at[here + 1].set(0.5)}}
    assert np.abs(roll.apply(moved, encoded, notes).mel - plain).max() > 0.01
    np.testing.assert_array_equal(roll.apply(elsewhere, encoded, notes).mel, plain)


def test_a_tied_note_tells_no_velocity():
    ids = Vocabulary(velocity_bins=32)
    tokens = [ids.program_id, ids.pitch_id + 60, ids.tie_id, ids.shift_id + 10, ids.program_id, ids.velocity_id + 7]
    notes = read_notes(jnp.asarray([[*tokens, ids.pitch_id + 64, 1]]), ids, FRAMES)
    velocity = np.asarray(notes.velocity)[np.asarray(notes.is_note)]
    np.testing.assert_array_equal(velocity, [ids.velocity_id, ids.velocity_id + 7])


def test_timbres_color_programs_and_drums_each_in_its_way():
    """And without a context an unknown one is the mean of all; before anything is learned there is no difference."""
    vocabulary = Vocabulary(timbres=("hall", "room"))
    config = dataclasses.replace(CONFIG, vocabulary=vocabulary, context_frames=FRAMES)
    network = MelTransformer(config, 128, autoregressive=False)
    piano, drum = (vocabulary.pitch_id + 60, vocabulary.drum_id + 60)
    notes = [vocabulary.tie_id, vocabulary.velocity_id + 1, vocabulary.program_id, piano, drum]
    tokens = jnp.asarray([[first, *notes] for first in (vocabulary.end_id, vocabulary.end_id + 1, 2)])
    context, mask = jnp.zeros((3, FRAMES, 128)), jnp.zeros((3, FRAMES), bool)
    params = nn.unbox(network.init(jax.random.key(0), tokens, jnp.zeros((3, FRAMES, 128)), jnp.zeros(3), context, mask))

    @jax.jit
    def encoded(table, context, mask):
        params["params"]["timbre"]["embedding"] = table
        inputs = (jnp.where(tokens < vocabulary.end_id, tokens, 2), tokens > 0, tokens, context, mask)

        def encode(net, same_tokens, token_mask, tokens, context, mask):
            notes = note_roll.read_notes(tokens, vocabulary, FRAMES)
            timbre = net.timbre(notes.timbre, context, mask)
            return net.token_encoder(same_tokens, token_mask, True, notes, timbre)

        return network.apply(params, *inputs, method=encode)

    begin = np.asarray(encoded(jnp.zeros((100, 16)), context, mask))
    np.testing.assert_array_equal(begin[:, 1:], np.broadcast_to(begin[:1, 1:], begin[:, 1:].shape))
    table = jax.random.normal(jax.random.key(1), (100, 16))
    hall, room, unknown = np.asarray(encoded(table, context, mask))
    mean = np.asarray(encoded(jnp.broadcast_to(table[:2].mean(axis=0, keepdims=True), table.shape), context, mask))
    np.testing.assert_allclose(mean[2, 1:], unknown[1:], atol=1e-5)
    assert min(np.abs(a - b)[4:].max() for a, b in ((hall, room), (hall, unknown), (room, unknown))) > 0.1
    by_drum, by_piano = hall[5] - room[5], hall[4] - room[4]
    assert np.abs(by_drum - by_piano).max() > 0.1  # not one shift for all
    heard = np.asarray(encoded(table, context.at[:, :, 90:].set(1.0), mask | True))
    np.testing.assert_array_equal(heard[:2], [hall, room])  # what is known needs no context
    assert np.abs(heard[2] - unknown).max() > 1e-3
