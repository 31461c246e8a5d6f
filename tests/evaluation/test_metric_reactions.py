"""What each metric sees, and what it does not: one known change at a time on rendered audio.

Two instruments play 6 s. A metric must be 0 (F1: unchanged) for the same audio, move for the change that it is there
for, and stay nearly where it was for what it cannot hear.
"""

import functools

import jax
import numpy as np
import pytest
from scipy import signal

from music_synth.audio.io import resample
from music_synth.audio.mel import log_mel
from music_synth.audio.soundfont import RENDER_RATE, render_midi
from music_synth.evaluation import transcription
from music_synth.evaluation.embeddings import load_embeddings
from music_synth.evaluation.measures import log_mel_error
from music_synth.evaluation.statistics import Gaussian, frechet_distance, kernel_distance, reconstruction_distance
from music_synth.evaluation.transcription import note_scores
from music_synth.midi.notes import Note, midi_bytes
from music_synth.vocoder.objective import stft_distance

PIANO, STRINGS, FLUTE, CHURCH_ORGAN = 0, 48, 73, 19
SAMPLES = 6 * 16_000
TUNE = [
    Note(pitch, 100, PIANO, 0.5 * i, 0.5 * i + 0.45) for i, pitch in enumerate((60, 64, 67, 72, 69, 65, 62, 59, 57, 60))
]
CHORDS = [Note(pitch, 70, STRINGS, 1.5 * i, 1.5 * i + 1.4, instrument=1) for i, pitch in enumerate((48, 53, 55, 48))]
NOTES = TUNE + CHORDS
EMBEDDINGS = ("log_mel", "basic_pitch")


def render(notes):
    audio = resample(render_midi(midi_bytes(notes), reverb=False), RENDER_RATE, 16_000)
    return np.pad(audio, (0, max(0, SAMPLES - len(audio))))[:SAMPLES]


def with_noise(audio, snr_db):
    noise = np.random.default_rng(0).standard_normal(len(audio))
    return (audio + noise * np.sqrt(np.mean(audio**2) / 10 ** (snr_db / 10))).astype(np.float32)


def low_pass(audio, hz):
    return signal.sosfiltfilt(signal.butter(8, hz, fs=16_000, output="sos"), audio).astype(np.float32)


def shifted(audio, seconds):
    return np.pad(audio, (round(seconds * 16_000), 0))[: len(audio)]


@functools.cache
def original():
    return render(NOTES)


CHANGES = {
    "none": original,
    "pitch": lambda: render([note._replace(pitch=note.pitch + 1) for note in NOTES]),
    "little noise": lambda: with_noise(original(), 40),
    "noise": lambda: with_noise(original(), 15),
    "low-pass": lambda: low_pass(original(), 1500),
    "instruments": lambda: render([note._replace(program=FLUTE if note.program else CHURCH_ORGAN) for note in NOTES]),
    "late": lambda: shifted(original(), 0.1),
}


@pytest.fixture(scope="module")
def scores():
    """Metrics of each change against the original: change -> metric -> value."""
    found = load_embeddings({})
    frames = {name: found[name].embed(original()) for name in EMBEDDINGS}

    def all_metrics(audio):
        values = {}
        for name, reference in frames.items():
            judged = found[name].embed(audio)
            values[f"{name} frechet"] = frechet_distance(Gaussian.of(reference), Gaussian.of(judged))
            values[f"{name} kernel"] = kernel_distance(reference, judged, np.random.default_rng(0))
            values[f"{name} reconstruction"] = reconstruction_distance(reference, judged)
        values["log-mel error"] = log_mel_error(log_mel(audio, np), log_mel(original(), np))["value"]
        values["stft"] = float(jax.jit(stft_distance)(audio[None], original()[None])[0])
        return values | note_scores(NOTES, transcription.BasicPitch()(audio))

    return {name: all_metrics(make()) for name, make in CHANGES.items()}


DISTANCES = [f"{name} {kind}" for name in EMBEDDINGS for kind in ("frechet", "kernel", "reconstruction")] + [
    "log-mel error",
    "stft",
]


def test_identical_audio_is_at_zero(scores):
    for name in DISTANCES:
        assert scores["none"][name] == pytest.approx(0, abs=1e-6), name
    assert scores["none"]["onset_f1"] > 0.7  # what the transcriber can hear of the recording: the ceiling


def test_a_semitone_up_is_seen_by_what_hears_notes(scores):
    seen = scores["pitch"]
    assert seen["onset_f1"] < 0.1
    for kind in ("frechet", "kernel", "reconstruction"):
        heard = f"basic_pitch {kind}"
        assert seen[heard] > 2 * max(scores[other][heard] for other in ("noise", "low-pass", "late")), kind
    assert seen["log-mel error"] > 3 and seen["stft"] > 0.5


def test_noise_is_seen_by_spectra_and_the_more_the_noisier(scores):
    for name in ("log_mel frechet", "log_mel kernel", "log_mel reconstruction", "log-mel error", "stft"):
        assert scores["noise"][name] > 2 * scores["little noise"][name] > 0.1, name
    assert scores["noise"]["onset_f1"] > scores["none"]["onset_f1"] - 0.2  # the notes are still there


def test_a_low_pass_is_seen_by_spectra(scores):
    seen, other = scores["low-pass"], scores["pitch"]
    for name in ("log_mel frechet", "log_mel kernel", "log_mel reconstruction", "log-mel error"):
        assert seen[name] > 2 * other[name], name
    assert seen["stft"] > 0.5
    assert seen["onset_f1"] > scores["none"]["onset_f1"] - 0.2


def test_other_instruments_are_seen_by_the_color_of_the_sound(scores):
    seen = scores["instruments"]
    for name, least in {"log_mel frechet": 50, "log_mel kernel": 5, "log-mel error": 3, "stft": 0.5}.items():
        assert seen[name] > least, name
    # Heard notes say nothing of instruments; lists of notes do.
    swapped = [note._replace(program=STRINGS if note.program == PIANO else PIANO) for note in NOTES]
    of = note_scores(NOTES, swapped)
    assert (of["onset_f1"], of["flat_f1"], of["midi_class_f1"], of["full_f1"]) == (1, 1, 0, 0)


def test_a_late_start_is_seen_by_what_compares_moment_by_moment(scores):
    seen = scores["late"]
    assert seen["onset_f1"] < 0.1  # 100 ms
    assert seen["log-mel error"] > 3 and seen["stft"] > 0.5
    for embedding, least in (("log_mel", 1), ("basic_pitch", 0.3)):
        assert seen[f"{embedding} reconstruction"] > least
        # Distances of distributions do not ask when.
        for kind in ("frechet", "kernel"):
            assert seen[f"{embedding} {kind}"] < 0.25 * scores["instruments"][f"{embedding} {kind}"], kind


def test_the_order_of_clips_and_how_they_are_grouped_change_nothing():
    found = load_embeddings({})
    noisy = with_noise(original(), 15)
    clips = [slice(start, start + 32_000) for start in range(0, SAMPLES, 32_000)]
    for name in EMBEDDINGS:
        pairs = [tuple(found[name].embed(audio[clip]) for audio in (original(), noisy)) for clip in clips]
        together = [np.concatenate(side) for side in zip(*pairs, strict=True)]
        distance = frechet_distance(*map(Gaussian.of, together))
        streamed = [Gaussian.merged(map(Gaussian.of, side)) for side in zip(*pairs[::-1], strict=True)]
        assert frechet_distance(*streamed) == pytest.approx(distance, rel=1e-6)
        turned = [np.concatenate(side) for side in zip(*pairs[::-1], strict=True)]

        def rng():
            return np.random.default_rng(0)

        assert kernel_distance(*turned, rng()) == pytest.approx(kernel_distance(*together, rng()), rel=1e-6)
