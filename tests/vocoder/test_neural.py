import resource

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.melgan import MelGANGenerator
from music_synth.vocoder.neural import NeuralInverter, load_weights, save_inverter

pytestmark = pytest.mark.usefixtures("quick_compilation")


SMALL = {"dim": 8, "mlp_dim": 16, "num_layers": 1, "num_projections": 2}
GENERATORS = {
    "melgan": MelGANGenerator(channels=4, strides=(20, 16), dilations=(1, 3)),
    "istft": ISTFTGenerator(**SMALL, num_consistency_steps=1),
    "short": ISTFTGenerator(**SMALL, num_consistency_steps=0, max_ahead=1),
    "source": ISTFTGenerator(**SMALL, num_consistency_steps=0, width=5, ahead=1, source=True),
}
NOTES = [
    Note(60, 90, 0, -0.5, 1.2),
    Note(67, 60, 40, 0.313, 2.0),
    Note(38, 127, 0, 1.0, 1.1, is_drum=True),
    Note(90, 100, 0, 2.2, 9.0),
]


@pytest.fixture(scope="module", params=list(GENERATORS))
def inverter(request):
    generator = GENERATORS[request.param]
    return NeuralInverter(generator, jax.jit(generator.init)(jax.random.key(0)))


def random_mel(frames):
    return np.random.default_rng(0).normal(-3, 2, (frames, 128)).astype(np.float32).clip(MIN_LOG_MEL)


def test_chunked_equals_whole(inverter):
    """However the mel arrives and in whatever stretches it is made, sample for sample; and equal to one window."""
    mel = random_mel(150)
    whole = np.concatenate(list(inverter.stream([mel], NOTES, stretch=200, early=False)))
    assert whole.shape == (150 * HOP_LENGTH,) and np.std(whole) > 0
    again = [
        np.concatenate(list(inverter.stream(np.split(mel, cuts), NOTES, stretch=32, early=False)))
        for cuts in ([], [7, 8, 90, 149])
    ]
    np.testing.assert_array_equal(*again)
    early = np.concatenate(list(inverter.stream([mel], NOTES, stretch=32)))
    for streamed in (again[0], early):
        np.testing.assert_allclose(streamed, whole, rtol=0, atol=1e-5 * np.abs(whole).max())
    without = np.concatenate(list(inverter.stream([mel], stretch=200, early=False)))
    assert np.array_equal(without, whole) != inverter.generator.takes_notes


def test_the_first_stretch_does_not_wait_for_the_end(inverter):
    ahead = inverter.generator.as_played().reach[1]
    came = []

    def mels():
        for part in np.split(random_mel(32 + ahead + 50), [32 + ahead]):
            came.append(len(part))
            yield part

    first = next(inverter.stream(mels(), stretch=32, early=False))
    assert first.shape == (32 * HOP_LENGTH,) and came == [32 + ahead]
    sooner = min(ahead, 31)
    early = next(inverter.stream([random_mel(32 + ahead - sooner)], stretch=32))
    assert early.shape == ((32 - sooner) * HOP_LENGTH,)


@pytest.mark.slow
def test_memory_does_not_grow_with_length(inverter):
    """An hour of mel through a stream, in a quarter of what its audio alone would take (230 MB)."""
    if isinstance(inverter.generator, ISTFTGenerator):
        pytest.skip("the same streaming code, at a tenth of the speed")
    part = random_mel(10_000)
    for _ in inverter.stream((part for _ in range(4)), stretch=2048, early=False):
        pass  # compiled, and all buffers in place: the allocator's settle in the first minutes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    samples = sum(len(audio) for audio in inverter.stream((part for _ in range(18)), stretch=2048, early=False))
    assert samples == 180_000 * HOP_LENGTH
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 * 1024  # kB


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_short_mels(inverter, frames):
    audio = np.concatenate([np.zeros(0, np.float32), *inverter.stream([random_mel(frames)], stretch=32)])
    assert audio.shape == (frames * HOP_LENGTH,) and audio.dtype == np.float32


def test_a_file_brings_it_back(inverter, tmp_path):
    path = tmp_path / "inverter.safetensors"
    save_inverter(path, inverter.generator, inverter.params, about="of a test")
    loaded = load_weights(path)
    assert loaded.generator == inverter.generator
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float16(a), b), inverter.params, loaded.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {np.dtype("float32")}


def test_bad_mels(inverter):
    with pytest.raises(ValueError, match=r"log-mel \[T, 128\], not shape \(9, 80\)"):
        inverter(np.zeros((9, 80), np.float32))
    mel = random_mel(9)
    mel[4, 2] = np.nan
    with pytest.raises(UserError, match="not finite at frame 4"):
        inverter(mel)
    with pytest.raises(ValueError, match=r"not shape \(\)"):
        inverter(None)


def test_bad_files(inverter, tmp_path):
    path = tmp_path / "inverter.safetensors"
    with pytest.raises(UserError, match=r"no inverter .*inverter\.safetensors"):
        load_weights(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_weights(path)
    save_inverter(path, inverter.generator, inverter.params)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_weights(path)
    path.write_bytes(whole)
    meta = {"format": "music_synth inverter", "config": '{"generator": "HiFiGAN"}'}
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match="is no inverter of music_synth"):
        load_weights(path)
    save_file(tensors, path, metadata=meta)
    with pytest.raises(UserError, match="header that does not parse"):
        load_weights(path)
    key = sorted(tensors)[0]
    for spoiled, said in (({}, "None"), ({key: np.zeros(3, np.float16)}, r"\(3,\)")):
        save_inverter(path, inverter.generator, inverter.params)
        from safetensors import safe_open

        with safe_open(path, "numpy") as file:
            meta = file.metadata()
        save_file({name: a for name, a in tensors.items() if name != key} | spoiled, path, metadata=meta)
        with pytest.raises(UserError, match=f"tensor {key} has shape {said}"):
            load_weights(path)
    save_file(tensors | {key: np.full_like(tensors[key], np.nan)}, path, metadata=meta)
    with pytest.raises(UserError, match=f"tensor {key} is not finite"):
        load_weights(path)
