"""The encoders of notes and of context. Parameter names are those of the published checkpoints."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from music_synth.midi.vocabulary import NUM_EXTRA_IDS
from music_synth.models.layers import (
    Dense,
    EncoderLayer,
    NetworkConfig,
    PositionTable,
    RMSNorm,
    length_dropout,
    partitioned,
    sinusoid_table,
)
from music_synth.models.note_roll import TimedNotes

Array = jax.Array


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
