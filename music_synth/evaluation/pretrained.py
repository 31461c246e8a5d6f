"""Embeddings by networks of others, from files that users bring: VGGish, TRILL, CLAP and MERT (see `embeddings`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from music_synth.audio.io import resample
from music_synth.audio.mel import SAMPLE_RATE, hann_window, mel_matrix
from music_synth.errors import UserError
from music_synth.evaluation.transcription import checked_audio

Array = np.ndarray


# --- VGGish and TRILL: the waveform at 16 kHz --------------------------------------------------------------------


@dataclass(frozen=True)
class WaveformModel:
    """VGGish or TRILL: the waveform at 16 kHz in, frames out.

    As in the published evaluation (docs/spec.md 3.20.7) a clip is filled with silence to whole seconds, the audio in
    the middle.
    """

    name: str
    path: str  # SavedModel or ONNX file
    min_seconds: float  # of one window
    takes_rate: bool  # whether the SavedModel is called as f(samples=, sample_rate=), not f(waveform)

    def embed(self, audio: Array) -> Array:
        audio = checked_audio(audio, self.name, self.min_seconds)
        missing = -len(audio) % SAMPLE_RATE
        audio = np.pad(audio, (missing // 2, missing - missing // 2))
        return run(self.name, self.path, self.function(), audio)

    def function(self) -> Callable[[Array], Array]:
        return waveform_function(self.path, self.takes_rate)


@functools.cache
def waveform_function(path: str, takes_rate: bool) -> Callable[[Array], Array]:
    """Opens a model of a waveform [S]; of several outputs it gives the one that is called an embedding."""
    from music_synth.interop import runtimes

    place = Path(path)
    if not place.exists():
        raise UserError(f"no SavedModel folder and no ONNX file at {path}")
    if place.is_dir():
        model, tf = runtimes.open_saved_model(place, trust=True)  # `load_embeddings` has asked
        return saved_model_function(path, model, tf, takes_rate)
    session = runtimes.open_onnx(place)
    inputs = session.get_inputs()
    floats = [taken for taken in inputs if taken.type in runtimes.DTYPES]
    rates = [taken for taken in inputs if taken.type in ("tensor(int32)", "tensor(int64)")]
    shape = tuple(floats[0].shape) if len(floats) == 1 and len(floats) + len(rates) == len(inputs) else (None,) * 9
    if shape[-2:] == (VGGISH_FRAMES, VGGISH_MELS) and not takes_rate:
        shaped = (-1, *(1,) * (len(shape) - 3), *shape[-2:])
    elif len(shape) <= 2:
        shaped = (1,) * (len(shape) - 1) + (-1,)
    else:
        raise UserError(f"{path} takes {described(inputs)}, not one waveform [S] or [1, S]")
    output = chosen_output(path, session, "embedding")
    given = {
        rate.name: np.full([1] * len(rate.shape), SAMPLE_RATE, np.int64 if "64" in rate.type else np.int32)
        for rate in rates
    }

    def call(audio: Array) -> Array:
        taken = (vggish_log_mel(audio) if len(shape) > 2 else audio).reshape(shaped)
        return session.run([output], {floats[0].name: taken.astype(runtimes.DTYPES[floats[0].type]), **given})[0]

    return call


VGGISH_WINDOW, VGGISH_HOP, VGGISH_FFT = 400, 160, 512  # samples at 16 kHz
VGGISH_FRAMES, VGGISH_MELS, VGGISH_MIN_HZ, VGGISH_MAX_HZ = 96, 64, 125.0, 7500.0
VGGISH_OFFSET = 0.01  # added before the logarithm


def vggish_log_mel(audio: Array) -> Array:
    """Computes what VGGish hears (Hershey et al. 2017): [S] to log-mel [n, 96, 64], of 0.96 s each.

    ONNX files of it mostly begin here; the TF-Hub module takes the waveform and does this itself.
    """
    frames = np.lib.stride_tricks.sliding_window_view(audio, VGGISH_WINDOW)[::VGGISH_HOP]
    spectrum = np.abs(np.fft.rfft(frames * hann_window(VGGISH_WINDOW), VGGISH_FFT))
    mel = np.log(spectrum @ mel_matrix(VGGISH_MELS, VGGISH_FFT, VGGISH_MIN_HZ, VGGISH_MAX_HZ) + VGGISH_OFFSET)
    num_examples = len(mel) // VGGISH_FRAMES
    return mel[: num_examples * VGGISH_FRAMES].reshape(num_examples, VGGISH_FRAMES, VGGISH_MELS).astype(np.float32)


def saved_model_function(path: str, model: Any, tf: Any, takes_rate: bool) -> Callable[[Array], Array]:
    if not callable(model):
        raise UserError(f"{path} is no function: nothing in it can be called with a waveform")

    def call(audio: Array) -> Array:
        waveform = tf.constant(audio)
        made = model(samples=waveform, sample_rate=SAMPLE_RATE) if takes_rate else model(waveform)
        return np.asarray(made["embedding"] if isinstance(made, Mapping) else made)

    return call


# --- CLAP and MERT: ONNX files -----------------------------------------------------------------------------------

CLAP_RATE = 48_000  # Hz
CLAP_SECONDS = 10  # of a window
CLAP_HOP_SECONDS = 1  # from window to window
CLAP_FFT, CLAP_HOP = 1024, 480  # samples
CLAP_MELS, CLAP_MIN_HZ, CLAP_MAX_HZ = 64, 50.0, 14_000.0


@dataclass(frozen=True)
class CLAP:
    """LAION-CLAP's audio side as an ONNX file: log-mel [1, 1, 1001, 64] of 10 s, or the waveform [1, 480000], to [512].

    A window of 10 s every second; a shorter clip is repeated as often as it fits whole and filled with silence, as the
    model was trained.
    """

    path: str
    name: str = "clap"

    def embed(self, audio: Array) -> Array:
        audio = resample(checked_audio(audio, self.name, CLAP_HOP_SECONDS), SAMPLE_RATE, CLAP_RATE)
        size = CLAP_SECONDS * CLAP_RATE
        if len(audio) < size:
            repeated = np.tile(audio, size // len(audio))
            audio = np.pad(repeated, (0, size - len(repeated)))
        starts = range(0, len(audio) - size + 1, CLAP_HOP_SECONDS * CLAP_RATE)
        call = self.function()
        return np.concatenate([run(self.name, self.path, call, audio[start : start + size]) for start in starts])

    def function(self) -> Callable[[Array], Array]:
        return clap_function(self.path)


@functools.cache
def clap_function(path: str) -> Callable[[Array], Array]:
    """Opens a model of a window [480000] at 48 kHz, which gives [1, dims]."""
    from music_synth.interop import runtimes

    session = runtimes.open_onnx(Path(path))
    output = chosen_output(path, session, "audio_embeds")
    inputs = {taken.name: taken for taken in session.get_inputs()}
    others = {name: np.zeros((1, 1), bool) for name in inputs if name == "is_longer"}
    features = [name for name in inputs if name not in others]
    shape = inputs[features[0]].shape
    if len(features) != 1 or len(shape) not in (2, 4) or (len(shape) == 4 and shape[1] == 4):
        raise UserError(
            f"{path} takes {described(inputs.values())}, not the log-mel"
            f" [1, 1, 1001, {CLAP_MELS}] or the waveform [1, {CLAP_SECONDS * CLAP_RATE}] of a CLAP without fusion"
        )

    def call(audio: Array) -> Array:
        taken = audio[None] if len(shape) == 2 else clap_log_mel(audio)[None, None]
        return session.run([output], {features[0]: taken, **others})[0]

    return call


def clap_log_mel(audio: Array) -> Array:
    """Computes what CLAP is fed: power log-mel in dB at 48 kHz, [S] to [S / 480 + 1, 64]; frames are centered."""
    padded = np.pad(audio, CLAP_FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, CLAP_FFT)[::CLAP_HOP]
    power = np.abs(np.fft.rfft(frames * hann_window(CLAP_FFT))) ** 2  # [T, 513]
    return (10 * np.log10(np.maximum(power @ clap_mel_matrix(), 1e-10))).astype(np.float32)


@functools.cache
def clap_mel_matrix() -> Array:
    """Computes triangles on Slaney's mel scale (linear to 1 kHz, then 27 to a factor of 6.4), of area 1: [513, 64]."""
    bend, step, per_step = 1000.0, 200 / 3, np.log(6.4) / 27
    highest = bend / step + np.log(CLAP_MAX_HZ / bend) / per_step
    mels = np.linspace(CLAP_MIN_HZ / step, highest, CLAP_MELS + 2)
    edges = np.where(mels < bend / step, mels * step, bend * np.exp(per_step * (mels - bend / step)))  # Hz
    bins = np.linspace(0, CLAP_RATE / 2, CLAP_FFT // 2 + 1)[:, None]
    lower, center, upper = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.maximum(0, np.minimum((bins - lower) / (center - lower), (upper - bins) / (upper - center)))
    return triangles * 2 / (upper - lower)


MERT_RATE = 24_000  # Hz
MERT_SECONDS = 5  # of a window: what the model was trained on
MERT_MIN_SECONDS = 1  # a shorter rest at the end is left out


@dataclass(frozen=True)
class MERT:
    """MERT as an ONNX file: the waveform [1, S] at 24 kHz to [1, frames, dims], 75 frames a second.

    The audio goes through in windows of 5 s, or of the size that the file fixes, each scaled to mean 0 and variance 1
    as the model was trained. Where the file gives all layers, [layers, frames, dims], the last counts.
    """

    path: str
    name: str = "mert"

    def embed(self, audio: Array) -> Array:
        audio = resample(checked_audio(audio, self.name, MERT_MIN_SECONDS), SAMPLE_RATE, MERT_RATE)
        call, fixed = self.function()
        size = fixed or MERT_SECONDS * MERT_RATE
        frames = []
        for start in range(0, len(audio), size):
            window = audio[start : start + size]
            if start and len(window) < MERT_MIN_SECONDS * MERT_RATE:
                break
            scaled = (window - window.mean()) / np.sqrt(window.var() + 1e-7)
            made = run(self.name, self.path, call, np.pad(scaled, (0, (fixed or len(window)) - len(window))))
            frames.append(made[: -(-len(made) * len(window) // size)] if fixed else made)
        return np.concatenate(frames)

    def function(self) -> tuple[Callable[[Array], Array], int | None]:
        return mert_function(self.path)


@functools.cache
def mert_function(path: str) -> tuple[Callable[[Array], Array], int | None]:
    """Opens a model of a window [S] at 24 kHz, which gives [frames, dims]; and the only S that it takes, or None."""
    from music_synth.interop import runtimes

    session = runtimes.open_onnx(Path(path))
    output = chosen_output(path, session, "last_hidden_state")
    inputs = {taken.name: taken for taken in session.get_inputs()}
    masks = [name for name in inputs if "mask" in name]
    waveform = [name for name in inputs if name not in masks]
    if len(waveform) != 1 or len(inputs[waveform[0]].shape) != 2:
        raise UserError(f"{path} takes {described(inputs.values())}, not the waveform [1, S] of a MERT")
    size = inputs[waveform[0]].shape[1]

    def call(audio: Array) -> Array:
        given = {waveform[0]: audio[None].astype(np.float32)}
        given |= {name: np.ones((1, len(audio)), np.int64) for name in masks}
        made = session.run([output], given)[0]
        return made.reshape(-1, *made.shape[-2:])[-1]

    return call, size if isinstance(size, int) else None


WITH_PATH: dict[str, Callable[[str], WaveformModel | CLAP | MERT]] = {  # whose path a flag of their name brings
    "vggish": lambda path: WaveformModel("vggish", path, min_seconds=0.96, takes_rate=False),
    "trill": lambda path: WaveformModel("trill", path, min_seconds=0.975, takes_rate=True),
    "clap": CLAP,
    "mert": MERT,
}


# --- models of others --------------------------------------------------------------------------------------------


def described(inputs: Iterable) -> str:
    return ", ".join(f"{taken.name} {taken.shape}" for taken in inputs)


def chosen_output(path: str, session: Any, name: str) -> str:
    """Chooses the output called `name`, the only one whose name holds it, or the only one; else raises UserError."""
    outputs = [given.name for given in session.get_outputs()]
    for found in ([name] if name in outputs else [], [output for output in outputs if name in output], outputs):
        if len(found) == 1:
            return found[0]
    raise UserError(f"{path} gives {', '.join(outputs)}: which of them is {name!r}?")


def run(name: str, path: str, call: Callable[[Array], Array], audio: Array) -> Array:
    """Computes float32 frames [n, dims], n > 0, by a model; UserError if it fails or they are not finite."""
    from music_synth.interop.runtimes import reason

    try:
        frames = np.asarray(call(audio), np.float32)
    except Exception as error:
        raise UserError(f"{path} fails as {name} on {len(audio)} samples: {reason(error)}") from error
    if frames.ndim == 3 and len(frames) == 1:
        frames = frames[0]
    if frames.ndim != 2 or not frames.size:
        raise UserError(f"{path} gives {frames.shape} as {name}, not frames [n, dims]")
    if not np.isfinite(frames).all():
        raise UserError(f"{path} gives frames that are not finite (NaN or infinity) as {name}")
    return frames
