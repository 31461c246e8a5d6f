"""Decoders as ONNX files: what JAX samples, sampled by onnxruntime, and a piece played without JAX."""

import dataclasses
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.autoregressive.objective import Autoregressive
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import LogNormalSchedule
from music_synth.errors import UserError
from music_synth.interop.inverters import load_onnx
from music_synth.interop.onnx import export_onnx
from music_synth.interop.onnx_decoder import export_decoder
from music_synth.interop.onnx_graph import Graph
from music_synth.interop.onnx_player import OnnxDecoder
from music_synth.interop.onnx_trace import trace
from music_synth.interop.runtimes import open_onnx
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.playing import Decoder
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.neural import NeuralInverter

pytestmark = pytest.mark.usefixtures("quick_compilation")
TOKENIZER = Tokenizer(velocity_bins=32, segment_frames=64, max_tokens=96, timbres=("hall", "room"))
NETWORK = NetworkConfig(
    model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1, max_tokens=96,
    target_frames=64, context_frames=64, dropout_rate=0.0, vocabulary=TOKENIZER.vocabulary, note_roll=True,
    roll_harmonics=4, num_prior_layers=1, decoder="convolutional",
)  # fmt: skip
PUBLISHED = dataclasses.replace(NETWORK, note_roll=False, num_prior_layers=0, decoder="transformer")
RESIDUAL = Diffusion(
    NETWORK, LogNormalSchedule(), prediction_type="v", loss_target="v", condition_dropout=0.0,
    sampler=Sampler("euler", 2, grid="karras", min_log_snr=-4.0, max_log_snr=7.0, clip_x_0=False),
)  # fmt: skip
LATENT = dataclasses.replace(RESIDUAL, network=dataclasses.replace(NETWORK, note_latents=2))
GUIDED = Diffusion(PUBLISHED, prediction_type="eps", sampler=Sampler("ddpm", 3, guidance_scale=2.0))
NOTES = [Note(60, 100, 0, 0.1, 1.9), Note(67, 60, 0, 0.5, 0.9), Note(36, 90, 0, 1.5, 1.6, is_drum=True)]


def trained(model):
    """Parameters none of which is 0, as after training."""
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        tree, [a + 0.02 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    )


def as_jax_draws(model):
    """The noise and latents that `Decoder` gives a model in segment `number` of a piece of seed 0."""

    def noise(number, shape):
        key = jax.random.fold_in(jax.random.key(np.uint32(0)), np.uint32(number))
        start, steps = jax.random.split(key)
        if len(shape) == 3:
            drawn = model.draw_latents(jax.random.fold_in(start, 1)[None], {"note_tokens": np.zeros(shape[:2])})
            return np.asarray(drawn)
        drawn = [jax.random.normal(start, shape[2:])]
        drawn += [jax.random.normal(jax.random.fold_in(steps, i), shape[2:]) for i in range(shape[1] - 1)]
        return np.stack(drawn)[None]

    return noise


@pytest.mark.parametrize("model", [RESIDUAL, LATENT, GUIDED], ids=["residual", "latent", "guided"])
def test_a_piece_is_sampled_as_by_jax(tmp_path, model):
    params = trained(model)
    export_decoder(model, params, TOKENIZER, tmp_path / "decoder.onnx")
    made = np.concatenate(list(OnnxDecoder(tmp_path / "decoder.onnx").stream(NOTES, noise=as_jax_draws(model))))
    expected = np.concatenate(list(Decoder(model, params, TOKENIZER).stream(NOTES)))
    assert made.shape == expected.shape and len(made) > 2 * 64 and expected.std() > 0.5
    np.testing.assert_allclose(made, expected, atol=2e-3)


def test_a_piece_is_played_without_jax(tmp_path):
    """By a process that has no JAX; as loud, sample by sample, as JAX to 2e-3 of full scale."""
    params, generator = trained(RESIDUAL), ISTFTGenerator(8, 16, 1)
    weights = generator.init(jax.random.key(2))
    export_decoder(RESIDUAL, params, TOKENIZER, tmp_path / "decoder.onnx")
    export_onnx(generator, weights, tmp_path / "inverter.onnx", notes=True)
    program = f"""
import sys
import numpy as np
from pathlib import Path
from music_synth.interop import onnx_player
from music_synth.midi.notes import Note
decoder = onnx_player.OnnxDecoder(Path({str(tmp_path / "decoder.onnx")!r}))
noise = np.load({str(tmp_path / "noise.npy")!r})
notes = {NOTES!r}
mel = np.concatenate(list(decoder.stream(notes, noise=lambda number, shape: noise[number])))
audio = onnx_player.load_onnx(Path({str(tmp_path / "inverter.onnx")!r}))(mel, notes)
np.save({str(tmp_path / "audio.npy")!r}, audio)
assert not {{"jax", "flax", "tensorflow"}} & sys.modules.keys()
"""
    draw = as_jax_draws(RESIDUAL)
    np.save(tmp_path / "noise.npy", [draw(number, (1, 1, 64, 128)) for number in range(3)])
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)
    mel = np.concatenate(list(Decoder(RESIDUAL, params, TOKENIZER).stream(NOTES)))
    expected, audio = NeuralInverter(generator, weights)(mel, NOTES), np.load(tmp_path / "audio.npy")
    assert audio.shape == expected.shape
    np.testing.assert_allclose(audio, expected, atol=2e-3 * max(1.0, np.abs(expected).max()))


def test_what_is_not_written(tmp_path):
    with pytest.raises(UserError, match="a Autoregressive is not written as ONNX, only a Diffusion"):
        export_decoder(Autoregressive(PUBLISHED), {}, TOKENIZER, tmp_path / "a.onnx")
    slow = RESIDUAL.with_sampling(num_steps=65)
    with pytest.raises(UserError, match=r"Sampler\.num_steps = 65: as ONNX at most 64"):
        export_decoder(slow, {}, TOKENIZER, tmp_path / "a.onnx")
    with pytest.raises(UserError, match="the operation sort cannot be written as ONNX"):
        trace(Graph(), jnp.sort, {"x": jax.ShapeDtypeStruct((3,), np.float32)}, "y")


def primitives(x):
    """What is left out above: a loop, paddings within and negative, products along two axes."""
    y = jax.lax.fori_loop(0, 3, lambda i, a: a * 2.0 + i, x)
    y = jax.lax.pad(y, 0.5, ((0, 0, 0), (1, -1, 1)))
    y = y + jnp.einsum("bt,ct->bc", y, y).sum()
    y = jnp.where(y > 3.0, jnp.log1p(jnp.abs(y)), jnp.expm1(-jnp.abs(y))) / nn.sigmoid(y)
    return jnp.stack([y.at[:, 2].set(7.0), 2.0 - y]).max(axis=0)


def test_primitives(tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    graph = Graph()
    trace(graph, primitives, {"x": jax.ShapeDtypeStruct(x.shape, np.float32)}, "y")
    expected = primitives(x)
    graph.save(tmp_path / "p.onnx", {"x": x.shape}, {"y": list(expected.shape)}, "")
    np.testing.assert_allclose(open_onnx(tmp_path / "p.onnx").run(None, {"x": x})[0], expected, rtol=1e-5, atol=1e-5)


def test_a_file_that_is_no_decoder(tmp_path):
    generator = ISTFTGenerator(8, 16, 1)
    export_onnx(generator, generator.init(jax.random.key(0)), tmp_path / "inverter.onnx")
    with pytest.raises(UserError, match=r"inverter\.onnx is no decoder: python -m music_synth\.convert RUN"):
        OnnxDecoder(tmp_path / "inverter.onnx")
    assert load_onnx(tmp_path / "inverter.onnx")(np.zeros((4, 128), np.float32)).shape == (1280,)
    with pytest.raises(UserError, match="no file"):
        OnnxDecoder(tmp_path / "nothing.onnx")
