"""Folders of the diffusers port: what it computes, byte for byte back, and what is refused."""

import collections
import dataclasses
import functools
import io
import json
import pickle
import shutil
import subprocess
import sys
import types
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from music_synth.audio.mel import scale_mel
from music_synth.diffusion import process
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler, ddpm_posterior, grid_times
from music_synth.diffusion.schedule import CosineSchedule, LinearSchedule, LogNormalSchedule, SquaredCosineSchedule
from music_synth.errors import UserError
from music_synth.interop import diffusers
from music_synth.interop.diffusers_parts import LIBRARY
from music_synth.interop.tensor_files import read_tensors
from music_synth.models.layers import NetworkConfig
from music_synth.runs import load_inverter
from tests import golden_arrays, tiny_runs
from tests.golden_arrays import GOLDEN

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def golden():
    return {key: jnp.asarray(value) for key, value in golden_arrays.load("diffusers_expected").items()}


def copy(folder):
    """The port's tiny pipeline, whole."""
    shutil.copytree(GOLDEN / "diffusers_tiny", folder)
    (folder / "melgan").mkdir()
    shutil.copyfile(GOLDEN / "toy_inverter.onnx", folder / "melgan/model.onnx")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return copy(tmp_path_factory.mktemp("port") / "tiny")


@pytest.fixture(scope="module")
def tiny(whole):
    return diffusers.read(whole)


@pytest.fixture
def folder(tmp_path):
    return copy(tmp_path / "tiny")


# --- what it computes --------------------------------------------------------------------------------------------


def test_what_is_read(tiny, whole):
    assert tiny.model.network == NetworkConfig(
        model_dim=16, num_heads=2, head_dim=8, mlp_dim=32, num_encoder_layers=2, num_decoder_layers=2
    )
    assert tiny.model.schedule == SquaredCosineSchedule(1000)
    sampler = tiny.model.sampler
    assert (sampler.name, sampler.num_steps, sampler.guidance_scale, sampler.variance) == ("ddpm", 100, 1.0, "large")
    assert sampler.grid == "leading"
    assert tiny.model.prediction_type == "eps" and sampler.clip_x_0
    assert tiny.tokenizer.granularity == "slakh"
    assert tiny.inverter == whole / "melgan/model.onnx"
    shapes = jax.eval_shape(tiny.model.init, jax.random.key(0))
    assert jax.tree.map(np.shape, tiny.params) == jax.tree.map(np.shape, shapes)


def test_note_encoder_and_mask(tiny, golden):
    tokens = golden["enc/tokens"]
    assert (tokens > 0).sum() == golden["enc/tokens_mask_sum"]
    encode = jax.jit(lambda params: tiny.model.module.bind({"params": params}).token_encoder(tokens, tokens > 0, True))
    # Where there is padding, too: both hide it from the notes, and not the notes from it.
    np.testing.assert_allclose(encode(tiny.params)[:, :128], golden["enc/tokens_encoded_first128"], atol=3e-5)


def with_positions(model, positions):
    return dataclasses.replace(model, network=dataclasses.replace(model.network, context_positions=positions))


def test_decoder(tiny, golden):
    """And the context encoder, where the context is masked in part: the port counts positions from its start then."""

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params, arrays, num_frames, time):
        net, context_mask = model.module.bind({"params": params}), jnp.arange(256)[None] < num_frames
        tokens, context = arrays["enc/tokens"], arrays["enc/context"]
        cache = net.encode(tokens, tokens > 0, context, context_mask, True)
        output = net.decode(arrays["dec/x"], net.condition_time(time[None]), cache)
        return output, net.continuous_encoder(context, context_mask, True)

    arrays = {name: golden[name] for name in ("enc/tokens", "enc/context", "dec/x")}
    regular = with_positions(tiny.model, "regular")
    # The stored partial context is its first 100 frames; no other length gives the stored numbers.
    for model, kind, num_frames, time in (
        (tiny.model, "full", 256, 0.0),
        (tiny.model, "full", 256, 0.75),
        (tiny.model, "none", 0, 0.25),
        (regular, "partial", 100, 0.999),
    ):
        output, encoded = run(model, tiny.params, arrays, jnp.int32(num_frames), jnp.float32(time))
        expected = golden[f"dec/output_context_{kind}_time_{time}"]
        # Sinusoids of angles up to 20000 t, in float32, are not the same everywhere (docs/spec.md, section 1).
        np.testing.assert_allclose(output[:, : expected.shape[1]], expected, atol=3e-5 + 3e-3 * time, err_msg=kind)
        np.testing.assert_allclose(encoded, golden[f"enc/context_encoded_{kind}"], atol=3e-5, err_msg=kind)
    _, as_trained = run(tiny.model, tiny.params, arrays, jnp.int32(100), jnp.float32(0))
    assert np.abs(as_trained - golden["enc/context_encoded_partial"]).max() > 0.3


def test_schedule(golden):
    schedule = SquaredCosineSchedule()
    keep = golden["scheduler/alphas_cumprod"]
    log_snr = schedule.log_snr(jnp.arange(1000, dtype=jnp.float32) / 1000)
    np.testing.assert_allclose(jax.nn.sigmoid(log_snr), keep, rtol=1e-6)
    np.testing.assert_allclose(jax.nn.sigmoid(-log_snr), 1 - keep, rtol=1e-6)
    keep_before = np.append(np.float32(1), keep[:-1])
    betas = 1 - np.asarray(keep, np.float64) / keep_before
    np.testing.assert_allclose(betas[[0, 1, 2, -3, -2, -1]], golden["scheduler/betas_first_last"], atol=1e-7)
    assert schedule.log_snr(jnp.float32(1.0)) == log_snr[-1]
    assert log_snr[500] > schedule.log_snr(jnp.float32(0.5005)) > log_snr[501]
    with pytest.raises(ValueError, match="num_steps = 1"):
        SquaredCosineSchedule(1)


@pytest.mark.parametrize("steps", [3, 50, 100, 1000])
def test_times(golden, steps):
    times = grid_times(Sampler("ddpm", steps, grid="leading"), SquaredCosineSchedule())
    np.testing.assert_allclose(1000 * times[:-1], golden[f"scheduler/timesteps_{steps}"], atol=1e-3)
    assert times[-1] == 0
    with pytest.raises(UserError, match="num_steps = 1001"):
        grid_times(Sampler("ddpm", 1001, grid="leading"), SquaredCosineSchedule())


def port_step(keep, x_t, eps, noise, t, s, dtype):
    """The port's step, operation for operation, in `dtype`."""
    keep, x_t, eps, noise = (np.asarray(a, dtype) for a in (keep, x_t, eps, noise))
    one = dtype(1)
    x_0 = np.clip((x_t - np.sqrt(one - keep[t]) * eps) / np.sqrt(keep[t]), -one, one)
    ratio = keep[t] / keep[s]
    beta = one - ratio
    mean = np.sqrt(keep[s]) * beta / (one - keep[t]) * x_0 + np.sqrt(ratio) * (one - keep[s]) / (one - keep[t]) * x_t
    return mean + np.sqrt(beta) * noise


@pytest.mark.parametrize(("steps", "t"), [(100, 990), (100, 500), (100, 10), (100, 0), (1000, 999), (3, 666)])
def test_scheduler_steps(golden, steps, t):
    """Each stored step to 1e-6. That to t = 0 the port itself rounds: 1 - 0.9987 in float32 has four digits left."""
    x_t, eps = golden["scheduler/step/sample"], golden["scheduler/step/model_output"]
    stored = {name: golden[f"scheduler/step/n{steps}_t{t}/{name}"] for name in ("prev_sample", "pred_original_sample")}
    noise = golden[f"scheduler/step/n{steps}_t{t}/noise"]
    s = t - 1000 // steps
    log_snr = SquaredCosineSchedule().log_snr(jnp.float32([t, max(s, 0)]) / 1000)
    x_0 = jnp.clip(process.to_x_0(eps, x_t, log_snr[0], "eps"), -1.0, 1.0)
    np.testing.assert_allclose(x_0, stored["pred_original_sample"], atol=1e-6)
    if s < 0:  # the last step returns x_0
        np.testing.assert_allclose(x_0, stored["prev_sample"], atol=1e-6)
        return
    mean, log_variance = ddpm_posterior(x_t, x_0, *log_snr, "large")
    ours = mean + jnp.exp(0.5 * log_variance) * noise
    given = golden["scheduler/alphas_cumprod"], x_t, eps, noise, t, s
    np.testing.assert_allclose(ours, port_step(*given, np.float64), atol=1e-6)
    np.testing.assert_allclose(port_step(*given, np.float32), stored["prev_sample"], atol=1e-6)
    np.testing.assert_allclose(ours, stored["prev_sample"], atol=5e-5 if s == 0 else 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def sample_from(model, params, batch, x_1, noise):
    return model.sample_from(params, batch, x_1, lambda i: noise[i])


def test_the_stored_run(tiny, golden):
    """Two segments of three steps, with the port's noise."""
    model = tiny.model.with_sampling(num_steps=int(golden["pipeline/num_inference_steps"]))
    context, has_context, mels = jnp.zeros((1, 256, 128)), jnp.zeros((1, 256), bool), []
    for i in range(2):
        batch = {"note_tokens": golden["pipeline/tokens"][i][None], "context_mel": context, "context_mask": has_context}
        noise = [golden[f"pipeline/segment{i}/step_noise_{j}"] for j in (1, 0)]  # by the calls that are left
        noise = jnp.stack([jnp.full_like(noise[0], jnp.nan), *noise])  # the last step takes none
        context = sample_from(model, tiny.params, batch, golden[f"pipeline/segment{i}/initial_noise"], noise)
        has_context = jnp.ones_like(has_context)
        mels.append(context)
    mel = jnp.concatenate(mels, axis=1)
    np.testing.assert_allclose(mel, golden["pipeline/mel"], atol=1e-2)
    audio = load_inverter(str(tiny.inverter))(np.asarray(mel[0]))
    assert audio[None].shape == tuple(golden["pipeline/audio_shape"])
    np.testing.assert_allclose(audio[:2000], golden["pipeline/audio_first2000"][0], atol=1e-2)


def test_our_samplers_on_the_same_weights(tiny, golden):
    """On their own grids: from the same noise, ten steps of DPM-Solver++ come near where forty of DDIM end."""
    batch = {
        "note_tokens": golden["enc/tokens"][:, :128],
        "context_mel": jnp.zeros((1, 256, 128)),
        "context_mask": jnp.zeros((1, 256), bool),
    }
    mels = []
    for name, steps in (("dpmpp_2m", 10), ("ddim", 40)):
        model = tiny.model.with_sampling(name=name, num_steps=steps, grid="t")
        no_noise = jnp.full((1, 1, 1, 1), jnp.nan)
        mel = sample_from(model, tiny.params, batch, golden["pipeline/segment0/initial_noise"], no_noise)
        mels.append(np.asarray(scale_mel(mel, clip=False)))
    few, many = mels
    assert np.abs(few - many).mean() < 0.25 * np.abs(many).mean()
    assert np.abs(many).max() <= 1.0 + 1e-5


# --- back --------------------------------------------------------------------------------------------------------


def test_written_back_every_file_is_the_same(tiny, whole, tmp_path):
    diffusers.write(tmp_path / "new", tiny.model, tiny.params, tiny.inverter)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "new") for path in (tmp_path / "new").rglob("*") if path.is_file()
    )
    assert len(files) == 9
    for name in files:
        expected = (whole / name).read_text("latin1")
        if name.name == diffusers.INDEX:  # as diffusers found the encoders before; reading takes both
            for module, kind in (("notes_encoder", "NotesEncoder"), ("continuous_encoder", "ContEncoder")):
                old = f'"spectrogram_diffusion",\n    "Spectrogram{kind}"'
                assert old in expected
                expected = expected.replace(old, f'"{LIBRARY}.{module}",\n    "Spectrogram{kind}"')
        assert (tmp_path / "new" / name).read_text("latin1") == expected, name


def test_a_folder_can_be_written_over_itself(folder):
    def files():  # but the index, where the libraries' names are those of today
        return {
            path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != diffusers.INDEX
        }

    before, whole = files(), diffusers.read(folder)
    diffusers.write(folder, whole.model, whole.params, whole.inverter)
    assert files() == before and len(before) > 6
    assert f"{LIBRARY}.notes_encoder" in (folder / diffusers.INDEX).read_text()


def test_a_model_of_ours_goes_out_and_comes_back(tmp_path):
    """Of our own shapes, layers stacked, with the schedule of the published training."""
    network = NetworkConfig(
        model_dim=12, num_heads=3, head_dim=2, mlp_dim=10, num_encoder_layers=1, num_decoder_layers=2, num_mels=8,
        max_tokens=16, target_frames=6, context_frames=4, vocab_size=20, scan_layers=True,
    )  # fmt: skip
    model = Diffusion(network, CosineSchedule(), prediction_type="v")
    params = tiny_runs.random_like(model.init)
    diffusers.write(tmp_path, model, params)
    back = diffusers.read(tmp_path)
    assert back.inverter is None
    diffusers.write(tmp_path, model, params, GOLDEN / "toy_inverter.onnx")
    assert diffusers.read(tmp_path).inverter.read_bytes() == (GOLDEN / "toy_inverter.onnx").read_bytes()
    diffusers.write(tmp_path, model, params)
    assert diffusers.read(tmp_path).inverter is None  # a file that the index does not name means nothing
    assert back.model.prediction_type == "v"
    assert back.model.network == dataclasses.replace(network, scan_layers=False)
    np.testing.assert_array_equal(
        back.params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"], params["decoder"]["layers"]["mlp"]["wo"]["kernel"][1]
    )
    flat, flat_back = flatten_dict(params), flatten_dict(back.params)
    assert sum(leaf.size for leaf in flat.values()) == sum(leaf.size for leaf in flat_back.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": NetworkConfig(note_roll=True)}, "a note roll"),
        ({"network": NetworkConfig(context_frames=0)}, "without context"),
        ({"network": NetworkConfig(cross_attention="sum")}, "cross_attention"),
        ({"prediction_type": "x0_and_eps"}, "prediction_type 'x0_and_eps'"),
        ({"schedule": LinearSchedule()}, "no schedule like LinearSchedule"),
        ({"schedule": LogNormalSchedule()}, "no schedule like LogNormalSchedule"),
    ],
)
def test_what_the_port_has_no_place_for(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        diffusers.write(tmp_path / "new", dataclasses.replace(Diffusion(), **changes), {})
    assert not (tmp_path / "new").exists()


# --- torch's own files -------------------------------------------------------------------------------------------


def torch_save(path, tensors, order="little", compression=zipfile.ZIP_STORED):
    """Writes what `torch.save(state_dict)` writes; `tensors`: name -> array, or anything else to be pickled."""
    module, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")

    def _rebuild_tensor_v2(*args):
        raise AssertionError

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in ("FloatStorage", "HalfStorage", "BFloat16Storage", "LongStorage"):
        setattr(module, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    kinds = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}
    storages = []

    class Storage:
        def __init__(self, array):
            self.array = array

    class Pickler(pickle.Pickler):
        def reducer_override(self, value):
            if not isinstance(value, np.ndarray):
                return NotImplemented
            strides = tuple(stride // value.itemsize for stride in value.strides)
            hooks = collections.OrderedDict()
            return _rebuild_tensor_v2, (Storage(value), 0, value.shape, strides, False, hooks)

        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            storages.append(value.array)
            kind = getattr(module, kinds[value.array.dtype.name])
            return "storage", kind, str(len(storages) - 1), "cpu", value.array.size

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", module)
        patch.setitem(sys.modules, "torch._utils", utils)
        pickled = io.BytesIO()
        state = collections.OrderedDict(tensors)
        state._metadata = {"": {"version": 1}}
        Pickler(pickled, protocol=2).dump(state)
    stem = path.stem
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{stem}/data.pkl", pickled.getvalue())
        archive.writestr(f"{stem}/byteorder", order)
        for i, array in enumerate(storages):
            archive.writestr(f"{stem}/data/{i}", array.tobytes("A"))
    return path


def test_bin_instead_of_safetensors(tiny, folder):
    for part in diffusers.NETWORKS:
        path = folder / part / WEIGHTS
        torch_save(path.with_suffix(".bin"), read_tensors(path))
        path.unlink()
    shutil.copyfile(
        GOLDEN / "continuous_encoder.bin", folder / "continuous_encoder/diffusion_pytorch_model.bin"
    )  # true
    back = diffusers.read(folder)
    jax.tree.map(np.testing.assert_array_equal, back.params, tiny.params)
    assert "torch" not in sys.modules


def test_other_layouts_and_types_of_torch(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"transposed": array.T, "half": array.astype(np.float16), "brain": array.astype(jnp.bfloat16)}
    for name, tensor in read_tensors(torch_save(tmp_path / "a.bin", tensors)).items():
        np.testing.assert_array_equal(tensor.astype(np.float32), tensors[name].astype(np.float32))
        assert tensor.dtype == tensors[name].dtype


class Harmful:
    def __reduce__(self):
        return print, ("this pickle has run code",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensors": {"a": Harmful()}}, r"holds a \w+\.print,"),
        ({"tensors": {"a": np.zeros(2, np.int64)}}, r"holds a torch\.LongStorage"),
        ({"tensors": {"a": 3}}, "no state dict"),
        ({"tensors": {"a": np.zeros(2, np.float32)}, "order": "big"}, "big-endian"),
        ({"tensors": {"a": np.zeros(2, np.float32)}, "compression": zipfile.ZIP_DEFLATED}, "compressed"),
    ],
)
def test_files_of_torch_that_are_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(UserError, match=rf"a\.bin cannot be read as a file of torch \(.*{message}"):
        read_tensors(torch_save(tmp_path / "a.bin", **arguments))
    assert capsys.readouterr().out == ""


def test_a_tensor_of_torch_beyond_its_bytes(tmp_path):
    lies = np.lib.stride_tricks.as_strided(np.zeros(4, np.float32), (2,), (4,))
    path = torch_save(tmp_path / "a.bin", {"a": lies})
    pickled = zipfile.ZipFile(path).read("a/data.pkl")
    with zipfile.ZipFile(tmp_path / "b.bin", "w") as archive:
        archive.writestr("b/data.pkl", pickled)
        archive.writestr("b/data/0", bytes(4))  # one number, of two
    with pytest.raises(UserError, match="beyond its bytes"):
        read_tensors(tmp_path / "b.bin")
    (tmp_path / "c.bin").write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # how torch before 1.6 began
    with pytest.raises(UserError, match=r"torch before 1\.6"):
        read_tensors(tmp_path / "c.bin")


# --- bad input ---------------------------------------------------------------------------------------------------


def edit(path, **changes):
    settings = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del settings[key]
        else:
            settings[key] = value
    path.write_text(json.dumps(settings))


def edit_weights(path, change):
    from safetensors.numpy import save_file

    tensors = {name: np.array(tensor) for name, tensor in read_tensors(path).items()}
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "no index": (lambda f: (f / "model_index.json").unlink(), r"no file .*model_index\.json"),
    "an index that does not parse": (
        lambda f: (f / "model_index.json").write_text('{"_class'),
        r"model_index\.json does not parse",
    ),
    "another pipeline": (
        lambda f: edit(f / "model_index.json", _class_name="StableDiffusionPipeline"),
        "holds a StableDiffusionPipeline, not a SpectrogramDiffusionPipeline",
    ),
    "no config": (lambda f: (f / "decoder/config.json").unlink(), r"no file .*decoder/config\.json"),
    "another network": (
        lambda f: edit(f / "decoder/config.json", _class_name="UNet2DModel"),
        r"decoder/config\.json: _class_name = 'UNet2DModel', and only 'T5FilmDecoder'",
    ),
    "a setting is missing": (lambda f: edit(f / "decoder/config.json", d_kv=...), "d_kv = None, where int is needed"),
    "a setting of another kind": (
        lambda f: edit(f / "decoder/config.json", targets_length="long"),
        "targets_length = 'long', where int is needed",
    ),
    "a setting that is nonsense": (lambda f: edit(f / "decoder/config.json", targets_length=0), "target_frames = 0"),
    "unequal widths": (
        lambda f: edit(f / "continuous_encoder/config.json", d_ff=64),
        r"d_ff = 64, but 32 in .*notes_encoder",
    ),
    "another activation": (lambda f: edit(f / "notes_encoder/config.json", feed_forward_proj="relu"), "'gated-gelu'"),
    "another scheduler": (
        lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "'DDIMScheduler', and only 'DDPMScheduler'",
    ),
    "other betas": (
        lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="linear"),
        "'linear', and only 'squaredcos_cap_v2'",
    ),
    "another prediction": (
        lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="flow"),
        "'flow', and only epsilon, sample, v_prediction",
    ),
    "no weights": (
        lambda f: (f / "decoder" / WEIGHTS).unlink(),
        r"no weights in .*decoder: .*\.safetensors or .*\.bin",
    ),
    "weights cut off": (
        lambda f: (f / "decoder" / WEIGHTS).write_bytes((f / "decoder" / WEIGHTS).read_bytes()[:-9]),
        r"decoder/.*\.safetensors cannot be read as safetensors \(.* beyond the end",
    ),
    "weights that are something else": (
        lambda f: (f / "decoder" / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1"),
        "cannot be read as safetensors",
    ),
    "an empty file": (lambda f: (f / "decoder" / WEIGHTS).write_bytes(b""), "cannot be read as safetensors"),
    "a missing tensor": (
        lambda f: edit_weights(f / "decoder" / WEIGHTS, lambda t: t.pop("spec_out.weight")),
        r"it has no tensor spec_out\.weight, which config\.json asks for with shape \(128, 16\)",
    ),
    "an extra tensor": (
        lambda f: edit_weights(f / "decoder" / WEIGHTS, lambda t: t.update({"lora.weight": np.zeros(3)})),
        r"lora\.weight of shape \(3,\) has no place",
    ),
    "another shape": (
        lambda f: edit_weights(f / "decoder" / WEIGHTS, lambda t: t.update({"spec_out.weight": np.zeros((4, 16))})),
        r"spec_out\.weight has shape \(4, 16\), and config\.json asks for \(128, 16\)",
    ),
    "other numbers": (
        lambda f: edit_weights(
            f / "decoder" / WEIGHTS, lambda t: t.update({"spec_out.weight": np.zeros((128, 16), np.int32)})
        ),
        "spec_out.weight is of I32, not of floating point",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_folders(folder, name):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        diffusers.read(folder)
    assert "\n" not in str(error.value)


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        diffusers.read(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file"):
        diffusers.write(tmp_path / "file", tiny.model, tiny.params)


BASE_SIZE = """
import hashlib, resource, sys
from pathlib import Path
import jax, numpy as np
from music_synth import SpectrogramDiffusionPipeline
from music_synth.diffusion.objective import Diffusion
from music_synth.interop import diffusers
from music_synth.midi.notes import Note
from music_synth.models.layers import NetworkConfig

folder = Path(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB
digests = lambda: [hashlib.sha1(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*.safetensors"))]
if sys.argv[1] == "write":
    network = NetworkConfig(model_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, num_encoder_layers=12,
                            num_decoder_layers=12)
    model, block = Diffusion(network, prediction_type="eps"), np.random.default_rng(0).normal(0, 0.02, 10**6)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.resize(block.astype(np.float32), leaf.shape), shapes)
    diffusers.write(folder, model, params)
    print(sum(leaf.size for leaf in jax.tree.leaves(shapes)), peak())
elif sys.argv[1] == "convert":
    before = digests()
    pipeline = diffusers.read(folder)
    diffusers.write(folder, pipeline.model, pipeline.params)
    print(digests() == before, peak())
else:
    pipe = SpectrogramDiffusionPipeline.from_pretrained(folder, inverter="griffin_lim")
    audio = pipe([Note(60, 90, 0, 0.0, 1.0)], 0, num_inference_steps=2).audios[0]
    print(audio.shape, np.isfinite(audio).all(), peak())
"""


@pytest.mark.slow
def test_the_base_size_in_8_gb(tmp_path):
    """412 million random parameters: written, read and written back bit for bit, and one segment played."""

    def run(what):
        arguments = [sys.executable, "-W", "ignore", "-c", BASE_SIZE, what, str(tmp_path)]
        printed = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        *results, peak = printed.rsplit(" ", 1)
        assert float(peak) < 8, (what, peak)
        return results[0]

    assert 411e6 < int(run("write")) < 413e6
    assert run("convert") == "True"
    assert run("play") == "(1, 81920) True"
