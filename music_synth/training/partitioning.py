"""One mesh with axes `data` and `model`: the same code for one CPU, eight GPUs or a TPU pod."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from music_synth.errors import UserError

# Logical axis of a parameter -> mesh axis. An axis that its mesh axis does not divide stays whole.
RULES = {
    "vocab": "model",
    "joined_kv": "model",  # heads times head_dim
    "mlp": "model",
    "embed": None,
    "mel": None,
    "length": None,
}


def make_mesh(model_parallelism: int = 1) -> Mesh:
    """Makes a mesh [data, model] over all devices of all processes; `model_parallelism` of them share one copy."""
    num_devices = jax.device_count()
    if model_parallelism < 1 or num_devices % model_parallelism:
        raise UserError(f"model_parallelism = {model_parallelism}: must divide the number of devices, {num_devices}")
    shape = (num_devices // model_parallelism, model_parallelism)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def param_shardings(mesh: Mesh, abstract_params: Any, logical_axes: Any) -> Any:
    """Lays the parameters out: a tree of shardings, from the logical names of their dimensions."""

    def one(leaf, names: tuple[str | None, ...]) -> NamedSharding:
        if len(names) != len(leaf.shape):
            raise ValueError(f"axes {names} do not fit shape {leaf.shape}")
        return NamedSharding(
            mesh, PartitionSpec(*(mesh_axis(mesh, *pair) for pair in zip(names, leaf.shape, strict=True)))
        )

    return jax.tree.map(one, abstract_params, logical_axes)


def mesh_axis(mesh: Mesh, name: str | None, size: int) -> str | None:
    """Returns the mesh axis for a dimension of `size` with a logical name; None: whole on every device."""
    axis = RULES.get(name or "")  # a name without a rule, such as "layers", stays whole
    return axis if axis is not None and size % mesh.shape[axis] == 0 else None


def like_params(mesh: Mesh, tree: Any, abstract_params: Any, shardings: Any) -> Any:
    """Lays out a tree that holds copies of the parameters among other things, such as an optimizer state.

    A leaf at the end of whose path stands a parameter's path, with the parameter's shape, is laid out as that
    parameter is (Adam's moments, say); all others (counters, factored moments) are whole on every device.
    """
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract_params), jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path, leaf) -> NamedSharding:
        for start in range(len(path)):
            shape, sharding = known.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return whole(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def over_data(mesh: Mesh) -> NamedSharding:
    """Spreads rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def whole(mesh: Mesh) -> NamedSharding:
    """Puts the same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int, num_microbatches: int) -> None:
    """Raises UserError unless every micro-batch spreads evenly over the data axis."""
    if num_microbatches < 1:
        raise UserError(f"num_microbatches = {num_microbatches}: must be at least 1")
    rows = mesh.shape["data"] * num_microbatches
    if batch_size % rows:
        raise UserError(
            f"batch size {batch_size} must be a multiple of {rows}: {mesh.shape['data']} devices along the data axis"
            f" times {num_microbatches} micro-batches"
        )


def put(sharding: NamedSharding, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Lays a global batch out over the mesh. Every process holds all of it and hands over the rows it must."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return {
        name: jax.make_array_from_callback(array.shape, sharding, np.asarray(array).__getitem__)
        for name, array in batch.items()
    }


def in_all_processes(truth: bool) -> bool:
    """Tells whether something is true in every process of the run; each waits here for the others."""
    if jax.process_count() == 1:
        return truth
    return bool(np.all(multihost_utils.process_allgather(np.asarray(truth))))


def state_shardings(mesh: Mesh, shapes: Any, logical_axes: Any) -> Any:
    """Lays out a whole `TrainState`, given its shapes and the parameters' logical axes."""
    params = param_shardings(mesh, shapes.params, logical_axes)
    return shapes.replace(
        step=whole(mesh),
        params=params,
        opt_state=like_params(mesh, shapes.opt_state, shapes.params, params),
        ema_params=None if shapes.ema_params is None else params,
        rng=whole(mesh),
    )
