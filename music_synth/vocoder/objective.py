"""How an inverter is trained: a generator against the recorded audio and against discriminators.

`VocoderObjective` has the methods of a decoder (`models/base.py`), so that the same loop trains it. A batch:

    audio [B, 320 T] f32     recorded
    mel [B, T, M] f32        its log-mel, or what a decoder sampled in its place
    mel_mask [B, T] bool     True = a frame that counts
    source [B, 320 (T + 3)]  f32, of the notes, for generators that take one (`vocoder.source.source_of_frames`)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from music_synth.audio.mel import DB_PER_NEPER, HOP_LENGTH, NUM_MELS, log_mel
from music_synth.errors import UserError
from music_synth.vocoder.discriminators import SpectrogramDiscriminators
from music_synth.vocoder.istft import TURN, ISTFTGenerator, Spectra, analysis, turned
from music_synth.vocoder.melgan import Discriminators, MelGANGenerator
from music_synth.vocoder.neural import play_whole
from music_synth.vocoder.stft import magnitude, scaled, stft

Array = jax.Array
Params = dict[str, Any]
Batch = dict[str, Array]

MARGIN = 4  # frames at either end of an excerpt that no loss looks at: there the generator sees too little
RESOLUTIONS = ((256, 64), (512, 128), (1024, 256), (2048, 512))  # (window, hop) of the multi-resolution STFT, samples
LOG_FLOOR = 3e-3  # magnitude of a synthesis frame that counts as silence in its logarithm
FLOOR = 1e-3  # magnitude that counts as silence in their logarithms; a full-scale sine has a quarter of the window


@dataclass(frozen=True)
class VocoderObjective:
    """A generator, its discriminators, and what they are trained for; a weight of 0 leaves a term out."""

    generator: MelGANGenerator | ISTFTGenerator
    discriminators: Discriminators | SpectrogramDiscriminators = field(default_factory=Discriminators)
    warm_steps: int = 0  # updates before the discriminators join
    audio_from: int = 0  # updates by the spectra alone, before the audio is looked at
    spectrum_weight: float = 0.0  # of the generator's spectra themselves, where it writes spectra
    stft_weight: float = 1.0  # multi-resolution STFT (Yamamoto et al. 2020, eqs. 4-6)
    mel_weight: float = 1.0  # mean absolute log-mel error, natural-log units
    adversarial_weight: float = 0.1  # hinge (Kumar et al. 2019, eqs. 1-2)
    feature_weight: float = 1.0  # feature matching (Kumar et al. 2019, eq. 3)
    # Which terms take part; `at_step` says.
    audible: bool = True
    adversarial: bool = True

    def __post_init__(self):
        for name in ("spectrum", "stft", "mel", "adversarial", "feature"):
            if (weight := getattr(self, f"{name}_weight")) < 0:
                raise ValueError(f"VocoderObjective.{name}_weight = {weight}: must be 0 or more")
        if min(self.warm_steps, self.audio_from) < 0:
            raise ValueError(
                f"VocoderObjective.warm_steps = {self.warm_steps}, audio_from = {self.audio_from}: must be 0 or more"
            )
        if self.audio_from and not self.spectrum_weight:
            raise ValueError(f"VocoderObjective.audio_from = {self.audio_from}, but nothing to train on before: set 0")
        if self.spectrum_weight and not isinstance(self.generator, ISTFTGenerator):
            raise ValueError(
                f"VocoderObjective.spectrum_weight = {self.spectrum_weight}: a MelGAN writes no spectra; set 0"
            )

    def at_step(self, step: int) -> VocoderObjective:
        """The objective of the update after `step` of them."""
        joined = step >= self.warm_steps and (self.adversarial_weight > 0 or self.feature_weight > 0)
        return replace(self, audible=step >= self.audio_from, adversarial=joined)

    def init(self, rng: Array) -> Params:
        generator_key, discriminator_key = jax.random.split(rng)
        audio = jnp.zeros((1, 4096))
        judges = self.discriminators.module.init(discriminator_key, audio)["params"]
        return {"generator": self.generator.init(generator_key), "discriminators": judges}

    def logical_axes(self) -> Any:
        """Every parameter is whole on every device."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        return jax.tree.map(lambda leaf: (None,) * len(leaf.shape), shapes)

    def check_feed(self, feed: Any) -> None:
        """Any feed will do that brings audio."""

    def check_batch(self, batch: Batch) -> None:
        if "audio" not in batch:
            raise UserError("the feed brings no audio, which an inverter trains on: bind train.feed = @AudioFeed()")
        if self.generator.source and "source" not in batch:
            raise UserError("the generator takes a source, but the feed brings no notes: set AudioFeed.notes = True")
        frames = batch["mel"].shape[1]
        if batch["mel"].shape[2] != NUM_MELS or batch["audio"].shape[1] != frames * HOP_LENGTH:
            raise UserError(
                f"audio {batch['audio'].shape} does not fit mel {batch['mel'].shape}: {HOP_LENGTH} samples a frame"
            )
        if frames <= 2 * MARGIN:
            raise UserError(f"excerpts of {frames} frames are too short: set AudioFeed.num_frames above {2 * MARGIN}")

    def loss(self, params: Params, batch: Batch, rng: Array, train: bool = True) -> tuple[Array, dict[str, Array]]:
        """Losses of both players in one sum, each seeing the other as fixed: their gradients do not mix.

        Returns:
          The sum and its terms, scalars.
        """
        rows, frames = batch["mel_mask"].shape
        first_frame = jax.random.randint(rng, (rows,), 0, 2**20)  # which noise the generator gets
        inputs = batch["mel"], batch["mel_mask"], first_frame, batch.get("source")
        generator: Any = self.generator
        made, spectra = generator.generate(params["generator"], *inputs)
        inner = slice(MARGIN * HOP_LENGTH, (frames - MARGIN) * HOP_LENGTH)
        target, made_inner = batch["audio"][:, inner], made[:, inner]
        counted = jnp.sum(batch["mel_mask"].astype(jnp.float32), axis=1)

        def mean(values: Array) -> Array:
            """Of rows [B], each as long as what of it counts."""
            return jnp.sum(values * counted) / jnp.maximum(jnp.sum(counted), 1.0)

        terms = {}
        if self.spectrum_weight:
            for name, value in spectrum_losses(spectra, batch["audio"]).items():
                terms[name] = (self.spectrum_weight, mean(value))
        if self.audible and self.stft_weight:
            terms["stft"] = (self.stft_weight, mean(stft_distance(made_inner, target)))
        if self.audible and self.mel_weight:
            terms["mel"] = (self.mel_weight, mean(mel_distance(made_inner, target)))
        if self.adversarial:
            judge: Any = self.discriminators.module.apply
            fixed, judges = jax.lax.stop_gradient, params["discriminators"]
            on_real, on_made = (judge({"params": judges}, audio) for audio in (target, fixed(made_inner)))
            seen = judge({"params": fixed(judges)}, made_inner)
            terms["adversarial"] = (self.adversarial_weight, adversarial_loss(seen))
            terms["feature"] = (self.feature_weight, feature_distance(seen, fixed(on_real)))
            terms["discriminator"] = (1.0, hinge_loss(on_real, 1.0) + hinge_loss(on_made, -1.0))
        total = sum((weight * value for weight, value in terms.values()), start=jnp.zeros(()))
        metrics = {name: value for name, (_, value) in terms.items()}
        if not train:
            metrics["mel_error_db"] = mean(mel_distance(made_inner, target)) * DB_PER_NEPER
        return total, metrics

    def sample(self, params: Params, batch: Batch, rng: Array) -> Array:
        """Audio [B, 320 T] of the batch's mel."""
        first_frame = jnp.zeros(len(batch["mel"]), jnp.int32)
        inputs = batch["mel"], batch["mel_mask"], first_frame, batch.get("source")
        return play_whole(self.generator, params["generator"], *inputs)


# --- distances of audio, [B, S] each, a number a row -------------------------------------------------------------


def spectrum_losses(spectra: Spectra, audio: Array) -> dict[str, Array]:
    """Distances of the network's spectra from those of the recorded audio [B, 320 T], [B] each.

    Phases are compared by their differences from frame to frame and from bin to bin, as the phase of a sound
    itself cannot be told from its mel (Ai and Ling 2023); each difference weighs by the root of its magnitude.
    """
    inside = slice(MARGIN, audio.shape[1] // HOP_LENGTH - MARGIN)
    true = analysis(audio)[:, inside]
    made = jax.tree.map(lambda x: x[:, inside], spectra)
    size = magnitude(true, 1e-6)
    direction = scaled(true, 1 / size)
    mean = functools.partial(jnp.mean, axis=(1, 2))
    weight = jnp.sqrt(size)
    weight = weight / (mean(weight)[:, None, None] + 1e-3)

    log_error = jnp.abs(jnp.log(size + LOG_FLOOR) - jnp.log(jnp.exp(made.log_magnitude) + LOG_FLOOR))

    def squares(x):
        return jnp.sum(jnp.square(x), axis=(1, 2))

    convergence = jnp.sqrt((squares(size - jnp.exp(made.log_magnitude)) + 1e-6) / (squares(size) + 1e-2))

    def in_time(x):
        return x[:, 1:] * jnp.conj(x[:, :-1])

    def in_frequency(x):
        return x[:, :, 1:] * jnp.conj(x[:, :, :-1])

    def apart(a, b):
        return 1 - (a * jnp.conj(b)).real  # of two differences, as points on the unit circle

    both = jnp.minimum(weight[:, 1:], weight[:, :-1])
    turn = turned(TURN * made.frequency[:, 1:])
    return {
        "log_magnitude": mean(log_error),
        "convergence": convergence,
        "frequency": mean(both * apart(in_time(direction), turn)),
        "phase_in_time": mean(both * apart(in_time(direction), in_time(made.direction))),
        "phase_in_frequency": mean(
            jnp.minimum(weight[:, :, 1:], weight[:, :, :-1])
            * apart(in_frequency(direction), in_frequency(made.direction))
        ),
    }


def mean_of(arrays: Sequence[Array]) -> Array:
    """Takes the mean of arrays of one shape."""
    return functools.reduce(jnp.add, arrays) / len(arrays)


def stft_distance(made: Array, target: Array) -> Array:
    """Multi-resolution STFT distance: spectral convergence and mean log-magnitude error, mean over resolutions. [B]"""
    return mean_of([jnp.add(*stft_parts(made, target, *resolution)) for resolution in RESOLUTIONS])


def stft_parts(made: Array, target: Array, window: int, hop: int) -> tuple[Array, Array]:
    """Spectral convergence ||A - B|| / ||A|| and mean |ln A - ln B| (floored) of one resolution, [B] each."""
    difference, power, log_error = stft_sums(made, target, window, hop)
    return jnp.sqrt(difference + 1e-8) / jnp.sqrt(power + FLOOR), log_error


def stft_sums(made: Array, target: Array, window: int, hop: int) -> tuple[Array, Array, Array]:
    """Sums of |A - B|^2 and of |A|^2, and the mean |ln A - ln B| (floored), of one resolution, [B] each."""
    a, b = (magnitude(stft(audio, window, hop), 1e-5) for audio in (target, made))
    difference, power = (jnp.sum(jnp.square(x), axis=(1, 2)) for x in (a - b, a))
    log_error = jnp.abs(jnp.log(jnp.maximum(a, FLOOR)) - jnp.log(jnp.maximum(b, FLOOR)))
    return difference, power, jnp.mean(log_error, axis=(1, 2))


def mel_distance(made: Array, target: Array) -> Array:
    """Mean absolute log-mel error over the frames that lie inside, natural-log units. [B]"""
    return jnp.mean(jnp.abs(log_mel(made) - log_mel(target))[:, :-1], axis=(1, 2))


# --- what discriminators say: for each of them its feature maps, the last of which are the scores -------------------


def adversarial_loss(judged: list[list[Array]]) -> Array:
    """The generator's: minus the mean score."""
    return -mean_of([jnp.mean(maps[-1]) for maps in judged])


def hinge_loss(judged: list[list[Array]], wanted: float) -> Array:
    """The discriminators': scores should lie beyond `wanted`, 1 or -1."""
    return mean_of([jnp.mean(jax.nn.relu(1 - wanted * maps[-1])) for maps in judged])


def feature_distance(seen: list[list[Array]], on_real: list[list[Array]]) -> Array:
    """Mean absolute difference of the feature maps, each over the mean size of the real one's."""
    parts = [
        jnp.mean(jnp.abs(a - b)) / (jnp.mean(jnp.abs(b)) + 1e-6)
        for maps, real in zip(seen, on_real, strict=True)
        for a, b in zip(maps[:-1], real[:-1], strict=True)
    ]
    return mean_of(parts)
