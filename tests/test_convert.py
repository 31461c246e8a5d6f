"""Conversions there and back: the same tensors, a config that makes the same model, nothing half done left behind."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from music_synth import __version__, config, convert, runs
from music_synth.errors import UserError
from music_synth.gin_files import read_values
from music_synth.interop import diffusers, model_card, t5x
from music_synth.training.checkpoint import load_progress
from music_synth.training.initial import InitialCheckpoint
from music_synth.vocoder import neural
from music_synth.vocoder.melgan import MelGANGenerator
from music_synth.vocoder.neural import SHIPPED, save_inverter
from tests import golden_arrays, t5x_folders, tiny_runs

GOLDEN = golden_arrays.GOLDEN
pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(*argv):
    convert.main([str(argument) for argument in argv])


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, prepared):
    """A run of diffusion.gin, never trained, that has logged something."""
    folder = tiny_runs.start(tmp_path_factory.mktemp("runs") / "mine", "diffusion.gin", prepared)
    lines = [{"step": 100, "eval/loss": 0.5, "train/loss": 0.7}, {"step": 200, "eval/loss": 0.25}]
    text = "\n".join([*map(json.dumps, lines), '{"step": 300, "eval/lo'])
    (folder / "metrics.jsonl").write_text(text)
    return folder


# --- checkpoints of T5X ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["context", "autoregressive"])
def test_t5x_to_a_run_and_back(tmp_path, name, capsys):
    """The msgpack file that T5X wrote comes out to the byte: tree, shapes, step and moments went through the run."""
    source = t5x_folders.make(tmp_path / "source", name)
    run(source, tmp_path / "run", "--num_heads", 2)
    said = capsys.readouterr().out
    assert "a checkpoint of T5X, step 17" in said and "with Adafactor's moments" in said
    assert re.search(r"(\d+) of \1 tensors are equal to the bit; outputs differ by 0.0e\+00", said)
    model, tokenizer, params, step = runs.load(tmp_path / "run")
    assert step == 17 and tokenizer.segment_frames == model.network.target_frames
    assert_same(params, golden_arrays.tree(golden_arrays.load(t5x_folders.FILES[name])))
    assert model == runs.load_trained(source, num_heads=2).model
    moments = t5x.moments_of(load_progress(tmp_path / "run")["opt_state"])
    assert_same(moments, t5x.read(source).moments)

    run(tmp_path / "run", tmp_path / "again", "--to", "t5x")
    assert "outputs differ by 0.0e+00" in capsys.readouterr().out
    again = tmp_path / "again" / "checkpoint_17"
    assert (again / "checkpoint").read_bytes() == (GOLDEN / f"t5x_{name}.msgpack").read_bytes()
    assert_same(t5x.read(again).params, params)
    assert runs.load_trained(tmp_path / "again").model == model  # by the gin file that was written beside it


def test_t5x_to_diffusers_and_back(tmp_path, capsys):
    """The names and transposes of the port lead back to the same tensors; what it cannot say is said."""
    source = t5x_folders.make(tmp_path / "source", "context")
    run(source, tmp_path / "port", "--to", "diffusers", "--num_heads", 2, "--inverter", GOLDEN / "toy_inverter.onnx")
    said = capsys.readouterr().out
    assert "80 of 80 tensors are equal to the bit; outputs differ by 0.0e+00" in said
    assert "Diffusion.schedule = CosineSchedule cannot be said there: read again, it is SquaredCosineSchedule" in said
    run(tmp_path / "port", tmp_path / "t5x", "--to", "t5x")
    said = capsys.readouterr().out
    assert "a pipeline of diffusers" in said and "--inverter" in said
    back, original = runs.load_trained(tmp_path / "t5x"), runs.load_trained(source, num_heads=2)
    assert_same(back.params, original.params)
    assert back.model.network == original.model.network and back.step == 0 and back.moments is None
    run(tmp_path / "port", tmp_path / "run")
    model, tokenizer, params, _ = runs.load(tmp_path / "run")
    assert_same(params, original.params)
    assert model == diffusers.read(tmp_path / "port").model
    assert tokenizer == dataclasses.replace(diffusers.TOKENIZER, segment_frames=32, max_tokens=64)


def test_settings_of_the_training_come_from_the_gin_file(tmp_path):
    t5x_folders.make(tmp_path / "source", "autoregressive")
    (tmp_path / "source" / "config.gin").write_text(
        "T5Config.num_heads = 4\nT5Config.head_dim = 8\nTRAIN_STEPS = 600\nBATCH_SIZE = 24\n"
        "utils.create_learning_rate_scheduler.base_learning_rate = 0.002\nadafactor.Adafactor.decay_rate = 0.7\n"
    )
    run(tmp_path / "source", tmp_path / "run")
    values = read_values(tmp_path / "run" / "config.gin")
    asked = ("train.num_steps", "Feed.batch_size", "warmup_constant.learning_rate", "adafactor.decay_exponent")
    assert [values[name] for name in asked] == [600, 24, 0.002, 0.7]
    assert values["train.model_dir"] == str(tmp_path / "run")
    run(tmp_path / "source", tmp_path / "card", "--to", "export")  # the card claims no data of the recipe's
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| training data | not stated |\n| training steps | 17, 24 segments each |" in card
    run(tmp_path / "source", tmp_path / "t5x", "--to", "t5x")  # the gin file goes with it as it is
    assert (tmp_path / "t5x" / "config.gin").read_bytes() == (tmp_path / "source" / "config.gin").read_bytes()
    other = tmp_path / "other.gin"
    other.write_text("T5Config.num_heads = 2\nT5Config.head_dim = 16\n")
    run(tmp_path / "source", tmp_path / "by_other", "--to", "t5x", "--config", other)  # ... or the one that was read
    assert (tmp_path / "by_other" / "config.gin").read_bytes() == other.read_bytes()


# --- exported runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "within"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_a_run_is_exported_and_read_again(model_dir, tmp_path, dtype, within):
    run(model_dir, tmp_path / "card", "--dtype", dtype, "--license", "cc-by-4.0")
    assert sorted(path.name for path in (tmp_path / "card").iterdir()) == [
        "README.md",
        "config.gin",
        "model.safetensors",
    ]
    model, tokenizer, params, step = runs.load(model_dir)
    again = runs.load(tmp_path / "card")
    assert again[0] == model and again[1] == tokenizer and again[3] == step
    atol = 1e-7 if within else 0  # the smallest numbers of float16 are coarse
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, within, atol, strict=True), again[2], params)
    size = (tmp_path / "card" / "model.safetensors").stat().st_size
    assert size > sum(leaf.size for leaf in jax.tree.leaves(params)) * (4 if dtype == "float32" else 2)


def test_the_card_says_what_a_stranger_asks(model_dir, tmp_path):
    (tmp_path / "table.md").write_text("| | pieces, dB |\n|---|---:|\n| Diffusion | 5.25 |\n")
    run(model_dir, tmp_path / "card", "--scores", tmp_path, "--license", "cc-by-4.0")
    card = (tmp_path / "card" / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    for fact in (
        "# Diffusion decoder",
        "music_synth.synthesize FILE.mid --checkpoint",
        "| training data | noise 1, as prepared arrays |",
        "| license of the weights | cc-by-4.0 |",
        "| seeds | 0 of the parameters, 0 of the order of segments |",
        f"| versions | music_synth {__version__}, Python 3.",
        f"jax {jax.__version__}",
        "music_synth.train --gin_file=THIS_FOLDER/config.gin",
        "| eval/loss | 200 | 0.25 |",
        "| train/loss | 100 | 0.7 |",
        "euler, 2 steps",
        "| Diffusion | 5.25 |",
    ):
        assert fact in card, fact


def test_an_exported_run_becomes_a_run_again(model_dir, tmp_path):
    run(model_dir, tmp_path / "card")
    run(tmp_path / "card", tmp_path / "run")
    original, again = runs.load(model_dir), runs.load(tmp_path / "run")
    assert again[0] == original[0]
    assert_same(again[2], original[2])
    assert read_values(tmp_path / "run" / "config.gin")["train.model_dir"] == str(tmp_path / "run")


# --- inverters -------------------------------------------------------------------------------------------------------


def test_an_inverter_becomes_onnx(tmp_path, capsys):
    generator = MelGANGenerator(16, dilations=(1,))
    save_inverter(tmp_path / "mine.safetensors", generator, tiny_runs.random_like(generator.init))
    run(tmp_path / "mine.safetensors", tmp_path / "mine.onnx")
    said = capsys.readouterr().out
    assert "an inverter (MelGANGenerator)" in said
    assert float(re.search(r"differ by (\S+) of the peak", said).group(1)) < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.onnx", "mine.safetensors"]
    with pytest.raises(UserError, match="is an inverter of another project: it plays as it is"):
        run(tmp_path / "mine.onnx", tmp_path / "again.onnx")


# --- starting a run from a checkpoint --------------------------------------------------------------------------------


def test_published_recipes_start_from_a_checkpoint(model_dir, prepared):
    """The knob reaches the training loop (tests/training/test_loop.py goes on from there)."""
    config.parse(["papers/diffusion_small.gin"], [f"TASK={prepared}", f"INITIAL_CHECKPOINT={model_dir}"])
    assert config.build("train").keywords["initial"] == InitialCheckpoint(str(model_dir))


def test_initial_parameters_of_another_model_are_refused_or_warned_of(model_dir, tmp_path):
    model = runs.load(model_dir)[0]
    assert InitialCheckpoint()(model) is None
    initial = InitialCheckpoint(str(model_dir))
    assert_same(initial(model), runs.load(model_dir)[2])
    other = model.__class__(model.network.__class__(model_dim=32, num_heads=2), prediction_type="v")
    with pytest.raises(UserError, match=r"mine is of another configuration: it has no|has shape"):
        initial(other)
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        InitialCheckpoint(str(tmp_path / "nowhere"))(model)
    published = t5x_folders.make(tmp_path, "context")
    theirs = runs.load_trained(published, num_heads=2).model
    with pytest.warns(UserWarning, match=r"Diffusion.prediction_type is eps in .* and v here"):
        params = InitialCheckpoint(str(published))(convert.Diffusion(theirs.network, prediction_type="v"))
    assert_same(params, t5x.read(published).params)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_nothing_half_written_is_left(model_dir, tmp_path, monkeypatch):
    def fails(*_, **__):
        (tmp_path / "seen").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_card, "save_exported", fails)
    with pytest.raises(UserError, match=r"cannot write .*card: No space left on device"):
        run(model_dir, tmp_path / "card")
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]


def test_what_computes_something_else_is_not_kept(model_dir, tmp_path, monkeypatch):
    """Parameters that are damaged on the way, of a decoder and of an inverter."""

    def damaged(params):
        return jax.tree.map(lambda leaf: -leaf, params)

    def save_damaged(path, generator, params, *rest):
        save_inverter(path, generator, damaged(params), *rest)

    save = model_card.save_exported
    monkeypatch.setattr(model_card, "save_exported", lambda path, params, *rest: save(path, damaged(params), *rest))
    with pytest.raises(UserError, match=r"read again, computes something else: it differs by"):
        run(model_dir, tmp_path / "card")
    generator = MelGANGenerator(16, dilations=(1,))
    params = tiny_runs.random_like(generator.init)
    save_inverter(tmp_path / "mine.safetensors", generator, params)
    monkeypatch.setattr(neural, "save_inverter", save_damaged)
    with pytest.raises(UserError, match=r"again.safetensors, written and read again, computes something else"):
        run(tmp_path / "mine.safetensors", tmp_path / "again.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_a_folder_with_something_in_it_is_not_overwritten(model_dir, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(UserError, match="mine is there already"):
        run(model_dir, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    run(model_dir, tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").is_file()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{run}", "{new}", "--to", "t5x"], "the published code has no NetworkConfig.note_roll"),
        (["{run}", "{new}", "--to", "run"], "is a run of music_synth already"),
        (["{run}", "{new}", "--num_heads", "2"], "--num_heads and --config are for checkpoints of T5X"),
        (["{run}", "{new}", "--scores", "{run}"], r"no table\.md in .*mine: give the OUTPUT_DIR"),
        (["{run}", "{new}", "--inverter", "{run}/nowhere"], "no file .*nowhere"),
        (["{run}/inverter.onnx", "{new}.onnx"], "no file .*inverter.onnx"),
        (["{shipped}", "{new}"], r"what an inverter becomes ends in \.onnx or"),
        (
            ["{run}", "{new}", "--inverter", "{shipped}"],
            "--inverter is of a pipeline of diffusers, and .*new becomes an",
        ),
        (["{run}", "{new}", "--to", "torch"], "invalid choice"),
        (["{shipped}", "{new}.onnx", "--dtype", "float16"], "--dtype is for decoders, and .*new.onnx is to be an inv"),
        (["{run}/nowhere", "{new}"], r"no folder .*nowhere"),
        (["{run}/checkpoints", "{new}"], "is not recognized"),
        (["{run}", "{new}.onnx"], "not of an inverter"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(model_dir, tmp_path, argv, said):
    with pytest.raises(UserError, match=said) as told:
        run(*(argument.format(run=model_dir, new=tmp_path / "new", shipped=SHIPPED) for argument in argv))
    assert "\n" not in str(told.value) and list(tmp_path.iterdir()) == []


def test_an_exported_folder_of_which_something_is_wrong_is_named(model_dir, tmp_path):
    run(model_dir, tmp_path / "card")
    with pytest.raises(UserError, match=r"no checkpoint of step 5 .* there is 0"):
        runs.load(tmp_path / "card", step=5)
    weights = tmp_path / "card" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors"):
        runs.load(tmp_path / "card")
    (tmp_path / "card" / "config.gin").unlink()
    with pytest.raises(UserError, match=r"no config\.gin in .*card"):
        runs.load(tmp_path / "card")
