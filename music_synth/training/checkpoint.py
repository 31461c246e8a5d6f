"""Checkpoints on Orbax: MODEL_DIR/checkpoints/<step>/{params, ema_params, progress, meta}.

Orbax writes a checkpoint under another name and renames it when it is whole, so killing the process at any moment
leaves only whole ones. What a disk does to a file afterwards is caught too: every array's checksum is stored, and a
newest checkpoint that cannot be read or does not match is passed over for the one before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import unflatten_dict

from music_synth.errors import UserError
from music_synth.files import most_unpacked, sync_folder
from music_synth.training.partitioning import in_all_processes

if TYPE_CHECKING:
    from music_synth.training.step import TrainState

FOLDER = "checkpoints"
DAMAGED = "damaged-"  # a checkpoint that training passed over is renamed to damaged-<step>, out of the way


class Damaged(Exception):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpointer:
    """Saves and restores the state of the run in `model_dir`, keeping the newest `keep` checkpoints."""

    def __init__(self, model_dir: str | Path, keep: int = 3):
        self.folder = (Path(model_dir) / FOLDER).absolute()
        self.keep = keep
        self._manager = None

    def save(self, state: TrainState, data_position: int) -> None:
        """Writes the state and the number of the feed's next batch; returns when they are on the disk (fsync).

        Only then do the oldest checkpoints beyond `keep` go.

        Raises:
            UserError: it cannot be written; the checkpoints before it are untouched.
        """
        step = int(state.step)
        items = _items(state)
        meta = {"step": step, "data_position": data_position, "checksums": _checksums(items)}
        ocp = _orbax()
        arguments = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        arguments["meta"] = ocp.args.JsonSave(meta)
        reason = None
        with _quiet_orbax() as settle:
            try:
                manager = self._open_manager()
                manager.save(step, args=ocp.args.Composite(**arguments), force=True)
                if jax.process_index() == 0:
                    sync_folder(self.folder / str(step))
                for old in sorted(manager.all_steps())[: -self.keep]:
                    manager.delete(old)
            except (OSError, ValueError) as error:  # TensorStore says ValueError when the disk is full
                reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].partition(" [")[0]
            if reason is not None:
                settle()
        if reason is not None:
            for part in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(part, ignore_errors=True)
            raise UserError(
                f"cannot save checkpoint {step} in {self.folder}: {reason}; when that is mended, the same command goes"
                " on from the newest checkpoint"
            )

    def restore_latest(self, like: TrainState) -> tuple[TrainState, int] | None:
        """Reads the newest whole checkpoint as (state, data position), laid out as `like` (shapes with shardings) says.

        None where there is none. UserError for a checkpoint of other shapes, and where every one is damaged.
        """
        damaged = []
        restored = None
        for step in reversed(saved_steps(self.folder)):
            path = self.folder / str(step)
            error = None
            try:
                restored = self._restore(path, like)
            except Damaged as damage:
                error = damage
            if in_all_processes(restored is not None):
                break
            restored = None
            _warn_damaged(path, error)
            damaged.append(path)
        if damaged and restored is None:
            raise UserError(
                f"no checkpoint in {self.folder} can be read: remove the folder to start afresh, or choose"
                " another MODEL_DIR"
            )
        if jax.process_index() == 0:
            for path in damaged:
                path.rename(path.with_name(DAMAGED + path.name))
        in_all_processes(True)  # none goes on before the damaged ones are out of the way
        return restored

    def _restore(self, path: Path, like: TrainState) -> tuple[TrainState, int]:
        wanted = _items(like)
        meta = _read_meta(path)
        items = {name: _restore_item(path, name, tree) for name, tree in wanted.items()}
        if _checksums(items) != {name: meta["checksums"].get(name) for name in items}:
            raise Damaged("checksums differ")
        progress = items["progress"]
        return (
            dataclasses.replace(
                like,
                step=progress["step"],
                params=items["params"],
                opt_state=_from_paths(like.opt_state, progress["opt_state"]),
                ema_params=items.get("ema_params"),
                rng=progress["rng"],
            ),
            int(meta["data_position"]),
        )

    def _open_manager(self) -> Any:
        if self._manager is None:  # only now: opening clears half-written folders away, which a reader must not do
            ocp = _orbax()
            options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager


def load_params(model_dir: str | Path, step: int | None = None, ema: bool = True, model: Any = None) -> tuple[Any, int]:
    """Reads the parameters of a run as a nested dictionary of NumPy arrays, and the step they are of.

    Args:
        model_dir: the run's MODEL_DIR.
        step: which checkpoint; None: the newest whole one.
        ema: the moving average where the run keeps one, else the parameters themselves.
        model: whose parameters they must be; this is known before they are read.

    Raises:
        UserError: no folder, no checkpoint in it, no such step, none that can be read, or one of another model.
    """
    like = None if model is None else jax.eval_shape(model.init, jax.random.key(0))
    return _load(model_dir, step, lambda names: "ema_params" if ema and "ema_params" in names else "params", like)


def load_progress(model_dir: str | Path, step: int | None = None) -> dict[str, Any]:
    """Reads what a run keeps beside its parameters: "step", "rng" and "opt_state" (dictionaries for named tuples).

    Arguments and errors as of `load_params`.
    """
    return _load(model_dir, step, lambda names: "progress")[0]


def _load(
    model_dir: str | Path, step: int | None, choose: Callable[[Collection[str]], str], like: Any = None
) -> tuple[Any, int]:
    """One item of a checkpoint, chosen from the names of what is there, of the shapes of `like`; and its step."""
    if not Path(model_dir).is_dir():
        raise UserError(f"no folder {model_dir}: give the MODEL_DIR of a training run")
    folder = (Path(model_dir) / FOLDER).absolute()
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {model_dir}: train first, or give the MODEL_DIR of a training run")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {model_dir}: there are {', '.join(map(str, steps))}")
    for candidate in reversed(steps) if step is None else [step]:
        path = folder / str(candidate)
        try:
            return _load_item(path, choose, like), candidate
        except Damaged as error:
            _warn_damaged(path, error)
    raise UserError(f"no readable checkpoint {'' if step is None else f'of step {step} '}in {model_dir}")


def _load_item(path: Path, choose: Callable[[Collection[str]], str], like: Any) -> Any:
    meta = _read_meta(path)
    name = choose(meta["checksums"])
    shapes = _stored_shapes(path, name)
    if like is not None:
        _check_shapes(shapes, like, f"{path.parent.parent}, step {path.name}")
    if sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes.values()) > most_unpacked(path / name):
        raise Damaged(f"{name}: its arrays are larger than its files can hold")
    structs = {key: jax.ShapeDtypeStruct(shape, dtype) for key, (shape, dtype) in shapes.items()}
    tree = unflatten_dict(structs, sep="/")
    as_numpy = _orbax().RestoreArgs(restore_type=np.ndarray)
    restore_args = jax.tree.map(lambda leaf: as_numpy, tree)
    item = _read(path, name, tree, restore_args)
    if _checksums({name: item})[name] != meta["checksums"].get(name):
        raise Damaged("checksums differ")
    return item


def saved_steps(folder: Path) -> list[int]:
    """Lists the steps of the checkpoints in a run's checkpoint folder, damaged or not, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir())


OTHER_RUN = "use the config.gin beside it, or another MODEL_DIR"


def check_shapes(params: Any, model: Any, where: Any, remedy: str = OTHER_RUN) -> None:
    """Raises UserError that names the first tensor in which parameters differ from those of `model`, and the remedy."""
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    _check_shapes({k: (tuple(v.shape), v.dtype) for k, v in _paths(params).items()}, wanted, where, remedy)


# --- one item of a checkpoint ------------------------------------------------------------------------------------


def _items(state: TrainState) -> dict[str, Any]:
    """What is saved under which name; the averages and parameters apart, so that playing reads only one of them."""
    items = {"params": state.params}
    if state.ema_params is not None:
        items["ema_params"] = state.ema_params
    # Named tuples as dictionaries: files outlive optax's classes.
    opt_state = unflatten_dict(_paths(state.opt_state), sep="/")
    items["progress"] = {"step": state.step, "rng": state.rng, "opt_state": opt_state}
    return items


def _restore_item(path: Path, name: str, like: Any) -> Any:
    if not (path / name).is_dir():
        raise _different(path, f"it holds no {name}, which this configuration needs")
    _check_shapes(_stored_shapes(path, name), like, f"{path} ({name})")
    args_of = _orbax().ArrayRestoreArgs
    restore_args = jax.tree.map(
        lambda leaf: args_of(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype), like
    )
    return _read(path, name, like, restore_args)


def _read(path: Path, name: str, like: Any, restore_args: Any) -> Any:
    ocp = _orbax()
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=restore_args)
    with _damage_in(name):
        return ocp.PyTreeCheckpointHandler().restore(epath.Path(path / name), args=arguments)


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        if not isinstance(meta["checksums"], dict) or not isinstance(meta["data_position"], int):
            raise TypeError("it does not say what was saved")
        return meta
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(f"meta: {error}") from error


def _stored_shapes(path: Path, name: str) -> dict[str, tuple[tuple[int, ...], Any]]:
    with _damage_in(name):
        if not (path / name / "manifest.ocdbt").is_file():  # without it Orbax takes names for paths
            raise Damaged("no manifest.ocdbt")
        leaves = _paths(_orbax().PyTreeCheckpointHandler().metadata(epath.Path(path / name)).tree)
        for key, leaf in leaves.items():
            if any(part > max(size, 1) for part, size in zip(leaf.storage.chunk_shape, leaf.shape, strict=True)):
                raise Damaged(f"{key} has chunks larger than itself")
        return {key: (tuple(leaf.shape), np.dtype(leaf.dtype)) for key, leaf in leaves.items()}


def _orbax() -> Any:
    """Imports Orbax, which takes a fifth of the time that a command needs to begin, and only checkpoints need it."""
    import orbax.checkpoint

    return orbax.checkpoint


@contextlib.contextmanager
def _damage_in(name: str) -> Iterator[None]:
    """Turns whatever Orbax and TensorStore raise, from KeyError to a bare Exception, into `Damaged`."""
    reason = None
    with _quiet_orbax() as settle:
        try:
            yield
        except Exception as error:
            reason = str(error)
        if reason is not None:
            settle()
    if reason is not None:
        raise Damaged(f"{name}: {reason}")


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[Callable[[], None]]:
    """Keeps Orbax from printing a page for each of its threads that an error ends; the error tells it all.

    Yields what is to be called after an error, outside of the `except` that holds what the threads hold.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def settle() -> None:
        gc.collect()
        time.sleep(0.2)  # for the other reads and writes, which are half done

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield settle
    finally:
        sys.unraisablehook = hook
        logger.setLevel(level)


def _check_shapes(
    stored: dict[str, tuple[tuple[int, ...], Any]], like: Any, where: Any, remedy: str = OTHER_RUN
) -> None:
    wanted = _paths(like)
    for key, leaf in wanted.items():
        if key not in stored:
            raise _different(where, f"it has no {key}, which this configuration needs with shape {leaf.shape}", remedy)
        if stored[key][0] != tuple(leaf.shape):
            raise _different(where, f"{key} has shape {stored[key][0]} there and {tuple(leaf.shape)} here", remedy)
    for key, (shape, _) in stored.items():
        if key not in wanted:
            raise _different(where, f"it has {key} with shape {shape}, which this configuration lacks", remedy)


def _different(where: Any, difference: str, remedy: str = OTHER_RUN) -> UserError:
    return UserError(f"checkpoint {where} is of another configuration: {difference}; {remedy}")


def _warn_damaged(path: Path, error: Damaged | None) -> None:
    reason = " ".join(str(error or "seen by another process").split())[:200]
    warnings.warn(f"checkpoint {path} is damaged and passed over ({reason})", stacklevel=3)


@jax.jit
def _sums(tree: Any) -> Any:
    """Sum of the bits of each array as unsigned integers: exact in any order, so on any number of devices."""

    def one(leaf):
        bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[leaf.dtype.itemsize]
        return jnp.sum(jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint32), dtype=jnp.uint32)

    return jax.tree.map(one, tree)


def _checksums(items: dict[str, Any]) -> dict[str, dict[str, int]]:
    sums = jax.device_get(_sums(items))
    return {name: {key: int(value) for key, value in _paths(tree).items()} for name, tree in sums.items()}


def _paths(tree: Any) -> dict[str, Any]:
    """Leaves by the names on their path: {"decoder/layers_0/mlp/wi/kernel": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _from_paths(like: Any, nested: Any) -> Any:
    leaves = _paths(nested)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in _paths(like)])
