"""Writes a diffusion decoder as an ONNX file, which `onnx_player` plays without JAX.

The file samples one segment: encoders, note roll, prior and every step of the sampler, with the noise as an input.

    note_tokens   int32 [1, N]             N is fixed; zeros fill up
    context_mel   float32 [1, C, M]        log-mel of the segment before     (both where the network has a context)
    context_mask  float32 [1, C]           1 where that is known
    noise         float32 [1, 1 + n, T, M] standard normal: to begin with, and for each of n steps that add noise
    latents       float32 [1, N, L]        standard normal: of the notes             (where the network has any)
    mel           float32 [1, T, M]        log-mel
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from music_synth.diffusion.objective import Diffusion
from music_synth.errors import UserError
from music_synth.interop.onnx_graph import Graph
from music_synth.interop.onnx_player import ABOUT, MEL
from music_synth.interop.onnx_trace import trace
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import Params

MAX_TOKENS = 512  # of a segment, unless said; what attention costs grows with their square
MAX_STEPS = 64  # of a sampler, as they are written one by one


def export_decoder(model: Any, params: Params, tokenizer: Tokenizer, path: Path, max_tokens: int | None = None) -> None:
    """Writes a decoder as it is set to sample.

    Args:
        max_tokens: of a segment; `MAX_TOKENS` if None.

    Raises:
        UserError: it is no diffusion decoder, samples in too many steps, or computes what has no counterpart.
    """
    if not isinstance(model, Diffusion):
        raise UserError(f"a {type(model).__name__} is not written as ONNX, only a Diffusion: it samples in few steps")
    network, sampler = model.network, model.sampler
    if sampler.num_steps > MAX_STEPS:
        raise UserError(
            f"Sampler.num_steps = {sampler.num_steps}: as ONNX at most {MAX_STEPS}; set fewer in its config"
        )
    count = min(max_tokens or MAX_TOKENS, network.max_tokens)
    noises = 1 + (sampler.num_steps if sampler.name == "ddpm" else 0)
    shapes = {"note_tokens": (1, count), "noise": (1, noises, network.target_frames, network.num_mels)}
    if network.context_frames:
        shapes |= {"context_mel": (1, network.context_frames, network.num_mels)}
        shapes |= {"context_mask": (1, network.context_frames)}
    if network.note_latents:
        shapes |= {"latents": (1, count, network.note_latents)}
    params = jax.tree.map(np.asarray, params)

    def sample(*arrays: Any) -> Any:
        batch = dict(zip(shapes, arrays, strict=True))
        noise = batch.pop("noise")
        if network.context_frames:
            batch["context_mask"] = batch["context_mask"] > 0.5
        return model.sample_from(params, batch, noise[:, 0], lambda i: noise[:, 1 + i], batch.pop("latents", None))

    graph = Graph()
    inputs = {
        name: jax.ShapeDtypeStruct(shape, np.int32 if name == "note_tokens" else np.float32)
        for name, shape in shapes.items()
    }
    trace(graph, sample, inputs, MEL)
    about = {ABOUT: json.dumps(dataclasses.asdict(dataclasses.replace(tokenizer, max_tokens=count)))}
    doc = "Note tokens, context and noise to log-mel, 50 frames a second. music_synth.interop.onnx_player plays it."
    graph.save(path, shapes, {MEL: list(shapes["noise"][:1] + shapes["noise"][2:])}, doc, about)
