"""What ships, whatever its weights: it fits, says where it is from, plays unasked, and follows the notes."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from music_synth import runs, synthesize
from music_synth.audio.io import resample
from music_synth.audio.mel import FRAME_RATE, SAMPLE_RATE, log_mel
from music_synth.audio.soundfont import RENDER_RATE, render_midi
from music_synth.interop.model_card import CARD, WEIGHTS
from music_synth.midi import players, smf
from music_synth.midi.notes import Note, midi_bytes
from music_synth.playing import Decoder
from music_synth.training.checkpoint import check_shapes
from music_synth.vocoder import neural

NAMES = [name for name, folder in runs.DECODERS.items() if (runs.SHIPPED_DIR / folder / WEIGHTS).is_file()]
with_weights = pytest.mark.skipif(not NAMES, reason="no weights of decoders are installed")
every_decoder = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != runs.SHIPPED)) for name in NAMES]
)
PIECE = Path(__file__).parents[1] / "data" / "piano_with_pedal.mid"


# --- what it is --------------------------------------------------------------------------------------------------


def test_all_weights_together_are_small():
    files = [*runs.SHIPPED_DIR.rglob("*"), *neural.SHIPPED.parent.glob("*.safetensors")]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 25e6


@with_weights
def test_shapes_are_those_of_the_networks():
    for name in runs.DECODERS:
        model, _, params, _ = runs.load(name)  # which does not look
        check_shapes(params, model, name)
    inverter = runs.load_inverter()
    wanted = jax.eval_shape(inverter.generator.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, inverter.params) == jax.tree.map(jnp.shape, wanted)


@with_weights
def test_cards_say_how_to_train_again():
    assert runs.SHIPPED in NAMES
    common = (runs.SHIPPED_DIR / CARD).read_text(encoding="utf-8")
    for fact in ("music_synth.prepare_data rendered", "music_synth.train", "apt-get install", "MIT", "Seeds"):
        assert fact in common, fact
    for name in NAMES:
        card = (runs.SHIPPED_DIR / runs.DECODERS[name] / CARD).read_text(encoding="utf-8")
        for fact in ("| training steps | ", "| seeds | ", "| versions | music_synth", "| time | ", "float16"):
            assert fact in card, (name, fact)
        assert "license: unknown" not in card


@with_weights
def test_a_file_plays_without_being_asked_by_what(tmp_path, capsys):
    synthesize.main([str(PIECE), f"--out={tmp_path}/out.wav"])
    audio, rate = soundfile.read(tmp_path / "out.wav")
    assert rate == SAMPLE_RATE and len(audio) > 25 * rate
    assert 0.01 < np.sqrt(np.mean(audio**2)) < 0.5
    assert "of shipped, step" in capsys.readouterr().out


# --- what it plays -----------------------------------------------------------------------------------------------

CHORDS = [(60, 64, 67), (57, 60, 65), (55, 59, 62), (60, 64, 72)]
PIECES = {
    "piano": [Note(pitch, 100, 0, k, k + 0.9) for k, chord in enumerate(CHORDS) for pitch in chord],
    "strings": [Note(pitch, 100, 48, k, k + 1.0) for k, chord in enumerate(CHORDS) for pitch in chord],
    "drums": [
        Note(pitch, 100, 0, k / 4, k / 4 + 0.1, is_drum=True)
        for k in range(16)
        for pitch in (42, (36, 42, 38, 42)[k % 4])
    ],
}
CHANGES = {  # quiet and loud: (velocity, volume, expression)
    "velocity": ((40, 100, 127), (110, 100, 127)),
    "volume": ((100, 50, 127), (100, 110, 127)),
    "expression": ((100, 100, 50), (100, 100, 120)),
}


def file_of(notes: list[Note], velocity: int, volume: int, expression: int) -> smf.MidiFile:
    midi = smf.load(midi_bytes([note._replace(velocity=velocity) for note in notes]))
    (channel,) = {event.channel for track in midi.tracks for event in track if event.kind == smf.NOTE_ON}
    controls = [(players.VOLUME, volume), (players.EXPRESSION, expression)]
    first = [smf.Event(0, smf.CONTROL_CHANGE, channel, number, value) for number, value in controls]
    return midi._replace(tracks=[[*first, *midi.tracks[0]], *midi.tracks[1:]])


def recorded(midi: smf.MidiFile) -> np.ndarray:
    return resample(render_midi(midi), RENDER_RATE, SAMPLE_RATE)


def notes_in(midi: smf.MidiFile) -> list[Note]:
    return [Note(*sound) for sound in players.sounds(midi)]


@functools.cache
def decoder(name: str) -> Decoder:
    model, tokenizer, params, _ = runs.load(name)
    return Decoder(model, params, tokenizer)


def level(mel: np.ndarray) -> float:
    """The level of log-mel [T, M] up to the end of the last note, in dB."""
    return float(10 * np.log10(np.mean(np.exp(2.0 * mel[: 4 * FRAME_RATE]))))


# By the default of SoundFont 2.04, as FluidR3 has it, velocities of 40 and 110 differ by 17.6 dB; in MuseScore General,
# which the decoders that ship learned too, by less (rendered by FluidSynth 2.3).
MUSESCORE_VELOCITY = {"piano": 14.7, "strings": 14.7, "drums": 15.3}


@with_weights
@every_decoder
def test_loudness_is_that_of_the_recording(name):
    wrong = {}
    for instrument, notes in PIECES.items():
        for change, settings in CHANGES.items():
            files = [file_of(notes, *setting) for setting in settings]
            played = [level(np.concatenate(list(decoder(name).stream(notes_in(file))))) for file in files]
            true = [level(log_mel(recorded(file), np)) for file in files]
            fonts = [true[1] - true[0], MUSESCORE_VELOCITY[instrument] if change == "velocity" else true[1] - true[0]]
            if not min(fonts) - 2 < played[1] - played[0] < max(fonts) + 2:
                wrong[instrument, change] = played[1] - played[0], fonts
    assert not wrong


def drum_piece() -> list[Note]:
    """16 s of a rock beat with fills: 170 strokes of nine drums."""
    rng = np.random.default_rng(0)
    strokes = []
    for step in range(128):
        pitches = [42] if step % 2 == 0 else []
        pitches += [36] * (step % 8 in (0, 5)) + [38] * (step % 8 == 4) + [49] * (step % 64 == 0)
        pitches += [int(rng.choice([41, 45, 48, 50, 46]))] * (step % 32 >= 26)
        strokes += [Note(pitch, int(rng.integers(70, 120)), 0, step / 8, step / 8 + 0.1, True) for pitch in pitches]
    return strokes


def onsets_in(audio: np.ndarray) -> np.ndarray:
    """Onsets in seconds by spectral flux: peaks of the rise of the log-mel, above half of the mean around them."""
    mel = np.maximum(log_mel(audio, np), -8.0)
    flux = np.maximum(np.diff(mel, axis=0), 0).mean(axis=1)
    around = np.convolve(np.pad(flux, 12, mode="edge"), np.ones(25) / 25, mode="valid")
    peak = (flux[1:-1] >= flux[:-2]) & (flux[1:-1] > flux[2:]) & (flux[1:-1] > 1.2 * around[1:-1])
    return (np.flatnonzero(peak) + 2) / FRAME_RATE


def onset_f1(truth: np.ndarray, found: np.ndarray) -> float:
    """F1 of onsets that lie within 50 ms of one another, each used once."""
    hits, left = 0, list(found)
    for onset in truth:
        near = [other for other in left if abs(other - onset) <= 0.05]
        if near:
            hits += 1
            left.remove(min(near, key=lambda other: abs(other - onset)))
    return 2 * hits / (len(truth) + len(found))


@pytest.mark.slow
@with_weights
@pytest.mark.parametrize("name", NAMES)
def test_the_strokes_of_a_drum_kit_are_heard(name):
    notes = drum_piece()
    truth = np.unique([note.onset for note in notes])
    recording = onset_f1(truth, onsets_in(recorded(smf.load(midi_bytes(notes)))))
    mel = np.concatenate(list(decoder(name).stream(notes)))
    played = onset_f1(truth, onsets_in(runs.load_inverter()(mel, notes)))
    assert recording > 0.8
    assert played > 0.9 * recording, (played, recording)
