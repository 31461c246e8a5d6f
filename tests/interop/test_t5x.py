"""What T5X wrote is read and written again to the byte; what the gin files beside it say; what is wrong is named."""

import copy
import dataclasses
import gzip
import os
import re
from functools import partial
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from music_synth import runs
from music_synth.autoregressive.objective import Autoregressive, shift_right
from music_synth.autoregressive.outputs import GaussianMixture
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, LinearSchedule
from music_synth.errors import UserError
from music_synth.gin_files import included_around, read_values
from music_synth.interop import published, t5x
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.training.optimizer import adafactor
from tests import golden_arrays, t5x_folders

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("context", "autoregressive")
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "t5x_checkpoint"


@pytest.fixture(scope="module")
def written_by_t5x(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5x")
    return {name: t5x_folders.make(folder / name, name) for name in NAMES}


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def files(folder):
    """All files by name, chunks unpacked: the same data may be packed in more than one way."""
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data for name, data in contents.items()}


# --- in and out ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_parameters_step_and_moments_are_read(written_by_t5x, name):
    checkpoint = t5x.read(written_by_t5x[name])
    assert checkpoint.step == 17
    assert_same(checkpoint.params, golden_arrays.tree(golden_arrays.load(t5x_folders.FILES[name])))
    moments = {key: value for key, value in flatten_dict(checkpoint.moments, sep=".").items() if value.size > 1}
    expected = t5x_folders.arrays_of(name).items()
    assert_same(moments, {key[19:]: value for key, value in expected if key.startswith("state.")})


@pytest.mark.parametrize("name", NAMES)
def test_written_again_it_is_the_same(written_by_t5x, name, tmp_path):
    """The same tree, shapes and values; the msgpack file, which T5X wrote, is the same to the byte."""
    checkpoint = t5x.read(written_by_t5x[name])
    again = t5x.write(tmp_path, checkpoint.step, checkpoint.params, checkpoint.moments)
    assert (again / "checkpoint").read_bytes() == (golden_arrays.GOLDEN / f"t5x_{name}.msgpack").read_bytes()
    assert files(again).keys() == files(written_by_t5x[name]).keys()
    read = t5x.read(again)
    assert_same((read.params, read.moments), (checkpoint.params, checkpoint.moments))
    without = t5x.write(tmp_path / "without", 3, checkpoint.params)
    assert t5x.read(without).moments is None and t5x.read(without).step == 3
    assert files(without).keys() == {name for name in files(again) if not name.startswith("state.")}


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared golden data")
@pytest.mark.parametrize("name", NAMES)
def test_the_folder_of_t5x_itself_is_written_again(name, tmp_path):
    checkpoint = t5x.read(SHARED / name)
    again = t5x.write(tmp_path, 17, checkpoint.params, checkpoint.moments)
    assert files(again) == files(SHARED / name / "checkpoint_17")


def test_moments_are_those_of_our_adafactor(written_by_t5x):
    checkpoint = t5x.read(written_by_t5x["context"])
    opt_state = adafactor(1e-3).transform.init(checkpoint.params)
    filled = t5x.to_opt_state(checkpoint.moments, checkpoint.step, opt_state)
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, opt_state)
    assert filled[0].count == 17 and filled[2].count == 17
    for key, value in golden_arrays.load("t5x_optimizer_state").items():
        path, kind = key.removeprefix("context/state/").rsplit("/", 1)
        np.testing.assert_array_equal(flatten_dict(getattr(filled[0], kind), sep="/")[path], value)
    nested = {"0": {kind: getattr(filled[0], kind) for kind in ("v", "v_col", "v_row")}, "2": {"count": 17}}
    assert_same(t5x.moments_of(nested), checkpoint.moments)
    unfactored = adafactor(1e-3, min_dim_to_factor=256).transform.init(checkpoint.params)
    with pytest.raises(UserError, match=r"moment decoder/time_emb_dense1/kernel/v_row has shape \(128,\), .* \(1,\)"):
        t5x.to_opt_state(checkpoint.moments, 17, unfactored)


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_reproduced(written_by_t5x, name):
    decoder = runs.load_trained(written_by_t5x[name], num_heads=2)
    arrays, model = golden_arrays.load(t5x_folders.FILES[name]), decoder.model
    tokens = arrays["inputs/tokens"]
    if name == "autoregressive":
        network = dataclasses.replace(model.network, max_tokens=tokens.shape[1])  # what these were padded to
        model = dataclasses.replace(model, network=network)
        inputs = shift_right(jnp.asarray(arrays["inputs/decoder_target"]), 0.0)
        frames = jax.jit(partial(golden_arrays.teacher_forced, model))(decoder.params, {"note_tokens": tokens}, inputs)
        np.testing.assert_allclose(frames, arrays["out/teacher_forced"], atol=3e-5)
        return
    context_mel, mask = arrays["inputs/context"], arrays["inputs/context_mask"] > 0

    @jax.jit
    def run(params):
        net = model.module.bind({"params": params})
        cache = net.encode(tokens, tokens > 0, context_mel, mask, True)
        film = net.decoder.film(arrays["time_embedding/output_jit"])
        encoded = net.token_encoder(tokens, tokens > 0, True), net.continuous_encoder(context_mel, mask, True)
        return *encoded, net.decode(arrays["inputs/z"], film, cache)

    notes, context, frames = map(np.asarray, run(decoder.params))
    assert np.abs(notes - arrays["out/tokens_encoded"])[tokens > 0].max() < 2e-5
    assert np.abs(context - arrays["out/context_encoded"])[mask].max() < 2e-5
    np.testing.assert_allclose(frames, arrays["out/decoder"], atol=3e-5)


# --- layouts ---------------------------------------------------------------------------------------------------------


def inline(contents, arrays):
    """The tree with arrays in place of the pointers."""
    if not isinstance(contents, dict):
        return contents
    if "driver" in contents:
        return arrays[contents["kvstore"]["path"].rstrip("/")]
    return {key: inline(child, arrays) for key, child in contents.items()}


def changed(contents, change):
    """The tree with change(pointer) in place of the pointers."""
    if not isinstance(contents, dict):
        return contents
    if "driver" in contents:
        return change(contents)
    return {key: changed(child, change) for key, child in contents.items()}


def in_chunks(pointer):
    shape = pointer["metadata"]["shape"]
    return pointer | {"metadata": pointer["metadata"] | {"chunks": [max(1, size // 3) for size in shape]}}


def before_tensorstore_0_1_14(pointer):
    return {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "gfile"},
        "path": pointer["kvstore"]["path"],
    } | {"metadata": pointer["metadata"]}


def in_a_bucket(pointer):
    return pointer | {"kvstore": pointer["kvstore"] | {"driver": "gcs", "bucket": "t5x-dummy-bucket"}}


@pytest.mark.parametrize("change", [in_chunks, before_tensorstore_0_1_14, in_a_bucket])
def test_other_pointers_are_followed(tmp_path, change):
    contents = changed(t5x_folders.contents_of("context"), change)
    if change is before_tensorstore_0_1_14:
        for pointer in t5x_folders.pointers(contents):
            pointer["kvstore"] = {"driver": "file", "path": pointer.pop("path")}
        folder = t5x_folders.make(tmp_path, "context", contents)
        old = changed(t5x_folders.contents_of("context"), change)
        (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(old))
    else:
        folder = t5x_folders.make(tmp_path, "context", contents)
    assert_same(t5x.read(folder).params, golden_arrays.tree(golden_arrays.load("network_context")))


def test_arrays_in_the_file_itself_are_read(tmp_path):
    arrays = t5x_folders.arrays_of("context")
    contents = inline(t5x_folders.contents_of("context"), arrays)
    for tree in (contents, contents["optimizer"], {"target": contents["optimizer"]["target"]}):
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "checkpoint_17"
        folder.mkdir(parents=True)
        (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(tree))
        checkpoint = t5x.read(folder)
        assert_same(checkpoint.params, golden_arrays.tree(golden_arrays.load("network_context")))
        assert checkpoint.step == 17 and (checkpoint.moments is None) == ("state" not in tree.get("optimizer", tree))


def test_t5x_on_orbax_is_read(tmp_path):
    """Placeholders for pointers, in a folder `state`, with nothing around target and state."""
    contents = t5x_folders.contents_of("context")
    made = t5x_folders.make(tmp_path / "made", "context")
    placeholders = changed(contents, lambda pointer: f"PLACEHOLDER://{pointer['kvstore']['path'].rstrip('/')}")
    state = tmp_path / "run" / "checkpoint_20" / "state"
    state.parent.mkdir(parents=True)
    made.rename(state)
    (state / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(placeholders["optimizer"]))
    checkpoint = t5x.read(tmp_path / "run")
    assert_same(checkpoint.params, golden_arrays.tree(golden_arrays.load("network_context")))
    assert checkpoint.folder == state and checkpoint.step == 17 and checkpoint.moments is not None


@pytest.mark.parametrize("called", ["bfloat16", "uint16"])
def test_bfloat16_is_read(tmp_path, called):
    """By that name, or as version 2 has it."""
    value = np.linspace(-3, 3, 12, dtype=np.float32).reshape(3, 4).astype(ml_dtypes.bfloat16)
    t5x_folders.write_zarr(tmp_path / "checkpoint_5/target.x", value if called == "bfloat16" else value.view(np.uint16))
    contents = {"version": 2, "optimizer": {"target": {"x": "PLACEHOLDER://target.x", "y": value}}}
    (tmp_path / "checkpoint_5" / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    checkpoint = t5x.read(tmp_path)
    assert checkpoint.step == 5
    assert_same(checkpoint.params, {"x": value.astype(np.float32), "y": value.astype(np.float32)})


def test_the_newest_step_is_found(tmp_path):
    for step in (9, 100, 20):
        t5x.write(tmp_path, step, {"x": np.full(3, step, np.float32)})
    (tmp_path / "checkpoint_200").mkdir()  # broken off: no file in it
    (tmp_path / "checkpoint_300.tmp-1").mkdir()
    assert t5x.read(tmp_path).step == 100
    assert t5x.read(tmp_path / "checkpoint_20").step == 20
    assert t5x.read(tmp_path / "checkpoint_9" / "checkpoint").step == 9


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
    assert t5x.chunk_shape((4096, 4096), 4) == [4096, 4096]
    assert t5x.chunk_shape((8192, 4096), 4) == [4096, 4096]
    assert t5x.chunk_shape((3, 5), 4) == [3, 5]
    monkeypatch.setattr(t5x, "LARGEST_CHUNK", 64)
    assert t5x.chunk_shape((10, 9), 4) == [5, 3]
    value = np.arange(90, dtype=np.float32).reshape(10, 9)
    folder = t5x.write(tmp_path, 1, {"x": value}) / "target.x"
    assert {path.name for path in folder.iterdir()} == {".zarray", *(f"{i}.{j}" for i in range(2) for j in range(3))}
    assert_same(t5x.read(tmp_path).params, {"x": value})


# --- gin files -------------------------------------------------------------------------------------------------------

PUBLISHED_GIN = """
from __gin__ import dynamic_registration
import __main__ as train_script
from music_spectrogram_diffusion.models.diffusion import models
from music_spectrogram_diffusion.models.diffusion import network
import seqio

MODEL_DIR = %gin.REQUIRED
NUM_VELOCITY_BINS = 127
PROGRAM_GRANULARITY = 'midi_class'
TASK_FEATURE_LENGTHS = {'inputs': 64, 'targets': 32, 'targets_context': 32}
TRAIN_STEPS = 600
BATCH_SIZE = 24
MODEL = @models.ContextDiffusionModel()
vocabularies.VocabularyConfig.num_velocity_bins = %NUM_VELOCITY_BINS
preprocessors.map_midi_programs.granularity_type = %PROGRAM_GRANULARITY
tasks.NoteRepresentationConfig:
  onsets_only = False
  include_ties = False
train/utils.DatasetConfig.batch_size = %BATCH_SIZE
utils.create_learning_rate_scheduler:
  base_learning_rate = 0.002
  warmup_steps = 7
diffusion_utils.DiffusionConfig:
  classifier_free_guidance = @diffusion_utils.ClassifierFreeGuidanceConfig()
  train_schedule = @train/diffusion_utils.DiffusionSchedule()
  model_output = 'v'
  loss_type = 'x0'
  loss_norm = 'l2'
diffusion_utils.ClassifierFreeGuidanceConfig.eval_condition_weight = 3.5
diffusion_utils.SamplerConfig.name = 'ddim'
train/diffusion_utils.DiffusionSchedule.name = 'cosine'
sampler/diffusion_utils.DiffusionSchedule:
  name = 'cosine'
  num_steps = 250
network.ContinuousContextTransformer.config = @network.T5Config()
network.T5Config:
  vocab_size = @vocabularies.num_embeddings()
  emb_dim = 32
  num_heads = 4
  head_dim = 8
  num_encoder_layers = 2
  num_decoder_layers = 2
  mlp_dim = 64
  mlp_activations = ('gelu', 'linear')
  dropout_rate = 0.25
  decoder_cross_attend_style = 'concat_encodings'
"""


@pytest.fixture
def with_gin(written_by_t5x, tmp_path):
    """Reads the context checkpoint with a gin file's text beside it."""

    def read(text, **arguments):
        path = tmp_path / "their.gin"
        path.write_text(text)
        return runs.load_trained(written_by_t5x["context"], gin_file=path, **arguments)

    return read


def test_the_gin_file_says_what_the_tensors_do_not(with_gin):
    decoder = with_gin(PUBLISHED_GIN)
    model, tokenizer = decoder.model, decoder.tokenizer
    assert (model.network.num_heads, model.network.head_dim, model.network.dropout_rate) == (4, 8, 0.25)
    assert model.network.context_positions == "regular"  # the default of the class
    assert (model.prediction_type, model.loss_target, model.loss_norm) == ("v", "x0", "l2")
    sampler = model.sampler
    assert (sampler.name, sampler.num_steps, sampler.guidance_scale, sampler.variance) == ("ddim", 250, 3.5, "large")
    assert (tokenizer.velocity_bins, tokenizer.granularity, tokenizer.ties) == (127, "midi_class", False)
    assert tokenizer.segment_frames == 32 and tokenizer.max_tokens == 64
    assert decoder.given["TRAIN_STEPS"] == 600 and decoder.given["train/DatasetConfig.batch_size"] == 24
    assert decoder.given["MODEL"] == "@ContextDiffusionModel()" and decoder.given["MODEL_DIR"] is None
    assert not any("assumed" in remark for remark in decoder.remarks)


def test_without_a_gin_file_it_is_said_what_is_assumed(written_by_t5x):
    decoder = runs.load_trained(written_by_t5x["context"], num_heads=2)
    c = dict(model_dim=32, num_heads=2, head_dim=16, mlp_dim=64, num_encoder_layers=2, num_decoder_layers=2)
    network = NetworkConfig(**c, max_tokens=64, target_frames=32, context_frames=32)
    sampler = Sampler("ddpm", 1000, guidance_scale=2.0, variance="large")
    assert decoder.model == Diffusion(network, CosineSchedule(), "eps", "eps", "l1", sampler=sampler)
    assert any("2 heads of 16" in remark and "prediction of eps" in remark for remark in decoder.remarks)


def test_a_config_beside_the_checkpoint_is_found(written_by_t5x, tmp_path):
    made = t5x_folders.make(tmp_path, "context")
    (tmp_path / "config.gin").write_text(PUBLISHED_GIN)
    assert runs.load_trained(tmp_path).model == runs.load_trained(made).model
    assert runs.load_trained(made).model.network.num_heads == 4


def test_gin_files_in_pieces_are_read(tmp_path):
    (tmp_path / "gin" / "models").mkdir(parents=True)
    (tmp_path / "gin" / "base.gin").write_text("a.T5Config:\n  emb_dim = %WIDTH\n  layers = [%WIDTH, {'x': %LOOP}]\n")
    (tmp_path / "gin" / "models" / "small.gin").write_text(
        "include 'gin/base.gin'\ninclude 'elsewhere/none.gin'\nWIDTH = 3\nLOOP = %LOOP\ntrain/b.F.g = @s/c.h.K\n"
    )
    values = read_values(tmp_path / "gin" / "models" / "small.gin", included_around)
    assert values == {
        "T5Config.emb_dim": 3, "T5Config.layers": [3, {"x": None}], "WIDTH": 3, "LOOP": None, "train/F.g": "@s/K",
    }  # fmt: skip


@pytest.mark.parametrize("network", ["context", "nocontext", "linear", "autoregressive", "mixture"])
def test_the_gin_file_that_is_written_says_the_same(tmp_path, network):
    c = NetworkConfig(
        model_dim=16, num_heads=2, head_dim=4, mlp_dim=8, num_encoder_layers=1, num_decoder_layers=2, max_tokens=12,
        target_frames=6, context_frames=4, context_positions="regular", max_noise_time=2000.0, dropout_rate=0.2,
    )  # fmt: skip
    without = dataclasses.replace(c, context_frames=0)
    sampler = dataclasses.replace(Diffusion().sampler, name="ddim", num_steps=9, variance="medium:0.3", clip_x_0=False)
    model = {
        "context": Diffusion(c, prediction_type="x0_and_eps", sampler=sampler),
        "nocontext": Diffusion(without, prediction_type="v", condition_dropout=0.3),
        "linear": Diffusion(c, LinearSchedule(1e-3, 0.1, 9), "eps", sampler=sampler),
        "autoregressive": Autoregressive(without, as_published=True),
        "mixture": Autoregressive(without, GaussianMixture(3), as_published=True),
    }[network]
    if not isinstance(model, Diffusion):  # it has no use for these
        unused = dict(context_positions="terminal_relative", max_noise_time=20000.0)
        model = dataclasses.replace(model, network=dataclasses.replace(model.network, **unused))
    published.check_published(model)
    tokenizer = Tokenizer(granularity="flat", ties=False, segment_frames=6, max_tokens=12)
    path = tmp_path / "config.gin"
    path.write_text(published.gin_text(model, tokenizer))
    params = jax.eval_shape(model.init, jax.random.key(0))
    read, read_tokenizer, assumed = published.model_of(params, read_values(path), path)
    assert read == model and read_tokenizer == tokenizer and assumed == []


# --- what is wrong ---------------------------------------------------------------------------------------------------


def broken(folder, what):
    kernel = folder / "target.decoder.spec_out_dense.kernel"
    if what == "truncated chunk":
        os.truncate(kernel / "0.0", 1000)
    elif what == "missing chunk":
        (kernel / "0.0").unlink()
    elif what == "missing folder":
        (kernel / "0.0").unlink()
        (kernel / ".zarray").unlink()
    elif what == "zarray":
        (kernel / ".zarray").write_text("{")
    elif what == "truncated file":
        os.truncate(folder / "checkpoint", 20000)
    elif what == "empty file":
        os.truncate(folder / "checkpoint", 0)
    elif what == "tensorflow":
        (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-5"\n')
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("truncated chunk", r"tensor target\.decoder\.spec_out_dense\.kernel cannot be read from .*truncated"),
        ("missing chunk", r"tensor target\.decoder\.spec_out_dense\.kernel is not whole: there is no .*/0\.0"),
        ("missing folder", r"tensor target\.decoder\.spec_out_dense\.kernel is missing"),
        ("zarray", r"tensor target\.decoder\.spec_out_dense\.kernel cannot be read"),
        ("truncated file", r"checkpoint_17/checkpoint is damaged or no checkpoint of T5X"),
        ("empty file", r"checkpoint_17/checkpoint is damaged or no checkpoint of T5X"),
        ("tensorflow", r"checkpoint_17 is a checkpoint of TensorFlow, not of T5X"),
    ],
)
def test_damage_is_named(tmp_path, what, said):
    folder = broken(t5x_folders.make(tmp_path, "autoregressive"), what)
    with pytest.raises(UserError, match=said) as told:
        t5x.read(folder)
    assert "\n" not in str(told.value)


def without(tree, path):
    tree = copy.deepcopy(tree)
    *parents, last = path.split("/")
    node = tree
    for part in parents:
        node = node[part]
    del node[last]
    return tree


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: without(p, "decoder/layers_1/mlp/wo/kernel"), r"it has no decoder/layers_1/mlp/wo/kernel"),
        (lambda p: without(p, "decoder/layers_0/mlp/wi_0/kernel"), r"has no decoder/layers_0/mlp/wi_0/kernel"),
        (lambda p: p | {"spare": np.ones(5, np.float32)}, r"it has spare with shape \(5,\)"),
        (
            lambda p: p | {"encoder": p["encoder"] | {"encoder_norm": {"scale": np.ones(31, np.float32)}}},
            r"encoder/encoder_norm/scale has shape \(31,\) there and \(32,\) here",
        ),
        (lambda p: {"shared": p["encoder"], "decoder": {"logits_dense": np.ones((3, 3))}}, "no network of music-spec"),
        (lambda p: {"x": np.ones(3, np.float32)}, "no network of music-spec"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, said):
    params = golden_arrays.tree(golden_arrays.load("network_autoregressive"))
    t5x.write(tmp_path, 17, change(params))
    with pytest.raises(UserError, match=said) as told:
        runs.load_trained(tmp_path, num_heads=2)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("num_decoder_layers = 2", "num_decoder_layers = 3", r"it has no decoder/layers_2/FiLMLayer_0"),
        ("mlp_dim = 64", "mlp_dim = 65", r"mlp/wi_0/kernel has shape \(32, 64\) there and \(32, 65\) here"),
        ("num_heads = 4", "num_heads = 3", r"attention of width 32 is not 3 heads of 8"),
        ("'targets': 32", "'targets': 40", r"decoder/Embed_0/embedding has shape \(32, 32\) there and \(40, 32\)"),
        ("('gelu', 'linear')", "('relu',)", r"T5Config.mlp_activations = \('relu',\) cannot be had here"),
        ("onsets_only = False", "onsets_only = True", "onsets_only = True cannot be had"),
        ("model_output = 'v'", "model_output = 'w'", r"Diffusion.prediction_type = 'w'"),
        ("name = 'ddim'", "name = 'leapfrog'", r"Sampler.name = 'leapfrog'"),
        ("emb_dim = 32", "emb_dim = = 32", "their.gin, line \\d+: .* in 'emb_dim = = 32'"),
        ("dropout_rate = 0.25", "dropout_rate = 1.0", r"their.gin does not describe .*dropout_rate = 1.0"),
        ("num_heads = 4\n  head_dim = 8", "head_dim = 0", r"their.gin does not describe"),
        ("head_dim = 8", "head_dim = %HEADS", r"their.gin does not describe"),
        ("emb_dim = 32", "emb_dim = 32\n  dtype = 'float16'", r"their.gin does not describe .*dtype = 'float16'"),
    ],
)
def test_a_gin_file_that_does_not_fit_is_named(with_gin, old, new, said):
    assert old in PUBLISHED_GIN
    with pytest.raises(UserError, match=said) as told:
        with_gin(PUBLISHED_GIN.replace(old, new))
    assert "\n" not in str(told.value)


def test_heads_that_cannot_be_told_are_asked_for(written_by_t5x):
    with pytest.raises(UserError, match="attention of width 32 is not 0 heads of 64: convert it with --num_heads"):
        runs.load_trained(written_by_t5x["context"])
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        runs.load_trained("/nowhere")
    with pytest.raises(UserError, match=r"is not recognized: a run has config.gin and checkpoints/"):
        runs.load_trained(Path(__file__).parent)
    with pytest.raises(UserError, match="no T5X checkpoint in"):
        t5x.read(Path(__file__).parent)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Diffusion(NetworkConfig(note_roll=True)), "no NetworkConfig.note_roll"),
        (Autoregressive(), "not as_published"),
    ],
)
def test_what_the_published_code_cannot_do_is_not_written_for_it(model, said):
    with pytest.raises(UserError, match=re.escape(said)):
        published.check_published(model)


# --- on Orbax of today: a database ------------------------------------------------------------------------------------


def write_database(folder, checkpoint):
    """What T5X writes with Orbax today (`checkpoint_<step>/state/manifest.ocdbt`), by Orbax itself."""
    import orbax.checkpoint as ocp
    from etils import epath

    tree = {"target": checkpoint.params, "state": {"step": np.int32(checkpoint.step)}}
    if checkpoint.moments is not None:
        tree["state"]["param_states"] = checkpoint.moments
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
    ocp.Checkpointer(handler).save(epath.Path(folder), args=ocp.args.PyTreeSave(tree))
    return folder


def test_a_database_holds_what_the_msgpack_file_does(tmp_path):
    plain = t5x.read(t5x_folders.make(tmp_path / "plain", "context"))
    folder = tmp_path / f"checkpoint_{plain.step}"
    folder.mkdir()
    write_database(folder / "state", plain)
    (tmp_path / "config.gin").write_text("T5Config.num_heads = 2\n")
    again = t5x.read(folder)
    assert again.step == plain.step and again.folder == folder / "state"
    for before, after in ((plain.params, again.params), (plain.moments, again.moments)):
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert runs.load(tmp_path, plain.step).model.network.num_heads == 2

    [manifest] = (folder / "state").glob("manifest.ocdbt")
    whole = manifest.read_bytes()
    for damage in (whole[:-9], b"", whole[:20] + b"x" + whole[21:]):
        manifest.write_bytes(damage)
        with pytest.raises(UserError, match=r"manifest\.ocdbt is damaged or no checkpoint of T5X") as told:
            t5x.read(folder)
        assert "\n" not in str(told.value)
