"""T5X checkpoints for tests: msgpack files that T5X wrote, with the zarr folders they point to made here by hand."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np

from tests import golden_arrays

FILES = {"context": "network_context", "autoregressive": "network_autoregressive"}


def contents_of(name: str) -> dict[str, Any]:
    """The tree of a msgpack file: "context" or "autoregressive"."""
    return flax.serialization.msgpack_restore((golden_arrays.GOLDEN / f"t5x_{name}.msgpack").read_bytes())


def pointers(node: Any) -> Iterator[dict[str, Any]]:
    """The leaves that point to zarr folders."""
    if isinstance(node, dict):
        yield from [node] if "driver" in node else itertools.chain(*map(pointers, node.values()))


def arrays_of(name: str) -> dict[str, np.ndarray]:
    """The arrays of the zarr folders by the folders' names."""
    stored = golden_arrays.load(FILES[name])
    arrays = {f"target.{key[7:].replace('/', '.')}": v for key, v in stored.items() if key.startswith("params/")}
    if name == "context":
        for key, value in golden_arrays.load("t5x_optimizer_state").items():
            arrays[key.replace("context/state/", "state.param_states.", 1).replace("/", ".")] = value
    else:  # its second moments are not kept here; any will do
        rng = np.random.default_rng(0)
        v = {f"state.param_states.{key[7:]}.v": rng.random(v.shape, np.float32) for key, v in arrays.items()}
        arrays |= v
    return arrays


def write_zarr(folder: Path, array: np.ndarray, chunks: tuple[int, ...] | None = None) -> None:
    """A zarr array of version 2, as its specification says: a .zarray and a gzip file for every chunk."""
    chunks = chunks or array.shape
    folder.mkdir(parents=True)
    dtype = array.dtype.str if array.dtype.kind in "fui" else "bfloat16"
    layout = {"zarr_format": 2, "shape": array.shape, "chunks": chunks, "dtype": dtype, "order": "C"}
    layout |= {"compressor": {"id": "gzip", "level": 1}, "fill_value": None, "filters": None}
    (folder / ".zarray").write_text(json.dumps(layout))
    counts = [-(-size // chunk) for size, chunk in zip(array.shape, chunks, strict=True)]
    for index in np.ndindex(*counts):
        block = np.zeros(chunks, array.dtype)  # at the far ends a chunk reaches beyond the array
        part = array[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))]
        block[tuple(slice(0, size) for size in part.shape)] = part
        (folder / ".".join(map(str, index))).write_bytes(gzip.compress(block.tobytes(), 1))


def make(folder: Path, name: str, contents: dict[str, Any] | None = None) -> Path:
    """folder/checkpoint_17, as T5X leaves it; `contents`: of its msgpack file, where it is to be another."""
    checkpoint = folder / "checkpoint_17"
    checkpoint.mkdir(parents=True)
    arrays = arrays_of(name)
    contents = contents or contents_of(name)
    for pointer in pointers(contents):
        path = pointer.get("kvstore", pointer)["path"]
        write_zarr(checkpoint / path, arrays[path.rstrip("/")], tuple(pointer["metadata"]["chunks"]))
    (checkpoint / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents, in_place=True))
    return checkpoint
