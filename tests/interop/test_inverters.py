"""Other projects' inverters: an ONNX file written by another program, and SavedModels and ONNX files made here."""

import gc
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from music_synth.audio.mel import MIN_LOG_MEL
from music_synth.errors import UserError
from music_synth.runs import load_inverter

TOY = Path(__file__).parents[1] / "golden" / "toy_inverter.onnx"  # audio = tanh(mel @ M), see golden/README.md
RNG = np.random.default_rng(1)
MATRIX = (RNG.standard_normal((128, 320)) / 100).astype(np.float32)


def random_mel(num_frames):
    return RNG.uniform(-12, 4, (num_frames, 128)).astype(np.float32)


def write_onnx(path, shape=(1, "frames", 128), nodes=None, matrix=MATRIX, dtype=TensorProto.FLOAT, inputs=1, outputs=1):
    """mel @ matrix as an ONNX file, unless `nodes` say otherwise; further inputs and outputs do nothing."""
    made = ["audio", *(f"extra_{i}" for i in range(1, outputs))]
    nodes = list(nodes or [helper.make_node("MatMul", ["mel", "M"], ["audio"])])
    nodes += [helper.make_node("Identity", ["M"], [name]) for name in made[1:]]
    taken = [helper.make_tensor_value_info("mel", dtype, shape)]
    taken += [helper.make_tensor_value_info(f"unused_{i}", TensorProto.FLOAT, [1]) for i in range(1, inputs)]
    given = [helper.make_tensor_value_info(name, dtype, None) for name in made]
    matrix = matrix.astype(helper.tensor_dtype_to_np_dtype(dtype))
    graph = helper.make_graph(nodes, "toy", taken, given, [numpy_helper.from_array(matrix, "M")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


@pytest.mark.parametrize("num_frames", [0, 1, 300])
def test_golden_onnx(num_frames):
    matrix = numpy_helper.to_array(onnx.load(TOY).graph.initializer[0])
    mel = random_mel(num_frames)
    audio = load_inverter(str(TOY))(mel)
    assert audio.dtype == np.float32 and audio.shape == (320 * num_frames,)
    np.testing.assert_allclose(audio, np.tanh(mel @ matrix).ravel(), atol=1e-5)


TRANSPOSED = [
    helper.make_node("Transpose", ["mel"], ["turned"], perm=[0, 2, 1]),
    helper.make_node("MatMul", ["turned", "M"], ["audio"]),
]


@pytest.mark.parametrize(
    "model",
    [
        {"shape": (None, None, 128)},
        {"shape": ("frames", 128)},
        {"shape": (1, 1, "frames", 128)},
        {"shape": ("a", "b", "c")},
        {"shape": None},
        {"shape": (1, 128, "frames"), "nodes": TRANSPOSED},
        {"shape": (1, 50, 128)},
        {"shape": (1, 128, 50), "nodes": TRANSPOSED},
        {"dtype": TensorProto.DOUBLE},
    ],
    ids=lambda model: str(model.get("shape", "double")),
)
def test_shapes_of_input(tmp_path, model):
    inverter = load_inverter(write_onnx(tmp_path / "model.onnx", **model))
    for num_frames in (1, 50, 70):  # of a model with 50 frames: less than a piece, one, more than one
        mel = random_mel(num_frames)
        np.testing.assert_allclose(inverter(mel), (mel @ MATRIX).ravel(), atol=1e-4)


def test_last_piece_is_filled_with_silence(tmp_path):
    mean_of_piece = [
        helper.make_node("ReduceMean", ["mel"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Sub", ["mel", "mean"], ["difference"]),
        helper.make_node("MatMul", ["difference", "M"], ["audio"]),
    ]
    inverter = load_inverter(write_onnx(tmp_path / "model.onnx", (1, 50, 128), mean_of_piece))
    mel = random_mel(70)
    filled = np.concatenate([mel, np.full((30, 128), MIN_LOG_MEL, np.float32)]).reshape(2, 50, 128)
    expected = (filled - filled.mean(axis=1, keepdims=True)) @ MATRIX
    np.testing.assert_allclose(inverter(mel), expected.ravel()[: 320 * 70], atol=1e-4)


def test_refused(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"no file .*model\.onnx"):
        load_inverter(str(path))
    path.write_bytes(b"RIFF not a model")
    with pytest.raises(UserError, match=r"model\.onnx is no ONNX file that onnxruntime can run"):
        load_inverter(str(path))
    for model, message in (
        ({"shape": (1, "frames", 80), "matrix": MATRIX[:80]}, r"takes \[1, any, 80\], not log-mel \[1, frames, 128\]"),
        ({"shape": (4, "frames", 128)}, r"takes \[4, any, 128\]"),
        ({"shape": (128,)}, r"takes \[128\]"),
        ({"inputs": 2}, "has 2 inputs; an inverter has one"),
        ({"outputs": 3}, "has 3 outputs; an inverter has one"),
        ({"dtype": TensorProto.INT32}, r"takes tensor\(int32\) as 'mel', not a log-mel of floats"),
    ):
        with pytest.raises(UserError, match=message):
            load_inverter(write_onnx(path, **model))


def test_wrong_audio(tmp_path, capfd):
    path, mel = tmp_path / "model.onnx", random_mel(10)
    with pytest.raises(UserError, match="gives 2560 samples for 10 frames, not 320 a frame"):
        load_inverter(write_onnx(path, matrix=MATRIX[:, :256]))(mel)
    with pytest.raises(UserError, match="audio that is not finite"):
        load_inverter(write_onnx(path, matrix=np.where(MATRIX > 0.02, np.nan, MATRIX)))(mel)
    with pytest.raises(UserError, match=r"fails on 10 frames of log-mel: .*MatMul") as caught:
        load_inverter(write_onnx(path, shape=("a", "b", "c"), matrix=MATRIX[:100]))(mel)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"log-mel \[T, 128\], not shape \(10, 80\)"):
        load_inverter(str(TOY))(mel[:, :80])
    with pytest.raises(UserError, match="the mel is not finite at frame 0"):
        load_inverter(str(TOY))(np.full((10, 128), np.nan))
    assert capfd.readouterr().err == ""  # onnxruntime prints nothing beside what it raises


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # importing it fails
    with pytest.raises(UserError, match=r"pip install 'music_synth\[eval\]'"):
        load_inverter(str(TOY))
    (tmp_path / "saved_model.pb").touch()
    monkeypatch.setitem(sys.modules, "music_synth.data.quiet_tensorflow", None)
    with pytest.raises(UserError, match=r"pip install 'music_synth\[data]'"):
        load_inverter(str(tmp_path), trust=True)
    with pytest.raises(UserError, match=r"is a SavedModel, which is a program: .* add --trust"):
        load_inverter(str(tmp_path))


@pytest.fixture
def save_model(tmp_path):
    """Writes mel @ MATRIX, the matrix a variable, as a SavedModel: with a signature, or only as a function to call."""
    from music_synth.data.quiet_tensorflow import tf

    class Toy(tf.Module):
        def __init__(self, matrix):
            self.matrix = tf.Variable(matrix)

        @tf.function
        def __call__(self, mel):
            return tf.reshape(mel @ self.matrix, [1, -1])

        @tf.function
        def transposed(self, mel):
            return {"audio": self(tf.transpose(mel, [0, 2, 1]))}

        @tf.function
        def stereo(self, mel):
            return {"left": self(mel), "right": self(mel)}

    def save(shape=(None, None, 128), serve="__call__", matrix=MATRIX):
        if serve == "nothing":
            tf.saved_model.save(tf.Module(), str(tmp_path / "saved"))
            return str(tmp_path / "saved")
        toy = Toy(matrix)
        mel = tf.TensorSpec(shape, tf.float32, name="mel")
        toy.__call__.get_concrete_function(tf.TensorSpec((None, None, len(matrix)), tf.float32))
        signature = getattr(toy, serve).get_concrete_function(mel) if serve else {}
        tf.saved_model.save(toy, str(tmp_path / "saved"), signatures=signature)
        return str(tmp_path / "saved")

    return save


def test_saved_model(save_model):
    for model in ({}, {"serve": None}, {"shape": (1, 50, 128)}, {"shape": (1, 128, None), "serve": "transposed"}):
        inverter = load_inverter(save_model(**model), trust=True)
        gc.collect()  # whatever nobody holds, such as the variables of a model of which only a function is kept
        for num_frames in (0, 1, 70):
            mel = random_mel(num_frames)
            audio = inverter(mel)
            assert audio.dtype == np.float32
            np.testing.assert_allclose(audio, (mel @ MATRIX).ravel(), atol=1e-4, err_msg=str(model))


def test_saved_models_refused(save_model, tmp_path):
    with pytest.raises(UserError, match=r"takes \[any, any, 80\], not log-mel"):
        load_inverter(save_model((None, None, 80), matrix=MATRIX[:80]), trust=True)
    with pytest.raises(UserError, match="has 2 outputs; an inverter has one"):
        load_inverter(save_model(serve="stereo"), trust=True)
    with pytest.raises(UserError, match="gives 1000 samples for 10 frames, not 320 a frame"):
        load_inverter(save_model(matrix=MATRIX[:, :100]), trust=True)(random_mel(10))
    with pytest.raises(UserError, match="fails on 10 frames of log-mel: ") as caught:
        load_inverter(save_model(serve=None, matrix=MATRIX[:80]), trust=True)(random_mel(10))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no signature 'serving_default' and is no function"):
        load_inverter(save_model(serve="nothing"), trust=True)
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="is no SavedModel that TensorFlow can load"):
        load_inverter(str(tmp_path / "saved"), trust=True)
