"""Metrics of single segments: those of training's held-out ones, and the `metric_fns` of our seqio tasks.

seqio's Evaluator, and T5X's infer_eval with it, call a metric with all targets, as `target_of` makes them of a task's
examples, and with what a model predicts of each: log-mel [T, M].
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from music_synth.audio.mel import DB_PER_NEPER
from music_synth.errors import UserError
from music_synth.evaluation import transcription
from music_synth.evaluation.embeddings import STATISTICS_FRAMES, log_mel_statistics
from music_synth.evaluation.statistics import Gaussian, frechet_distance, reconstruction_distance
from music_synth.midi.tokenizer import Tokenizer
from music_synth.vocoder import neural

log = logging.getLogger(__name__)
Target = Mapping[str, np.ndarray]  # "inputs": tokens [n], "targets": log-mel [t, M]


def mel_distances(targets: Sequence[np.ndarray], sampled: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns distances of log-mels in pairs, [T, M] each.

    The mean absolute error in dB over all frames; and between the log-mel statistics of those that last 1 s the
    Fréchet distance and the mean Euclidean one.
    """
    if not sum(map(len, targets)):
        return {}
    error = np.mean(np.abs(np.concatenate(sampled) - np.concatenate(targets)))
    distances = {"error_db": float(error) * DB_PER_NEPER}
    pairs = [pair for pair in zip(targets, sampled, strict=True) if len(pair[0]) >= STATISTICS_FRAMES]
    if pairs and np.isfinite(error):
        frames = [tuple(map(log_mel_statistics, pair)) for pair in pairs]
        of_targets, of_sampled = (Gaussian.merged(map(Gaussian.of, side)) for side in zip(*frames, strict=True))
        distances["frechet_log_mel"] = frechet_distance(of_targets, of_sampled)
        distances["reconstruction_log_mel"] = float(np.mean([reconstruction_distance(*pair) for pair in frames]))
    return distances


# --- of seqio ----------------------------------------------------------------------------------------------------


def target_of(mel: Any, example: Mapping[str, Any], is_target: bool) -> Any:
    """Makes of an example what metrics read, and of a prediction an array: the `postprocess_fn` of our tasks."""
    if not is_target:
        return np.asarray(mel)
    return {name: np.asarray(example[name]) for name in ("inputs", "targets")}


def distances(targets: Sequence[Target], predictions: Sequence[np.ndarray]) -> dict[str, float]:
    """Computes `mel_distances` of the frames that the targets have."""
    mels = [target["targets"] for target in targets]
    return mel_distances(mels, [made[: len(mel)] for mel, made in zip(mels, predictions, strict=True)])


def note_f1(targets: Sequence[Target], predictions: Sequence[np.ndarray], *, tokenizer: Tokenizer) -> dict[str, float]:
    """Computes how many notes basic-pitch hears of those to be heard, the predictions played by the shipped inverter.

    F1 of onsets, and of onsets and offsets, means over segments that have notes without drums; notes that began before
    the segment are not looked for. Empty where basic-pitch is not installed.
    """
    try:
        transcription.basic_pitch_session()
    except UserError as error:
        log.warning("no note F1: %s", error)
        return {}
    inverter, transcribe = _shipped_inverter(), transcription.BasicPitch()
    found: dict[str, list[float]] = {"onset_f1": [], "onset_offset_f1": []}
    for target, mel in zip(targets, predictions, strict=True):
        notes = tokenizer.decode([target["inputs"]]).notes
        if transcription.without_drums(notes):
            heard = transcribe(inverter(mel[: len(target["targets"])]))
            scores = transcription.note_scores(notes, heard)
            for name, values in found.items():
                values.append(scores[name])
    return {name: float(np.mean(values)) for name, values in found.items() if values}


@functools.cache
def _shipped_inverter() -> neural.NeuralInverter:
    return neural.load_weights(neural.SHIPPED)
