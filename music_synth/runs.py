"""Trained things, brought back from wherever they are kept:

    model, tokenizer, params, step = runs.load("runs/diffusion")  # or "shipped", what comes with the package
    inverter = runs.load_inverter("runs/istft")

What somebody sent is data: of its config, a model and a tokenizer are made and nothing else (`gin_objects.PARTS`), and
no file outside the folder is read. A SavedModel of TensorFlow is a program, and wants `trust`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from music_synth import gin_files
from music_synth.errors import UserError
from music_synth.files import check_inside
from music_synth.gin_files import CONFIG_FILE
from music_synth.gin_objects import OPTIMIZERS, PARTS, Maker
from music_synth.interop import decoders, diffusers, inverters, t5x
from music_synth.interop.decoders import Trained
from music_synth.interop.model_card import WEIGHTS, load_exported
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import Params, SpectrogramModel
from music_synth.playing import Decoder
from music_synth.training.checkpoint import FOLDER, check_shapes, load_params, load_progress
from music_synth.vocoder import neural
from music_synth.vocoder.inverter import GRIFFIN_LIM, MEL_ONLY, GriffinLim, Inverter, MelOnly

SHIPPED = "shipped"
DECODERS = {
    SHIPPED: "diffusion",
    "autoregressive": "autoregressive",
}  # that ship, by name: their folders in SHIPPED_DIR
SHIPPED_DIR = Path(__file__).with_name("shipped")


class Run(NamedTuple):
    """A trained decoder."""

    model: SpectrogramModel
    tokenizer: Tokenizer
    params: Params
    step: int

    def decoder(self, timbre: str = "") -> Decoder:
        """Makes the decoder that plays it, as what is named `timbre`; UserError if it knows no such timbre."""
        return Decoder(self.model, self.params, self.tokenizer, timbre)


# --- decoders ----------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike, step: int | None = None, ema: bool = True) -> Run:
    """Loads a decoder: a training run, an exported model, a checkpoint of T5X or a pipeline folder of diffusers.

    Args:
        path: of it, or the name of one that ships: "shipped", a diffusion decoder, or "autoregressive".
        step: of a run or of T5X, which checkpoint; None: the newest whole one.
        ema: the moving average of the parameters where a run keeps one, else the parameters themselves.

    Raises:
        UserError: it is none of these, or damaged, or asks for more than a model; no such step; tokenizer and network
            do not belong together.
    """
    trained = load_trained(path, step, ema)
    return Run(trained.model, trained.tokenizer, trained.params, trained.step)


def load_trained(
    path: str | os.PathLike,
    step: int | None = None,
    ema: bool = True,
    num_heads: int | None = None,
    gin_file: str | os.PathLike | None = None,
) -> Trained:
    """`load`, with what else was found beside the decoder.

    Args:
        num_heads: of a T5X checkpoint without a gin file, where they are not of 64 channels.
        gin_file: of a T5X checkpoint; None: the config.gin that lies beside it, if any.
    """
    folder, kind = find(path), kind_of(path)
    if kind != "t5x" and (num_heads is not None or gin_file is not None):
        raise UserError(f"--num_heads and --config are for checkpoints of T5X; {path} says itself what it is")
    if kind == "t5x":
        trained = decoders.read_t5x(folder, step, num_heads, None if gin_file is None else Path(gin_file))
    elif kind == "diffusers":
        trained = decoders.read_diffusers(folder)
        if step is not None:
            raise UserError(f"no checkpoint of step {step} in {path}: {decoders.KINDS[kind]} has no steps")
    else:
        trained = _read_run(kind, folder, step, ema)
    trained.model.check_tokenizer(trained.tokenizer, f"{path}: ")
    return trained


def find(path: str | os.PathLike) -> Path:
    """Finds the folder of a decoder that ships by its name; what there is at `path` comes first.

    Raises:
        UserError: no weights are installed under that name.
    """
    path = Path(path)
    if str(path) not in DECODERS or path.exists():
        return path
    folder = SHIPPED_DIR / DECODERS[str(path)]
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"this copy of music_synth has no weights of {str(path)!r} ({folder}): give a folder, or train")
    return folder


def kind_of(path: str | os.PathLike) -> str:
    """Which of `decoders.KINDS` there is at `path`; UserError if none."""
    path = find(path)
    if not path.exists():
        raise UserError(f"no folder {path}: give a run, an exported model, a checkpoint of T5X or a diffusers pipeline")
    signs = {"diffusers": diffusers.INDEX, "export": WEIGHTS, "run": FOLDER}
    for kind, sign in signs.items():
        if (path / sign).exists():
            return kind
    if t5x.find(path):
        return "t5x"
    if (path / CONFIG_FILE).is_file():
        return "run"  # whose checkpoints are missing
    raise UserError(
        f"{path} is not recognized: a run has {CONFIG_FILE} and {FOLDER}/, an exported model {WEIGHTS}, a T5X"
        f" checkpoint is checkpoint_<step>/{t5x.FILE}, a diffusers pipeline has {diffusers.INDEX}"
    )


def _read_run(kind: str, folder: Path, step: int | None, ema: bool) -> Trained:
    maker = _maker(folder, PARTS)
    if "VocoderObjective.generator" in maker.bindings:
        raise UserError(
            f"{folder} is a run of an inverter, not of a decoder: it plays by --inverter, and `convert` makes a file of"
            " it, .onnx or .safetensors"
        )
    model, tokenizer = maker.value("train.model"), maker.value("Feed.tokenizer")
    for key, made, wanted in (("train.model", model, SpectrogramModel), ("Feed.tokenizer", tokenizer, Tokenizer)):
        if not isinstance(made, wanted):
            raise UserError(f"{folder / CONFIG_FILE}: {key} = {maker.bindings[key]!r} is no {wanted.__name__}")
    if kind == "export":
        params, step = load_exported(folder / WEIGHTS, step)
        if folder.parent != SHIPPED_DIR:  # whose shapes a test checks: it takes a second
            check_shapes(params, model, where=f"{folder}, step {step}")
        return Trained(kind, folder, model, tokenizer, params, step)
    trained = Trained(kind, folder, model, tokenizer, *load_params(folder, step, ema, model))
    if maker.bindings.get("train.ema_decay", 1.0):  # moments are of other parameters than the average, which plays
        return replace(trained, remarks=("the moving average of the parameters",))
    if repr(maker.bindings.get("train.optimizer")) == "@adafactor()":
        return replace(trained, moments=t5x.moments_of(load_progress(folder, trained.step)["opt_state"]))
    return trained


def load_optimizer(folder: str | os.PathLike) -> tuple[Any, float]:
    """Makes (optimizer, decay of the moving average) as the config.gin of a run says."""
    maker = _maker(Path(folder), OPTIMIZERS)
    return maker.value("train.optimizer"), maker.value("train.ema_decay")


def _maker(folder: Path, table: dict[str, str]) -> Maker:
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the MODEL_DIR of a training run")
    if not path.is_file():
        raise UserError(f"no {CONFIG_FILE} in {folder}: give the MODEL_DIR of a training run")
    check_inside(folder, CONFIG_FILE, FOLDER, WEIGHTS)
    maker = Maker(gin_files.read(path, gin_files.none_included), table, str(path))
    if "train.model" not in maker.bindings:
        raise UserError(f"{path} does not say train.model: it is not the config of a training run")
    return maker


# --- inverters ---------------------------------------------------------------------------------------------------


def load_inverter(name: str | os.PathLike | None = None, trust: bool = False) -> Inverter:
    """Loads an inverter by name or path.

    Args:
        name: None or "shipped": the trained one of the package; "mel_only": the same, not told the notes;
            "griffin_lim"; a .safetensors file; the MODEL_DIR of a run of istft.gin, informed.gin or melgan.gin; or a
            model of another project: an .onnx file or a folder with a SavedModel.
        trust: whether a SavedModel, which is a program, may run.

    Raises:
        UserError: there is none, it cannot be read, or it is a SavedModel without `trust`.
    """
    if name is None or str(name) == SHIPPED:
        return neural.load_weights(neural.SHIPPED)
    if str(name) == MEL_ONLY:
        return MelOnly(neural.load_weights(neural.SHIPPED))
    if str(name) == GRIFFIN_LIM:
        return GriffinLim()
    path = Path(name)
    if (path / CONFIG_FILE).is_file():
        return neural.NeuralInverter(*load_generator(path))
    if path.suffix == ".onnx":
        return inverters.load_onnx(path)
    if (path / "saved_model.pb").is_file() or (path / "saved_model.pbtxt").is_file():
        return inverters.load_saved_model(path, trust)
    return neural.load_weights(path)


def load_generator(model_dir: str | os.PathLike) -> tuple[Any, Any]:
    """Loads (generator, its averaged parameters) of a run that trained an inverter; errors as of `load`."""
    folder = Path(model_dir)
    model = _maker(folder, PARTS).value("train.model")
    if not hasattr(model, "generator"):
        raise UserError(
            f"{folder} is a run of {type(model).__name__}, not of an inverter (istft, informed, melgan.gin)"
        )
    return model.generator, load_params(folder, model=model)[0]["generator"]
