import time
from pathlib import Path

import numpy as np
import pytest

from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL, SAMPLE_RATE, log_mel, mel_matrix
from music_synth.data import synthetic
from music_synth.errors import UserError
from music_synth.runs import load_inverter
from music_synth.vocoder.inverter import GriffinLim, magnitude_from_mel
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.neural import NeuralInverter

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mel.npz")
DECIBELS = 8.6859  # a nat of magnitude
STARTS = (3111, 14000, 22333, 31007, 40404)  # samples


def decibels(mel, reference):
    return DECIBELS * np.abs(mel - reference).mean()


def bursts():
    """Three seconds: decaying tones that begin at known, irregular samples."""
    audio = np.zeros(3 * SAMPLE_RATE, np.float32)
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    for start, hz in zip(STARTS, (440, 659, 330, 880, 554), strict=True):
        tone = sum(np.sin(2 * np.pi * k * hz * t) / k for k in (1, 2, 3)) * np.exp(-8 * t)
        stop = min(len(audio), start + len(t))
        audio[start:stop] += 0.2 * tone[: stop - start].astype(np.float32)
    return audio


@pytest.mark.parametrize("name, limit", [("song", 0.6), ("noise", 0.4), ("bursts", 4.0), ("chord", 4.5)])
def test_mel_survives(name, limit):
    """Music and noise come through well; sharp attacks out of nothing, less so."""
    audio = bursts() if name == "bursts" else GOLDEN[f"{name}/audio"]
    mel = log_mel(audio[: len(audio) // HOP_LENGTH * HOP_LENGTH], np)
    again = log_mel(GriffinLim()(mel), np)
    assert again.shape == mel.shape
    audible = mel[:-1] > -5  # the last frame reaches past the end, see docs/spec.md 3.12.5
    assert decibels(again[:-1][audible], mel[:-1][audible]) < limit
    if name == "chord":
        return  # it stands still; the others would not pass one frame late:
    late = np.roll(mel[:-1], 1, axis=0)
    assert decibels(late[audible], mel[:-1][audible]) > 1.3 * limit


def test_no_shift_in_time():
    audio, seconds = bursts(), np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    rebuilt = GriffinLim()(log_mel(audio, np))
    assert len(rebuilt) == len(audio)
    for start in STARTS:  # the center of gravity of the energy of each burst
        burst = slice(start - 1600, start + 6400)
        before, after = (np.average(seconds[burst], weights=x[burst] ** 2) for x in (audio, rebuilt))
        assert abs(after - before) < 0.002  # seconds; a hop is 0.02
    first = np.flatnonzero(np.abs(rebuilt) > 0.05)[0]
    assert abs(first - STARTS[0]) < 0.012 * SAMPLE_RATE, "little sounds ahead of the first"


def test_level():
    audio = GOLDEN["chord/audio"]
    rebuilt = GriffinLim()(log_mel(audio, np))
    assert np.std(rebuilt) == pytest.approx(np.std(audio), rel=0.1)


@pytest.mark.parametrize("num_frames", [0, 1, 2, 7])
def test_length(num_frames):
    mel = np.full((num_frames, 128), -2.0, np.float32)
    audio = GriffinLim(num_iterations=3)(mel)
    assert audio.shape == (320 * num_frames,) and audio.dtype == np.float32 and np.isfinite(audio).all()


def test_silence_and_loud():
    assert np.abs(GriffinLim(3)(np.full((50, 128), MIN_LOG_MEL, np.float32))).max() < 1e-4
    assert np.isfinite(GriffinLim(3)(np.full((50, 128), 6.0, np.float32))).all()


def test_same_mel_same_audio():
    mel = log_mel(bursts()[:16000], np)
    np.testing.assert_array_equal(GriffinLim(5)(mel), GriffinLim(5)(mel))
    assert np.abs(GriffinLim(5)(mel) - GriffinLim(5, seed=1)(mel)).max() > 1e-3


def test_iterations_help():
    mel = log_mel(bursts(), np)
    few, many = (decibels(log_mel(GriffinLim(n)(mel), np)[:-1], mel[:-1]) for n in (1, 60))
    assert many < 0.7 * few


def test_the_shipped_one_beats_griffin_lim():
    """Six seconds of a band with drums, of the embedded data set's test split. It is what plays by default."""
    shipped = load_inverter()
    assert isinstance(shipped, NeuralInverter) and isinstance(shipped.generator, ISTFTGenerator)
    band = next(spec for spec in synthetic.plan_split("test", 40) if spec.kind == "band")
    mel = log_mel(synthetic.render(synthetic.compose(band))[: 6 * SAMPLE_RATE], np)
    own, baseline = (decibels(log_mel(inverter(mel), np)[:-1], mel[:-1]) for inverter in (shipped, GriffinLim()))
    assert own < 0.6 * baseline


def test_magnitude_from_mel():
    mel = log_mel(bursts(), np)
    magnitude = magnitude_from_mel(mel)
    assert magnitude.shape == (150, 513) and magnitude.dtype == np.float32 and (magnitude >= 0).all()
    again = magnitude @ mel_matrix()
    audible = mel > -5
    assert decibels(np.log(again[audible]), mel[audible]) < 0.5


def test_mistakes():
    with pytest.raises(ValueError, match="128"):
        GriffinLim()(np.zeros((10, 80), np.float32))
    with pytest.raises(UserError, match="0 iterations"):
        GriffinLim(0)
    with pytest.raises(UserError, match=r"momentum 1\.5"):
        GriffinLim(momentum=1.5)
    assert load_inverter("griffin_lim") == GriffinLim()
    with pytest.raises(UserError, match=r"'melgan'.*griffin_lim"):
        load_inverter("melgan")


def test_five_times_real_time_on_one_core():
    mel = log_mel(GOLDEN["song/audio"], np)
    GriffinLim(1)(mel)  # imports
    start = time.process_time()
    GriffinLim()(mel)
    assert time.process_time() - start < len(mel) / 50 / 5
