"""A decoder from wherever it is kept: a run, an exported run, a checkpoint of T5X, a pipeline of diffusers."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from music_synth import config
from music_synth.errors import UserError
from music_synth.interop import diffusers, published, t5x
from music_synth.training.checkpoint import FOLDER, WEIGHTS, check_shapes, load_progress

KINDS = {
    "run": "a run of music_synth",
    "export": "an exported model of music_synth",
    "t5x": "a checkpoint of T5X",
    "diffusers": "a pipeline of diffusers",
}


@dataclass(frozen=True)
class Decoder:
    """A model with its parameters, and what else was found beside them."""

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


def kind_of(path: str | Path) -> str:
    """Which of KINDS `path` is.

    Raises:
        UserError: none; there is no such folder.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"no folder {path}: give a run, an exported model, a checkpoint of T5X or a diffusers pipeline")
    for kind, sign in (
        ("diffusers", path / diffusers.INDEX),
        ("export", path / WEIGHTS),
        ("run", path / FOLDER),
    ):
        if sign.exists():
            return kind
    if t5x.find(path):
        return "t5x"
    raise UserError(
        f"{path} is not recognized: a run has {FOLDER}/, an exported model {WEIGHTS}, a T5X checkpoint is"
        f" checkpoint_<step>/{t5x.FILE}, a diffusers pipeline has {diffusers.INDEX}"
    )


def read(path: str | Path, num_heads: int | None = None, gin_file: str | Path | None = None) -> Decoder:
    """Reads a decoder of any kind.

    Args:
        num_heads: of a T5X checkpoint without a gin file, where they are not of 64 channels.
        gin_file: of a T5X checkpoint; None: the config.gin that lies beside it, if any.

    Raises:
        UserError: it is not recognized, damaged, or no decoder of ours.
    """
    kind = kind_of(path)
    if kind == "t5x":
        return _read_t5x(Path(path), num_heads, gin_file)
    if num_heads is not None or gin_file is not None:
        raise UserError(f"--num_heads and --config are for checkpoints of T5X; {path} says itself what it is")
    return READERS[kind](Path(path))


def _read_run(path: Path) -> Decoder:
    said = path / config.CONFIG_FILE
    values = config.read_values(said) if said.is_file() else {}
    if "Vocoder.generator" in values:
        raise UserError(f"{path} is a run of an inverter: name a file to make of it, .onnx or .safetensors")
    model, tokenizer, params, step = config.load_run(path)
    if values.get("train.ema_decay", 1.0):  # moments belong to other parameters than the average, which plays
        return Decoder("run", path, model, tokenizer, params, step, remarks=("the moving average of the parameters",))
    if values.get("train.optimizer") != "@adafactor()":
        return Decoder("run", path, model, tokenizer, params, step)
    moments = t5x.moments_of(load_progress(path, step)["opt_state"])
    return Decoder("run", path, model, tokenizer, params, step, moments)


def _read_export(path: Path) -> Decoder:
    model, tokenizer, params, step = config.load_run(path)
    return Decoder("export", path, model, tokenizer, params, step)


def _read_t5x(path: Path, num_heads: int | None = None, gin_file: str | Path | None = None) -> Decoder:
    checkpoint = t5x.read(path)
    found = Path(gin_file) if gin_file else t5x.find_config(checkpoint.folder)
    given = config.read_values(found) if found else {}
    try:
        model, tokenizer, assumed = published.model_of(checkpoint.params, given, checkpoint.folder, num_heads)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:  # of values that nothing here expects
        raise UserError(f"{found or checkpoint.folder} does not describe a model that can be had: {error}") from error
    check_shapes(checkpoint.params, model, checkpoint.folder, "give the gin file of its training by --config")
    remarks = [f"settings from {found}" if found else "no config.gin beside it: sizes from the tensors"]
    remarks += [f"assumed: {', '.join(assumed)}"] * bool(assumed)
    remarks.append("with Adafactor's moments" if checkpoint.moments is not None else "without moments of Adafactor")
    return Decoder(
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


def _read_diffusers(path: Path) -> Decoder:
    pipeline = diffusers.read(path)
    network = pipeline.model.network
    tokenizer = dataclasses.replace(
        pipeline.tokenizer, segment_frames=network.target_frames, max_tokens=network.max_tokens
    )
    remarks = (f"its inverter plays by --inverter {pipeline.inverter}",) if pipeline.inverter else ()
    return Decoder(
        "diffusers",
        path,
        pipeline.model,
        tokenizer,
        pipeline.params,
        step=0,
        remarks=remarks,
        inverter=pipeline.inverter,
    )


READERS: dict[str, Callable[[Path], Decoder]] = {
    "run": _read_run,
    "export": _read_export,
    "t5x": _read_t5x,
    "diffusers": _read_diffusers,
}


@dataclass(frozen=True)
class InitialCheckpoint:
    """Where a new run takes its parameters from; its optimizer and its count of steps begin afresh.

    To go on with a T5X run as it was, moments and step included, convert it and train in the folder that this makes.
    """

    path: str | None = None  # anything that `read` knows; None: the parameters are random

    def __str__(self) -> str:
        return str(self.path)

    def __call__(self, model: Any) -> Any:
        """The parameters, for `model`; None where there is no path.

        Warns where `model` computes something else from the same parameters than the model they are of.

        Raises:
            UserError: the path is not recognized, or its tensors are of other names or shapes.
        """
        if self.path is None:
            return None
        decoder = read(self.path, model.network.num_heads if kind_of(self.path) == "t5x" else None)
        check_shapes(decoder.params, model, self.path, "train a network of its sizes, or start from another")
        theirs, ours = computed_by(decoder.model), computed_by(model)
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                warnings.warn(f"{name} is {theirs.get(name)} in {self.path} and {ours.get(name)} here", stacklevel=2)
        return decoder.params


def computed_by(model: Any) -> dict[str, Any]:
    """What, beside parameters, decides what a model's network computes: {"Diffusion.prediction_type": "eps", ...}."""
    names = ("schedule", "prediction_type", "data_power", "output", "as_published")
    found = {f"{type(model).__name__}.{name}": getattr(model, name) for name in names if hasattr(model, name)}
    network = ("num_heads", "head_dim", "context_positions", "cross_attention", "note_roll", "max_noise_time")
    return found | {f"NetworkConfig.{name}": getattr(model.network, name) for name in network}
