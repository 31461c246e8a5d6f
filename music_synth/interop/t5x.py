"""Checkpoints of T5X in and out, and the gin file beside them. T5X itself is not needed.

A checkpoint is a folder `checkpoint_<step>` (docs/spec.md 3.19). Its file `checkpoint` is msgpack, as flax writes
it: version, and under "optimizer" the parameters ("target") and what the optimizer keeps ("state"). A leaf is one of

    an array                                   old checkpoints have all of them here, new ones only the small ones
    {"driver": "zarr", "kvstore": {"path"}}    T5X: a zarr folder beside the file; before TensorStore 0.1.14 {"path"}
    "PLACEHOLDER://name"                       T5X on Orbax: likewise; the file may then lie in a folder `state`

T5X on Orbax of today writes no such file but a database, `state/manifest.ocdbt` and what belongs to it, with a zarr
array under each name: target.decoder.decoder_norm.scale, state.step, state.param_states.<name>.v_row, ...

The published models are such checkpoints, and `music_synth.models` has their parameter names.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from music_synth.errors import UserError
from music_synth.files import check_inside, most_unpacked
from music_synth.gin_files import CONFIG_FILE

FILE = "checkpoint"
DATABASE = "manifest.ocdbt"
PLACEHOLDER = "PLACEHOLDER://"
VERSION = 3  # of what is written: bfloat16 arrays are of that type; in version 2 they are called uint16
ZARR_DTYPES = ("bfloat16", "<f2", "<f4", "<f8", "<i4", "<i8", "<u2", "<u4")
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


def find(path: str | Path, step: int | None = None) -> Path | None:
    """Finds the folder of a checkpoint in `path`, which may also be a checkpoint itself; None: there is none.

    step: which of several; None: the newest.
    """
    path = Path(path)
    if path.name == FILE and path.is_file():
        return path.parent
    if folder := _with_file(path):
        return folder
    children = path.iterdir() if path.is_dir() else ()
    numbered = {int(child.name[11:]): child for child in children if re.fullmatch(r"checkpoint_\d{1,15}", child.name)}
    wanted = sorted(numbered, reverse=True) if step is None else [step] * (step in numbered)
    return next((folder for number in wanted if (folder := _with_file(numbered[number]))), None)


def _with_file(path: Path) -> Path | None:
    files = ((folder, folder / name) for folder in (path, path / "state") for name in (FILE, DATABASE))
    return next((folder for folder, file in files if file.is_file()), None)


def find_config(folder: Path) -> Path | None:
    """The config.gin of the run that a checkpoint's folder belongs to: in it, or up to two folders above."""
    places = (folder, folder.parent, folder.parent.parent if folder.name == "state" else folder)
    return next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)


# --- reading -----------------------------------------------------------------------------------------------------


def read(path: str | Path, step: int | None = None) -> Checkpoint:
    """Reads a checkpoint in `path`, or the one that `path` is.

    step: which of several; None: the newest.

    Raises:
        UserError: there is none, it is damaged or of another kind, or one of its tensors cannot be read.
    """
    folder = find(path, step)
    if folder is None:
        of_step = "" if step is None else f" of step {step}"
        raise UserError(
            f"no T5X checkpoint{of_step} in {path}: give a folder checkpoint_<step>, or one that holds such folders"
        )
    root = folder.parent if folder.name == "state" else folder
    check_inside(root.parent, root.name)
    contents = _read_msgpack(folder / FILE) if (folder / FILE).is_file() else _list_database(folder)
    tree = contents.get("optimizer", contents)
    if not isinstance(tree, dict) or not isinstance(tree.get("target"), dict):
        held = ", ".join(map(str, contents)) or "nothing"
        raise UserError(f"{folder} is no checkpoint of T5X: it holds {held[:200]}")
    with contextlib.suppress(KeyError, TypeError, ValueError):  # what `t5x_model` keeps beside the parameters
        tree["target"]["prior"] |= tree["flax_mutables"]["statistics"]["prior"]
    held_state = tree.get("state")
    state: dict[str, Any] = held_state if isinstance(held_state, dict) else {}
    moments = state.get("param_states")
    named = re.fullmatch(r"checkpoint_(\d+)", root.name)
    leaves = _Leaves(folder)
    try:
        if not (isinstance(moments, dict) and _are_of_adafactor(moments, tree["target"])):
            moments = None
        saved = np.ravel(leaves.read(state.get("step", int(named[1]) if named else 0), "state.step"))
        if saved.shape != (1,) or saved.dtype.kind not in "iu":
            raise UserError(f"{folder / FILE}: state.step is no number of a step")
        if step not in (None, int(saved[0])):
            raise UserError(f"no checkpoint of step {step} in {path}: there is {saved[0]}")
        return Checkpoint(
            folder=folder,
            step=int(saved[0]),
            params=leaves.read(tree["target"], "target"),
            moments=None if moments is None else leaves.read(moments, "state.param_states"),
        )
    except RecursionError as error:
        raise UserError(f"{folder / FILE} is no checkpoint of T5X: it is nested too deeply") from error


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


@dataclass(frozen=True)
class _InDatabase:
    """A leaf that lies under a name in the database."""

    name: str


def _list_database(folder: Path) -> Tree:
    try:
        keys = tensorstore.KvStore.open(_database(folder)).result().list().result()
        names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
        return unflatten_dict({name: _InDatabase(name) for name in names}, sep=".")
    except Exception as error:  # TensorStore's are of several kinds
        raise UserError(f"{folder / DATABASE} is damaged or no checkpoint of T5X ({_reason(error)})") from error


def _database(folder: Path) -> Tree:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}


def _are_of_adafactor(moments: Tree, params: Tree) -> bool:
    """Whether `moments` has, in place of every parameter, what Adafactor keeps of it."""
    if _is_leaf(params):
        return isinstance(moments, dict) and moments.keys() == {"m", "v", "v_col", "v_row"}
    if not isinstance(moments, dict) or moments.keys() != params.keys():
        return False
    return all(_are_of_adafactor(moments[key], child) for key, child in params.items())


def _is_leaf(node: Any) -> bool:
    return not isinstance(node, dict) or "driver" in node


class _Leaves:
    """Reads the arrays of a checkpoint, whatever they say of themselves: from its folder, and as much as lies there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._left = most_unpacked(folder)

    def read(self, node: Any, name: str) -> Any:
        """A tree like `node` with an array for every leaf, read from its zarr folder where it points to one."""
        if not _is_leaf(node):
            return {key: self.read(child, f"{name}.{key}") for key, child in node.items()}
        if isinstance(node, dict):
            node = self._read_zarr(self._pointed(node, name), name)
        elif isinstance(node, str):
            if not node.startswith(PLACEHOLDER):
                raise UserError(f"tensor {name} in {self.folder} is the text {node[:40]!r}")
            node = self._read_zarr(self._inside(node.removeprefix(PLACEHOLDER), name), name)
        elif isinstance(node, _InDatabase):
            node = self._read_database(node.name, name)
        array = np.asarray(node)
        if array.dtype.kind not in "iufV" or (array.dtype.kind == "V" and array.dtype != ml_dtypes.bfloat16):
            raise UserError(f"tensor {name} in {self.folder} is of {array.dtype}, not of numbers")
        if array.dtype == np.uint16:
            array = array.view(ml_dtypes.bfloat16)
        return array if array.dtype.kind == "i" else array.astype(np.float32, copy=False)

    def _pointed(self, pointer: Tree, name: str) -> Path:
        store = pointer.get("kvstore")
        path = (store.get("path") if isinstance(store, dict) else None) or pointer.get("path")
        if pointer["driver"] != "zarr" or not isinstance(path, str):
            driver = pointer["driver"]
            raise UserError(f"tensor {name} points to {path!r} by the driver {driver!r}, not to a zarr folder")
        return self._inside(path, name)

    def _inside(self, path: str, name: str) -> Path:
        if not path or "\0" in path or Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(f"tensor {name} points to {path[:80]!r}, not to a zarr folder in {self.folder}")
        return self.folder / path

    def _read_database(self, key: str, name: str) -> np.ndarray:
        try:
            database = _database(self.folder)
            said = tensorstore.KvStore.open(database).result().read(f"{key}/.zarray").result().value
            shape, chunks, dtype, _ = _layout(json.loads(said))
            self._claim(shape, chunks, dtype, name, f"{self.folder / DATABASE}")
            store = tensorstore.open({"driver": "zarr", "kvstore": database | {"path": f"{key}/"}}).result()
            return store.read().result()
        except UserError:
            raise
        except Exception as error:  # TensorStore's are of several kinds
            raise UserError(f"tensor {name} cannot be read from {self.folder} ({_reason(error)})") from error

    def _claim(self, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype, name: str, where: str) -> None:
        """UserError if an array is larger than all files can hold, with what was read before, or its chunks than it."""
        self._left -= math.prod(shape) * dtype.itemsize
        if self._left < 0 or any(chunk > max(size, 1) for size, chunk in zip(shape, chunks, strict=True)):
            raise UserError(
                f"tensor {name} is {list(shape)} in chunks of {list(chunks)} by {where}: more than the checkpoint's"
                " files can hold"
            )

    def _read_zarr(self, folder: Path, name: str) -> np.ndarray:
        """An array of zarr's version 2, as T5X writes them: packed by gzip, every chunk there."""
        try:
            if not (folder / ".zarray").is_file():
                raise UserError(f"tensor {name} is missing: there is no {folder}/.zarray")
            said = json.loads((folder / ".zarray").read_text("utf-8"))
            shape, chunks, dtype, packed = _layout(said, ("gzip", "zlib"))
            separator = said.get("dimension_separator", ".")
            self._claim(shape, chunks, dtype, name, f"{folder}/.zarray")
            array, size = np.empty(shape, dtype), math.prod(chunks) * dtype.itemsize
            for index in np.ndindex(*(-(-whole // part) for whole, part in zip(shape, chunks, strict=True))):
                path = folder / (separator.join(map(str, index)) or "0")
                if not path.is_file():  # to zarr it would be zeros; T5X writes them all, so this one was lost
                    raise UserError(f"tensor {name} is not whole: there is no {path}")
                chunk = np.frombuffer(_unpacked(path, size, packed), dtype).reshape(chunks)
                starts = [i * part for i, part in zip(index, chunks, strict=True)]
                counts = [min(part, whole - i) for i, part, whole in zip(starts, chunks, shape, strict=True)]
                place = tuple(slice(start, start + count) for start, count in zip(starts, counts, strict=True))
                array[place] = chunk[tuple(map(slice, counts))]
            return array
        except (ValueError, KeyError, TypeError, OSError, RecursionError, zlib.error) as error:
            raise UserError(f"tensor {name} cannot be read from {folder} ({_reason(error)})") from error


def _layout(said: Tree, packings: Sequence[str] = ()) -> tuple[tuple[int, ...], tuple[int, ...], np.dtype, bool]:
    """Shape, shape of the chunks, dtype, whether they are packed, of a .zarray; `packings`: by which it may be."""
    shape, chunks, compressor = said["shape"], said["chunks"], said.get("compressor")
    if not all(type(size) is int and size >= 0 for size in (*shape, *chunks)) or 0 in chunks:
        raise ValueError(f"shape {str(shape)[:80]} in chunks of {str(chunks)[:80]}")
    if said.get("order", "C") != "C" or said.get("filters") or said.get("dimension_separator", ".") not in (".", "/"):
        raise ValueError("it is laid out otherwise than T5X does")
    if packings and compressor is not None and compressor["id"] not in packings:
        raise ValueError(f"it is packed by {compressor['id']!r}, and T5X's are by gzip")
    name = said["dtype"]
    if name not in ZARR_DTYPES:
        raise ValueError(f"it is of dtype {str(name)[:40]!r}: choose from {', '.join(ZARR_DTYPES)}")
    dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    return tuple(shape), tuple(chunks), dtype, compressor is not None


def _unpacked(path: Path, size: int, packed: bool) -> bytes:
    """The `size` bytes of a chunk; ValueError if it has another number, without unpacking more."""
    data = path.read_bytes()
    if packed:
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # of gzip or zlib
        data = unpacker.decompress(data, size + 1)
        if not unpacker.eof:
            raise ValueError(f"{path.name} is truncated, or longer than its array")
    if len(data) != size:
        raise ValueError(f"{path.name} has {len(data)} bytes, not {size}")
    return data


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
    spec = pointer | {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
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
    from optax import FactoredState

    def is_factored(node: Any) -> bool:
        return isinstance(node, FactoredState)

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
