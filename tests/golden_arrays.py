"""Reads tests/golden/*.npz. See tests/golden/README.md for where the arrays come from."""

from pathlib import Path

import numpy as np

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
