"""Checkpoints of T5X in and out, and the gin file beside them. T5X itself is not needed.

A checkpoint is a folder `checkpoint_<step>` (golden/README.md 3.19). Its file `checkpoint` is msgpack, as flax writes
it: version, and under "optimizer" the parameters ("target") and what the optimizer keeps ("state"). A leaf is one of

    an array                                   old checkpoints have all of them here, new ones only the small ones
    {"driver": "zarr", "kvstore": {"path"}}    T5X: a zarr folder beside the file; before TensorStore 0.1.14 {"path"}
    "PLACEHOLDER://name"                       T5X on Orbax: likewise; the file may then lie in a folder `state`

The published models are such checkpoints, and `music_synth.models` has their parameter names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import optax
import tensorstore
from flax.traverse_util import flatten_dict

from music_synth.errors import UserError

FILE = "checkpoint"
PLACEHOLDER = "PLACEHOLDER://"
VERSION = 3  # of what is written: bfloat16 arrays are of that type; in version 2 they are called uint16
LARGEST_CHUNK = 64 * 2**20  # bytes of a zarr chunk
UNUSED = np.zeros(1, np.float32)  # stands for a moment that Adafactor does not keep
Tree = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    folder: Path  # that its file `checkpoint` lies in
    step: int
    params: Tree  # float32
    moments: Tree | None  # Adafactor's: params with {"m", "v", "v_col", "v_row"} in place of each; None: there are none


# --- finding -----------------------------------------------------------------------------------------------------


def find(path: str | Path) -> Path | None:
    """The folder of the newest checkpoint in `path`, which may also be a checkpoint itself; None: there is none."""
    path = Path(path)
    if path.name == FILE and path.is_file():
        return path.parent
    for folder in (path, path / "state"):
        if (folder / FILE).is_file():
            return folder
    numbered = {int(child.name.split("_")[1]): child for child in _children(path)}
    held = [folder for step, child in sorted(numbered.items()) if (folder := find(child))]
    return held[-1] if held else None


def _children(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (child for child in path.iterdir() if re.fullmatch(r"checkpoint_\d+", child.name))


def find_config(folder: Path) -> Path | None:
    """The config.gin of the run that a checkpoint's folder belongs to: in it, or up to two folders above."""
    places = (folder, folder.parent, folder.parent.parent if folder.name == "state" else folder)
    return next((place / "config.gin" for place in places if (place / "config.gin").is_file()), None)


# --- reading -----------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Checkpoint:
    """Reads the newest checkpoint in `path`, or the one that `path` is.

    Raises:
        UserError: there is none, it is damaged or of another kind, or one of its tensors cannot be read.
    """
    folder = find(path)
    if folder is None:
        raise UserError(f"no T5X checkpoint in {path}: give a folder checkpoint_<step>, or one that holds such folders")
    contents = _read_msgpack(folder / FILE)
    tree = contents.get("optimizer", contents)
    if not isinstance(tree, dict) or not isinstance(tree.get("target"), dict):
        held = ", ".join(map(str, contents)) or "nothing"
        raise UserError(f"{folder / FILE} is no checkpoint of T5X: it holds {held}")
    state = tree.get("state") or {}
    moments = state.get("param_states")
    if not (isinstance(moments, dict) and _are_of_adafactor(moments, tree["target"])):
        moments = None
    named = re.fullmatch(r"checkpoint_(\d+)", folder.parent.name if folder.name == "state" else folder.name)
    step = _read_leaves(folder, state.get("step", int(named[1]) if named else 0), "state.step")
    return Checkpoint(
        folder=folder,
        step=int(np.ravel(step)[0]),
        params=_read_leaves(folder, tree["target"], "target"),
        moments=None if moments is None else _read_leaves(folder, moments, "state.param_states"),
    )


def _read_msgpack(path: Path) -> Tree:
    data = path.read_bytes()
    if data.startswith(b"model_checkpoint_path"):
        raise UserError(f"{path.parent} is a checkpoint of TensorFlow, not of T5X")
    try:
        contents = flax.serialization.msgpack_restore(data)
    except Exception as error:  # of every kind that msgpack and its ndarrays know
        raise UserError(f"{path} is damaged or no checkpoint of T5X ({_reason(error)})") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} is no checkpoint of T5X: it holds one {type(contents).__name__}")
    return contents


def _are_of_adafactor(moments: Tree, params: Tree) -> bool:
    """Whether `moments` has, in place of every parameter, what Adafactor keeps of it."""
    if _is_leaf(params):
        return isinstance(moments, dict) and moments.keys() == {"m", "v", "v_col", "v_row"}
    if not isinstance(moments, dict) or moments.keys() != params.keys():
        return False
    return all(_are_of_adafactor(moments[key], child) for key, child in params.items())


def _is_leaf(node: Any) -> bool:
    return not isinstance(node, dict) or "driver" in node


def _read_leaves(folder: Path, node: Any, name: str) -> Any:
    """A tree like `node` with an array for every leaf, read from its zarr folder where it points to one."""
    if not _is_leaf(node):
        return {key: _read_leaves(folder, child, f"{name}.{key}") for key, child in node.items()}
    if isinstance(node, dict):
        node = _read_zarr(folder / _path_of(node, name), name)
    elif isinstance(node, str):
        if not node.startswith(PLACEHOLDER):
            raise UserError(f"tensor {name} in {folder} is the text {node[:40]!r}")
        node = _read_zarr(folder / node.removeprefix(PLACEHOLDER), name)
    array = np.asarray(node)
    if array.dtype == np.uint16:
        array = array.view(ml_dtypes.bfloat16)
    return array if array.dtype.kind == "i" else array.astype(np.float32, copy=False)


def _path_of(pointer: Tree, name: str) -> str:
    path = pointer.get("kvstore", {}).get("path") or pointer.get("path")
    if pointer["driver"] != "zarr" or not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise UserError(f"tensor {name} points to {path!r} by the driver {pointer['driver']!r}, not to a zarr folder")
    return path


def _read_zarr(folder: Path, name: str) -> np.ndarray:
    if not (folder / ".zarray").is_file():
        raise UserError(f"tensor {name} is missing: there is no {folder}/.zarray")
    try:
        store = tensorstore.open(_spec(folder)).result()
        layout = store.spec().to_json()["metadata"]
        separator = layout.get("dimension_separator", ".")
        # TensorStore takes a chunk that is not there for zeros. T5X writes them all, so this one was lost.
        counts = [-(-size // chunk) for size, chunk in zip(layout["shape"], layout["chunks"], strict=True)]
        for index in np.ndindex(*counts):
            chunk = folder / (separator.join(map(str, index)) or "0")
            if not chunk.is_file():
                raise UserError(f"tensor {name} is not whole: there is no {chunk}")
        return store.read().result()
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"tensor {name} cannot be read from {folder} ({_reason(error)})") from error


def _spec(folder: Path) -> Tree:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(" [tensorstore_spec=")[0][:200]


# --- writing -----------------------------------------------------------------------------------------------------


def write(folder: Path, step: int, params: Tree, moments: Tree | None = None) -> Path:
    """Writes the folder `checkpoint_<step>` into `folder`, as T5X writes it; returns it.

    The file `checkpoint` comes last, so that a folder with one is whole.
    """
    checkpoint = folder / f"checkpoint_{step}"
    checkpoint.mkdir(parents=True)
    state: Tree = {} if moments is None else {"param_states": _write_leaves(checkpoint, moments, "state.param_states")}
    state["step"] = np.int32(step)
    target = _write_leaves(checkpoint, params, "target")
    contents = {"version": VERSION, "optimizer": {"state": state, "target": target}}
    (checkpoint / FILE).write_bytes(flax.serialization.msgpack_serialize(contents, in_place=True))
    return checkpoint


def _write_leaves(folder: Path, node: Any, name: str) -> Any:
    """Parameters and whole second moments go into zarr folders, what is small stays in the msgpack file."""
    if isinstance(node, Mapping):
        return {key: _write_leaves(folder, node[key], f"{name}.{key}") for key in sorted(node)}
    array = np.asarray(node, np.float32)
    if name.startswith("state.") and (array.size == 1 or not name.endswith(".v")):
        return array
    metadata = {
        "chunks": chunk_shape(array.shape, array.itemsize),
        "compressor": {"id": "gzip", "level": 1},
        "shape": list(array.shape),
    }
    pointer = {
        "driver": "zarr",
        "dtype": "float32",
        "kvstore": {"driver": "file", "path": f"{name}/"},
        "metadata": metadata,
    }
    spec = pointer | _spec(folder / name)
    tensorstore.open(spec, create=True).result().write(array).result()
    return pointer


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """The array in one chunk; where it is larger than `LARGEST_CHUNK`, its longest side divided until it is not."""
    chunks = list(shape)
    while math.prod(chunks) * itemsize > LARGEST_CHUNK:
        axis = int(np.argmax(chunks))
        chunks[axis] = next(n for n in range(chunks[axis] - 1, 0, -1) if shape[axis] % n == 0)
    return chunks


# --- optimizer state ---------------------------------------------------------------------------------------------


def to_opt_state(moments: Tree, step: int, opt_state: Any) -> Any:
    """`opt_state`, of `training.optimizer.adafactor`, with moments as after `step` updates in it.

    Raises:
        UserError: the moments are of other shapes.
    """
    is_factored = lambda node: isinstance(node, optax.FactoredState)

    def fill(node: Any) -> Any:
        if not is_factored(node):
            return np.asarray(step, node.dtype)  # what else is kept counts updates
        picked = {kind: _pick(moments, kind) for kind in ("v_row", "v_col", "v")}
        for kind, tree in picked.items():
            theirs, ours = flatten_dict(tree, sep="/"), flatten_dict(getattr(node, kind), sep="/")
            for name, leaf in ours.items():
                if theirs[name].shape != leaf.shape:
                    raise UserError(
                        f"moment {name}/{kind} has shape {theirs[name].shape}, Adafactor here keeps {leaf.shape}"
                    )
        return node._replace(count=np.asarray(step, np.int32), **picked)

    return jax.tree.map(fill, opt_state, is_leaf=is_factored)


def _pick(moments: Tree, kind: str) -> Tree:
    if kind in moments and not isinstance(moments[kind], dict):
        return moments[kind]
    return {key: _pick(child, kind) for key, child in moments.items()}


def moments_of(opt_state: Any) -> Tree | None:
    """The reverse, from an optimizer's state in nested dictionaries (`checkpoint.load_progress`); None: another's."""
    if not isinstance(opt_state, dict):
        return None
    if opt_state.keys() >= {"v_row", "v_col", "v"}:
        return _join(opt_state["v"], opt_state["v_col"], opt_state["v_row"])
    return next((found for child in opt_state.values() if (found := moments_of(child)) is not None), None)


def _join(v: Any, v_col: Any, v_row: Any) -> Tree:
    if isinstance(v, dict):
        return {key: _join(v[key], v_col[key], v_row[key]) for key in v}
    return {"m": UNUSED, "v": v, "v_col": v_col, "v_row": v_row}
