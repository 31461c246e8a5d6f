"""`Autoregressive`: the frame-by-frame decoder, a `SpectrogramModel` as `Diffusion` is (init, loss, sample)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from music_synth.audio.mel import unscale_mel
from music_synth.autoregressive.outputs import Deterministic, GaussianMixture
from music_synth.models.base import Batch, Params, SpectrogramModel, masked_mean, row_keys
from music_synth.models.layers import NetworkConfig
from music_synth.models.transformer import CrossCache, MelTransformer

Array = jax.Array


def shift_right(frames: Array, start: float) -> Array:
    """Delays [B, T, M] by one frame; the first is filled with `start`."""
    return jnp.concatenate([jnp.full_like(frames[:, :1], start), frames[:, :-1]], axis=1)


@dataclass(frozen=True)
class Autoregressive(SpectrogramModel):
    """An autoregressive decoder: each frame from the ones before it (Hawthorne et al. 2022, section 3.1).

    Differs from the published code, which docs/spec.md 3.18 describes: the note encoder does not attend to
    padding, the first input frame is silence, frames are scaled to [-1, 1], a context encoder may stand beside the
    note encoder, and the loss is a mean over frames, not a sum. `as_published` brings the first three back; tokens are
    then padded to `network.max_tokens`, as published inputs are, for what padding does depends on how much there is.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    output: Deterministic | GaussianMixture = field(default_factory=Deterministic)
    input_noise: float = 0.0  # deviation of noise added to the teacher's frames: it learns to mend its own errors
    as_published: bool = False

    def __post_init__(self):
        if self.input_noise < 0:
            raise ValueError(f"Autoregressive.input_noise = {self.input_noise}: must be 0 or more")
        if self.network.decoder != "transformer":
            raise ValueError(f"NetworkConfig.decoder = {self.network.decoder!r}: frame by frame only 'transformer'")
        if self._has_prior and isinstance(self.output, Deterministic):
            raise ValueError("Autoregressive.output: a residual is sampled: @GaussianMixture(), or no prior")

    @cached_property
    def module(self) -> MelTransformer:
        channels = self.output.num_channels(self.network.num_mels)
        return MelTransformer(
            self.network,
            channels,
            autoregressive=True,
            attend_to_padding=self.as_published,
            corrects_roll=isinstance(self.output, Deterministic) and not self.as_published and not self._has_prior,
        )

    @property
    def _has_prior(self) -> bool:
        return self.network.num_prior_layers > 0

    def with_sampling(self, **overrides: Any) -> Autoregressive:
        """Returns a copy with other sampling settings: dither, or a mixture's temperature. UserError on others."""
        return dataclasses.replace(self, output=self._replace_settings(self.output, overrides))

    def loss(self, params: Params, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Computes the mean loss a frame with the true frames as input (teacher forcing), and that of a prior."""
        noise_key, dropout_key = jax.random.split(rng)
        latent_key = jax.random.fold_in(noise_key, 1)
        encode_key, decode_key = jax.random.split(dropout_key) if train else (None, None)
        cache = self._encode_target(params, batch, latent_key, encode_key)
        target = self.target(params, cache, batch)
        inputs = shift_right(target, self._start)
        if train and self.input_noise:
            inputs = inputs + self.input_noise * jax.random.normal(noise_key, inputs.shape)
        channels = self._apply(params, inputs, None, cache, not train, method="decode", dropout_key=decode_key)
        loss = masked_mean(self.output.loss(channels, target), batch["mel_mask"])
        metrics: dict[str, Any] = {}
        if cache.prior is not None:
            prior_loss, metrics = self.prior_loss(cache, batch, train)
            loss = loss / self.network.num_mels + prior_loss  # nats a bin, as the prior's
        return loss, metrics | {"loss": loss}

    def sample(self, params: Params, batch: Batch, rng: Array) -> Array:
        """Samples log-mel [B, T, M] of notes and context, frame by frame with cached keys and values, in one scan."""
        rows, frames = batch["note_tokens"].shape[0], self.network.target_frames
        keys, params = row_keys(rng, rows), self._in_dtype(params)
        output, temperature = self.output, 1.0
        if self._has_prior and isinstance(output, GaussianMixture):  # scales residual and latents, as `Sampler` does
            temperature, output = output.temperature, dataclasses.replace(output, temperature=1.0)
        latents = self.draw_latents(jax.vmap(lambda key: jax.random.fold_in(key, frames))(keys), batch)
        cross = self._encode_drawn(params, batch, latents, temperature)
        if cross.prior is not None and temperature == 0.0:
            return unscale_mel(self.from_residual(params, cross.prior, jnp.zeros_like(cross.prior.mean), 0.0))
        start = jnp.full((rows, 1, self.network.num_mels), self._start)
        caches = self.module.bind({"params": params}).decoder.empty_caches(rows, frames)

        def step(carry, index):
            frame, caches = carry
            channels, caches = self._apply(params, frame, index, cross, caches, method="decode_step")
            frame = jax.vmap(lambda c, key: output.sample(c, jax.random.fold_in(key, index)))(channels, keys)
            return (frame, caches), frame[:, 0]

        _, mel = jax.lax.scan(step, (start, caches), jnp.arange(frames))  # [T, B, M]
        mel = jnp.moveaxis(mel, 0, 1)
        if cross.prior is not None:
            mel = self.from_residual(params, cross.prior, mel, temperature)
        return mel if self.as_published else unscale_mel(mel)

    def _encode(self, params: Params, batch: Batch, dropout_key: Array | None, **latents: Any) -> CrossCache:
        if self.as_published:
            missing = max(self.network.max_tokens - batch["note_tokens"].shape[1], 0)
            batch = {**batch, "note_tokens": jnp.pad(batch["note_tokens"], ((0, 0), (0, missing)))}
        return super()._encode(params, batch, dropout_key, **latents)

    @property
    def _start(self) -> float:
        return 0.0 if self.as_published or self._has_prior else -1.0  # -1 is silence in the model's range

    def _to_model(self, log_mel: Array) -> Array:
        return log_mel if self.as_published else super()._to_model(log_mel)
