"""Synthesis: what a call returns, what the command writes and prints, and what an import costs."""

import contextlib
import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

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
from music_synth.runs import load_inverter
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.neural import NeuralInverter, save_inverter
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")
NETWORK = NetworkConfig(
    model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1, max_tokens=128
)
TOKENIZER = Tokenizer(max_tokens=128)
MODELS = {"diffusion": Diffusion(NETWORK).with_sampling(num_steps=2), "autoregressive": Autoregressive(NETWORK)}
NOTES = [Note(60, 90, 0, 0.0, 1.0), Note(64, 90, 33, 5.0, 6.5), Note(36, 90, 0, 5.0, 5.01, is_drum=True)]


def clicks(mel, notes=None):
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
    np.testing.assert_array_equal(audio, load_inverter()(mel, NOTES[:1]))


def test_segments_with_too_many_notes_are_played_with_a_warning():
    model = MODELS["autoregressive"]
    crowd = [Note(pitch, 90, pitch, 0.01 * pitch, 1.5) for pitch in range(20, 90)]
    with pytest.warns(OverlongSegmentWarning, match="notes from .* are left out"):
        _, mel = entry.synthesize(crowd, model, tiny_runs.random_like(model.init), TOKENIZER, clicks)
    assert mel.shape == (125, 128)


def test_no_notes_are_refused():
    with pytest.raises(UserError, match="no notes"):
        entry.synthesize([], MODELS["diffusion"], {}, TOKENIZER)


def test_a_stream_equals_the_whole(decoder):
    generator = ISTFTGenerator(dim=8, mlp_dim=16, num_layers=1, num_consistency_steps=1, num_projections=2)
    inverter = NeuralInverter(generator, tiny_runs.random_like(generator.init))
    audio, mel = entry.synthesize(NOTES, *decoder, TOKENIZER, inverter, seed=5)
    first, *rest = entry.synthesize_stream(NOTES, *decoder, TOKENIZER, inverter, seed=5)
    assert len(first) == (256 - generator.as_played().reach[1]) * 320
    np.testing.assert_allclose(np.concatenate([first, *rest]), audio, atol=1e-3 * np.abs(audio).max())
    (only,) = entry.synthesize_stream(NOTES, *decoder, TOKENIZER, clicks, seed=5)  # cannot stream
    np.testing.assert_array_equal(only, clicks(mel))


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


def test_without_out_the_audio_lies_beside_the_file_and_never_over_another(workspace, tmp_path):
    write_midi(NOTES[:1], tmp_path / "in.mid")
    argv = [f"{tmp_path}/in.mid", f"--checkpoint={workspace}/diffusion"]
    entry.main(argv)
    assert soundfile.info(tmp_path / "in.wav").duration == 2.0
    with pytest.raises(UserError, match=r"in\.wav is there already: name a file by --out"):
        entry.main(argv)
    with pytest.raises(UserError, match="--out is missing: for several pieces name a folder"):
        entry.main([str(tmp_path), *argv[1:]])


def test_a_link_is_judged_by_its_own_name_and_the_folder_that_it_leads_to(tmp_path):
    link = tmp_path / "out.wav"
    link.symlink_to(tmp_path / "no suffix")
    entry.check_writable(link, (".wav",))
    link.unlink()
    link.symlink_to(tmp_path / "nowhere" / "out.wav")
    with pytest.raises(UserError, match=r"out\.wav: there is no folder .*/nowhere"):
        entry.check_writable(link, (".wav",))


def test_several_files_and_folders_become_a_folder(workspace, tmp_path, capsys):
    folder = tmp_path / "pieces"
    folder.mkdir()
    for name, notes in (("one.mid", NOTES), ("two.MIDI", NOTES[:1])):
        write_midi(notes, folder / name)
    (folder / "notes.txt").write_text("not music")
    argv = [f"--checkpoint={workspace}/diffusion"]
    entry.main([str(folder), *argv, f"--out={tmp_path}/all"])
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["one.wav", "two.wav"]
    assert "9.5 s of music" in capsys.readouterr().out
    entry.main([str(folder / "one.mid"), *argv, f"--out={tmp_path}/alone.wav"])
    assert (tmp_path / "alone.wav").read_bytes() == (tmp_path / "all" / "one.wav").read_bytes()


def test_samples_go_to_stdout_and_words_to_stderr(workspace, tmp_path, capfdbinary):
    argv = [f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion"]
    entry.main([*argv, f"--out={tmp_path}/a.wav"])
    capfdbinary.readouterr()
    entry.main([*argv, "--out", "-"])
    out, err = capfdbinary.readouterr()
    samples = np.frombuffer(out, "<i2").astype(np.float32) / 2**15
    np.testing.assert_allclose(samples, soundfile.read(tmp_path / "a.wav")[0], atol=5e-3)
    assert b"of audio after" in err and b"times real time" in err


def test_a_player_may_close_the_pipe(workspace, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        entry.main([f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion", "--out", "-"])
    assert "closed the pipe" in capsys.readouterr().err


def test_a_full_disk_behind_stdout_is_named(workspace, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with pytest.raises(UserError, match=r"--out -: cannot write \(No space left"):
            entry.main([f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion", "--out", "-"])


def test_a_folder_plays_what_can_be_played_and_names_the_rest(workspace, tmp_path, capsys, recwarn):
    folder = tmp_path / "pieces"
    folder.mkdir()
    for name in ("a.kar", "b.rmi", "c.smf"):
        write_midi(NOTES[:1], folder / name)
    (folder / "broken.mid").write_bytes(b"MThd")
    write_midi([Note(60, 90, 0, 3600.0, 3601.0)], folder / "long.mid")
    with pytest.raises(UserError, match=r"2 of 5 files are not played: \S+/broken.mid, \S+/long.mid"):
        entry.main([str(folder), f"--checkpoint={workspace}/diffusion", f"--out={tmp_path}/all"])
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["a.wav", "b.wav", "c.wav"]
    assert "3 pieces: 3 notes, 6.0 s of music" in capsys.readouterr().out
    told = [str(warning.message) for warning in recwarn]
    assert any("broken.mid" in text for text in told)
    assert any("long.mid is 1 h 0 min of music: --long plays" in text for text in told)


def test_a_piece_of_more_than_an_hour_is_played_only_if_asked_for(workspace, tmp_path, monkeypatch):
    write_midi([Note(60, 90, 0, 0.0, 1.0), Note(60, 90, 0, 86_000.0, 86_001.0)], tmp_path / "day.mid")
    argv = [f"{tmp_path}/day.mid", f"--checkpoint={workspace}/diffusion", f"--out={tmp_path}/day.wav"]
    with pytest.raises(UserError, match=r"day.mid is 23 h 53 min of music: --long"):
        entry.main(argv)
    monkeypatch.setattr(entry, "play", lambda *args, **kwargs: ("mel", "audio"))
    entry.main([*argv, "--long"])


def test_a_closed_stdout_is_none_to_play_to(workspace, tmp_path, monkeypatch):
    argv = [f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion"]
    monkeypatch.setattr("sys.stdout", None)  # as Python has it under `>&-`
    with pytest.raises(UserError, match="stdout is closed"):
        entry.main([*argv, "--out", "-"])
    entry.main([*argv, f"--out={tmp_path}/a.wav"])
    assert (tmp_path / "a.wav").is_file()


def test_what_is_broken_off_leaves_nothing_half(workspace, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(b"old")

    def broken(mel, notes=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry.runs, "load_inverter", lambda *_: broken)
    with pytest.raises(KeyboardInterrupt):
        entry.main([f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion", f"--out={tmp_path}/a.wav"])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_flags_reach_the_sampler(workspace, tmp_path, monkeypatch):
    seen = {}

    def play(decoder, pieces, targets, inverter, seed, batch_size, say, keep):
        seen.update(dataclasses.asdict(decoder.model.sampler), seed=seed, batch_size=batch_size)
        return None, None

    monkeypatch.setattr(entry, "play", play)
    monkeypatch.setattr(entry.runs, "load_inverter", lambda *_: clicks)
    flags = ["--sampler=ddpm", "--steps=7", "--temperature=0.5", "--texture=0.3", "--seed=9", "--batch_size=3"]
    entry.main([f"{workspace}/in.mid", f"--checkpoint={workspace}/diffusion", f"--out={tmp_path}/a.wav", *flags])
    assert [seen[k] for k in ("name", "num_steps", "temperature", "texture")] == ["ddpm", 7, 0.5, 0.3]
    assert (seen["seed"], seen["batch_size"]) == (9, 3)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(7.5, "7.5 s"), (59.94, "59.9 s"), (200.4, "3 min 20 s"), (3599.7, "1 h 0 min"), (86_040, "23 h 54 min")],
)
def test_lengths_are_said_in_words(seconds, words):
    assert entry.in_words(seconds) == words


def peak_of(minutes, workspace, out):
    """The most memory in MB that this process has had, after it played a piece of a note every five seconds."""
    midi = workspace / f"{minutes}.mid"
    write_midi([Note(60 + k % 12, 80, 0, 5.0 * k, 5.0 * k + 2) for k in range(12 * minutes)], midi)
    with contextlib.redirect_stdout(sys.stderr):
        argv = [f"--checkpoint={workspace}/diffusion", f"--inverter={workspace}/small.safetensors", "--steps=1"]
        entry.main([str(midi), *argv, f"--out={out}"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow  # plays 35 minutes in a process of its own
def test_memory_does_not_grow_with_the_length(workspace, tmp_path):
    generator = ISTFTGenerator(dim=8, mlp_dim=16, num_layers=1, num_consistency_steps=1, num_projections=2)
    save_inverter(workspace / "small.safetensors", generator, tiny_runs.random_like(generator.init))
    code = "import pathlib, sys; from tests.test_synthesize import peak_of; "
    code += "print(*(peak_of(n, pathlib.Path(sys.argv[1]), f'{sys.argv[2]}/{n}.wav') for n in (5, 30)))"
    command = [sys.executable, "-c", code, str(workspace), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    short, long = map(float, done.stdout.split())
    assert soundfile.info(tmp_path / "30.wav").duration > 1795
    assert long - short < 30, (short, long)  # the 25 more minutes are 96 MB of audio, 38 MB of mel


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
