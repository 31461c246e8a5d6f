"""The networks: mel decoder, and note encoder, context encoder and decoder together.

They know nothing of diffusion or of likelihoods. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import MIN_LOG_MEL, unscale_mel
from music_synth.models.convolution import ConvDecoder
from music_synth.models.encoders import ContextEncoder, NoteEncoder, Timbre
from music_synth.models.layers import (
    Array,
    DecoderLayer,
    Dense,
    NetworkConfig,
    PositionTable,
    RMSNorm,
    length_dropout,
    sinusoid_table,
)
from music_synth.models.note_latents import NotePosterior
from music_synth.models.note_roll import NoteRoll, TimedNotes, read_notes
from music_synth.models.prior import Prior, PriorNetwork, last_frames


class Told(NamedTuple):
    """What a recording told of the notes' latents."""

    mean: Array  # [B, T, M], of the prior without it: that of latents 0
    information: Array  # [B, N] nats


class CrossCache(NamedTuple):
    """What the decoder reads of the notes and the context: computed once a segment.

    `layers`: cross-attention keys and values of every layer (a tuple, or stacked arrays when layers are scanned),
    `masks`: per source, [B, L], True = a key that may be seen; `roll`: the guess of the note roll, [B, T, M];
    `prior`: what is made of that guess; `told`: what a recording told of the notes, where there was one.
    """

    layers: tuple
    masks: tuple[Array, ...]
    roll: Array | None = None
    prior: Prior | None = None
    told: Told | None = None


class MelDecoder(nn.Module):
    """Mel frames in, mel frames out, reading a `CrossCache`.

    With `autoregressive` it is causal and has no noise time; otherwise frames see each other freely and every
    layer is modulated by the noise time (FiLM). It reads the guess of the note roll beside its input, and with
    `corrects_roll` what comes out is that guess, corrected.
    """

    config: NetworkConfig
    output_dim: int
    autoregressive: bool
    attend_to_padding: bool = False
    corrects_roll: bool = False

    def setup(self):
        c = self.config
        self.continuous_inputs_projection = Dense(c.model_dim, ("mel", "embed"))
        if c.note_roll:
            self.roll_projection = Dense(c.model_dim, ("mel", "embed"))
        if c.num_prior_layers:
            self.prior_projection = Dense(c.model_dim, ("mel", "embed"))
        if not self.autoregressive:
            self.Embed_0 = PositionTable(c.target_frames, c.model_dim)
            self.time_emb_dense0 = Dense(4 * c.model_dim, ("embed", "mlp"))
            self.time_emb_dense1 = Dense(4 * c.model_dim, ("mlp", "embed"))
        self.dropout = length_dropout(c.dropout_rate)
        self.stack = self._layers()
        self.decoder_norm = RMSNorm()
        self.spec_out_dense = Dense(self.output_dim, ("embed", "mel"))

    def _layers(self) -> list[DecoderLayer]:
        c, flags = self.config, (self.autoregressive, self.attend_to_padding)
        layer = DecoderLayer
        if c.remat:  # argument 6 of __call__ is `deterministic`
            layer = nn.remat(layer, static_argnums=(6,), prevent_cse=not c.scan_layers)
        if c.scan_layers:
            every, same = 0, nn.broadcast
            shared = dict(
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=c.num_decoder_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            methods = {
                "__call__": dict(in_axes=(every, every, same, same, same), **shared),
                "precompute": dict(in_axes=(same,), **shared),
                "film": dict(in_axes=(same,), **shared),
                "step": dict(in_axes=(every, every, same, same), **shared),
            }
            return [nn.scan(layer, methods=methods)(c, *flags, name="layers")]
        return [layer(c, *flags, name=f"layers_{i}") for i in range(c.num_decoder_layers)]

    def precompute(self, sources: tuple[Array, ...], masks: tuple[Array, ...]) -> CrossCache:
        """Encoded sources [B, L, D] and their masks [B, L] -> the cache every call below reads."""
        if self.config.cross_attention == "concat":
            sources = (jnp.concatenate(sources, axis=1),)
            masks = (jnp.concatenate(masks, axis=1),)
        layers = tuple(layer.precompute(None, sources)[1] for layer in self.stack)
        return CrossCache(layers, masks)

    def condition_time(self, t: Array) -> Array:
        """Noise times t [S] in [0, 1] -> the modulation of all layers [S, layers, 2, 2D], in one batched call."""
        half = self.config.model_dim // 2
        # float32 and compiled, as published: the largest angles round to about 1e-3, and weights are used to it.
        step = np.float32(-np.log(self.config.max_noise_time) / (half - 1))
        frequencies = jnp.exp(jnp.arange(half, dtype=jnp.float32) * step)
        angles = (t * self.config.max_noise_time)[:, None] * frequencies[None, :]
        return self.film(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))

    def film(self, sinusoids: Array) -> Array:
        """Sinusoids of the noise time [S, D] -> modulation of all layers [S, layers, 2, 2D] (3.14.4, 3.14.6)."""
        y = nn.swish(self.time_emb_dense1(nn.swish(self.time_emb_dense0(sinusoids))))  # [S, 4D]
        films = [layer.film(None, y)[1] for layer in self.stack]
        return jnp.moveaxis(films[0], 0, 1) if self.config.scan_layers else jnp.stack(films, axis=1)

    def __call__(self, x: Array, film: Array | None, cache: CrossCache, deterministic: bool) -> Array:
        """x [B, T, M] -> [B, T, output_dim] float32.

        `film` [B or 1, layers, 2, 2D] from `condition_time`, None when autoregressive. The cache may have fewer
        rows than x: the further rows are then unconditional, which makes guidance one batched call.
        """
        c, frames = self.config, x.shape[1]
        conditioning = None if cache.prior is None else cache.prior.conditioning()
        x = self._embed(x, self._positions(frames)[None], cache.roll, conditioning)
        x = self.dropout(x, deterministic=deterministic).astype(c.dtype)
        mask = nn.make_causal_mask(jnp.ones((1, frames)), dtype=bool) if self.autoregressive else None
        if c.scan_layers:
            films = None if film is None else jnp.moveaxis(film, 1, 0)
            x, _ = self.stack[0](x, films, cache.layers[0], cache.masks, mask, deterministic)
        else:
            for i, layer in enumerate(self.stack):
                x, _ = layer(x, None if film is None else film[:, i], cache.layers[i], cache.masks, mask, deterministic)
        return self._output(x, cache.roll, deterministic)

    def step(self, x: Array, index: Array, cross: CrossCache, caches: tuple) -> tuple[Array, tuple]:
        """Autoregressive decoding of one frame x [B, 1, M] at position `index`; caches from `empty_caches`."""
        position = jax.lax.dynamic_slice_in_dim(self._positions(self.config.target_frames), index, 1)

        def frame_of(a: Array | None) -> Array | None:
            return None if a is None else jax.lax.dynamic_slice_in_dim(a, index, 1, axis=1)

        roll = frame_of(cross.roll)
        conditioning = None if cross.prior is None else frame_of(cross.prior.conditioning())
        x = self._embed(x, position[None], roll, conditioning).astype(self.config.dtype)
        new_caches = []
        for layer, layer_cross, layer_cache in zip(self.stack, cross.layers, caches, strict=True):
            x, new = layer.step(x, layer_cross, layer_cache, cross.masks, index)
            new_caches.append(new)
        return self._output(x, roll, True), tuple(new_caches)

    def empty_caches(self, batch_size: int, frames: int) -> tuple:
        """Zero self-attention keys and values, [B, T, H, K] each, of every layer (stacked when scanned)."""
        c = self.config
        stacked = (c.num_decoder_layers,) if c.scan_layers else ()
        zeros = jnp.zeros((*stacked, batch_size, frames, c.num_heads, c.head_dim), c.dtype)
        return tuple((zeros, zeros) for _ in range(1 if c.scan_layers else c.num_decoder_layers))

    def _positions(self, frames: int) -> Array:
        c = self.config
        if frames > c.target_frames:
            raise ValueError(f"{frames} target frames, but NetworkConfig.target_frames = {c.target_frames}")
        table = jnp.asarray(sinusoid_table(c.target_frames, c.model_dim)) if self.autoregressive else self.Embed_0()
        return table[:frames]

    def _embed(self, x: Array, positions: Array, roll: Array | None, conditioning: Array | None) -> Array:
        x = self.continuous_inputs_projection(x) + positions
        x = x if conditioning is None else x + self.prior_projection(conditioning)
        return x if roll is None else x.at[: len(roll)].add(self.roll_projection(roll))  # further rows have no notes

    def _output(self, x: Array, roll: Array | None, deterministic: bool) -> Array:
        x = self.dropout(self.decoder_norm(x), deterministic=deterministic)
        y = self.spec_out_dense(x.astype(jnp.float32))
        # A roll of 0 is silence, which is -1 in the model's range.
        return (y - 1.0).at[: len(roll)].add(roll) if self.corrects_roll and roll is not None else y


class MelTransformer(nn.Module):
    """Encoders and decoder together; the decoder's output has `output_dim` channels a frame.

    `attend_to_padding` is the fault of docs/spec.md 3.18.2: the note encoder sees padding as if it were notes,
    and a decoder without a single note averages over padding.
    """

    config: NetworkConfig
    output_dim: int
    autoregressive: bool
    attend_to_padding: bool = False
    corrects_roll: bool = False  # for outputs that are frames of x_0, where there is a note roll

    def setup(self):
        c = self.config
        # Published checkpoints call the note encoder "encoder" where there is no context encoder beside it.
        if self._encodes_context():
            self.token_encoder = NoteEncoder(c, sinusoids=self.autoregressive)
            self.continuous_encoder = ContextEncoder(c, sinusoids=self.autoregressive)
        else:
            self.encoder = NoteEncoder(c, sinusoids=self.autoregressive)
        if c.note_roll:
            self.note_roll = NoteRoll(c)
            if c.vocabulary.timbres:
                self.timbre = Timbre(c)
        if c.note_latents:
            self.note_posterior = NotePosterior(c)
        if c.num_prior_layers:
            self.prior = PriorNetwork(c)
        self.decoder: Any
        if c.decoder == "convolutional":
            self.decoder = ConvDecoder(c, self.output_dim)
        else:
            flags = self.autoregressive, self.attend_to_padding, self.corrects_roll
            self.decoder = MelDecoder(c, self.output_dim, *flags)

    def _encodes_context(self) -> bool:
        return self.config.context_frames > 0 and self.config.decoder == "transformer"

    def encode(self, *inputs, latents: Array | None = None, recording: tuple[Array, Array] | None = None) -> CrossCache:
        """Inputs as of `encodings` -> cache of the decoder.

        latents [B, N, L]: of the notes; None: 0. With a recording, x_0 [B, T, M] and its mask [B, T], they are the
        noise that is added to what it tells of the notes.
        """
        sources, masks, notes, tail = self._sources(*inputs)
        attends = self.config.decoder == "transformer"
        cache = self.decoder.precompute(sources, masks) if attends else CrossCache((), ())
        if notes is None:
            return cache
        encoded, has_prior, told = sources[0], self.config.num_prior_layers > 0, None
        if latents is not None and recording is not None:
            x_0, mask = recording
            plain = self.note_roll(encoded, notes, tail)
            mean = self.prior(plain.mel, *inputs[2:]).mean
            posterior = self.note_posterior(encoded, notes.is_note, plain, x_0 - mean, mask)
            latents, told = posterior.sample(latents), Told(mean, posterior.information())
        roll = self.note_roll(encoded, notes, tail, latents).mel
        return cache._replace(roll=roll, prior=self.prior(roll, *inputs[2:]) if has_prior else None, told=told)

    def encodings(self, *inputs) -> tuple[tuple[Array, ...], tuple[Array, ...], Array | None]:
        """Notes [B, N], their mask, scaled context [B, C, M], its mask -> encodings, masks, note roll [B, T, M].

        The context and its mask are None where the network has none; the last input is whether dropout is off.
        """
        sources, masks, notes, tail = self._sources(*inputs)
        return sources, masks, None if notes is None else self.note_roll(sources[0], notes, tail).mel

    def _sources(
        self, note_tokens: Array, token_mask: Array, context: Any, context_mask: Any, deterministic: bool
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], TimedNotes | None, Array | None]:
        """Inputs as of `encodings` -> encodings, masks, and what the note roll needs besides: notes and the tail."""
        c, encoder_mask = self.config, None if self.attend_to_padding else token_mask
        notes = read_notes(note_tokens, c.vocabulary, c.target_frames) if c.note_roll else None
        encoder = self.token_encoder if self._encodes_context() else self.encoder
        timbre = None
        if notes is not None and c.vocabulary.timbres:
            timbre = self.timbre(notes.timbre, context, context_mask)
        sources: tuple[Array, ...] = (encoder(note_tokens, encoder_mask, deterministic, notes, timbre),)
        masks: tuple[Array, ...] = (token_mask,)
        if self._encodes_context():
            sources += (self.continuous_encoder(context, context_mask, deterministic),)
            masks += (context_mask,)
        return sources, masks, notes, self._tail(context, context_mask)

    def _tail(self, context: Array | None, context_mask: Any) -> Array | None:
        """Magnitudes [B, M] of the context's last frame, 0 where there is none."""
        if context is None:
            return None
        frame, known = last_frames(context, context_mask, 1)
        return jnp.where(known, jnp.exp(unscale_mel(frame)) - np.exp(MIN_LOG_MEL), 0.0)[:, 0]

    def precompute(self, sources: tuple[Array, ...], masks: tuple[Array, ...]) -> CrossCache:
        """The part of `encode` that follows `encodings`, for scripts/benchmark.py."""
        return self.decoder.precompute(sources, masks)

    def condition_time(self, t: Array) -> Array:
        return self.decoder.condition_time(t)

    def decode(self, x: Array, film: Array | None, cache: CrossCache, deterministic: bool = True) -> Array:
        return self.decoder(x, film, cache, deterministic)

    def decode_step(self, x: Array, index: Array, cross: CrossCache, caches: tuple) -> tuple[Array, tuple]:
        return self.decoder.step(x, index, cross, caches)

    def __call__(self, note_tokens, x, t, context=None, context_mask=None, deterministic: bool = True) -> Array:
        """Everything in one pass, as initialization needs it."""
        latents: dict[str, Any] = {}
        if self.config.note_latents:
            noise = jnp.zeros((*note_tokens.shape, self.config.note_latents))
            latents = {"latents": noise, "recording": (x, jnp.ones(x.shape[:2], bool))}
        cache = self.encode(note_tokens, note_tokens > 0, context, context_mask, deterministic, **latents)
        film = None if self.autoregressive else self.condition_time(t)
        return self.decode(x, film, cache, deterministic)
