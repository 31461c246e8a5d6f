"""Synthesis: what a call returns, what the command writes and prints, and what an import costs."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from music_synth import synthesize as entry
from music_synth.autoregressive.objective import Autoregressive
from music_synth.diffusion.objective import Diffusion
from music_synth.errors import UserError
from music_synth.midi.notes import Note, write_midi
from music_synth.midi.segments import OverlongSegmentWarning
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.vocoder.inverter import load_inverter
from tests import tiny_runs

NETWORK = NetworkConfig(
    model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1, max_tokens=128
)
TOKENIZER = Tokenizer(max_tokens=128)
MODELS = {"diffusion": Diffusion(NETWORK).with_sampling(num_steps=2), "autoregressive": Autoregressive(NETWORK)}
NOTES = [Note(60, 90, 0, 0.0, 1.0), Note(64, 90, 33, 5.0, 6.5), Note(36, 90, 0, 5.0, 5.01, is_drum=True)]


def clicks(mel):
    """An inverter: one sample a frame."""
    audio = np.zeros(320 * len(mel), np.float32)
    audio[::320] = np.tanh(mel.mean(axis=1))
    return audio


@pytest.fixture(scope="module", params=MODELS)
def decoder(request):
    model = MODELS[request.param]
    return model, tiny_runs.random_like(model.init)


def test_length_is_that_of_the_notes_and_a_ring_out(decoder):
    audio, mel = entry.synthesize(NOTES, *decoder, TOKENIZER, clicks)
    assert mel.shape == (375, 128)  # (6.5 + 1) s, two segments
    assert audio.shape == (375 * 320,)
    assert mel.dtype == audio.dtype == np.float32
    np.testing.assert_array_equal(audio, clicks(mel))


def test_the_seed_decides(decoder):
    model, _ = decoder
    if isinstance(model, Autoregressive):
        pytest.skip("deterministic")
    first, again, other = (entry.synthesize(NOTES, *decoder, TOKENIZER, clicks, seed=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


def test_without_an_inverter_the_shipped_one_makes_the_audio():
    model = MODELS["autoregressive"]
    audio, mel = entry.synthesize(NOTES[:1], model, tiny_runs.random_like(model.init), TOKENIZER)
    assert audio.shape == (100 * 320,)
    np.testing.assert_array_equal(audio, load_inverter()(mel))


def test_segments_with_too_many_notes_are_played_with_a_warning():
    model = MODELS["autoregressive"]
    crowd = [Note(pitch, 90, pitch, 0.01 * pitch, 1.5) for pitch in range(20, 90)]
    with pytest.warns(OverlongSegmentWarning, match="notes from .* are left out"):
        _, mel = entry.synthesize(crowd, model, tiny_runs.random_like(model.init), TOKENIZER, clicks)
    assert mel.shape == (125, 128)


def test_no_notes_are_refused():
    with pytest.raises(UserError, match="no notes"):
        entry.synthesize([], MODELS["diffusion"], {}, TOKENIZER)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a run and a MIDI file."""
    folder = tmp_path_factory.mktemp("synthesize")
    tiny_runs.start(folder / "diffusion", "diffusion.gin", tiny_runs.prepare(folder / "prepared"))
    write_midi(NOTES, folder / "in.mid")
    return folder


def test_the_command_writes_audio_and_a_picture(workspace, tmp_path, capsys):
    def play(name, *flags):
        argv = [f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion", f"--out={tmp_path}/{name}", *flags]
        entry.main(argv)
        return tmp_path / name

    out = play("a.wav", f"--plot={tmp_path}/a.png")
    printed = capsys.readouterr()
    audio, rate = soundfile.read(out)
    assert (len(audio), rate) == (375 * 320, 16000)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "Diffusion" in printed.out and "step 0" in printed.out
    assert "7.5 s of music" in printed.out and "times real time" in printed.out
    assert "sampling" in printed.err  # the progress bar

    assert play("b.wav").read_bytes() == out.read_bytes()  # same seed, same bytes
    assert play("c.wav", "--seed=1").read_bytes() != out.read_bytes()
    np.testing.assert_allclose(soundfile.read(play("d.flac", "--step=0"))[0], audio, atol=1.1 / 2**15)


def test_flags_reach_the_sampler(workspace, tmp_path, monkeypatch):
    seen = {}

    def sample(notes, model, params, tokenizer, seed, progress):
        seen.update(dataclasses.asdict(model.sampler), seed=seed)
        return np.zeros((1, 128), np.float32)

    monkeypatch.setattr(entry, "sample_piece", sample)
    monkeypatch.setattr(entry, "load_inverter", lambda name: clicks)
    flags = ["--sampler=ddpm", "--steps=7", "--guidance=1.5", "--seed=9"]
    entry.main([f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion", f"--out={tmp_path}/a.wav", *flags])
    assert (seen["name"], seen["num_steps"], seen["guidance_scale"], seen["seed"]) == ("ddpm", 7, 1.5, 9)


def test_importing_is_light():
    # Processor time: what the clock on the wall shows where nothing else runs.
    code = """
import sys, time
import music_synth.synthesize
print(time.process_time())
heavy = ("tensorflow", "note_seq", "clu", "librosa", "matplotlib", "seqio", "pretty_midi", "soundfile")
print(*(name for name in heavy if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = result.stdout.split("\n")[:2]
    assert float(seconds) < 6
    assert heavy == ""
