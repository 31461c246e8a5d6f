"""Folders of the diffusers port of the published models (its `SpectrogramDiffusionPipeline`), in and out.

    model_index.json                                         names the parts
    notes_encoder/  continuous_encoder/  decoder/            config.json and the weights, .safetensors or .bin
    scheduler/scheduler_config.json                          how it samples
    melgan/model.onnx                                        an inverter; may be absent

The port's networks are ours under other names, with every matrix transposed. What it does differently does not show in
its own pipeline (docs/spec.md 3.21): it counts the positions of a context that is masked in part from its start, as
`NetworkConfig.context_positions` = "regular" does, and where all notes and context are masked it averages over them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import CosineSchedule, SquaredCosineSchedule
from music_synth.errors import UserError, telling
from music_synth.files import check_inside
from music_synth.interop.diffusers_parts import NETWORKS, SHARED, Part
from music_synth.interop.tensor_files import read_tensors
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import Params
from music_synth.models.layers import NetworkConfig

PIPELINE = "SpectrogramDiffusionPipeline"
VERSION = "0.33.1"  # of diffusers, whose folders these are
INDEX, CONFIG = "model_index.json", "config.json"
SCHEDULER, INVERTER = "scheduler/scheduler_config.json", "melgan/model.onnx"
MAX_JSON = 2**20  # characters of a file of settings that are read
WEIGHTS = "diffusion_pytorch_model"  # .safetensors, or .bin
TOKENIZER = Tokenizer(granularity="slakh")  # what the port's MidiProcessor does
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_large": "large", "fixed_small": "small"}
# What the scheduler must say, as we have nothing else. Beside it are prediction_type, variance_type, clip_sample and
# num_train_timesteps, and settings that mean nothing here.
SCHEDULE = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
UNUSED = {"beta_start": 0.0001, "beta_end": 0.02, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
ALWAYS = ("_class_name", "beta_schedule")  # of SCHEDULE; older versions knew only what the others stand for now


class Pipeline(NamedTuple):
    """What a folder holds."""

    model: Diffusion
    tokenizer: Tokenizer
    params: Params  # NumPy arrays, float32; mapped into memory where they are float32 in the file
    inverter: Path | None  # an ONNX file, for `interop.inverters`


def read(folder: str | Path) -> Pipeline:
    """The model of a pipeline folder, which samples as its scheduler says: DDPM in 100 steps, without guidance.

    Raises:
      UserError: there is no such folder; it is of another pipeline; a file is missing, damaged or asks for what our
        networks cannot do; a tensor is missing, has another shape, or has no place.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give one with the {INDEX} of a {PIPELINE}")
    check_inside(folder, INDEX, "scheduler", "melgan", *NETWORKS)
    index = _read_json(folder / INDEX)
    if index.get("_class_name") != PIPELINE:
        raise UserError(f"{folder} holds a {index.get('_class_name')}, not a {PIPELINE} ({INDEX}, _class_name)")
    model = _read_model(folder)
    params: dict[str, Any] = {}
    for name, part in NETWORKS.items():
        params |= _read_weights(folder / name, part, model)
    inverter = folder / INVERTER if any(index.get("melgan") or ()) else None
    whole = inverter is not None and inverter.is_file()
    return Pipeline(model, TOKENIZER, unflatten_dict(params, sep="/"), inverter if whole else None)


def write(folder: str | Path, model: Any, params: Params, inverter: str | Path | None = None) -> None:
    """Writes a `Diffusion` as a folder that the port loads; `read` gives the same arrays back, bit for bit.

    A model with the continuous cosine schedule, which the published weights were trained with, gets the port's discrete
    one, as the published folders do. The port samples with DDPM, whatever the model's sampler is.

    inverter: an ONNX file to put beside it.

    Raises:
      UserError: the port has no network or schedule like this, or the folder cannot be written.
    """
    folder, network = Path(folder), model.network
    _check_writable(model)
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(_unstacked(params, network), sep="/").items()}
    with telling(f"cannot write into {folder}"):
        for name, part in NETWORKS.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            _write_json(folder / name / CONFIG, part.class_name, _settings(part, network))
            _write_weights(folder / name, part, network, flat)
        (folder / SCHEDULER).parent.mkdir(exist_ok=True)
        _write_json(folder / SCHEDULER, str(SCHEDULE["_class_name"]), _scheduler_settings(model))
        index: dict[str, Any] = {name: [part.library, part.class_name] for name, part in NETWORKS.items()}
        index |= {"scheduler": ["diffusers", "DDPMScheduler"], "melgan": [None, None]}
        if inverter is not None:
            (folder / INVERTER).parent.mkdir(exist_ok=True)
            if Path(inverter).resolve() != (folder / INVERTER).resolve():
                shutil.copyfile(inverter, folder / INVERTER)
            index["melgan"] = ["diffusers", "OnnxRuntimeModel"]
        _write_json(folder / INDEX, PIPELINE, index)


# --- reading -----------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no file {path}: {path.parent} is not whole")
    try:
        with path.open(encoding="utf-8") as file:
            value = json.loads(file.read(MAX_JSON))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} does not parse ({error}): get it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings but {str(value)[:50]!r}: get it again")
    return value


def _read_model(folder: Path) -> Diffusion:
    network: dict[str, Any] = {}
    said: dict[str, Path] = {}  # of each setting, the file that it is from
    for name, part in NETWORKS.items():
        path = folder / name / CONFIG
        config = _read_json(path)
        for key, value in {"_class_name": part.class_name, **part.fixed}.items():
            _expect(path, config, key, value)
        for theirs, ours in {**SHARED, **part.settings}.items():
            value = config.get(theirs)
            kinds = (int, float) if isinstance(getattr(NetworkConfig, ours), float) else (int,)
            if type(value) not in kinds:
                raise UserError(f"{path}: {theirs} = {value!r}, where {kinds[-1].__name__} is needed")
            if network.setdefault(ours, value) != value:
                raise UserError(f"{path}: {theirs} = {value}, but {network[ours]} in {said[ours]}; ours are the same")
            said.setdefault(ours, path)
    schedule = _read_json(folder / SCHEDULER)
    for key, value in SCHEDULE.items():
        if key in schedule or key in ALWAYS:
            _expect(folder / SCHEDULER, schedule, key, value)
    prediction_type = _choose(folder / SCHEDULER, schedule, "prediction_type", PREDICTION_TYPES)
    variance = _choose(folder / SCHEDULER, schedule, "variance_type", VARIANCES)
    try:
        return Diffusion(
            NetworkConfig(**network),
            SquaredCosineSchedule(schedule.get("num_train_timesteps", 1000)),
            prediction_type=prediction_type,
            loss_target="eps",
            loss_norm="l1",
            sampler=Sampler(
                "ddpm", 100, variance=variance, clip_x_0=bool(schedule.get("clip_sample", True)), grid="leading"
            ),
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: {error}") from error


def _expect(path: Path, config: Mapping[str, Any], key: str, value: Any) -> None:
    if config.get(key) != value:
        raise UserError(f"{path}: {key} = {config.get(key)!r}, and only {value!r} can be played here")


def _choose(path: Path, config: Mapping[str, Any], key: str, choices: Mapping[str, str]) -> str:
    value = config.get(key)
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"{path}: {key} = {value!r}, and only {', '.join(choices)} can be played here")
    return choices[value]


@functools.cache
def _shapes(model: Diffusion) -> dict[str, tuple[int, ...]]:
    """Path in our parameters -> shape."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes, sep="/").items()}


def _read_weights(folder: Path, part: Part, model: Diffusion) -> Params:
    """Path in our parameters -> array, of one part."""
    path = folder / f"{WEIGHTS}.safetensors"
    if not path.is_file():
        path = path.with_suffix(".bin")
    if not path.is_file():
        raise UserError(f"no weights in {folder}: {WEIGHTS}.safetensors or {WEIGHTS}.bin")
    tensors = read_tensors(path)
    params = {}
    for theirs, ours in part.names(_num_layers(part, model.network)).items():
        shape = _shapes(model)[f"{part.ours}/{ours}"]
        wanted = shape[::-1] if ours.endswith("kernel") else shape
        if theirs not in tensors:
            raise UserError(f"{path}: it has no tensor {theirs}, which {CONFIG} asks for with shape {wanted}")
        tensor = tensors.pop(theirs)
        if tensor.shape != wanted:
            raise UserError(f"{path}: {theirs} has shape {tensor.shape}, and {CONFIG} asks for {wanted}")
        params[f"{part.ours}/{ours}"] = _theirs(ours, tensor).astype(np.float32, copy=False)
    if tensors:
        name, tensor = next(iter(tensors.items()))
        raise UserError(f"{path}: {name} of shape {tensor.shape} has no place in the networks that {CONFIG} asks for")
    return params


def _theirs(path: str, array: np.ndarray) -> np.ndarray:
    """Ours to theirs, and theirs to ours: their matrices are [outputs, inputs]."""
    return array.T if path.endswith("kernel") else array


def _num_layers(part: Part, network: NetworkConfig) -> int:
    return getattr(network, part.settings["num_layers"])


# --- writing -----------------------------------------------------------------------------------------------------


def _check_writable(model: Diffusion) -> None:
    network = model.network
    for what, is_so in {
        "a model other than Diffusion": not isinstance(model, Diffusion),
        "a network without context": not network.context_frames,
        "a note roll": network.note_roll,
        'cross_attention = "sum"': network.cross_attention != "concat",
    }.items():
        if is_so:
            raise UserError(f"the diffusers port has no place for {what}: this model cannot be written for it")
    if model.prediction_type not in PREDICTION_TYPES.values():
        raise UserError(f"the diffusers port has no prediction_type {model.prediction_type!r}")
    if not isinstance(model.schedule, (SquaredCosineSchedule, CosineSchedule)):
        raise UserError(
            f"the diffusers port has no schedule like {model.schedule}: this model cannot be written for it"
        )


def _unstacked(params: Params, network: NetworkConfig) -> Params:
    """`params` with scanned layers taken apart: `layers` [L, ...] -> `layers_0`, `layers_1`, ..."""
    if not network.scan_layers:
        return params
    return {
        name: {key: value for key, value in part.items() if key != "layers"}
        | {
            f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], part["layers"])
            for i in range(len(jax.tree.leaves(part["layers"])[0]))
        }
        for name, part in params.items()
    }


def _settings(part: Part, network: NetworkConfig) -> dict[str, Any]:
    ours = {theirs: getattr(network, name) for theirs, name in {**SHARED, **part.settings}.items()}
    return ours | dict(part.fixed)


def _scheduler_settings(model: Diffusion) -> dict[str, Any]:
    schedule, sampler = model.schedule, model.sampler
    return {
        **{key: value for key, value in SCHEDULE.items() if key != "_class_name"},
        **UNUSED,
        "num_train_timesteps": schedule.num_steps if isinstance(schedule, SquaredCosineSchedule) else 1000,
        "prediction_type": _key_of(PREDICTION_TYPES, model.prediction_type),
        "variance_type": _key_of(VARIANCES, sampler.variance) or "fixed_large",
        "clip_sample": sampler.clip_x_0,
    }


def _key_of(choices: Mapping[str, str], value: str) -> str | None:
    return next((key for key, choice in choices.items() if choice == value), None)


def _write_json(path: Path, class_name: str, settings: Mapping[str, Any]) -> None:
    """As diffusers writes its files: class and version first, names in order."""
    text = json.dumps({"_class_name": class_name, "_diffusers_version": VERSION, **settings}, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")


def _write_weights(folder: Path, part: Part, network: NetworkConfig, flat: Mapping[str, np.ndarray]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    names = part.names(_num_layers(part, network))
    tensors = {theirs: np.ascontiguousarray(_theirs(o, flat[f"{part.ours}/{o}"])) for theirs, o in names.items()}
    path = folder / f"{WEIGHTS}.safetensors"
    part_file = path.with_suffix(".part")
    try:  # beside the old file and then in its place: the arrays may be mapped from that very file
        save_file(tensors, part_file, metadata={"format": "pt"})
        os.replace(part_file, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        part_file.unlink(missing_ok=True)
    path.with_suffix(".bin").unlink(missing_ok=True)  # where both are, which one counts is anyone's guess
