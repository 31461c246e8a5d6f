"""A model of a few numbers and a feed to go with it, behind the seams of the real ones.

Run as a script, this is a training run in a process of its own:

    python -m tests.training.toy MODEL_DIR key=value ...     keys: arguments of `train_toy`
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.midi.tokenizer import Tokenizer, Vocabulary
from music_synth.models.base import SpectrogramModel, masked_mean
from music_synth.training import loop
from music_synth.training.optimizer import adafactor, adamw, constant_rate

MELS, FRAMES, TOKENS, VOCAB = 4, 6, 16, 16


@dataclasses.dataclass(frozen=True)
class Network:
    vocab_size: int = VOCAB
    num_mels: int = MELS
    max_tokens: int = TOKENS
    target_frames: int = FRAMES
    context_frames: int = FRAMES
    note_roll: bool = False
    vocabulary: Vocabulary = dataclasses.field(default_factory=Vocabulary)


@dataclasses.dataclass(frozen=True)
class Toy(SpectrogramModel):
    """Mean of token embeddings plus a two-layer map of the context -> mel. Noise in training if `noise`."""

    network: Network = Network()
    width: int = 8
    noise: float = 0.1
    poison: bool = False  # gradients and losses turn NaN when a batch holds a token of id VOCAB - 1

    def init(self, rng: jax.Array) -> Any:
        keys = jax.random.split(rng, 3)

        def draw(key, *shape):
            return jax.random.normal(key, shape)

        return {
            "notes": {"embedding": draw(keys[0], VOCAB, MELS)},
            "context": {
                "wi": {"kernel": draw(keys[1], MELS, self.width)},
                "wo": {"kernel": draw(keys[2], self.width, MELS)},
                "norm": {"scale": jnp.ones(MELS)},
            },
        }

    def logical_axes(self) -> Any:
        return {
            "notes": {"embedding": ("vocab", "embed")},
            "context": {
                "wi": {"kernel": ("mel", "mlp")},
                "wo": {"kernel": ("mlp", "mel")},
                "norm": {"scale": ("mel",)},
            },
        }

    def __call__(self, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        used = (batch["note_tokens"] > 0).astype(jnp.float32)[..., None]  # [B, N, 1]
        notes = params["notes"]["embedding"][batch["note_tokens"]] * used  # [B, N, M]
        context = batch["context_mel"] * batch["context_mask"][..., None].astype(jnp.float32)  # [B, C, M]
        hidden = jnp.tanh(context @ params["context"]["wi"]["kernel"])  # [B, C, F]
        mapped = (hidden @ params["context"]["wo"]["kernel"]) * params["context"]["norm"]["scale"][None, None]
        return notes.sum(1, keepdims=True) / jnp.maximum(used.sum(1, keepdims=True), 1.0) + mapped  # [B, T, M]

    def loss(self, params: Any, batch: dict[str, jax.Array], rng: jax.Array, train: bool):
        predicted = self(params, batch)
        if train and self.noise:
            predicted = predicted + self.noise * jax.random.normal(rng, predicted.shape)
        error = jnp.square(predicted - batch["mel"])
        if self.poison:
            error = jnp.where((batch["note_tokens"] == VOCAB - 1).any(1)[:, None, None], jnp.nan, error)
        loss = masked_mean(error, batch["mel_mask"])
        return loss, {"draw": jax.random.uniform(rng)}

    def sample(self, params: Any, batch: dict[str, jax.Array], rng: jax.Array) -> jax.Array:
        return self(params, batch)


@dataclasses.dataclass(frozen=True)
class ToyFeed:
    """Batch k depends on (seed, k) alone; rows have masks and token lengths of all sizes."""

    batch_size: int = 8
    seed: int = 0
    delay: float = 0.0  # seconds a batch
    poisoned_step: int = -1
    tokenizer: Tokenizer = dataclasses.field(
        default_factory=lambda: Tokenizer(segment_frames=FRAMES, max_tokens=TOKENS)
    )

    def batch(self, seed: int, k: int, full: bool = False) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, seed, k))
        lengths = rng.integers(1, TOKENS + 1, (self.batch_size, 1))
        tokens = rng.integers(1, VOCAB - 1, (self.batch_size, TOKENS)) * (np.arange(TOKENS) < lengths)
        if k == self.poisoned_step:
            tokens[0, 0] = VOCAB - 1
        frames = rng.integers(0, FRAMES + 1, (2, self.batch_size, 1))
        masks = np.arange(FRAMES) < frames  # [2, B, T]
        mel = rng.normal(size=(self.batch_size, FRAMES, MELS)).astype(np.float32)
        return {
            "note_tokens": tokens.astype(np.int32),
            "context_mel": mel,
            "context_mask": masks[0],
            "mel": 0.5 * mel + 1.0,
            "mel_mask": masks[1],
        }

    def train_batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        while True:
            time.sleep(self.delay)
            yield self.batch(0, start_step)
            start_step += 1

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        yield from (self.batch(1, k) for k in range(3))


def train_toy(model_dir: str, num_steps: int = 10, delay: float = 0.0, batch_size: int = 8, **arguments: Any):
    """A run with the settings that tests share."""
    optimizer = adafactor(1e-2) if arguments.pop("adafactor", False) else adamw(constant_rate(1e-2))
    settings = {"log_every": 2, "checkpoint_every": 4, "eval_every": 100, "num_samples": 0} | arguments
    feed = ToyFeed(batch_size, delay=delay)
    return loop.train(Toy(), feed, optimizer, model_dir=model_dir, num_steps=num_steps, **settings)


if __name__ == "__main__":
    from music_synth import errors

    def main(argv: list[str]) -> None:
        values = dict(argument.split("=") for argument in argv[1:])
        if "process" in values:
            count, index, address = values.pop("process").split("/")
            jax.distributed.initialize(address, int(count), int(index))
        train_toy(argv[0], **{name: float(v) if "." in v else int(v) for name, v in values.items()})

    sys.argv[0] = "toy"
    errors.run(main)
