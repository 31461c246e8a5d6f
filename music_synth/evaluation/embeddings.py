"""What distances of sets of audio are taken in: audio [S] -> frames [n, dims], a vector a moment.

| name          | what                                                          | dims | frames a second | needs    |
|---------------|---------------------------------------------------------------|-----:|----------------:|----------|
| `vggish`      | VGGish (Hershey et al. 2017), its TF-Hub module's output      |  128 | 1.04            | a path   |
| `trill`       | TRILL v3 (Shor et al. 2020), layer `embedding`                |  512 | about 6         | a path   |
| `clap`        | LAION-CLAP's audio side (Wu et al. 2023), 10 s windows        |  512 | 1               | a path   |
| `mert`        | MERT (Li et al. 2024), last layer of what the file gives      |  768 | 75              | a path   |
| `basic_pitch` | onset, note and contour posteriors of basic-pitch             |  440 | 10.8            | nothing  |
| `log_mel`     | mean and standard deviation of each log-mel bin over 1 s      |  256 | 5               | nothing  |

The published tables use VGGish and TRILL. CLAP and MERT agree better with listeners on music (Gui et al. 2024).
`basic_pitch` sees which notes sound, and little else; `log_mel` sees pitch, loudness, color and their movement, and
does not tell which of them changed (tests/evaluation/test_metric_reactions.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from music_synth.audio.mel import FRAME_RATE, MIN_LOG_MEL, log_mel
from music_synth.errors import UserError
from music_synth.evaluation import transcription
from music_synth.evaluation.pretrained import WITH_PATH
from music_synth.evaluation.transcription import checked_audio

Array = np.ndarray


class Embedding(Protocol):
    """A frozen dataclass that can be sent to another process: models are opened where they are first needed."""

    @property
    def name(self) -> str:
        """The key in tables and of the command's flag."""

    def embed(self, audio: Array) -> Array:
        """Maps float32 [S] at 16 kHz to float32 [n, dims]; the same each time.

        Raises:
          UserError: the audio is shorter than one window or not finite, or the model fails or gives what is not finite.
        """


def load_embeddings(paths: Mapping[str, str], trust: bool = False) -> dict[str, Embedding | str]:
    """Opens every embedding that there is, by name; one that is absent says what it needs: "needs --vggish PATH".

    Args:
      paths: of `vggish` and `trill`: a SavedModel's folder or an ONNX file; of `clap` and `mert`: an ONNX
        file.
      trust: whether SavedModels, which are programs, may run.

    Raises:
      UserError: a path is given for what takes none, or holds no such model, or a SavedModel that is not trusted.
    """
    unknown = sorted(set(paths) - set(WITH_PATH))
    if unknown:
        raise UserError(f"no embedding {unknown[0]!r} takes a path: choose from {', '.join(WITH_PATH)}")
    for path in paths.values():
        if Path(path).is_dir():
            from music_synth.interop.runtimes import check_trust

            check_trust(path, trust)
    found: dict[str, Embedding | str] = {"log_mel": LogMelStatistics()}
    try:
        transcription.basic_pitch_session()
        found["basic_pitch"] = BasicPitchActivations()
    except UserError as error:
        found["basic_pitch"] = f"needs basic-pitch: {error}"
    for name, make in WITH_PATH.items():
        found[name] = f"needs --{name} PATH"
        if paths.get(name):
            found[name] = embedding = make(paths[name])
            embedding.function()  # a model that cannot be opened is told now, not after an hour
    return found


# --- those that need no download ---------------------------------------------------------------------------------

STATISTICS_FRAMES = FRAME_RATE  # mel frames in a window of `log_mel_statistics`: 1 s
STATISTICS_HOP = 10  # mel frames from window to window: 0.2 s


@dataclass(frozen=True)
class LogMelStatistics:
    """See `log_mel_statistics`."""

    name: str = "log_mel"

    def embed(self, audio: Array) -> Array:
        return log_mel_statistics(log_mel(checked_audio(audio, self.name, STATISTICS_FRAMES / FRAME_RATE), np))


def log_mel_statistics(mel: Array) -> Array:
    """Computes mean and deviation of each bin over 1 s, every 0.2 s: log-mel [T, M] to float32 [n, 2 M].

    n = (T - 50) // 10 + 1. Values under the mel's floor count as the floor. UserError if the mel is shorter than 1 s.
    """
    if len(mel) < STATISTICS_FRAMES:
        raise UserError(f"{len(mel)} mel frames are too few for log-mel statistics: they need {STATISTICS_FRAMES}")
    num_blocks = len(mel) // STATISTICS_HOP
    blocks = np.maximum(mel[: num_blocks * STATISTICS_HOP], MIN_LOG_MEL).astype(np.float64)
    blocks = blocks.reshape(num_blocks, STATISTICS_HOP, -1)  # [blocks, 10, M]
    window = STATISTICS_FRAMES // STATISTICS_HOP  # blocks

    def over_windows(x: Array) -> Array:  # [n, M]
        return np.lib.stride_tricks.sliding_window_view(x, window, axis=0).mean(axis=-1)

    mean, square = over_windows(blocks.mean(axis=1)), over_windows((blocks**2).mean(axis=1))
    deviation = np.sqrt(np.maximum(square - mean**2, 0))
    return np.concatenate([mean, deviation], axis=1).astype(np.float32)


PITCH_BLOCK = 8  # frames of basic-pitch that make one here: 93 ms


@dataclass(frozen=True)
class BasicPitchActivations:
    """Onset [88], note [88] and contour [264] posteriors of basic-pitch, each the mean over 93 ms."""

    name: str = "basic_pitch"

    def embed(self, audio: Array) -> Array:
        audio = checked_audio(audio, self.name, PITCH_BLOCK * transcription.HOP / transcription.MODEL_RATE)
        frames = np.concatenate(transcription.posteriors(audio), axis=1)  # [T, 440]
        num_blocks = len(frames) // PITCH_BLOCK
        return frames[: num_blocks * PITCH_BLOCK].reshape(num_blocks, PITCH_BLOCK, -1).mean(axis=1)
