"""`Diffusion`: the denoising decoder, a `SpectrogramModel` as `Autoregressive` is (init, loss, sample)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from music_synth.audio.mel import unscale_mel
from music_synth.diffusion import process
from music_synth.diffusion import sampler as samplers
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, Schedule
from music_synth.models.base import Batch, Params, SpectrogramModel, masked_mean, normal, row_keys
from music_synth.models.layers import NetworkConfig
from music_synth.models.transformer import CrossCache, MelTransformer

Array = jax.Array
LOSS_TARGETS = ("x0", "eps", "v", "max_x0_eps", "x0_and_eps")  # the last two: maximum and sum of the first two


@dataclass(frozen=True)
class Diffusion(SpectrogramModel):
    """A denoising diffusion decoder (Hawthorne et al. 2022, section 3.2).

    Differs from the published code, which docs/spec.md 3.16 describes: dropout and condition dropout are off
    when `train` is False; every evaluation batch brings its own key; the loss is the mean over unmasked elements,
    not their sum, so that a learning rate means the same at any batch size; noise times of a batch are stratified.
    The published objective is prediction_type="eps", loss_target="eps", loss_norm="l1".

    Where the network has a prior, x_0 is not the mel but the whitened residual that the prior leaves open
    (`SpectrogramModel.to_residual`), and the prior is trained beside it.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    schedule: Schedule = field(default_factory=CosineSchedule)
    prediction_type: str = "x0"  # what the network's output means: "eps", "x0", "v" or "x0_and_eps"
    loss_target: str = "x0"  # where the error is taken, one of LOSS_TARGETS
    loss_norm: str = "l2"  # "l1" or "l2"
    condition_dropout: float = 0.1  # share of training examples without notes and context, for guidance
    sampler: Sampler = field(default_factory=Sampler)

    def __post_init__(self):
        for name, choices in (
            ("prediction_type", process.PREDICTION_TYPES),
            ("loss_target", LOSS_TARGETS),
            ("loss_norm", ("l1", "l2")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Diffusion.{name} = {getattr(self, name)!r}: choose from {choices}")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"Diffusion.condition_dropout = {self.condition_dropout}: must be in [0, 1)")
        if self.network.num_prior_layers:
            if self.condition_dropout or self.sampler.guidance_scale != 1.0:
                given = f"condition_dropout = {self.condition_dropout}, guidance_scale = {self.sampler.guidance_scale}"
                raise ValueError(f"{given}: a residual is not guided; set them to 0 and 1")
            if self.sampler.clip_x_0:
                raise ValueError("Sampler.clip_x_0 = True: a residual has no bounds; set it to False")
        else:
            for name in ("temperature", "texture"):
                if getattr(self.sampler, name) != 1.0:
                    given = f"Sampler.{name} = {getattr(self.sampler, name)}"
                    raise ValueError(f"{given}: needs NetworkConfig.num_prior_layers")

    @cached_property
    def module(self) -> MelTransformer:
        channels = self.network.num_mels * (2 if self.prediction_type == "x0_and_eps" else 1)
        corrects_roll = self.prediction_type == "x0" and not self.network.num_prior_layers
        return MelTransformer(self.network, channels, autoregressive=False, corrects_roll=corrects_roll)

    def with_sampling(self, **overrides: Any) -> Diffusion:
        """Returns a copy with other sampler settings, for example num_steps=50. UserError on names a sampler lacks."""
        return self._replace_settings(self, {"sampler": self._replace_settings(self.sampler, overrides)})

    def loss(self, params: Params, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Computes the mean denoising error of a batch, and the loss of the prior where there is one.

        `train` turns dropout and condition dropout on.
        """
        time_key, noise_key, condition_key, dropout_key = jax.random.split(rng, 4)
        latent_key = jax.random.fold_in(noise_key, 1)
        encode_key, decode_key = jax.random.split(dropout_key) if train else (None, None)
        rows = batch["mel"].shape[0]
        if train and self.condition_dropout:
            batch = drop_conditions(batch, jax.random.uniform(condition_key, (rows,)) >= self.condition_dropout)
        cache = self._encode_target(params, batch, latent_key, encode_key)
        prior_loss = jnp.float32(0.0)
        metrics: dict[str, Any] = {}
        # Stratified: each example is uniform in [0, 1), the batch covers it evenly (Kingma et al. 2021, I.1).
        t = (jax.random.uniform(time_key) + jnp.arange(rows, dtype=jnp.float32) / rows) % 1.0
        eps = self._noise(params, cache, jax.random.normal(noise_key, batch["mel"].shape))
        error = masked_mean(self._error(params, cache, batch, t, eps, decode_key), batch["mel_mask"])
        if cache.prior is not None:
            prior_loss, metrics = self.prior_loss(cache, batch, train)
        loss = prior_loss + error
        return loss, metrics | {"loss": loss, "denoising_error": error}

    def _error(
        self, params: Params, cache: CrossCache, batch: Batch, t: Array, eps: Array, dropout_key: Array | None
    ) -> Array:
        """Computes the error [B, T, M] of what the network says of a batch noised by eps [B, T, M] to t [B]."""
        x_0 = self.target(params, cache, batch)
        log_snr = process.per_example(self.schedule.log_snr(t), x_0)
        x_t = process.diffuse(x_0, eps, log_snr)
        film = self._apply(params, t, method="condition_time")  # [B, layers, ...]
        output = self._apply(params, x_t, film, cache, dropout_key is None, method="decode", dropout_key=dropout_key)
        return elementwise_loss(output, x_0, eps, x_t, log_snr, self.prediction_type, self.loss_target, self.loss_norm)

    def sample(self, params: Params, batch: Batch, rng: Array) -> Array:
        """Samples log-mel [B, T, M] of notes and context; the batch's own mel, if any, is not looked at."""
        keys = jax.vmap(jax.random.split)(row_keys(rng, len(batch["note_tokens"])))  # [B, 2]
        start_keys, step_keys = keys[:, 0], keys[:, 1]
        shape = (self.network.target_frames, self.network.num_mels)

        def noise_fn(i):
            return normal(jax.vmap(lambda key: jax.random.fold_in(key, i))(step_keys), shape)

        latent_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(start_keys)
        latents = self.draw_latents(latent_keys, batch)
        return self.sample_from(params, batch, normal(start_keys, shape), noise_fn, latents)

    def sample_from(self, params: Params, batch: Batch, x_1: Array, noise_fn, latents: Array | None = None) -> Array:
        """Samples with the noise given: x_1 [B, T, M], noise_fn(i) [B, T, M] of step i, latents [B, N, L] of the notes.

        Both are scaled: latents by the sampler's temperature, what is made of the noise by that and by its texture.
        """
        params, temperature = self._in_dtype(params), self.sampler.temperature
        cache = self._encode_drawn(params, batch, latents, temperature)
        x_1, residual_scale = self._noise(params, cache, x_1), temperature * self.sampler.texture
        if cache.prior is not None and residual_scale == 0.0:
            return unscale_mel(self.from_residual(params, cache.prior, x_1, 0.0))
        drawn, noise_fn = noise_fn, lambda i: self._noise(params, cache, drawn(i))
        times = samplers.grid_times(self.sampler, self.schedule)
        film = self._apply(params, times[:-1], method="condition_time")[:, None]  # [steps, 1, layers, 2, 2D]
        x_0 = samplers.sample(self.denoiser(params, cache), x_1, times, film, noise_fn, self.schedule, self.sampler)
        if cache.prior is not None:
            x_0 = self.from_residual(params, cache.prior, x_0, residual_scale)
        return unscale_mel(x_0)

    def denoiser(self, params: Params, cache):
        """Returns (x_t, log_snr_t, film_t) -> x_0 [B, T, M], guided and clipped as the sampler says.

        Rows beyond those of the cache are unconditional, so guidance is one call on twice the rows.
        """
        settings = self.sampler

        def denoise_fn(x_t: Array, log_snr: Array, film: Array) -> Array:
            if settings.guidance_scale == 1.0:
                output = self._apply(params, x_t, film, cache, method="decode")
            else:
                films = film if len(film) == 1 else jnp.concatenate([film, film])
                both = self._apply(params, jnp.concatenate([x_t, x_t]), films, cache, method="decode")
                # Linear in x_0 or eps alike, so the raw outputs can be combined (Ho and Salimans 2022).
                conditional, unconditional = jnp.split(both, 2)
                output = settings.guidance_scale * conditional + (1.0 - settings.guidance_scale) * unconditional
            x_0 = process.to_x_0(output, x_t, log_snr, self.prediction_type)
            return jnp.clip(x_0, -1.0, 1.0) if settings.clip_x_0 else x_0

        return denoise_fn

    def _noise(self, params: Params, cache: CrossCache, noise: Array) -> Array:
        """Makes of white noise [B, T, M] that which is added to x_0: white for a mel, lasting for a residual."""
        return noise if cache.prior is None else self.lasting_noise(params, cache.prior, noise)


def drop_conditions(batch: Batch, keep: Array) -> Batch:
    """Takes notes and context together from the examples where keep [B] is False (docs/spec.md 3.15.6)."""
    dropped = dict(batch, note_tokens=jnp.where(keep[:, None], batch["note_tokens"], 0))
    if "context_mask" in batch:
        dropped["context_mask"] = batch["context_mask"] & keep[:, None]
    return dropped


def elementwise_loss(
    output: Array, x_0: Array, eps: Array, x_t: Array, log_snr: Array, prediction_type: str, target: str, norm: str
) -> Array:
    """Computes |error| or error^2 [B, T, M] of x_0, eps or v, or of x_0 and eps together (docs/spec.md 3.15.4)."""
    predicted_x_0, predicted_eps = process.to_x_0_and_eps(output, x_t, log_snr, prediction_type)
    distance = jnp.abs if norm == "l1" else jnp.square
    if target == "v":
        predicted = output if prediction_type == "v" else process.v_of(predicted_x_0, predicted_eps, log_snr)
        return distance(predicted - process.v_of(x_0, eps, log_snr))
    if target == "x0":
        return distance(predicted_x_0 - x_0)
    if target == "eps":
        return distance(predicted_eps - eps)
    both = distance(predicted_x_0 - x_0), distance(predicted_eps - eps)
    return jnp.maximum(*both) if target == "max_x0_eps" else both[0] + both[1]
