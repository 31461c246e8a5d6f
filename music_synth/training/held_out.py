"""What a training measures of the validation split: mean losses, and segments sampled to be seen and heard."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from music_synth.audio.mel import SAMPLE_RATE, log_mel
from music_synth.errors import UserError
from music_synth.evaluation.segment_metrics import mel_distances
from music_synth.pictures import mel_image
from music_synth.training import partitioning
from music_synth.training.step import Batch, Feed, HostBatch, Model, eval_step
from music_synth.training.writer import Writer
from music_synth.vocoder.objective import stft_distance


class HeldOut:
    """The validation split of a feed, measured again and again as the parameters change.

    Batch i always has the same key, so only the parameters make a difference.
    """

    def __init__(
        self,
        model: Model,
        feed: Feed,
        mesh: Mesh,
        ready: Callable[[HostBatch], Batch],  # lays a batch out over the mesh
        shown: HostBatch,  # segments to sample
        num_batches: int | None,  # None: all
        inverter: Callable[[np.ndarray], np.ndarray] | None,
    ):
        whole = partitioning.whole(mesh)
        self._feed, self._ready, self._num_batches, self._inverter = feed, ready, num_batches, inverter
        self._shown, self._placed = shown, partial(partitioning.put, whole, shown)
        self._evaluate = jax.jit(partial(eval_step, model), out_shardings=whole)
        self._sample = jax.jit(model.sample, out_shardings=whole)

    def metrics(self, params: Any) -> dict[str, float]:
        """Returns the means of the model's metrics over all frames that count."""
        total: dict[str, float] = {}
        counted = 0.0
        for i, batch in enumerate(map(self._ready, islice(self._feed.eval_batches(), self._num_batches))):
            metrics, weight = jax.device_get(self._evaluate(params, batch, _key(i)))
            counted += float(weight)
            for name, value in metrics.items():
                total[name] = total.get(name, 0.0) + float(weight) * float(value)
        return {name: value / max(counted, 1.0) for name, value in total.items()}

    def write_samples(self, writer: Writer, step: int, params: Any) -> None:
        """Samples the segments to show; writes their pictures and sounds, and their distances from the targets.

        A picture has a target above its sample. What is sampled is log-mel [B, T, M], which needs an inverter to be
        heard, or audio [B, S], as that of a vocoder.
        """
        target, mask = self._shown["mel"], self._shown["mel_mask"]  # [B, T, M], [B, T]
        if not len(target):
            return
        sampled, inverter = np.asarray(self._sample(params, self._placed(), _key(0))), self._inverter
        is_audio = sampled.ndim == 2
        mel = log_mel(sampled, np) if is_audio else sampled
        scores = mel_distances(*([one[kept] for one, kept in zip(all_, mask, strict=True)] for all_ in (target, mel)))
        stft_distances = []
        for i in range(len(mel)):
            pair = [mel_image(one) for one in (target[i], mel[i])]  # [M, T, 3] each
            writer.image(step, f"target_above_sample/{i}", np.concatenate(pair, axis=0))
            if is_audio:
                sounds = {"sample": sampled[i], "target": self._shown["audio"][i]}
            else:
                sounds = {"sample": inverter(mel[i]), "target": inverter(target[i])} if inverter is not None else {}
            for name, audio in sounds.items():
                writer.audio(step, f"{name}/{i}", audio, SAMPLE_RATE)
            if sounds:
                made, recorded = (np.asarray(sounds[name])[None] for name in ("sample", "target"))
                stft_distances.append(float(jax.jit(stft_distance)(made, recorded)[0]))
        if stft_distances:
            scores["stft_distance"] = float(np.mean(stft_distances))
        if scores:
            writer.scalars(step, {f"eval/sample_{name}": value for name, value in scores.items()})


def first_held_out(feed: Feed, num_rows: int) -> HostBatch:
    """Returns the first rows of the validation split; UserError if it is empty."""
    for batch in feed.eval_batches():
        return {name: array[:num_rows] for name, array in batch.items()}
    raise UserError("the validation split holds no segment to evaluate on: prepare the data with one")


def _key(i: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0), i)
