"""Decoders of other projects: a checkpoint of T5X, a pipeline folder of diffusers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from music_synth.errors import UserError
from music_synth.files import check_inside
from music_synth.gin_files import included_around, included_beside, read, read_values
from music_synth.gin_objects import PARTS, Maker
from music_synth.interop import diffusers, published, t5x
from music_synth.training.checkpoint import check_shapes

OURS = "DecoderModel.decoder"  # in the gin file of a run by `t5x_model`
KINDS = {
    "run": "a run of music_synth",
    "export": "an exported model of music_synth",
    "t5x": "a checkpoint of T5X",
    "diffusers": "a pipeline of diffusers",
}


@dataclass(frozen=True)
class Trained:
    """A decoder, a model with its parameters, and what else was found beside them."""

    kind: str  # of KINDS
    path: Path
    model: Any
    tokenizer: Any
    params: Any  # nested dictionaries of float32 arrays
    step: int
    moments: Any = None  # of Adafactor, as in `t5x.Checkpoint`
    given: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a gin file of T5X binds
    remarks: tuple[str, ...] = ()  # lines on what was found and assumed
    inverter: Path | None = None  # an ONNX file, in a pipeline of diffusers


def read_t5x(
    path: Path, step: int | None = None, num_heads: int | None = None, gin_file: Path | None = None
) -> Trained:
    """Reads a checkpoint of T5X.

    Args:
        step: which of several; None: the newest.
        num_heads: of a checkpoint without a gin file, where they are not of 64 channels.
        gin_file: None: the config.gin that lies beside it, if any.

    Raises:
        UserError: it is damaged, or no decoder of ours; a gin file that does not describe one.
    """
    checkpoint = t5x.read(path, step)
    found = gin_file or t5x.find_config(checkpoint.folder)
    if found is not None and gin_file is None:
        check_inside(found.parent, found.name)
    find = included_around if gin_file else included_beside
    given = {} if found is None else read_values(found, find)
    assumed: list[str] = []
    try:
        if found is not None and OURS in given:
            maker = Maker(read(found, find), PARTS, str(found))
            model, tokenizer = maker.value(OURS), maker.value("task.tokenizer")
        else:
            model, tokenizer, assumed = published.model_of(checkpoint.params, given, checkpoint.folder, num_heads)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:  # of values that nothing here expects
        raise UserError(f"{found or checkpoint.folder} does not describe a model that can be had: {error}") from error
    check_shapes(checkpoint.params, model, checkpoint.folder, "give the gin file of its training by --config")
    remarks = [f"settings from {found}" if found else "no config.gin beside it: sizes from the tensors"]
    remarks += [f"assumed: {', '.join(assumed)}"] * bool(assumed)
    remarks.append("with Adafactor's moments" if checkpoint.moments is not None else "without moments of Adafactor")
    return Trained(
        "t5x",
        checkpoint.folder,
        model,
        tokenizer,
        checkpoint.params,
        checkpoint.step,
        checkpoint.moments,
        given,
        tuple(remarks),
    )


def read_diffusers(path: Path) -> Trained:
    """Reads a pipeline folder of diffusers; errors as of `diffusers.read`."""
    pipeline = diffusers.read(path)
    network = pipeline.model.network
    tokenizer = dataclasses.replace(
        pipeline.tokenizer, segment_frames=network.target_frames, max_tokens=network.max_tokens
    )
    remarks = (f"its inverter plays by --inverter {pipeline.inverter}",) if pipeline.inverter else ()
    return Trained(
        "diffusers",
        path,
        pipeline.model,
        tokenizer,
        pipeline.params,
        step=0,
        remarks=remarks,
        inverter=pipeline.inverter,
    )


def computed_by(model: Any) -> dict[str, Any]:
    """What, beside parameters, decides what a model's network computes: {"Diffusion.prediction_type": "eps", ...}."""
    names = ("schedule", "prediction_type", "output", "as_published")
    found = {f"{type(model).__name__}.{name}": getattr(model, name) for name in names if hasattr(model, name)}
    network = ("num_heads", "head_dim", "context_positions", "cross_attention", "note_roll", "max_noise_time")
    return found | {f"NetworkConfig.{name}": getattr(model.network, name) for name in network}
