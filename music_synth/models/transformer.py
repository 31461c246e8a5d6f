"""The networks: note encoder, context encoder, mel decoder, and the three together.

They know nothing of diffusion or of likelihoods. Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import MIN_LOG_MEL, unscale_mel
from music_synth.midi.vocabulary import NUM_EXTRA_IDS
from music_synth.models.convolution import ConvDecoder
from music_synth.models.layers import (
    Array,
    DecoderLayer,
    Dense,
    EncoderLayer,
    NetworkConfig,
    PositionTable,
    RMSNorm,
    length_dropout,
    partitioned,
    sinusoid_table,
)
from music_synth.models.note_roll import NoteRoll, TimedNotes, read_notes
from music_synth.models.prior import Prior, PriorNetwork, last_frames


class CrossCache(NamedTuple):
    """What the decoder reads of the notes and the context: computed once a segment.

    `layers`: cross-attention keys and values of every layer (a tuple, or stacked arrays when layers are scanned),
    `masks`: per source, [B, L], True = a key that may be seen; `roll`: the guess of the note roll, [B, T, M];
    `prior`: what is made of that guess.
    """

    layers: tuple
    masks: tuple[Array, ...]
    roll: Array | None = None
    prior: Prior | None = None


def context_position_ids(mask: Array, positions: str) -> Array:
    """Position ids [B, C] of a context with `mask` [B, C].

    "terminal_relative" rolls 0..C-1 right by the number of leading valid frames, so that the last valid frame,
    the one next to the target, always has id C-1 (docs/spec.md 3.14.2-3). "regular" is plain 0..C-1.
    """
    length = mask.shape[1]
    ids = jnp.broadcast_to(jnp.arange(length)[None], mask.shape)
    if positions == "regular":
        return ids
    valid = jnp.where(jnp.all(mask, axis=1), length, jnp.argmin(mask, axis=1))  # index of the first False
    return (ids - valid[:, None]) % length


class LayerStack(nn.Module):
    """Runs the encoder layers, one by one or scanned; the final norm; dropout."""

    config: NetworkConfig
    sinusoids: bool  # positions computed (autoregressive) or from the checkpointed table (diffusion)

    def positions(self, length: int) -> Array:  # [length, D]
        if self.sinusoids:
            return jnp.asarray(sinusoid_table(length, self.config.model_dim))
        return PositionTable(length, self.config.model_dim, name="Embed_0")()

    def build(self):
        c = self.config
        layer = nn.remat(EncoderLayer, static_argnums=(3,), prevent_cse=not c.scan_layers) if c.remat else EncoderLayer
        if c.scan_layers:
            layer = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, nn.broadcast),
                length=c.num_encoder_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return [layer(c, name="layers")]
        return [layer(c, name=f"layers_{i}") for i in range(c.num_encoder_layers)]

    def run(self, x: Array, mask: Array | None, deterministic: bool) -> Array:  # [B, L, D] -> [B, L, D]
        x = length_dropout(self.config.dropout_rate)(x, deterministic=deterministic).astype(self.config.dtype)
        key_mask = None if mask is None else mask[:, None, None, :]
        for layer in self.build():
            x, _ = layer(x, key_mask, deterministic)
        x = RMSNorm(name="encoder_norm")(x)
        return nn.Dropout(self.config.dropout_rate)(x, deterministic=deterministic)


class NoteEncoder(LayerStack):
    """Note tokens [B, N] -> encodings [B, N, D]. Given `notes`, each also carries its program, velocity and timbre.

    A timbre [B, 1, D] colors each program and each drum in its own way, so it is multiplied by their embeddings.
    """

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        mask: Array | None,
        deterministic: bool,
        notes: TimedNotes | None = None,
        timbre: Array | None = None,
    ) -> Array:
        c, length = self.config, tokens.shape[1]
        if length > c.max_tokens:
            raise ValueError(f"{length} note tokens, but NetworkConfig.max_tokens = {c.max_tokens}")
        embed_init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        embedder = nn.Embed(c.vocab_size, c.model_dim, embedding_init=embed_init, name="token_embedder")
        x = embedder(tokens) + self.positions(c.max_tokens)[None, :length]
        if notes is not None:
            is_drum, program = notes.is_drum[..., None], embedder(notes.program)
            in_force = embedder(notes.velocity) + jnp.where(is_drum, 0.0, program)
            if timbre is not None:
                in_force += timbre * (1.0 + jnp.where(is_drum, embedder(tokens), program))
            x = x + jnp.where(notes.is_note[..., None], in_force, 0.0)
        return self.run(x, mask, deterministic)


class Timbre(nn.Module):
    """Token ids of timbres [B, 1], scaled context [B, C, M] or None, its mask [B, C] -> their embeddings [B, 1, D].

    An unknown timbre, id 0, is a mixture: each has a share by how near it is to what the context sounds like, all the
    same share without a context. Embeddings begin at 0, so that a network that has learned to play without them can
    learn them; their table has room for all that a vocabulary can name.
    """

    config: NetworkConfig

    @nn.compact
    def __call__(self, ids: Array, context: Array | None, mask: Any) -> Array:
        c, zeros = self.config, partitioned(nn.initializers.zeros_init(), None, "embed")
        table = self.param("embedding", zeros, (NUM_EXTRA_IDS, c.model_dim))
        known, table = ids > 0, table[: len(c.vocabulary.timbres)]
        mixture = jnp.mean(table, axis=0)[None, None]
        if context is not None:
            counted = mask[..., None].astype(jnp.float32)
            found = nn.gelu(Dense(c.model_dim, ("mel", "embed"), name="features")(context + 1.0)) * counted
            mean = jnp.sum(found, axis=1) / jnp.maximum(jnp.sum(counted, axis=1), 1.0)
            heard = Dense(c.model_dim, ("embed", "mel"), name="query")(mean)
            mixture = (nn.softmax(heard @ table.T) @ table)[:, None]
        rows = jnp.where(known, ids - c.vocabulary.end_id, 0)
        return jnp.where(known[..., None], jnp.take(table, rows, axis=0), mixture)


class ContextEncoder(LayerStack):
    """Scaled mel of the previous segment [B, C, M] with its mask [B, C] -> encodings [B, C, D]."""

    @nn.compact
    def __call__(self, context: Array, mask: Array, deterministic: bool) -> Array:
        c = self.config
        if context.shape[1:] != (c.context_frames, c.num_mels):
            raise ValueError(f"context of shape {context.shape}, expected [B, {c.context_frames}, {c.num_mels}]")
        x = Dense(c.model_dim, ("mel", "embed"), name="input_proj")(context)
        x = x + self.positions(c.context_frames)[context_position_ids(mask, c.context_positions)]
        return self.run(x, mask, deterministic)


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

    def encode(self, note_tokens: Array, *inputs) -> CrossCache:
        """Inputs as of `encodings` -> cache of the decoder."""
        sources, masks, roll = self.encodings(note_tokens, *inputs)
        attends = self.config.decoder == "transformer"
        cache = self.decoder.precompute(sources, masks) if attends else CrossCache((), ())
        prior = self.prior(roll, *inputs[1:]) if self.config.num_prior_layers and roll is not None else None
        return cache._replace(roll=roll, prior=prior)

    def encodings(
        self,
        note_tokens: Array,
        token_mask: Array,
        context: Any,  # None, with its mask, where the network has no context
        context_mask: Any,
        deterministic: bool,
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], Array | None]:
        """Notes [B, N] and scaled context [B, C, M], with masks [B, N], [B, C] -> encodings, masks, note roll."""
        c, encoder_mask = self.config, None if self.attend_to_padding else token_mask
        notes = read_notes(note_tokens, c.vocabulary, c.target_frames) if c.note_roll else None
        encoder = self.token_encoder if self._encodes_context() else self.encoder
        timbre = None
        if notes is not None and c.vocabulary.timbres:
            timbre = self.timbre(notes.timbre, context, context_mask)
        tokens = encoder(note_tokens, encoder_mask, deterministic, notes, timbre)
        sources: tuple[Array, ...] = (tokens,)
        masks: tuple[Array, ...] = (token_mask,)
        if self._encodes_context():
            sources += (self.continuous_encoder(context, context_mask, deterministic),)
            masks += (context_mask,)
        roll = None if notes is None else self.note_roll(tokens, notes, self._tail(context, context_mask))
        return sources, masks, roll

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
        cache = self.encode(note_tokens, note_tokens > 0, context, context_mask, deterministic)
        film = None if self.autoregressive else self.condition_time(t)
        return self.decode(x, film, cache, deterministic)
