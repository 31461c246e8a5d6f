"""What the tests of the commands start from: a prepared folder of noise, and a run that was never trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from music_synth import config
from music_synth.data.examples import Piece
from music_synth.data.prepared import write_folder
from music_synth.midi.notes import Note
from music_synth.training.checkpoint import Checkpointer
from music_synth.training.step import create_state


def prepare(folder: Path, audio: bool = False) -> Path:
    """A prepared folder: two pieces a split, of 300 and 100 frames; what it has of audio is not that of its mel."""
    rng = np.random.default_rng(0)

    def piece(split: str, num_frames: int) -> Piece:
        notes = [Note(int(pitch), 90, 40, 0.02 * pitch, 0.02 * pitch + 0.5) for pitch in rng.integers(40, 90, 5)]
        mel = rng.normal(-4, 2, (num_frames, 128)).astype(np.float32)
        sound = rng.normal(0, 0.1, num_frames * 320).astype(np.float32) if audio else None
        return Piece(f"{split}/{num_frames}", notes, mel, sound)

    splits = {split: [piece(split, 300), piece(split, 100)] for split in ("train", "validation", "test")}
    write_folder(folder, splits, "noise", "1", audio)
    return folder


def random_like(init: Callable[[jax.Array], Any]) -> Any:
    """What `init(key)` would return, with random numbers in it: saves the seconds of compiling an initialization."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype), shapes)


def start(model_dir: Path, recipe: str, prepared: Path) -> Path:
    """A MODEL_DIR as training leaves it behind, with random parameters at step 0."""
    config.parse([recipe, "smoke.gin"], [f"MODEL_DIR={model_dir}", f"TASK={prepared}"])
    settings = config.build("train").keywords
    create = functools.partial(create_state, settings["model"], settings["optimizer"], ema_decay=0.9)
    Checkpointer(model_dir).save(random_like(create), data_position=0)
    (model_dir / config.CONFIG_FILE).write_text(config.operative_text())
    return model_dir
