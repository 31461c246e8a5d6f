"""Embeddings: those of our own by hand, and VGGish, TRILL, CLAP and MERT through files with the real ones' signatures.

The files made here are tiny, but take and give what the published ones do: names, ranks, rates and layers.
"""

import pickle

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import signal

from music_synth.audio.io import resample
from music_synth.audio.mel import MIN_LOG_MEL, log_mel
from music_synth.errors import UserError
from music_synth.evaluation import embeddings, pretrained, transcription
from music_synth.evaluation.embeddings import load_embeddings, log_mel_statistics
from music_synth.evaluation.pretrained import clap_log_mel, vggish_log_mel

RNG = np.random.default_rng(0)
NOISE = (0.1 * RNG.standard_normal(16_000 * 12)).astype(np.float32)
FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def audio(seconds):
    return NOISE[: int(16_000 * seconds)]


def write_onnx(path, inputs, outputs, nodes, **weights):
    """inputs: name -> (dtype, shape); outputs: names; weights: arrays that the nodes name."""
    taken = [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()]
    given = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **node[3]) for node in nodes], "toy", taken, given, constants
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def write_waveform_model(path, dims, hop, shape=("samples",), output="embedding", more_outputs=(), inputs=None):
    """Each frame of `hop` samples times a matrix [hop, dims], as a convolution: (path, matrix)."""
    matrix = (RNG.standard_normal((hop, dims)) / hop).astype(np.float32)
    nodes = [
        ("Reshape", ["waveform", "row"], ["rows"], {}),
        ("Conv", ["rows", "kernel"], ["columns"], {"strides": [hop]}),
        ("Transpose", ["columns"], ["frames"], {"perm": [0, 2, 1]}),
        ("Identity", ["frames"], [output], {}),
        *(("Identity", ["kernel"], [name], {}) for name in more_outputs),
    ]
    inputs = {"waveform": (FLOAT, shape)} | (inputs or {})
    row, kernel = np.array([1, 1, -1], np.int64), matrix.T[:, None]
    return write_onnx(path, inputs, [output, *more_outputs], nodes, row=row, kernel=kernel), matrix


def by_hand(waveform, matrix):
    hop = len(matrix)
    num_frames = len(waveform) // hop
    return waveform[: num_frames * hop].reshape(num_frames, hop) @ matrix


# --- all of them -------------------------------------------------------------------------------------------------


def test_what_is_absent_says_what_it_needs(tmp_path, monkeypatch):
    found = load_embeddings({})
    assert {name for name, value in found.items() if not isinstance(value, str)} == {"log_mel", "basic_pitch"}
    absent = {name: value for name, value in found.items() if isinstance(value, str)}
    assert absent == {name: f"needs --{name} PATH" for name in ("vggish", "trill", "clap", "mert")}
    with pytest.raises(UserError, match="no embedding 'openl3' takes a path: choose from vggish, trill, clap, mert"):
        load_embeddings({"openl3": "x"})
    for name in absent:
        with pytest.raises(UserError, match=r"missing\.onnx"):
            load_embeddings({name: str(tmp_path / "missing.onnx")})
    (tmp_path / "text.onnx").write_text("no network")
    for name in absent:
        with pytest.raises(UserError, match=r"text\.onnx is no ONNX file"):
            load_embeddings({name: str(tmp_path / "text.onnx")})
    monkeypatch.setattr(transcription, "basic_pitch_session", lambda: (_ for _ in ()).throw(UserError("not there")))
    assert load_embeddings({})["basic_pitch"] == "needs basic-pitch: not there"


@pytest.mark.parametrize("name", ["log_mel", "basic_pitch"])
def test_embeddings_that_need_nothing(name):
    embedding = pickle.loads(pickle.dumps(load_embeddings({})[name]))  # as another process gets it
    dims, rate = {"log_mel": (256, 5), "basic_pitch": (440, 22050 / 256 / 8)}[name]
    frames = embedding.embed(audio(4))
    assert (embedding.name, frames.dtype, frames.shape[1]) == (name, np.float32, dims)
    assert len(frames) == pytest.approx(4 * rate, abs=5)
    np.testing.assert_array_equal(embedding.embed(audio(4)), frames)
    assert np.isfinite(embedding.embed(np.zeros(16_000, np.float32))).all()  # silence is no error
    with pytest.raises(UserError, match=f"0.05 s of audio are too short for {name}"):
        embedding.embed(audio(0.05))
    with pytest.raises(UserError, match="not finite"):
        embedding.embed(np.full(16_000, np.nan, np.float32))


def test_log_mel_statistics_by_hand():
    mel = RNG.normal(-6, 3, (87, 3)).astype(np.float32)
    frames = log_mel_statistics(mel)
    assert frames.shape == (4, 6)  # windows at 0, 10, 20, 30: the last 7 frames are no whole hop
    for i, frame in enumerate(frames):
        window = np.maximum(mel[10 * i : 10 * i + 50], MIN_LOG_MEL)
        np.testing.assert_allclose(frame, [*window.mean(axis=0), *window.std(axis=0)], rtol=1e-5)
    np.testing.assert_allclose(embeddings.LogMelStatistics().embed(audio(2)), log_mel_statistics(log_mel(audio(2), np)))
    with pytest.raises(UserError, match="49 mel frames are too few"):
        log_mel_statistics(mel[:49])


# --- VGGish and TRILL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [("samples",), (1, "samples"), (None, None)], ids=str)
def test_waveform_model_as_onnx(tmp_path, shape):
    path, matrix = write_waveform_model(tmp_path / "vggish.onnx", 128, 15_360, shape)
    vggish = load_embeddings({"vggish": path})["vggish"]
    assert vggish.name == "vggish"
    # 1.3 s are filled up to 2 s, the audio in the middle.
    expected = by_hand(np.pad(audio(1.3), (5600, 5600)), matrix)
    np.testing.assert_allclose(vggish.embed(audio(1.3)), expected, atol=1e-5)
    assert vggish.embed(audio(10)).shape == (10, 128)
    with pytest.raises(UserError, match=r"0\.95 s of audio are too short for vggish: it needs 0.96 s"):
        vggish.embed(audio(0.95))


def test_trill_as_onnx_is_told_the_rate_and_gives_its_layer(tmp_path):
    extra = {"sample_rate": (INT32, [])}
    path, matrix = write_waveform_model(
        tmp_path / "trill.onnx", 512, 2672, (1, "samples"), more_outputs=["layer19"], inputs=extra
    )
    trill = load_embeddings({"trill": path})["trill"]
    assert trill.name == "trill"
    np.testing.assert_allclose(trill.embed(audio(3)), by_hand(audio(3), matrix), atol=1e-5)


@pytest.mark.parametrize("shape", [("batch", 96, 64), ("batch", 1, 96, 64)], ids=str)
def test_vggish_as_onnx_that_takes_its_log_mel(tmp_path, shape):
    matrix = RNG.standard_normal((64, 128)).astype(np.float32)
    nodes = [
        ("Reshape", ["melspectrogram", "patches"], ["mel"], {}),
        ("ReduceMean", ["mel"], ["mean"], {"axes": [1], "keepdims": 0}),
        ("MatMul", ["mean", "matrix"], ["model/vggish/embeddings"], {}),
        ("Identity", ["mean"], ["model/vggish/fc1"], {}),
    ]
    patches = np.array([-1, 96, 64], np.int64)
    outputs = ["model/vggish/fc1", "model/vggish/embeddings"]
    inputs = {"melspectrogram": (FLOAT, shape)}
    path = write_onnx(tmp_path / "a.onnx", inputs, outputs, nodes, matrix=matrix, patches=patches)
    frames = load_embeddings({"vggish": path})["vggish"].embed(audio(3))
    np.testing.assert_allclose(frames, vggish_log_mel(audio(3)).mean(axis=1) @ matrix, atol=1e-4)
    with pytest.raises(UserError, match=r"takes melspectrogram .*, not one waveform"):
        load_embeddings({"trill": path})


def test_files_that_are_no_waveform_model(tmp_path):
    path, _ = write_waveform_model(tmp_path / "a.onnx", 4, 160, output="audio", more_outputs=["other"])
    with pytest.raises(UserError, match=r"gives audio, other: which of them is 'embedding'\?"):
        load_embeddings({"vggish": path})
    path, _ = write_waveform_model(tmp_path / "b.onnx", 4, 160, inputs={"second": (FLOAT, ["n"])})
    with pytest.raises(UserError, match=r"takes waveform \['samples'\], second \['n'\], not one waveform"):
        load_embeddings({"vggish": path})
    path, _ = write_waveform_model(tmp_path / "c.onnx", 4, 40_000)
    with pytest.raises(UserError, match=r"c\.onnx fails as vggish on 16000 samples: "):
        load_embeddings({"vggish": path})["vggish"].embed(audio(1))
    nodes = [("Log", ["waveform"], ["logs"], {}), ("Unsqueeze", ["logs", "axis"], ["embedding"], {})]
    inputs = {"waveform": (FLOAT, ["n"])}
    path = write_onnx(tmp_path / "d.onnx", inputs, ["embedding"], nodes, axis=np.array([0], np.int64))
    with pytest.raises(UserError, match="gives frames that are not finite"):
        load_embeddings({"vggish": path})["vggish"].embed(audio(1))


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    """VGGish (a function of the waveform) and TRILL (of samples and sample_rate, giving layers) as on TF-Hub."""
    from music_synth.data.quiet_tensorflow import tf

    folder = tmp_path_factory.mktemp("saved")

    class VGGish(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
        def __call__(self, waveform):
            return tf.reduce_mean(tf.reshape(tf.signal.frame(waveform, 15_360, 15_360), [-1, 128, 120]), axis=2)

    class TRILL(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec(None, tf.float32), tf.TensorSpec([], tf.int32)])
        def __call__(self, samples, sample_rate):
            hop = sample_rate // 6
            frames = tf.signal.frame(samples, hop, hop)
            return {"layer19": frames, "embedding": tf.reduce_mean(frames[:, :2560, None], axis=2)[:, ::5]}

    tf.saved_model.save(VGGish(), str(folder / "vggish"))
    tf.saved_model.save(TRILL(), str(folder / "trill"))
    tf.saved_model.save(tf.Module(), str(folder / "empty"))
    return folder


def test_saved_models(saved_models):
    found = load_embeddings({name: str(saved_models / name) for name in ("vggish", "trill")}, trust=True)
    expected = audio(2)[: 2 * 15_360].reshape(2, 128, 120).mean(axis=2)
    np.testing.assert_allclose(found["vggish"].embed(audio(2)), expected, atol=1e-6)
    frames = found["trill"].embed(audio(2))
    assert frames.shape == (12, 512)
    np.testing.assert_allclose(frames[1], audio(2)[2666 : 2666 + 2560 : 5], atol=1e-6)
    with pytest.raises(UserError, match="is no function"):
        load_embeddings({"vggish": str(saved_models / "empty")}, trust=True)


def test_vggish_log_mel_is_that_of_its_authors():
    """Whose filter matrix TensorFlow has as a function."""
    from music_synth.data.quiet_tensorflow import tf

    spectrum = tf.abs(tf.signal.stft(audio(2), 400, 160, 512))
    expected = tf.math.log(spectrum @ tf.signal.linear_to_mel_weight_matrix(64, 257, 16_000, 125.0, 7500.0) + 0.01)
    patches = vggish_log_mel(audio(2))
    assert patches.shape == (2, 96, 64)
    np.testing.assert_allclose(patches.reshape(192, 64), expected[:192], atol=2e-3)


# --- CLAP --------------------------------------------------------------------------------------------------------


def test_clap_log_mel_is_that_of_its_feature_extractor():
    """transformers' ClapFeatureExtractor: power under a periodic Hann window, Slaney's mel as librosa has it, dB."""
    filters = pytest.importorskip("librosa.filters")
    matrix = filters.mel(sr=48_000, n_fft=1024, n_mels=64, fmin=50, fmax=14_000)
    np.testing.assert_allclose(pretrained.clap_mel_matrix(), matrix.T, atol=1e-7)
    sound = resample(audio(1), 16_000, 48_000)
    window, padded = signal.get_window("hann", 1024), np.pad(sound.astype(np.float64), 512, mode="reflect")
    _, _, spectrum = signal.stft(padded, 1, window, 1024, 1024 - 480, boundary=None, padded=False)
    power = np.abs(spectrum * window.sum()) ** 2
    expected = 10 * np.log10(np.maximum(matrix @ power, 1e-10)).T
    assert expected.shape == (101, 64)
    np.testing.assert_allclose(clap_log_mel(sound), expected, atol=1e-3)
    assert (clap_log_mel(np.zeros(4800, np.float32)) == -100).all()


def test_clap(tmp_path):
    matrix = RNG.standard_normal((64, 512)).astype(np.float32)
    nodes = [
        ("ReduceMean", ["input_features"], ["mean"], {"axes": [1, 2], "keepdims": 0}),
        ("MatMul", ["mean", "matrix"], ["audio_embeds"], {}),
        ("Identity", ["mean"], ["last_hidden_state"], {}),
    ]
    inputs = {"input_features": (FLOAT, ["batch", 1, 1001, 64])}
    outputs = ["last_hidden_state", "audio_embeds"]
    clap = load_embeddings({"clap": write_onnx(tmp_path / "clap.onnx", inputs, outputs, nodes, matrix=matrix)})["clap"]
    frames = clap.embed(audio(12))
    assert frames.shape == (3, 512)  # windows at 0, 1, 2 s
    sound = resample(audio(12), 16_000, 48_000)
    for second in (0, 2):
        window = sound[second * 48_000 :][:480_000]
        np.testing.assert_allclose(frames[second], clap_log_mel(window).mean(axis=0) @ matrix, rtol=1e-3, atol=1e-2)
    # 4 s are repeated twice, then silence.
    short = resample(audio(4), 16_000, 48_000)
    filled = np.concatenate([short, short, np.zeros(96_000, np.float32)])
    np.testing.assert_allclose(
        clap.embed(audio(4))[0], clap_log_mel(filled).mean(axis=0) @ matrix, rtol=1e-3, atol=1e-2
    )
    with pytest.raises(UserError, match=r"0\.50 s of audio are too short for clap: it needs 1 s"):
        clap.embed(audio(0.5))


def test_clap_that_takes_the_waveform(tmp_path):
    path, matrix = write_waveform_model(tmp_path / "a.onnx", 2, 480_000, ("batch", 480_000), output="embeds")
    frames = load_embeddings({"clap": path})["clap"].embed(audio(10))
    expected = by_hand(resample(audio(10), 16_000, 48_000), matrix)
    np.testing.assert_allclose(frames, expected, atol=1e-4)


def test_clap_with_fusion_is_refused(tmp_path):
    inputs = {"input_features": (FLOAT, ["batch", 4, 1001, 64]), "is_longer": (TensorProto.BOOL, ["batch", 1])}
    nodes = [("ReduceMean", ["input_features"], ["audio_embeds"], {"axes": [1, 2], "keepdims": 0})]
    with pytest.raises(UserError, match="of a CLAP without fusion"):
        load_embeddings({"clap": write_onnx(tmp_path / "clap.onnx", inputs, ["audio_embeds"], nodes)})


# --- MERT --------------------------------------------------------------------------------------------------------


def standardized(sound):
    return (sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)


def write_mert(path, size, **settings):
    path, matrix = write_waveform_model(path, 768, 320, ("batch", size), output="last_hidden_state", **settings)
    return load_embeddings({"mert": path})["mert"], matrix


def test_mert(tmp_path):
    mert, matrix = write_mert(tmp_path / "mert.onnx", "samples", inputs={"attention_mask": (INT64, ["b", "n"])})
    frames = mert.embed(audio(7))
    assert frames.shape == (7 * 75, 768)
    sound = resample(audio(7), 16_000, 24_000)
    expected = [by_hand(standardized(window), matrix) for window in (sound[:120_000], sound[120_000:])]
    np.testing.assert_allclose(frames, np.concatenate(expected), atol=1e-4)
    assert len(mert.embed(audio(5.5))) == 5 * 75  # the rest is shorter than 1 s
    assert np.isfinite(mert.embed(np.zeros(32_000, np.float32))).all()
    with pytest.raises(UserError, match=r"0\.50 s of audio are too short for mert: it needs 1 s"):
        mert.embed(audio(0.5))


def test_mert_of_a_fixed_size(tmp_path):
    mert, matrix = write_mert(tmp_path / "mert.onnx", 48_000)  # 2 s
    frames = mert.embed(audio(5))
    assert frames.shape == (5 * 75, 768)  # the last window is filled up, and the filling left out
    last = standardized(resample(audio(5), 16_000, 24_000)[96_000:])
    np.testing.assert_allclose(frames[300:], by_hand(last, matrix), atol=1e-4)


def test_mert_that_gives_all_layers(tmp_path):
    nodes = [
        ("Reshape", ["input_values", "rows"], ["frames"], {}),  # [1, 75 frames, 320]
        ("Neg", ["frames"], ["last"], {}),
        ("Concat", ["frames", "last"], ["hidden_states"], {"axis": 0}),
    ]
    inputs = {"input_values": (FLOAT, [1, "samples"])}
    path = write_onnx(tmp_path / "mert.onnx", inputs, ["hidden_states"], nodes, rows=np.array([1, -1, 320], np.int64))
    frames = load_embeddings({"mert": path})["mert"].embed(audio(2))
    expected = -standardized(resample(audio(2), 16_000, 24_000)).reshape(150, 320)
    np.testing.assert_allclose(frames, expected, atol=1e-5)
    inputs["second"] = (FLOAT, ["n"])
    path = write_onnx(tmp_path / "b.onnx", inputs, ["hidden_states"], nodes, rows=np.array([1, -1, 320], np.int64))
    with pytest.raises(UserError, match=r"takes input_values \[1, 'samples'\], second \['n'\], not the waveform"):
        load_embeddings({"mert": path})
