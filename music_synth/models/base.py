"""What `Diffusion` and `Autoregressive` share: what training, evaluation and synthesis see of a decoder.

A model is a frozen dataclass with `network`, `loss(params, batch, rng, train)`, `sample(params, batch, rng)` and
`with_sampling(**overrides)`; this base brings `init` and `logical_axes`. `sample` takes one key, or one for each row
of the batch: a row then comes out the same in any company. A batch is a dictionary:

    note_tokens [B, N] int32     0 = padding, 1 = end; N may be any bucket up to network.max_tokens
    context_mel [B, C, M] f32    log-mel of the previous segment     (only where network.context_frames > 0)
    context_mask [B, C] bool     True = a frame of it; all False for the first segment
    mel [B, T, M] f32            log-mel target                      (loss only)
    mel_mask [B, T] bool         True = a frame that counts          (loss only)
"""

from __future__ import annotations

import dataclasses
import operator
import typing
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from music_synth.audio.mel import scale_mel
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.models.prior import Prior, whitening
from music_synth.models.transformer import CrossCache, MelTransformer

Array = jax.Array
Params = dict[str, Any]
Batch = dict[str, Array]
LATENT_WEIGHT = 4.0  # of nats about latents over those about bins, of which neighbors say much the same
PRIOR_WEIGHT = 10.0  # of the prior's mean over its deviations, which share its layers


def masked_mean(values: Array, mask: Array) -> Array:
    """Mean of values [B, T, ...] over the frames where mask [B, T] is True; 0 where there is none."""
    weights = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values.shape)
    return jnp.sum(jnp.where(weights, values, 0.0)) / jnp.maximum(jnp.sum(weights.astype(jnp.float32)), 1.0)


def row_keys(rng: Array, rows: int) -> Array:
    """Keys of the rows of a batch [rows]: those that are given, or one key split into as many."""
    return rng if rng.ndim else jax.random.split(rng, rows)


def normal(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal [B, *shape], each row from its own key, so that it does not depend on the others."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


class SpectrogramModel:
    """Base of the two models, frozen dataclasses."""

    network: NetworkConfig

    @property
    def module(self) -> MelTransformer:
        """The network, without parameters."""
        raise NotImplementedError

    def loss(self, params: Params, batch: Batch, rng: Array, train: bool) -> tuple[Array, dict[str, Array]]:
        """Computes the loss of a batch and further means; `train` turns dropout on."""
        raise NotImplementedError

    def sample(self, params: Params, batch: Batch, rng: Array) -> Array:
        """Samples log-mel [B, T, M] of notes and context; one key, or one for each row of the batch."""
        raise NotImplementedError

    def with_sampling(self, **overrides: Any) -> Any:
        """A copy that samples otherwise. UserError on settings that it has not."""
        raise NotImplementedError

    def can_sample(self, **overrides: Any) -> bool:
        """Tells whether it has these settings of sampling."""
        try:
            self.with_sampling(**overrides)
        except UserError:
            return False
        return True

    def init(self, rng: Array) -> Params:
        """Fresh float32 parameters as plain nested dictionaries."""
        return nn.unbox(self._init_boxed(rng))

    def at_step(self, step: int) -> SpectrogramModel:
        """The model whose loss is trained on after `step` updates; decoders are the same throughout."""
        return self

    def check_feed(self, feed: Any) -> None:
        """Raises a UserError unless the feed's tokens are those that the network reads."""
        self.check_tokenizer(feed.tokenizer)

    def check_tokenizer(self, tokenizer: Tokenizer, said: str = "") -> None:
        """Raises a UserError, which begins with `said`, unless the network reads what the tokenizer writes and plays.

        What is played gives the next segment its context, which is so no longer than a segment.
        """
        for theirs, ours, fits in (
            ("vocabulary", "vocabulary", operator.eq),
            ("segment_frames", "target_frames", operator.eq),
            ("max_tokens", "max_tokens", operator.le),
        ):
            written, read = getattr(tokenizer, theirs), getattr(self.network, ours)
            if not fits(written, read):
                raise UserError(
                    f"{said}Tokenizer.{theirs} = {written}, but NetworkConfig.{ours} = {read}: give both the same"
                )
        context, target = self.network.context_frames, self.network.target_frames
        if context > target:
            raise UserError(
                f"{said}NetworkConfig.context_frames = {context}, but target_frames = {target}: a context is the end of"
                " the segment before, so at most as long"
            )

    def check_batch(self, batch: dict[str, Any]) -> None:
        """UserError unless a batch of NumPy arrays suits the network."""
        network = self.network
        if batch["note_tokens"].max(initial=0) >= network.vocab_size:
            raise UserError(
                f"note token {batch['note_tokens'].max()} is beyond NetworkConfig.vocab_size = {network.vocab_size}:"
                " raise it to hold the Tokenizer's vocabulary"
            )
        if network.context_frames and "context_mel" not in batch:
            raise UserError(
                f"NetworkConfig.context_frames = {network.context_frames}, but the feed brings no context: set"
                " Feed.context = True, or context_frames = 0"
            )
        for name, length in (("mel", network.target_frames), ("context_mel", network.context_frames)):
            if length and batch[name].shape[1:] != (length, network.num_mels):
                raise UserError(
                    f"{name} of the feed is {batch[name].shape[1:]} frames by bins, the network's is"
                    f" {(length, network.num_mels)}: set Tokenizer.segment_frames and NetworkConfig alike"
                )

    def logical_axes(self) -> Any:
        """Tree like the parameters; each leaf a tuple with one logical axis name (or None) a dimension."""
        boxed = jax.eval_shape(self._init_boxed, jax.random.key(0))

        def is_box(leaf):
            return isinstance(leaf, nn.LogicallyPartitioned)

        return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=is_box)

    def _init_boxed(self, rng: Array) -> Params:
        c = self.network
        tokens = jnp.zeros((1, min(8, c.max_tokens)), jnp.int32)
        frames = jnp.zeros((1, c.target_frames, c.num_mels))
        context = jnp.zeros((1, c.context_frames, c.num_mels)) if c.context_frames else None
        mask = jnp.zeros((1, c.context_frames), bool) if c.context_frames else None
        return self.module.init(rng, tokens, frames, jnp.zeros(1), context, mask)["params"]

    def _apply(self, params: Params, *args, method: str, dropout_key: Array | None = None, **latents: Any):
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return self.module.apply({"params": params}, *args, method=method, rngs=rngs, **latents)

    def _encode(self, params: Params, batch: Batch, dropout_key: Array | None, **latents: Any) -> CrossCache:
        context = context_mask = None
        if self.network.context_frames:
            context, context_mask = scale_mel(batch["context_mel"], clip=True), batch["context_mask"]
        tokens = batch["note_tokens"]
        args = (tokens, tokens > 0, context, context_mask, dropout_key is None)
        return self._apply(params, *args, method="encode", dropout_key=dropout_key, **latents)

    def _encode_target(self, params: Params, batch: Batch, key: Array, dropout_key: Array | None) -> CrossCache:
        """As `_encode`, with what the batch's own mel tells of the latents of its notes."""
        if not self.network.note_latents:
            return self._encode(params, batch, dropout_key)
        noise = jax.random.normal(key, (*batch["note_tokens"].shape, self.network.note_latents))
        recording = self._to_model(batch["mel"]), batch["mel_mask"]
        return self._encode(params, batch, dropout_key, latents=noise, recording=recording)

    def _encode_drawn(self, params: Params, batch: Batch, latents: Array | None, temperature: float) -> CrossCache:
        """As `_encode`, with latents [B, N, L] of the notes times the temperature; where that is 0, the mean's."""
        scaled = None if latents is None or temperature == 0.0 else temperature * latents
        return self._encode(params, batch, None, latents=scaled)

    def draw_latents(self, keys: Array, batch: Batch) -> Array | None:
        """Latents [B, N, L] of the notes, where they have any: each row's from its own key, whatever N is."""
        if not self.network.note_latents:
            return None

        def of_row(key: Array) -> Array:
            token_keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch["note_tokens"].shape[1]))
            return normal(token_keys, (self.network.note_latents,))

        return jax.vmap(of_row)(keys)

    def target(self, params: Params, cache: CrossCache, batch: Batch) -> Array:
        """What a decoder learns of a batch, [B, T, M]: the mel in the model's range, or its residual. No gradient."""
        x_0 = self._to_model(batch["mel"])
        if cache.prior is None:
            return x_0
        residual = self.to_residual(*jax.lax.stop_gradient((params, cache.prior)), x_0)
        return jnp.where(batch["mel_mask"][..., None], residual, 0.0)  # of padding it would be anything

    def prior_loss(self, cache: CrossCache, batch: Batch, train: bool) -> tuple[Array, dict[str, Any]]:
        """The loss of the prior's mean and deviations and of the notes' latents, and metrics.

        The mean is the one with the least absolute error; deviations are the most likely of a Gaussian around it (Nix
        and Weigend 1994), without a say in the mean, and persistence that of a process of first order. In training
        metrics["statistics"] has the covariance of a frame's bins, for `training.step.with_statistics`.
        """
        prior, mask, x_0 = cache.prior, batch["mel_mask"], self._to_model(batch["mel"])
        assert prior is not None
        error, scaled = masked_mean(jnp.abs(x_0 - prior.mean), mask), prior.normalized(x_0)
        likelihood = masked_mean(prior.log_deviation + 0.5 * jnp.square(scaled), mask)
        fixed, persistence = jax.lax.stop_gradient(scaled), prior.persistence
        new = 1.0 - jnp.square(persistence)  # variance of what is new in a frame
        before = jnp.pad(fixed, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        change = 0.5 * (jnp.log(new) + jnp.square(fixed - persistence * before) / new)
        likelihood += masked_mean(change, mask)
        metrics: dict[str, Any] = {"prior_error": error, "prior_likelihood": likelihood}
        if train:
            counted = jax.lax.stop_gradient(jnp.where(mask[..., None], scaled, 0.0)).reshape(-1, x_0.shape[-1])
            covariance = counted.T @ counted / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
            metrics["statistics"] = {"prior": {"covariance": covariance}}
        loss = PRIOR_WEIGHT * error + likelihood
        if cache.told is not None:
            bins = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0) * x_0.shape[-1]
            metrics["mean_error"] = masked_mean(jnp.abs(x_0 - cache.told.mean), mask)
            metrics["latent_information"] = jnp.sum(cache.told.information) / bins
            loss += PRIOR_WEIGHT * metrics["mean_error"] + LATENT_WEIGHT * metrics["latent_information"]
        return loss, metrics

    def to_residual(self, params: Params, prior: Prior, x_0: Array) -> Array:
        """x_0 [B, T, M] -> what the prior leaves open of it, white and of unit variance."""
        whiten, _ = whitening(params["prior"]["covariance"])
        return prior.normalized(x_0) @ whiten

    def from_residual(self, params: Params, prior: Prior, residual: Array, temperature: float = 1.0) -> Array:
        """The inverse of `to_residual` at temperature 1, within the model's range; at 0 the mean."""
        if temperature == 0.0:
            return jnp.clip(prior.mean, -1.0, 1.0)
        _, color = whitening(params["prior"]["covariance"])
        deviation = temperature * jnp.exp(prior.log_deviation)
        return jnp.clip(prior.mean + deviation * (residual @ color), -1.0, 1.0)

    def lasting_noise(self, params: Params, prior: Prior, noise: Array) -> Array:
        """White noise [B, T, M] -> noise like a residual: white over bins, and as persistent as the prior says."""
        params, prior = jax.lax.stop_gradient((params, prior))
        whiten, color = whitening(params["prior"]["covariance"])
        return prior.lasting(noise @ color) @ whiten

    def _in_dtype(self, params: Params) -> Params:
        """Parameters whose layers' kernels are in the dtype they are used in: for loops, which else convert anew."""

        def is_kernel(path):
            return path[-1].key == "kernel" and any(key.key.startswith("layers") for key in path)

        def cast(path, leaf):
            return leaf.astype(self.network.dtype) if is_kernel(path) else leaf

        return jax.tree_util.tree_map_with_path(cast, params)

    def _to_model(self, log_mel: Array) -> Array:
        """Log-mel -> what the decoder reads and writes."""
        return scale_mel(log_mel, clip=True)

    @staticmethod
    def _replace_settings(settings, overrides: dict[str, Any]):
        """dataclasses.replace that turns an unknown name or a bad value into a UserError."""
        declared = typing.get_type_hints(type(settings))
        for name, value in overrides.items():
            if name not in declared:
                choices = ", ".join(declared)
                raise UserError(f"{type(settings).__name__} has no setting {name!r}: choose from {choices}")
            wanted = declared[name]
            if wanted in (int, float, str, bool) and not isinstance(value, (int, float) if wanted is float else wanted):
                raise UserError(f"{type(settings).__name__}.{name} = {value!r}: must be {wanted.__name__}")
        try:
            return dataclasses.replace(settings, **overrides)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error
