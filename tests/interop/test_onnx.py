"""Exported inverters equal the JAX ones; each block of the graph equals its JAX or NumPy counterpart."""

import sys
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import onnxruntime
import pytest

from music_synth.audio.mel import HOP_LENGTH, hann_window
from music_synth.errors import UserError
from music_synth.interop import onnx_graph
from music_synth.interop.onnx import export_onnx
from music_synth.interop.onnx_graph import Graph, Transform
from music_synth.midi.notes import Note
from music_synth.runs import load_inverter
from music_synth.vocoder.convnext import DepthwiseConv
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.melgan import MelGANGenerator
from music_synth.vocoder.neural import NeuralInverter, play_whole
from music_synth.vocoder.stft import frames_of, overlap_add

pytestmark = pytest.mark.usefixtures("quick_compilation")
RNG = np.random.default_rng(4)


def random_mel(num_frames):
    return RNG.uniform(-12, 6, (num_frames, 128)).astype(np.float32)  # beyond both ends of the model range


def trained(init):
    """Parameters as training leaves them, of the shapes that `init` makes: no bias is 0, no scale is 1."""
    draw = {
        "bias": lambda shape: 0.05 * RNG.standard_normal(shape),
        "scale": lambda shape: RNG.uniform(0.7, 1.4, shape),
        "kernel": lambda shape: RNG.standard_normal(shape) / np.sqrt(np.prod(shape[:-1])),
    }
    shapes = jax.eval_shape(init, jax.random.key(0))  # nothing is computed or compiled
    return jax.tree.map_with_path(lambda path, x: draw[path[-1].key](x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(
    "generator, lengths",
    [(MelGANGenerator(16, dilations=(1, 3)), (2, 45)), (MelGANGenerator(16, (5, 16, 4), dilations=(2,)), (9,))],
    ids=["strides as shipped", "others"],
)
def test_exported_melgan_equals_jax(tmp_path, generator, lengths):
    params = trained(generator.init)
    export_onnx(generator, params, tmp_path / "melgan.onnx")
    inverter = load_inverter(str(tmp_path / "melgan.onnx"))
    for num_frames in lengths:
        mel = random_mel(num_frames)
        expected = jax.jit(generator.module.apply)({"params": params}, mel[None], np.ones((1, num_frames), bool))[0]
        audio = inverter(mel)
        assert audio.shape == expected.shape == (320 * num_frames,)
        assert np.std(expected) > 0.1  # it sounds, so that the limit below means something
        np.testing.assert_allclose(audio, expected, rtol=0, atol=1e-4)


def test_exported_istft_equals_jax(tmp_path):
    generator = ISTFTGenerator(8, 16, 1, num_consistency_steps=1, num_projections=2)
    params = trained(generator.init)
    export_onnx(generator, params, tmp_path / "istft.onnx")
    inverter = load_inverter(str(tmp_path / "istft.onnx"))
    for num_frames in (2, 150):  # the noise begins anew after 128
        mel, exists = random_mel(num_frames), np.ones((1, num_frames), bool)
        audio = inverter(mel)
        play = jax.jit(play_whole, static_argnums=0)
        expected = play(generator, params, mel[None], exists, np.zeros(1, np.int32))[0]
        peak = np.abs(expected).max()
        assert audio.shape == expected.shape == (320 * num_frames,)
        assert np.std(expected) > 0.1 * peak
        np.testing.assert_allclose(audio, expected, rtol=0, atol=2e-4 * peak)  # measured: 2e-5

    more = ISTFTGenerator(8, 16, 1, num_consistency_steps=16, num_projections=48)
    export_onnx(more, params, tmp_path / "more.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("istft.onnx", "more.onnx")]
    assert abs(sizes[1] - sizes[0]) < 100  # the two counts, which may be kept once or twice


@pytest.mark.parametrize("source", [True, False], ids=["learned", "by rule"])
def test_exported_note_informed_istft_equals_jax(tmp_path, source):
    steps = {"num_consistency_steps": 0, "num_projections": 2}
    generator = ISTFTGenerator(8, 16, 1, width=5, ahead=1, max_ahead=1, source=source, **steps)
    params = trained(generator.init)
    export_onnx(generator, params, tmp_path / "istft.onnx", notes=True)
    inverter, own = load_inverter(str(tmp_path / "istft.onnx")), NeuralInverter(generator, params)
    mel, notes = random_mel(40), [Note(60, 100, 0, 0.1, 0.6), Note(38, 90, 0, 0.3, 0.4, is_drum=True)]
    played = []
    for given in (notes, None) if source else (notes, [Note(72, 100, 0, 0.1, 0.6)]):
        audio, expected = inverter(mel, given), own(mel, given)
        # Phases are the source's: where it is nearly silent they turn by rounding, so a few samples differ by more.
        apart = np.abs(audio - expected) / np.abs(expected).max()
        assert np.quantile(apart, 0.9) < 5e-4 and apart.max() < 1e-2
        played.append(audio)
    assert np.abs(played[0] - played[1]).max() > 0.1 * np.abs(played[0]).max()


def test_onnx_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # importing it fails
    with pytest.raises(UserError, match=r"out\.onnx needs onnx .*pip install 'music_synth\[eval\]'"):
        Graph().save(tmp_path / "out.onnx", {}, {}, "")


@pytest.fixture
def check(tmp_path):
    """Runs a block of a graph on an array and compares: check(lambda graph, x: ..., array, expected)."""

    def call(block, x, expected, atol=2e-5):
        graph = Graph()
        graph.add("Identity", block(graph, "x"), name="y")

        def any_size(array):
            return [f"size_{axis}" for axis in range(array.ndim)]

        graph.save(tmp_path / "block.onnx", {"x": any_size(x)[:-1] + [x.shape[-1]]}, {"y": any_size(expected)}, "")
        session = onnxruntime.InferenceSession(tmp_path / "block.onnx", providers=["CPUExecutionProvider"])
        [result] = session.run(None, {"x": x})
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=0, atol=atol)

    return call


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("num_frames", [1, 2, 30])
def test_layers_equal_flax(check, num_frames):
    x = 3 * normal(1, num_frames, 12) + 1
    check(onnx_graph.gelu, x, nn.gelu(x))
    for block, layer in (
        (onnx_graph.dense, nn.Dense(20)),
        (onnx_graph.layer_norm, nn.LayerNorm()),
        (partial(onnx_graph.depthwise_conv, ahead=3, seen=3), DepthwiseConv(7, 3, 3)),
        (partial(onnx_graph.depthwise_conv, ahead=3, seen=1), DepthwiseConv(7, 3, 1)),
        (partial(onnx_graph.depthwise_conv, ahead=1, seen=0), DepthwiseConv(4, 1, 0)),
    ):
        params = trained(lambda key, layer=layer: layer.init(key, x)["params"])
        check(partial(block, params=params), x, layer.apply({"params": params}, x))


@pytest.mark.parametrize("length, size", [(640, 1024), (1280, 1280), (16, 16)])
def test_transforms_equal_those_of_numpy(check, length, size):
    """Of frames turned so that their middle is sample 0, whose other half the zeros between come before."""
    window = hann_window(length)
    frames = normal(1, 5, length)

    def turned(x):
        padded = np.zeros((*x.shape[:-1], size), x.dtype)
        padded[..., : length // 2], padded[..., size - length // 2 :] = np.split(x, 2, axis=-1)[::-1]
        return padded

    spectrum = np.fft.rfft(turned(frames * window))
    both = np.concatenate([spectrum.real, spectrum.imag], -1)
    check(lambda graph, x: Transform(graph, window, size).spectra(graph, x), frames, both, atol=1e-4)
    other = normal(1, 5, 2 * (size // 2 + 1))
    real, imaginary = np.split(other, 2, axis=-1)
    made = np.fft.irfft(real + 1j * imaginary, size)
    expected = window * np.concatenate([made[..., size - length // 2 :], made[..., : length // 2]], -1)
    check(lambda graph, x: Transform(graph, window, size).frames(graph, x), other, expected, atol=1e-6)


@pytest.mark.parametrize("num_hops", [4, 5, 21])
def test_framing_equals_jax(check, num_hops):
    audio = normal(1, 320 * num_hops)
    for length in (640, 1280):
        frames = np.asarray(frames_of(audio, length, HOP_LENGTH))
        check(partial(onnx_graph.frames_of, length=length, hop=HOP_LENGTH), audio, frames, atol=0)
        added = overlap_add(frames, HOP_LENGTH)
        check(partial(onnx_graph.overlap_add, length=length, hop=HOP_LENGTH), frames, added, atol=1e-6)
