"""Inverters of other projects: ONNX files and TensorFlow SavedModels that turn log-mel into audio.

A model must do what the published SoundStream inverter of music does (SavedModel google/soundstream/mel/decoder/music,
as ONNX kashif/soundstream_mel_decoder): take one array, the natural log-mel of `audio.mel`, not scaled to model range,
[1, T, 128]; give one, the audio, 320 samples a frame. Axes of size 1 may be more or fewer, and an input that says
[1, 128, T] gets that. An ONNX file of ours may take a second one, `source`, the signal made of the notes
(`vocoder.excitation`), [1, 320 (T + 3)].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from music_synth.audio.mel import HOP_LENGTH, MIN_LOG_MEL, NUM_MELS
from music_synth.errors import UserError
from music_synth.interop.runtimes import DTYPES, SIGNATURE, open_onnx, open_saved_model, reason
from music_synth.midi.notes import Note
from music_synth.vocoder.excitation import Excitation
from music_synth.vocoder.inverter import checked_mel

SOURCE = "source"  # name of a second input
ANY_SHAPE = (None, None, None)  # of a model that does not say what it takes: it is given [1, T, 128]


@dataclass(frozen=True)
class ForeignInverter:
    """An `Inverter` around a model that is only known by its input and output.

    The whole mel goes through at once, unless the input has a fixed number of frames: then in pieces of that many, the
    last one filled up with silence, which is cut off again. A piece knows nothing of its neighbors: within the reach
    of the model's convolutions around each border the audio is that of music that begins or ends there, and may click.

    Raises (when made or called):
      UserError: the model does not take a log-mel of 128 bins, fails, or gives anything but 320 finite samples a frame.
    """

    path: Path  # for messages
    shape: tuple[int | None, ...]  # of the input; None: any size
    run: Callable[..., np.ndarray]  # float32 of that shape to audio; with takes_source, also the source
    takes_source: bool = False

    def __post_init__(self):
        leading, last = self.shape[:-2], self.shape[-2:]
        is_mel = len(last) == 2 and (NUM_MELS in last or last == (None, None))
        if not is_mel or any(size not in (1, None) for size in leading):
            sizes = ", ".join("any" if size is None else str(size) for size in self.shape)
            raise UserError(f"{self.path} takes [{sizes}], not log-mel [1, frames, {NUM_MELS}]: no inverter for us")

    @property
    def bins_first(self) -> bool:
        """Whether the input is [.., 128, T]; it is [.., T, 128] also where it says neither."""
        return self.shape[-1] != NUM_MELS and self.shape[-2] == NUM_MELS

    @property
    def num_frames(self) -> int | None:
        """That each call must have; None: any number."""
        return self.shape[-1] if self.bins_first else self.shape[-2]

    def __call__(self, mel: np.ndarray, notes: Sequence[Note] | None = None) -> np.ndarray:
        mel = checked_mel(mel)
        size = self.num_frames or max(1, len(mel))
        excitation = Excitation(notes or ()) if self.takes_source else None
        if excitation is not None:
            excitation.hear(mel)
        pieces = [self._play(mel[i : i + size], size, excitation, i) for i in range(0, len(mel), size)]
        return np.concatenate([np.zeros(0, np.float32), *pieces])

    def _play(self, mel: np.ndarray, size: int, excitation: Excitation | None, start: int) -> np.ndarray:
        """At most `size` frames [T, 128] in one call, from frame `start` of the piece on: float32 [320 T]."""
        features = np.pad(mel, ((0, size - len(mel)), (0, 0)), constant_values=MIN_LOG_MEL)
        features = features.T if self.bins_first else features
        source = [] if excitation is None else [excitation.of_frames(start, size)[None]]
        try:
            audio = self.run(features.reshape((1,) * (len(self.shape) - 2) + features.shape), *source)
        except Exception as error:
            raise UserError(f"{self.path} fails on {size} frames of log-mel: {reason(error)}") from error
        audio = np.asarray(audio, np.float32).ravel()
        if len(audio) != size * HOP_LENGTH:
            raise UserError(f"{self.path} gives {len(audio)} samples for {size} frames, not {HOP_LENGTH} a frame")
        if not np.isfinite(audio).all():
            raise UserError(f"{self.path} gives audio that is not finite (NaN or infinity)")
        return audio[: len(mel) * HOP_LENGTH]


def load_onnx(path: Path) -> ForeignInverter:
    """An ONNX file, run by onnxruntime on the CPU.

    Raises:
      UserError: there is no such file, it is not ONNX, or not an inverter (`ForeignInverter`).
    """
    session = open_onnx(path)
    inputs = session.get_inputs()
    takes_source = len(inputs) == 2 and inputs[1].name == SOURCE
    taken = only(path, "input", inputs[:1] if takes_source else inputs)
    only(path, "output", session.get_outputs())
    dtype = DTYPES.get(taken.type)
    if dtype is None:
        raise UserError(f"{path} takes {taken.type} as {taken.name!r}, not a log-mel of floats")
    shape = tuple(size if isinstance(size, int) else None for size in taken.shape) or ANY_SHAPE

    def play(mel: np.ndarray, *source: np.ndarray) -> np.ndarray:
        names = [given.name for given in inputs]
        return session.run(None, dict(zip(names, (mel.astype(dtype), *source), strict=True)))[0]

    return ForeignInverter(path, shape, play, takes_source)


def load_saved_model(path: Path, trust: bool = False) -> ForeignInverter:
    """A folder that TensorFlow saved a model in, run by TensorFlow on the CPU.

    Through its signature `serving_default`; where it has none it is called as a function, with [1, T, 128].

    Raises:
      UserError: TensorFlow is not installed, or cannot load the folder, or it is not an inverter (`ForeignInverter`).
    """
    model, tf = open_saved_model(path, trust)
    if SIGNATURE in model.signatures:
        function = model.signatures[SIGNATURE]
        name, taken = only(path, "input", function.structured_input_signature[1].items())
        output = only(path, "output", function.structured_outputs)
        shape = ANY_SHAPE if taken.shape.rank is None else tuple(taken.shape)
        return ForeignInverter(path, shape, lambda mel: function(**{name: tf.cast(mel, taken.dtype)})[output].numpy())
    if callable(model):
        return ForeignInverter(path, ANY_SHAPE, lambda mel: model(tf.constant(mel)).numpy())
    raise UserError(f"{path} has no signature {SIGNATURE!r} and is no function: nothing in it can be called")


def only(path: Path, what: str, found: Collection):
    """The one element; UserError where there are several."""
    if len(found) != 1:
        raise UserError(f"{path} has {len(found)} {what}s; an inverter has one")
    return next(iter(found))
