"""The pipeline of the diffusers port, over a tiny pipeline of its and over runs of ours."""

import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pretty_midi
import pytest

import music_synth
from music_synth import MidiProcessor, SpectrogramDiffusionPipeline
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError
from music_synth.interop import diffusers
from music_synth.midi.notes import Note, read_midi
from music_synth.midi.segments import OverlongSegmentWarning, pad_tokens
from music_synth.midi.tokenizer import Tokenizer
from music_synth.midi.vocabulary import EOS_ID
from music_synth.models.layers import NetworkConfig
from music_synth.pipeline import find_device, seed_of, to_notes
from music_synth.runs import load_inverter
from tests import golden_arrays, tiny_runs
from tests.golden_arrays import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compilation")

DATA = pathlib.Path(__file__).parents[1] / "data"
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The port's tiny pipeline."""
    folder = tmp_path_factory.mktemp("port") / "tiny"
    shutil.copytree(GOLDEN / "diffusers_tiny", folder)
    (folder / "melgan").mkdir()
    shutil.copyfile(GOLDEN / "toy_inverter.onnx", folder / diffusers.INVERTER)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return SpectrogramDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokens():
    """Of two segments; short ones."""
    return MidiProcessor()([Note(60, 90, 27, 0.5, 1.0), Note(62, 90, 0, 6.0, 6.5), Note(36, 90, 0, 6.0, 6.1, True)])


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((GOLDEN / "midi").glob("[a-f]*.mid")), ids=lambda path: path.stem)
def test_the_processor_gives_what_the_port_gives(path):
    """For the port equals upstream's chain over programs of Slakh (docs/spec.md 3.21)."""
    rows = MidiProcessor()(path)
    assert all(isinstance(row, list) and isinstance(row[0], int) for row in rows)
    np.testing.assert_array_equal(rows, golden_arrays.load("tokens")[f"{path.stem}/vb1_ties_full_slakhmap"])


def test_too_many_notes_give_a_longer_list():
    """As in the port, which neither raises nor cuts."""
    stored = golden_arrays.load("tokens")["g_too_long/vb1_ties_full_untruncated"]
    rows = MidiProcessor(Tokenizer())(GOLDEN / "midi/g_too_long.mid")
    assert [len(row) for row in rows] == [max(2048, np.count_nonzero(row)) for row in stored]
    np.testing.assert_array_equal([pad_tokens(row, stored.shape[1]) for row in rows], stored)


def test_whatever_holds_notes_is_processed():
    path = DATA / "string_quartet.mid"
    rows = MidiProcessor()(path)
    for same in (str(path), path.read_bytes(), read_midi(path, as_published=True)):
        assert MidiProcessor()(same) == rows
    midi = pretty_midi.PrettyMIDI()
    midi.instruments.append(pretty_midi.Instrument(40))
    midi.instruments[0].notes.append(pretty_midi.Note(90, 60, 0.5, 1.0))
    assert MidiProcessor()(midi) == MidiProcessor()([Note(60, 90, 40, 0.5, 1.0)])
    for wrong in (3, [], [1, 2]):
        with pytest.raises(UserError, match="no path, no bytes, no pretty_midi and no notes"):
            MidiProcessor()(wrong)


def test_an_object_of_pretty_midi_is_taken_as_it_is():
    midi = pretty_midi.PrettyMIDI(resolution=24)  # a coarse grid that must not matter
    part = pretty_midi.Instrument(40)
    midi.instruments.append(part)
    part.notes.append(pretty_midi.Note(90, 60, 0.5, 0.5001))
    part.notes.append(pretty_midi.Note(90, 62, 1.0, 1.2))
    part.control_changes += [pretty_midi.ControlChange(64, 127, 1.1), pretty_midi.ControlChange(64, 0, 2.0)]
    assert to_notes(midi) == [Note(60, 90, 40, 0.5, 0.5001), Note(62, 90, 40, 1.0, 2.0)]
    assert MidiProcessor()(midi) == MidiProcessor()(to_notes(midi))
    for impossible in ((90, 200, 0, 1), (300, 60, 0, 1), (0, 60, 0, 1), (90, 60, 1, 1), (90, 60, -1, 1)):
        part.notes[0] = pretty_midi.Note(*impossible)
        with pytest.raises(UserError, match="is no note"):
            MidiProcessor()(midi)
    for impossible in ((90, 60, float("nan"), 1), (90, 60, 0, float("inf")), (90, 60.5, 0, 1), ("a", 60, 0, 1)):
        part.notes[0] = pretty_midi.Note(*impossible)
        with pytest.raises(UserError, match="is no note"):
            MidiProcessor()(midi)
    part.control_changes[0].time = float("nan")
    with pytest.raises(UserError, match="a pedal at nan"):
        MidiProcessor()(midi)
    with pytest.raises(UserError, match="is no note"):
        MidiProcessor()([Note(60, 90, 200, 0.0, 1.0)])
    with pytest.raises(UserError, match="no notes"):
        MidiProcessor()(pretty_midi.PrettyMIDI())


# --- playing -----------------------------------------------------------------------------------------------------


def test_the_example_of_the_port(folder):
    """As people know it, but for the folder, and a device that is here."""
    pipe = SpectrogramDiffusionPipeline.from_pretrained(folder)
    pipe = pipe.to("cpu")
    processor = MidiProcessor()
    output = pipe(processor(DATA / "piano_with_pedal.mid"), num_inference_steps=STEPS)
    audio = output.audios[0]
    notes = read_midi(DATA / "piano_with_pedal.mid", as_published=True)
    segments = -(-int(16000 * max(note.offset for note in notes)) // (256 * 320))
    assert audio.shape == (1, segments * 256 * 320) and audio.dtype == np.float32
    assert np.isfinite(audio).all() and audio.std() > 0


def test_audio_and_mel(pipe, tokens):
    (mel,) = pipe(tokens, 7, STEPS, False, "mel")
    assert mel.shape == (1, 512, 128)
    output = pipe(tokens, generator=7, num_inference_steps=STEPS)
    assert isinstance(output.audios, list) and output[0] is output.audios
    np.testing.assert_allclose(output.audios[0][0], load_inverter(str(GOLDEN / "toy_inverter.onnx"))(mel[0]), atol=1e-6)


def test_a_hundred_steps_without_guidance_by_default(pipe):
    assert pipe.model.sampler == Sampler("ddpm", 100, grid="leading")
    model = pipe._with_sampling(None, None, None)
    assert model == pipe.model
    assert pipe._with_sampling(20, "dpmpp_2m", 0.0).sampler == Sampler("dpmpp_2m", 20, 0.0, grid="leading")
    assert pipe._with_sampling(20, Sampler("heun", 5), None).sampler == Sampler("heun", 20)
    for arguments, message in (
        ((0, None, None), "num_steps = 0"),
        ((None, "leapfrog", None), "'leapfrog': choose from"),
        ((None, None, -1.0), "guidance_scale = -1.0"),
    ):
        with pytest.raises(UserError, match=message):
            pipe._with_sampling(*arguments)


def test_new_arguments_reach_the_sampler(pipe, tokens):
    arguments = dict(generator=0, num_inference_steps=STEPS, output_type="mel")
    plain = pipe(tokens[:1], **arguments).audios
    for new in ({"sampler": "ddim"}, {"guidance_scale": 2.0}):
        assert np.abs(pipe(tokens[:1], **arguments, **new).audios - plain).max() > 1e-3


def test_the_generator_decides(pipe, tokens):
    def play(generator):
        return pipe(tokens[:1], generator, STEPS, output_type="mel").audios

    np.testing.assert_array_equal(play(3), play(np.int64(3)))

    def numpy():
        return np.random.default_rng(3)

    np.testing.assert_array_equal(play(numpy()), play(numpy()))
    assert np.abs(play(None) - play(None)).max() > 0.1
    key, raw = jax.random.key(1), jax.random.PRNGKey(1)
    assert seed_of(key) == seed_of(raw) != seed_of(jax.random.key(2))
    torch_generator = types.SimpleNamespace(initial_seed=lambda: 2**40 + 5)
    assert seed_of(torch_generator) == 5
    generator = numpy()
    assert seed_of(generator) != seed_of(generator)  # it goes on, as torch's does
    for wrong in (-1, 2**32, "3", True):
        with pytest.raises(UserError, match="generator"):
            seed_of(wrong)


def test_callback_and_bar(pipe, tokens, capsys):
    seen = []

    def callback(i, mel):
        seen.append((i, mel.shape))

    mel = pipe([*tokens, tokens[0]], 0, STEPS, True, "mel", callback, 2).audios
    assert seen == [(0, (1, 256, 128)), (2, (1, 768, 128))] and mel.shape == (1, 768, 128)
    assert "3/3" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(tokens, 0, STEPS, output_type="mel")
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config()


def test_streaming(pipe, tokens):
    whole = pipe(tokens, 0, STEPS, output_type="mel").audios
    parts = list(pipe(tokens, 0, STEPS, output_type="mel", streaming=True))
    assert [part.shape for part in parts] == [(1, 256, 128)] * 2
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    audio = np.concatenate(list(pipe(tokens, 0, STEPS, streaming=True)), axis=1)
    np.testing.assert_array_equal(audio, pipe(tokens, 0, STEPS).audios[0])


def test_a_path_and_notes_are_played_as_their_tokens(pipe):
    notes = [Note(60, 90, 27, 0.5, 1.0)]

    def play(what):
        return pipe(what, 0, STEPS, output_type="mel").audios

    np.testing.assert_array_equal(play(notes), play(MidiProcessor()(notes)))


def test_long_segments_are_cut_at_an_event(pipe):
    rows = MidiProcessor()(GOLDEN / "midi/g_too_long.mid")
    with pytest.warns(OverlongSegmentWarning, match="at most 2048 fit"):
        cut = pipe._tokens(rows)
    assert max(map(len, cut)) <= 2048
    long = next(i for i, row in enumerate(rows) if len(row) > 2048)
    assert cut[long].tolist() == [*rows[long][: len(cut[long]) - 1], EOS_ID]
    assert len(cut[long]) > 2040
    with pytest.warns(OverlongSegmentWarning):
        notes = read_midi(GOLDEN / "midi/g_too_long.mid", as_published=True)
        assert len(pipe.tokenizer.encode(notes)[long]) == len(cut[long])


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        ([], {}, "list of tokens is empty"),
        ([[4000, 1]], {}, r"segment 0 has the token 4000; the network knows 0 \.\. 1535"),
        ([[-3, 1]], {}, "token -3"),
        ([[0.5]], {}, "no list of whole numbers"),
        ([3], {}, "no list of whole numbers"),
        ([[1, [2]]], {}, "no list of whole numbers"),
        (5, {}, "'5' is no list of the tokens"),
        ([[1]], {"sampler": 5}, "sampler = 5"),
        ([[1]], {"num_inference_steps": 2.5}, "num_steps = 2.5: must be int"),
        ("nowhere.mid", {}, "no such MIDI file"),
        ([[1]], {"output_type": "pt"}, "'pt': choose from np"),
        ([[1]], {"callback_steps": 0}, "callback_steps = 0"),
        ([[1]], {"callback_steps": None}, "callback_steps = None"),
        ([[1]], {"num_inference_steps": 2000}, "at most 1000"),
    ],
)
def test_bad_arguments(pipe, tokens, arguments, message):
    with pytest.raises(UserError, match=message):
        pipe(tokens, **arguments)


# --- devices -----------------------------------------------------------------------------------------------------


def test_devices(pipe):
    assert pipe.to("cpu") is pipe and pipe.device.platform == "cpu"
    assert pipe.to("cpu:0").device == pipe.to(jax.devices("cpu")[0]).device
    assert jax.tree.leaves(pipe.params)[0].devices() == {jax.devices("cpu")[0]}
    for name, message in (
        ("cuda", r"JAX finds no cuda here, only cpu: .* use \.to\('cpu'\)"),
        ("tpu", "JAX finds no tpu"),
        ("cpu:7", "there is cpu:0 to cpu:0"),
        ("mps", "device 'mps': choose from cpu, cuda, gpu, tpu"),
        ("cpu:x", "device 'cpu:x'"),
    ):
        with pytest.raises(UserError, match=message):
            find_device(name)


# --- folders -----------------------------------------------------------------------------------------------------


def test_saved_and_loaded(pipe, folder, tmp_path):
    pipe.save_pretrained(tmp_path)
    for path in folder.rglob("*.*"):
        saved = tmp_path / path.relative_to(folder)
        assert saved.is_file() and (path.name == diffusers.INDEX or saved.read_bytes() == path.read_bytes())


def test_a_model_of_ours_with_our_inverter(tmp_path, tokens):
    """Saved for the port: the inverter that ships goes along as ONNX, without the source that a host would make."""
    network = NetworkConfig(
        model_dim=8, num_heads=1, head_dim=4, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1, max_tokens=128
    )
    model = Diffusion(network, prediction_type="eps")
    pipe = SpectrogramDiffusionPipeline(model, tiny_runs.random_like(model.init), Tokenizer(), load_inverter())
    pipe.save_pretrained(tmp_path)
    back = SpectrogramDiffusionPipeline.from_pretrained(tmp_path)
    assert back.melgan == tmp_path / diffusers.INVERTER
    mel = np.random.default_rng(0).normal(-5, 2, (40, 128)).astype(np.float32)
    np.testing.assert_allclose(back.inverter(mel), pipe.inverter.without_source(mel), atol=1e-3)


def test_without_an_inverter_ours_plays(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "tiny")
    (tmp_path / "tiny" / diffusers.INVERTER).unlink()
    with pytest.warns(UserWarning, match="the inverter that ships with music_synth makes the audio"):
        pipe = SpectrogramDiffusionPipeline.from_pretrained(tmp_path / "tiny")
    mel = np.full((20, 128), -8.0, np.float32)
    np.testing.assert_array_equal(pipe.inverter(mel), load_inverter()(mel))
    quiet = SpectrogramDiffusionPipeline.from_pretrained(folder, inverter="griffin_lim")
    np.testing.assert_array_equal(quiet.inverter(mel), load_inverter("griffin_lim")(mel))
    assert quiet.melgan is None
    other = SpectrogramDiffusionPipeline.from_pretrained(folder, inverter=GOLDEN / "toy_inverter.onnx")
    assert other.melgan == GOLDEN / "toy_inverter.onnx"


def test_a_run_of_ours(tmp_path, tokens):
    run = tiny_runs.start(tmp_path / "run", "diffusion.gin", tiny_runs.prepare(tmp_path / "prepared"))
    pipe = SpectrogramDiffusionPipeline.from_pretrained(run, inverter="griffin_lim")
    mel = pipe([Note(60, 90, 0, 0.5, 1.0)], 0, 1, output_type="mel").audios
    assert mel.shape == (1, 256, 128)


# --- the hub -----------------------------------------------------------------------------------------------------


def in_cache(cache, folder):
    """Puts a folder into a hub cache, as owner/tiny."""
    repository = cache / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def test_a_repository_in_the_cache(folder, tmp_path):
    in_cache(tmp_path, folder)
    pipe = SpectrogramDiffusionPipeline.from_pretrained("owner/tiny", cache_dir=tmp_path, local_files_only=True)
    assert pipe.model.network.model_dim == 16
    assert pipe.melgan.is_file()


def test_no_such_name(tmp_path):
    with pytest.raises(UserError, match=r"no folder nowhere/at/all, and no name of a repository"):
        SpectrogramDiffusionPipeline.from_pretrained("nowhere/at/all")
    with pytest.raises(UserError, match=r"no folder owner/absent, and the hub does not give it \(LocalEntryNotFound"):
        SpectrogramDiffusionPipeline.from_pretrained("owner/absent", cache_dir=tmp_path, local_files_only=True)


def test_no_network(tmp_path):
    code = """
from music_synth import SpectrogramDiffusionPipeline, errors
errors.run(lambda argv: SpectrogramDiffusionPipeline.from_pretrained("owner/absent"))
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: no folder owner/absent, and the hub does not give it (")
    assert "Traceback" not in result.stderr


def test_without_the_hub_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'music_synth\[hub\]'"):
        SpectrogramDiffusionPipeline.from_pretrained("owner/absent")


def test_importing_the_package_is_free():
    code = "import sys, music_synth; print('jax' in sys.modules, 'numpy' in sys.modules, dir(music_synth)[:2])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[:2] == ["False", "False"]
    assert "MidiProcessor" in dir(music_synth)
    with pytest.raises(AttributeError, match="no attribute 'MidiProcesor'"):
        music_synth.MidiProcesor  # noqa: B018
