"""Reads tests/golden/*.npz, and computes what they are of. See tests/golden/README.md for where they come from."""

from pathlib import Path

import numpy as np

from music_synth.diffusion.objective import drop_conditions

GOLDEN = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def tree(arrays: dict[str, np.ndarray], prefix: str = "params/") -> dict:
    """Arrays under `prefix`, whose names hold slashes, as nested dictionaries."""
    nested: dict = {}
    for key, value in arrays.items():
        if key.startswith(prefix):
            node, (*parents, leaf) = nested, key.removeprefix(prefix).split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
    return nested


def teacher_forced(model, params, batch, inputs):
    """All frames of an autoregressive decoder at once: shifted inputs [B, T, M] -> channels [B, T, channels]."""
    return model._apply(params, inputs, None, model._encode(params, batch, None), True, method="decode")


def denoising_error(model, params, batch, t, eps, keep=None):
    """Elementwise error [B, T, M] of a diffusion decoder at noise times t [B] with noise eps [B, T, M].

    keep [B]: which examples are conditioned; None: all.
    """
    cache = model._encode(params, batch if keep is None else drop_conditions(batch, keep), None)
    return model._error(params, cache, batch, t, eps, None)
