"""What a new run begins with: the parameters of another, fitted to its own network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import jax

from music_synth.interop import decoders
from music_synth.models.base import Params
from music_synth.runs import kind_of, load_trained
from music_synth.training.checkpoint import check_shapes

OPTIONAL_PARTS = {"timbre", "harmonics", "table", "latents", "note_posterior"}  # that a network may have


@dataclass(frozen=True)
class InitialCheckpoint:
    """Where a new run takes its parameters from; its optimizer and its count of steps begin afresh.

    To go on with a T5X run as it was, moments and step included, convert it and train in the folder that this makes.
    """

    path: str | None = None  # anything that `runs.load` knows; None: the parameters are random

    def __str__(self) -> str:
        return str(self.path)

    def __call__(self, model: Any) -> Any:
        """Loads the parameters, for `model`; None where there is no path.

        Of a decoder of the other kind, what both share; the rest is drawn at random. Warns where `model`
        computes something else from the same parameters than the model they are of.

        Raises:
            UserError: the path is not recognized, or its tensors are of other names or shapes.
        """
        if self.path is None:
            return None
        trained = load_trained(self.path, num_heads=model.network.num_heads if kind_of(self.path) == "t5x" else None)
        params = with_optional_parts(trained.params, model)
        same_kind = isinstance(trained.model, type(model))
        if not same_kind:
            params = shared_by_kinds(params, model, self.path)
        check_shapes(params, model, self.path, "train a network of its sizes, or start from another")
        theirs, ours = decoders.computed_by(trained.model), decoders.computed_by(model)
        for name in sorted(theirs.keys() | ours.keys() if same_kind else theirs.keys() & ours.keys()):
            if theirs.get(name) != ours.get(name):
                warnings.warn(f"{name} is {theirs.get(name)} in {self.path} and {ours.get(name)} here", stacklevel=2)
        return params


def with_optional_parts(params: Params, model: Any) -> Params:
    """Leaves out `OPTIONAL_PARTS` that `model` has not, and adds untrained ones; of these harmonics alone are heard."""
    wanted = jax.eval_shape(model.init, jax.random.key(0))
    if str(jax.tree.structure(wanted)) == str(jax.tree.structure(params)):
        return params

    def fit(theirs: Any, ours: Any) -> Any:
        if not isinstance(ours, dict) or not isinstance(theirs, dict):
            return theirs
        kept = {name: part for name, part in theirs.items() if name in ours or name not in OPTIONAL_PARTS}
        kept = {name: fit(part, ours.get(name)) for name, part in kept.items()}
        return kept | {name: ours[name] for name in OPTIONAL_PARTS & (ours.keys() - kept.keys())}

    return fit(params, jax.device_get(jax.jit(model.init)(jax.random.key(0))))


def shared_by_kinds(params: Params, model: Any, where: Any) -> Params:
    """Takes what decoders of two kinds have in common, all that reads notes; the rest of `model` is drawn at random."""
    notes = params.get("encoder", params.get("token_encoder"))  # its name depends on what stands beside it
    given = params | {"encoder": notes, "token_encoder": notes}
    fresh = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    random = [part for part in fresh if part not in given or part == "decoder"]
    warnings.warn(f"{where} is a decoder of another kind: {', '.join(random)} here begin at random", stacklevel=3)

    def taken(ours: Any, theirs: Any) -> Any:
        if not isinstance(ours, dict):
            return theirs
        return {name: taken(part, theirs[name]) if name in theirs else part for name, part in ours.items()}

    return {name: part if name in random else taken(part, given[name]) for name, part in fresh.items()}
