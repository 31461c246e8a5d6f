import builtins
import itertools

import numpy as np
import pytest

from music_synth.audio import soundfont
from music_synth.audio.soundfont import RENDER_RATE, render_midi
from music_synth.errors import UserError
from music_synth.midi import smf

DIVISION = 480  # ticks a beat; a beat is half a second, as no tempo is set
ORGAN, FLUTE, PIANO = 19, 73, 0


def tick(seconds):
    return round(seconds * 2 * DIVISION)


def midi(*events, program=PIANO, channel=0):
    """A MIDI file from (seconds, kind, a, b) of one channel."""
    track = [smf.Event(0, smf.PROGRAM_CHANGE, channel, program, 0)]
    track += [smf.Event(tick(seconds), kind, channel, a, b) for seconds, kind, a, b in events]
    return smf.build([[], track], DIVISION)


def note(pitch, onset, offset, velocity=90):
    return (onset, smf.NOTE_ON, pitch, velocity), (offset, smf.NOTE_OFF, pitch, 0)


def at(audio, start, end):
    return audio[round(start * RENDER_RATE) : round(end * RENDER_RATE)]


def rms(audio):
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))


def loudness_at(audio, frequency):
    """Largest magnitude of the spectrum within 8 Hz of a frequency."""
    spectrum = np.abs(np.fft.rfft(audio * np.hanning(len(audio))))
    hz = np.arange(len(spectrum)) * RENDER_RATE / len(audio)
    return spectrum[np.abs(hz - frequency) < 8].max()


def test_pitch_time_and_tail():
    audio = render_midi(midi(*note(69, 0.5, 1.2), program=ORGAN))
    assert audio.dtype == np.float32 and audio.ndim == 1
    assert np.abs(at(audio, 0, 0.498)).max() < 1e-6, "silence before the first note"
    heard = np.flatnonzero(np.abs(audio) > 1e-4)[0] / RENDER_RATE
    assert 0.499 < heard < 0.51
    held = at(audio, 0.7, 1.2)
    assert loudness_at(held, 440.0) > 20 * loudness_at(held, 415.3), "A4, not the G sharp below"
    assert rms(at(audio, 1.21, 1.3)) > 1e-3, "the release and the reverb ring"
    assert np.abs(audio[-1000:]).max() < soundfont.QUIET and len(audio) / RENDER_RATE < 4


def test_onsets_keep_their_distance():
    """Events fall on multiples of 64 samples, at most 0.73 ms from their time, however many came before."""
    onsets = [0.1 + 0.125 * i for i in range(20)]  # whole ticks, but 5512.5 samples
    audio = render_midi(midi(*(e for t in onsets for e in note(76, t, t + 0.02)), program=115), reverb=False)
    for earlier, later in itertools.pairwise(onsets):
        a, b = (at(audio, t - 0.003, t + 0.05) for t in (earlier, later))
        lag = np.argmax(np.correlate(b, a, mode="full")) - (len(a) - 1)
        assert abs(lag) <= 66  # samples: 2 x 32, and rounding in this test


def test_same_bytes_every_time():
    data = midi(*note(60, 0.1, 0.5), *note(64, 0.5, 0.8))
    np.testing.assert_array_equal(render_midi(data), render_midi(data))


def test_gain_is_linear_and_reverb_is_optional():
    data = midi(*note(60, 0.1, 0.5))
    quiet, loud = render_midi(data, gain=0.2), render_midi(data, gain=0.4)
    n = min(len(quiet), len(loud))  # the louder tail lasts longer
    np.testing.assert_allclose(2 * quiet[:n], loud[:n], atol=1e-5)
    assert len(render_midi(data, reverb=False)) < len(render_midi(data))


def test_program_change_in_mid_piece():
    notes = (*note(69, 0.1, 0.9), *note(69, 1.1, 1.9))
    change = (1.0, smf.PROGRAM_CHANGE, FLUTE, 0)
    events = sorted([*notes, change], key=lambda event: event[0])
    organ, changed, flute = (
        render_midi(midi(*notes, program=ORGAN)),
        render_midi(midi(*events, program=ORGAN)),
        render_midi(midi(*notes, program=FLUTE)),
    )
    np.testing.assert_array_equal(at(organ, 0, 0.99), at(changed, 0, 0.99))
    assert rms(at(organ, 1.2, 1.8) - at(changed, 1.2, 1.8)) > 0.5 * rms(at(changed, 1.2, 1.8))
    level = rms(at(flute, 1.2, 1.8))
    assert rms(at(changed, 1.2, 1.8)) == pytest.approx(level, rel=0.1)


def test_channel_ten_is_drums():
    """On channel 10 key 42 is a hi-hat, high and short; on another channel it is a low piano tone."""
    brightness = {}
    for channel in (0, smf.DRUM_CHANNEL):
        audio = at(render_midi(midi(*note(42, 0.0, 0.3), channel=channel), reverb=False), 0, 0.3)
        power = np.abs(np.fft.rfft(audio)) ** 2
        brightness[channel] = np.sum(power * np.arange(len(power))) / power.sum() / len(power) * 22050
    assert brightness[0] < 1000 < 4000 < brightness[smf.DRUM_CHANNEL]


def test_drums_are_those_of_the_notes():
    """Channels that the file makes drums, by system exclusive or by bank, or makes melodic, sound so."""
    strike = [smf.Event(tick(0.1), smf.NOTE_ON, 3, 42, 90), smf.Event(tick(0.4), smf.NOTE_OFF, 3, 42, 0)]
    drums = render_midi(midi(*note(42, 0.1, 0.4), channel=smf.DRUM_CHANNEL))
    piano = render_midi(midi(*note(42, 0.1, 0.4), channel=3))
    part = smf.Event(0, smf.RHYTHM_PART, 3, 1, 0)
    bank = [smf.Event(0, smf.CONTROL_CHANGE, 3, 0, 127), smf.Event(0, smf.PROGRAM_CHANGE, 3, 0, 0)]
    for events, right in (
        ([part], drums),
        (bank, drums),
        ([smf.Event(0, smf.RESET, 0, smf.GS, 0), *bank], piano),
        ([part, smf.Event(0, smf.RESET, 0, smf.GM, 0)], piano),
        ([part, part._replace(a=0)], piano),
    ):
        file = smf.MidiFile([[*events, *strike]], DIVISION, 0.0, [tick(0.4)], [])
        np.testing.assert_allclose(render_midi(file), right[: len(right)], atol=1e-6)


def test_a_reset_silences_and_forgets():
    start = [smf.Event(0, smf.PROGRAM_CHANGE, 0, ORGAN, 0), smf.Event(0, smf.NOTE_ON, 0, 69, 90)]
    later = [smf.Event(tick(2.0), smf.NOTE_ON, 0, 69, 90)]
    levels = {}
    for name, events in (("held", []), ("reset", [smf.Event(tick(1.0), smf.RESET, 0, smf.GM, 0)])):
        audio = render_midi(smf.MidiFile([[*start, *events, *later]], DIVISION, 0.0, [tick(2.0)], []), reverb=False)
        levels[name] = rms(at(audio, 0.5, 0.9)), rms(at(audio, 1.6, 1.9))
    assert levels["held"][1] > 0.5 * levels["held"][0] and levels["reset"][1] < 0.01 * levels["reset"][0]


def test_tuning_and_room():
    notes = note(69, 0.1, 0.9)
    plain, reset = midi(*notes, program=ORGAN), midi((0.0, smf.CONTROL_CHANGE, 121, 0), *notes, program=ORGAN)
    for data in (plain, reset):
        sharp = at(render_midi(data, tuning=50.0), 0.3, 0.8)
        assert loudness_at(sharp, 440 * 2 ** (50 / 1200)) > 20 * loudness_at(sharp, 430.0)
    small, large = (render_midi(plain, reverb=soundfont.Room(size, 0.0, 0.5, 0.9)) for size in (0.1, 0.9))
    assert len(large) > len(small) + RENDER_RATE // 4
    np.testing.assert_allclose(render_midi(plain, reverb=soundfont.Room()), render_midi(plain), atol=1e-6)


def test_pedal_and_bend_and_volume_act():
    pedalled = [(0.0, smf.CONTROL_CHANGE, 64, 127), *note(60, 0.1, 0.3), (1.0, smf.CONTROL_CHANGE, 64, 0)]
    assert rms(at(render_midi(midi(*pedalled)), 0.6, 0.9)) > 10 * rms(at(render_midi(midi(*pedalled[1:])), 0.6, 0.9))
    soft = [(0.0, smf.CONTROL_CHANGE, 7, 40), *note(60, 0.1, 0.3)]
    assert rms(render_midi(midi(*soft))) < 0.3 * rms(render_midi(midi(*soft[1:])))
    bent = midi((0.0, smf.PITCH_BEND, 127, 127), *note(67, 0.1, 0.8), program=ORGAN)  # two semitones up
    assert loudness_at(at(render_midi(bent), 0.3, 0.7), 440.0) > 20 * loudness_at(
        at(render_midi(midi(*note(67, 0.1, 0.8), program=ORGAN)), 0.3, 0.7), 440.0
    )


def test_pedal_never_released_ends_in_silence():
    audio = render_midi(midi((0.0, smf.CONTROL_CHANGE, 64, 127), *note(60, 0.1, 0.3), program=ORGAN))
    assert len(audio) / RENDER_RATE < 4 and np.abs(audio[-1000:]).max() < soundfont.QUIET


def test_from_a_path(tmp_path):
    data = midi(*note(60, 0.0, 0.2))
    (tmp_path / "a.mid").write_bytes(data)
    np.testing.assert_array_equal(render_midi(tmp_path / "a.mid"), render_midi(data))


@pytest.mark.parametrize("data", [b"", b"nonsense", midi(*note(60, 0.0, 0.2))[:9]])
def test_bad_midi(data):
    with pytest.raises(UserError, match="MIDI"):
        render_midi(data)


def test_what_is_whole_of_a_cut_file_is_played():
    data = midi(*note(60, 0.0, 0.2), *note(64, 0.3, 0.5))[:-9]
    with pytest.warns(smf.MidiWarning, match="bytes, .* are left"):
        np.testing.assert_array_equal(render_midi(data), render_midi(midi(*note(60, 0.0, 0.2))))


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"none\.mid"):
        render_midi(tmp_path / "none.mid")
    with pytest.raises(UserError, match=r"no SoundFont at .*none\.sf2"):
        render_midi(midi(*note(60, 0.0, 0.2)), soundfont=tmp_path / "none.sf2")
    (tmp_path / "bad.sf2").write_bytes(b"RIFF and then nothing")
    with pytest.raises(UserError, match=r"bad\.sf2 is not a SoundFont"):
        render_midi(midi(*note(60, 0.0, 0.2)), soundfont=tmp_path / "bad.sf2")


@pytest.mark.parametrize(
    "failure, advice",
    [
        (ImportError("Couldn't find the FluidSynth library."), "apt-get install libfluidsynth3"),
        (ModuleNotFoundError("No module named 'fluidsynth'"), "pip install pyfluidsynth"),
    ],
)
def test_missing_fluidsynth(monkeypatch, failure, advice):
    original = builtins.__import__

    def without_fluidsynth(name, *args, **kwargs):
        if name == "fluidsynth":
            raise failure
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_fluidsynth)
    with pytest.raises(UserError, match=advice):
        render_midi(midi(*note(60, 0.0, 0.2)))
