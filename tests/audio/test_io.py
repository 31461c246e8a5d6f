import subprocess
import sys

import numpy as np
import pytest
import soundfile

from music_synth.audio.io import audio_writer, read_audio, resample, write_audio
from music_synth.errors import UserError


def sine(hz, rate, seconds=1.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".WAV"])
def test_round_trip(tmp_path, suffix):
    path, audio = tmp_path / f"a{suffix}", sine(440, 16000)
    write_audio(path, audio)
    assert soundfile.info(path).samplerate == 16000 and soundfile.info(path).channels == 1
    again = read_audio(path)
    assert again.dtype == np.float32
    np.testing.assert_allclose(again, audio, atol=1.0 / 32768)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 96000])
def test_reads_at_any_rate(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(440, rate), rate, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")  # 16 kHz
    assert len(audio) == 16000
    inside = slice(1000, -1000)  # the ends ring
    np.testing.assert_allclose(audio[inside], sine(440, 16000)[inside], atol=2e-3)


def test_resampling_does_not_fold():
    assert np.abs(resample(sine(10000, 44100), 44100, 16000)[1000:-1000]).max() < 1e-3


def test_stereo_is_averaged(tmp_path):
    left, right = sine(440, 16000), sine(220, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


def test_clipping_is_warned_of(tmp_path):
    audio = sine(440, 16000, amplitude=2.0)
    with pytest.warns(UserWarning, match=r"a\.wav: \d+ of 16000 samples exceed 1"):
        write_audio(tmp_path / "a.wav", audio)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), audio.clip(-1, 1), atol=1.0 / 32768)


def nothing(folder):
    return folder / "none.wav"


def text(folder):
    (folder / "text.wav").write_text("this is not audio")
    return folder / "text.wav"


def empty_file(folder):
    (folder / "empty.wav").write_bytes(b"")
    return folder / "empty.wav"


def no_samples(folder):
    soundfile.write(folder / "short.wav", np.zeros(0, np.float32), 16000)
    return folder / "short.wav"


def nan(folder):
    soundfile.write(folder / "nan.wav", np.array([0.1, np.nan, 0.2], np.float32), 16000, subtype="FLOAT")
    return folder / "nan.wav"


@pytest.mark.parametrize(
    "make, message",
    [
        (nothing, r"no audio file at .*none\.wav"),
        (lambda folder: folder, "no audio file at"),
        (text, r"cannot read .*text\.wav as audio"),
        (empty_file, r"cannot read .*empty\.wav as audio"),
        (no_samples, r"short\.wav holds no audio samples"),
        (nan, r"nan\.wav holds samples that are NaN"),
    ],
)
def test_unreadable(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        read_audio(make(tmp_path))


@pytest.mark.parametrize(
    "name, audio, message",
    [
        ("a.mp3", np.zeros(10), r"must end in \.wav or \.flac"),
        ("a", np.zeros(10), r"must end in \.wav or \.flac"),
        ("none/a.wav", np.zeros(10), "no folder"),
        ("a.wav", np.zeros(0), "empty"),
        ("a.wav", np.array([0.0, np.inf]), "NaN or infinity"),
    ],
)
def test_unwritable(tmp_path, name, audio, message):
    with pytest.raises(UserError, match=message):
        write_audio(tmp_path / name, audio)
    assert not list(tmp_path.rglob("a*"))


def test_folder_in_the_way(tmp_path):
    (tmp_path / "a.wav").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*a\.wav"):
        write_audio(tmp_path / "a.wav", np.zeros(10))
    with pytest.raises(ValueError, match="mono"):
        write_audio(tmp_path / "b.wav", np.zeros((10, 2)))


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_audio_that_comes_in_parts_takes_its_name_when_it_is_whole(tmp_path, suffix):
    path, audio = tmp_path / f"a{suffix}", sine(440, 16000)
    path.write_bytes(b"old")
    with audio_writer(path) as write:
        for first in range(0, 16000, 3000):
            write(audio[first : first + 3000])
            assert path.read_bytes() == b"old"
    np.testing.assert_allclose(read_audio(path), audio, atol=1.0 / 32768)
    whole = path.read_bytes()
    with pytest.raises(KeyboardInterrupt), audio_writer(path) as write:
        write(audio)
        raise KeyboardInterrupt
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_disk_that_fills_up_is_named_and_leaves_what_was_there(tmp_path, suffix):
    """A process that may write no file of more than 100 kB stands for it."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"old")
    code = """
import resource, sys
import numpy as np
from music_synth import errors
from music_synth.audio.io import audio_writer
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
def main(argv):
    with audio_writer(argv[0]) as write:
        for _ in range(20):
            write(np.random.default_rng(0).uniform(-1, 1, 16000))
errors.run(main)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"error: cannot write {path} (File too large)\n")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
