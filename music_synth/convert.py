"""Converts a decoder from one form to another:

    python -m music_synth.convert SOURCE TARGET [--to run|export|t5x|diffusers|onnx]

SOURCE is recognized: the MODEL_DIR of a run, an exported model, a checkpoint of T5X (a folder checkpoint_<step>, or one
that holds such folders) or a pipeline folder of diffusers. TARGET is a new folder. Without --to, a run is exported to
one folder with weights and a model card, and everything else becomes a run, which plays and trains on. An inverter (a
run of istft.gin, informed.gin or melgan.gin, a .safetensors file, or "shipped") is converted to what TARGET ends in,
.onnx or .safetensors. `--to onnx` writes a diffusion decoder as one .onnx file.

What was written is read again, and both sides compute the same segment.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shlex
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from music_synth import config, errors, runs
from music_synth.audio.mel import MAX_LOG_MEL, MIN_LOG_MEL
from music_synth.compilation import keep_compiled
from music_synth.diffusion.objective import Diffusion
from music_synth.errors import UserError, telling
from music_synth.files import check_new, replacing, whole_folder
from music_synth.gin_files import CONFIG_FILE, read_file
from music_synth.interop import diffusers, model_card, published, t5x
from music_synth.interop.decoders import KINDS, Trained
from music_synth.midi.notes import Note
from music_synth.training.checkpoint import Checkpointer
from music_synth.training.step import create_state, num_params

FLAGS = {
    "export": ("dtype", "scores", "license"),
    "diffusers": ("inverter",),
    "file": ("about",),
    "onnx": ("max_tokens",),
}  # of one form alone
FORMS = KINDS | {"file": "an inverter's .safetensors file", "onnx": "a decoder's .onnx file"}
INVERTER_SUFFIXES = (".onnx", ".safetensors")
MAX_DIFFERENCE = 0.1  # of what is written from its source, as a share of the largest output; bfloat16 makes about 0.01


# --- the forms ---------------------------------------------------------------------------------------------------


def write_run(decoder: Trained, folder: Path, target: Path) -> None:
    """Writes a MODEL_DIR: config.gin and a checkpoint, of which training goes on where the source's stopped.

    The optimizer keeps the moments of the source where it has Adafactor's; else it begins afresh.
    """
    (folder / CONFIG_FILE).write_text(run_text(decoder, target), encoding="utf-8")
    optimizer, ema_decay = runs.load_optimizer(folder)
    # Not compiled, so that the parameters stay where they are: base size takes 1.7 GB for every copy of them.
    state = create_state(decoder.model, optimizer, jax.random.key(0), ema_decay, decoder.params)
    state = dataclasses.replace(state, step=jnp.asarray(decoder.step, jnp.int32))
    if decoder.moments is not None:
        try:
            moments = t5x.to_opt_state(decoder.moments, decoder.step, state.opt_state)
            state = dataclasses.replace(state, opt_state=moments)
        except UserError as error:
            warnings.warn(f"{error}: the optimizer begins afresh", stacklevel=2)
    Checkpointer(folder).save(state, data_position=decoder.step)


def run_text(decoder: Trained, target: Path) -> str:
    """Makes the config of a run: the source's own, or the published recipe with its model and its gin's values."""
    overrides = [f"MODEL_DIR={str(target)!r}"]
    own = decoder.path / CONFIG_FILE
    if decoder.kind == "export":
        return config.run_text(str(own.resolve()), [], overrides)
    if not isinstance(decoder.model, Diffusion):
        recipe = "autoregressive_base"
    else:
        recipe = "diffusion_base" if decoder.model.network.context_frames else "diffusion_base_nocontext"
    for knob, names in {
        "TRAIN_STEPS": ("TRAIN_STEPS", "train.total_steps"),
        "BATCH_SIZE": ("BATCH_SIZE", "train/DatasetConfig.batch_size"),
        "LEARNING_RATE": ("create_learning_rate_scheduler.base_learning_rate",),
        "WARMUP_STEPS": ("create_learning_rate_scheduler.warmup_steps",),
        "adafactor.decay_exponent": ("Adafactor.decay_rate",),
    }.items():
        value = next((decoder.given[name] for name in names if name in decoder.given), None)
        if isinstance(value, (int, float)):
            overrides.append(f"{knob}={value}")
    return config.run_text(f"papers/{recipe}.gin", [decoder.model, decoder.tokenizer], overrides)


def write_t5x(decoder: Trained, folder: Path, gin_file: Path | None) -> None:
    """Writes checkpoint_<step> and a gin file: the source's own (`gin_file`, or that beside it) or one of the model."""
    published.check_published(decoder.model)
    t5x.write(folder, decoder.step, decoder.params, decoder.moments)
    own = gin_file or (t5x.find_config(decoder.path) if decoder.kind == "t5x" else None)
    text = published.gin_text(decoder.model, decoder.tokenizer) if own is None else read_file(own)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


# --- checking ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="module")
def compute(module: Any, params: Any, batch: dict[str, Any], frames: Any) -> Any:
    """Computes what a network makes of noisy or previous frames [B, T, M], notes and context: [B, T, channels]."""
    net, tokens = module.bind({"params": params}), batch["note_tokens"]
    context = (batch["context_mel"], batch["context_mask"]) if module.config.context_frames else (None, None)
    cache = net.encode(tokens, tokens > 0, *context, True)
    film = None if module.autoregressive else net.condition_time(jnp.full(1, 0.5))
    return net.decode(frames, film, cache)


def segment(network: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Makes a batch of one segment of random notes and context, and noise [1, T, M]."""
    rng = np.random.default_rng(0)

    def noise(length: int) -> np.ndarray:
        return rng.normal(size=(1, length, network.num_mels)).astype(np.float32)

    batch = {
        "note_tokens": rng.integers(1, network.vocab_size, (1, min(64, network.max_tokens))).astype(np.int32),
        "context_mel": noise(network.context_frames),
        "context_mask": np.ones((1, network.context_frames), bool),
    }
    return batch, noise(network.target_frames)


def compare(source: Trained, written: Trained, target: Path) -> str:
    """Compares both networks on one segment; UserError where one does not give numbers, or the two give other ones."""
    before, after = jax.tree.leaves(source.params), jax.tree.leaves(written.params)
    equal = sum(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    batch, frames = segment(source.model.network)
    ours, theirs = (np.asarray(compute(side.model.module, side.params, batch, frames)) for side in (written, source))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise UserError(f"{source.path}: the network's output is not finite; the checkpoint is damaged")
    difference = relative_difference(theirs, ours, target)
    return f"{equal} of {len(before)} tensors are equal to the bit; outputs differ by {difference:.1e} of the largest"


def relative_difference(before: np.ndarray, after: np.ndarray, what: Path) -> float:
    """Returns the largest difference, as a share of the largest number before; UserError if beyond `MAX_DIFFERENCE`."""
    difference = float(np.abs(before - after).max()) / max(float(np.abs(before).max()), 1e-30)
    if not difference <= MAX_DIFFERENCE:  # nor a NaN
        raise UserError(
            f"{what}, written and read again, computes something else: it differs by {difference:.2g} of the largest"
            " number, and nothing was kept; please report this"
        )
    return difference


def settings_changed(source: Trained, written: Trained) -> list[str]:
    """Lists every setting, a line each, that the form which was written cannot hold."""
    before, after = ({**_settings(side.model), **_settings(side.tokenizer)} for side in (source, written))
    return [
        f"{name} = {before.get(name)} cannot be said there: read again, it is {after.get(name)}"
        for name in sorted(before.keys() & after.keys())
        if before.get(name) != after.get(name)
    ]


def _settings(part: Any) -> dict[str, Any]:
    """{"Diffusion.prediction_type": "eps", "Diffusion.schedule": "CosineSchedule", "CosineSchedule.shift": 0.0, ...}"""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        nested = dataclasses.is_dataclass(value)
        found[f"{type(part).__name__}.{field.name}"] = type(value).__name__ if nested else value
        found |= _settings(value) if nested else {}
    return found


def disk_size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.1f} MB"


# --- the command -------------------------------------------------------------------------------------------------


def convert_decoder(flags: argparse.Namespace) -> None:
    decoder = runs.load_trained(flags.source, num_heads=flags.num_heads, gin_file=flags.config)
    to = flags.to or ("export" if decoder.kind == "run" else "run")
    for form, names in FLAGS.items():
        for name in names:
            if getattr(flags, name) is not None and to != form:
                raise UserError(f"--{name} is of {FORMS[form]}, and {flags.target} becomes {FORMS[to]}: leave it out")
    network = decoder.model.network
    context = f"{network.context_frames} frames of context" if network.context_frames else "no context"
    print(f"{flags.source}: {KINDS[decoder.kind]}, step {decoder.step}, {disk_size(decoder.path)}")
    print(f"  {type(decoder.model).__name__}, {context}, {num_params(decoder.params):,} parameters")
    for remark in decoder.remarks:
        print(f"  {remark}")
    if to == decoder.kind and to != "t5x":
        raise UserError(f"{flags.source} is {KINDS[to]} already: choose another form by --to")
    if to == "onnx":
        return write_onnx(flags, decoder)
    with whole_folder(flags.target) as folder:
        if to == "run":
            write_run(decoder, folder, flags.target)
        elif to == "export":
            own = decoder.path / CONFIG_FILE
            text = read_file(own) if decoder.kind in ("run", "export") else run_text(decoder, flags.target)
            license = flags.license or model_card.UNKNOWN
            model_card.export(decoder, text, folder, flags.dtype or "float32", flags.scores, license)
        elif to == "t5x":
            write_t5x(decoder, folder, flags.config)
        else:
            diffusers.write(folder, decoder.model, decoder.params, flags.inverter or decoder.inverter)
        written = runs.load_trained(folder)
        changed = settings_changed(decoder, written)
        compared = compare(decoder, written, flags.target)
    print(f"{flags.target}: {KINDS[to]}, {disk_size(flags.target)}")
    print(f"  {compared}")
    for change in changed:
        print(f"  {change}")
    quoted = shlex.quote(str(flags.target))
    if to in ("run", "export"):
        print(f"play: python -m music_synth.synthesize FILE.mid --checkpoint {quoted} --out OUT.wav")
    if to == "run":
        gin_file = shlex.quote(str(flags.target / CONFIG_FILE))
        print(f"train on: python -m music_synth.train --gin_file={gin_file} --gin.TRAIN_STEPS={decoder.step + 10_000}")


def write_onnx(flags: argparse.Namespace, decoder: Trained) -> None:
    """Writes a decoder as one file, and compares what onnxruntime and JAX sample of one segment."""
    from music_synth.interop.onnx_decoder import export_decoder
    from music_synth.interop.onnx_player import DRAWN
    from music_synth.interop.runtimes import open_onnx

    if flags.target.suffix != ".onnx":
        raise UserError(f"{flags.target}: --to onnx writes a file that ends in .onnx")
    with replacing(flags.target) as partial:
        export_decoder(decoder.model, decoder.params, decoder.tokenizer, partial, flags.max_tokens)
        session = open_onnx(partial)
        shapes = {given.name: given.shape for given in session.get_inputs()}
        batch, _ = segment(decoder.model.network)
        random = np.random.default_rng(0)
        drawn = {name: random.standard_normal(shapes[name], np.float32) for name in DRAWN if name in shapes}
        tokens = np.zeros(shapes["note_tokens"], np.int32)
        tokens[:, : batch["note_tokens"].shape[1]] = batch["note_tokens"][:, : tokens.shape[1]]
        batch |= {"note_tokens": tokens, **drawn}
        noise, latents = drawn["noise"], drawn.get("latents")
        expected = decoder.model.sample_from(decoder.params, batch, noise[:, 0], lambda i: noise[:, 1 + i], latents)
        given = {name: np.asarray(batch[name], None if name == "note_tokens" else np.float32) for name in shapes}
        (made,) = session.run(None, given)
        difference = relative_difference(np.asarray(expected), made, flags.target)
    print(f"{flags.target}: {disk_size(flags.target)}; a segment differs by {difference:.0e} of the largest number")


def convert_inverter(flags: argparse.Namespace) -> None:
    from music_synth.vocoder.neural import NeuralInverter, save_inverter

    for name in ("to", "num_heads", "config", "dtype", "scores", "license", "inverter", "max_tokens"):
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} is for decoders, and {flags.target} is to be an inverter: leave it out")
    if flags.target.suffix not in INVERTER_SUFFIXES:
        raise UserError(f"{flags.target}: what an inverter becomes ends in {' or '.join(INVERTER_SUFFIXES)}")
    if not flags.target.absolute().parent.is_dir():
        raise UserError(f"{flags.target}: there is no folder {flags.target.parent} to write it into")
    if flags.about is not None and flags.target.suffix != ".safetensors":
        raise UserError(f"--about is of {FORMS['file']}, and {flags.target} is none: leave it out")
    inverter = runs.load_inverter(flags.source)
    if not isinstance(inverter, NeuralInverter):
        raise UserError(f"{flags.source} is an inverter of another project: it plays as it is, by --inverter")
    kind = type(inverter.generator).__name__
    size = "" if str(flags.source) == runs.SHIPPED else f", {disk_size(flags.source)}"
    print(f"{flags.source}: an inverter ({kind}){size}")
    with replacing(flags.target) as part:
        if flags.target.suffix == ".onnx":
            from music_synth.interop.onnx import export_onnx

            export_onnx(inverter.generator, inverter.params, part, flags.notes)
        else:
            save_inverter(part, inverter.generator, inverter.params, flags.about or "")
        mel = np.random.default_rng(0).uniform(MIN_LOG_MEL, MAX_LOG_MEL, (100, 128)).astype(np.float32)
        notes, written = [Note(60, 100, 0, 0.2, 1.5)], runs.load_inverter(part)
        mel_alone = flags.target.suffix == ".onnx" and not (flags.notes or inverter.generator.source)
        expected = inverter.without_source(mel) if mel_alone else inverter(mel, notes)
        difference = relative_difference(expected, written(mel, notes), flags.target)
    print(f"{flags.target}: {disk_size(flags.target)}; two seconds of noise differ by {difference:.0e} of the peak")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python -m music_synth.convert", __doc__)
    parser.add_argument("source", type=Path, help="what to convert")
    parser.add_argument("target", type=Path, help="folder to make; for an inverter a file, .onnx or .safetensors")
    parser.add_argument("--to", choices=[*KINDS, "onnx"], help="form of the target (default: a run; of a run: export)")
    parser.add_argument(
        "--num_heads", type=int, help="of a T5X checkpoint that has no gin file (default: of 64 channels)"
    )
    parser.add_argument("--config", type=Path, help="gin file of a T5X checkpoint (default: config.gin beside it)")
    exported = parser.add_argument_group("exported models")
    exported.add_argument("--dtype", choices=model_card.DTYPES, help="of the weights (default: float32)")
    exported.add_argument("--scores", type=Path, help="OUTPUT_DIR of music_synth.evaluate, for the model card")
    exported.add_argument("--license", help="of the weights, for the model card")
    port = parser.add_argument_group("pipelines of diffusers")
    port.add_argument(
        "--inverter", type=Path, help="ONNX file to put into it (default: that of a source which has one)"
    )
    graphs = parser.add_argument_group("ONNX files")
    graphs.add_argument("--max_tokens", type=int, help="of a segment, for a decoder (default: 512)")
    graphs.add_argument("--notes", action="store_true", help="let an inverter's file take the notes, too")
    files = parser.add_argument_group("inverters' .safetensors files")
    files.add_argument("--about", help="a line for people, kept in the file: data, steps, machine, date")
    flags = parser.parse_args(argv)
    if flags.inverter is not None and not flags.inverter.is_file():
        raise UserError(f"no file {flags.inverter}: --inverter takes an ONNX file")
    for name, least in (("num_heads", 1), ("max_tokens", 2)):
        if (given := getattr(flags, name)) is not None and given < least:
            raise UserError(f"--{name} {given}: must be at least {least}")
    return flags


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    keep_compiled()
    check_new(flags.target)
    if flags.notes and (flags.target.suffix != ".onnx" or flags.to):
        raise UserError(f"--notes is of an inverter's .onnx file, and {flags.target} becomes none: leave it out")
    suffixes = {flags.source.suffix, flags.target.suffix}
    is_inverter = flags.to != "onnx" and not suffixes.isdisjoint(INVERTER_SUFFIXES)
    with telling(f"cannot write {flags.target}"):
        (convert_inverter if is_inverter else convert_decoder)(flags)


if __name__ == "__main__":
    errors.run(main)
