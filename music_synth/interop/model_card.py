"""A run as one folder to give away: config.gin, weights as safetensors, and a card, README.md, that says what it is.

`runs.load` reads such a folder, so that every command that takes a MODEL_DIR takes it.
"""

from __future__ import annotations

import datetime
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from music_synth import __version__
from music_synth.audio.mel import FRAME_RATE
from music_synth.data.prepared import MANIFEST, TRANSCRIBED
from music_synth.errors import UserError
from music_synth.gin_files import CONFIG_FILE, read_values
from music_synth.interop.decoders import KINDS, Trained
from music_synth.training.step import num_params
from music_synth.training.writer import last_value, read_metrics

DTYPES = ("float32", "float16", "bfloat16")
WEIGHTS = "model.safetensors"
FORMAT = "music_synth model"  # what the header of that file says it is
CARD = "README.md"
TABLE = "table.md"  # of music_synth.evaluate
UNKNOWN = "not stated"
LIBRARIES = ("jax", "flax", "optax", "numpy")


def export(
    decoder: Trained,
    config_text: str,
    folder: Path,
    dtype: str = "float32",
    scores: Path | None = None,
    license: str = UNKNOWN,
) -> None:
    """Writes a decoder into `folder`, which exists.

    Args:
        config_text: its config.gin.
        dtype: of the weights.
        scores: OUTPUT_DIR of an evaluation, whose table goes into the card.
        license: of the weights, for the card: a name such as "cc-by-4.0".

    Raises:
        UserError: no such table, weights that the dtype cannot hold.
    """
    table = "" if scores is None else read_table(scores)
    save_exported(folder / WEIGHTS, decoder.params, decoder.step, dtype)
    (folder / CONFIG_FILE).write_text(config_text, encoding="utf-8")
    said = read_values(folder / CONFIG_FILE)
    minutes = last_value(decoder.path, "train/minutes")
    text = card(decoder, said, dtype, last_scores(decoder.path), minutes, table, license)
    (folder / CARD).write_text(text, encoding="utf-8")


def card(
    decoder: Trained,
    said: dict[str, Any],
    dtype: str,
    metrics: dict[str, tuple[int, float]],
    minutes: float,
    table: str,
    license: str,
) -> str:
    """Writes the text of the card, with the header of fields that model hubs read.

    Args:
        said: what the config binds.
        minutes: of training.
    """
    model, network, tokenizer = decoder.model, decoder.model.network, decoder.tokenizer
    name = type(model).__name__
    count = num_params(decoder.params)
    segment = network.target_frames / FRAME_RATE
    context = f"{network.context_frames / FRAME_RATE:.2f} s of the segment before" if network.context_frames else "none"
    velocities = f"{tokenizer.velocity_bins} velocity bin{'s' * (tokenizer.velocity_bins > 1)}"
    if metrics:  # it was trained here; what was only converted has the published recipe in its config, not its own
        task, batch_size = data_set(said.get("Feed.task")), said.get("Feed.batch_size")
    else:
        task, batch_size = decoder.given.get("DATASET_NAME") or UNKNOWN, decoder.given.get("BATCH_SIZE")
    steps = f"{decoder.step:,}" if decoder.step else UNKNOWN
    start = said.get("InitialCheckpoint.path")
    rehearsal, share = said.get("Feed.rehearsal"), said.get("Feed.rehearsal_share")
    seeds = f"{said.get('train.seed')} of the parameters, {said.get('Feed.seed')} of the order of segments"
    lines = [
        "---",
        f"license: {license if license != UNKNOWN else 'unknown'}",
        "library_name: music_synth",
        "tags: [music, midi, audio-generation]",
        "---",
        "",
        f"# {name} decoder, {count / 1e6:.1f} million parameters",
        "",
        "Turns the notes of a MIDI file into log-mel spectrograms, which an inverter turns into audio (16 kHz, mono).",
        "",
        "```",
        "python -m music_synth.synthesize FILE.mid --checkpoint THIS_FOLDER --out OUT.wav",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| network | {network.num_encoder_layers} encoder and {network.num_decoder_layers} decoder layers, width"
        f" {network.model_dim}, {network.num_heads} heads of {network.head_dim}, MLP {network.mlp_dim} |",
        f"| a segment | {segment:.2f} s, up to {network.max_tokens} note tokens; context: {context} |",
        f"| notes | {velocities}, programs: {tokenizer.granularity} |",
        *(
            [f"| timbres | {', '.join(tokenizer.timbres)}: `--timbre NAME`; without, a mixture |"]
            * bool(tokenizer.timbres)
        ),
        f"| training data | {task} |",
        f"| training steps | {steps}{f', {batch_size} segments each' * bool(batch_size)} |",
        *([f"| seeds | {seeds} |"] if metrics else []),
        *([f"| time | {minutes / 60:.1f} hours |"] if minutes else []),
        *([f"| trained from | {start} |"] if start else []),
        *([f"| rehearsed | {data_set(rehearsal)}, {share:.0%} of the examples |"] if rehearsal and share else []),
        f"| weights | {WEIGHTS}, {dtype} |",
        f"| made from | {KINDS[decoder.kind]}, {datetime.date.today()} |",
        f"| versions | {versions()} |",
        f"| license of the weights | {license} |",
    ]
    if hasattr(model, "sampler"):
        s = model.sampler
        lines.append(f"| sampler | {s.name}, {s.num_steps} steps, guidance {s.guidance_scale:g} |")
    if metrics:
        lines += ["", "## Scores during training", "", "The last of each that the run logged.", ""]
        lines += ["| | step | |", "|---|---:|---:|"]
        lines += [f"| {name} | {step:,} | {value:.4g} |" for name, (step, value) in sorted(metrics.items())]
    if table:
        lines += ["", "## Evaluation", "", table]
    lines += ["", f"`{CONFIG_FILE}` has every setting."]
    if metrics:
        lines += ["Another training by it:", "", "```"]
        lines += [f"python -m music_synth.train --gin_file=THIS_FOLDER/{CONFIG_FILE} --gin.MODEL_DIR=runs/again \\"]
        lines += ["  --gin.TASK=DATA", "```"]
    return "\n".join([*lines, ""])


def versions() -> str:
    """Lists what the numbers hang on, as it is installed here."""
    python = ".".join(map(str, sys.version_info[:3]))
    return ", ".join(
        [f"music_synth {__version__}", f"Python {python}", *(f"{name} {version(name)}" for name in LIBRARIES)]
    )


def data_set(task: str | None) -> str:
    """Names a task; a prepared folder, while it is there, by that of the data set in it."""
    try:
        manifest = json.loads((Path(task or "") / MANIFEST).read_text(encoding="utf-8"))
        pieces = [str(piece["id"]) for split in manifest["splits"].values() for piece in split]
        count = sum(TRANSCRIBED in piece for piece in pieces)
        labels = f"; the notes of {count} of {len(pieces)} pieces are transcribed by a program" if count else ""
        return f"{manifest['data_set']} {manifest['data_set_version']}, as prepared arrays{labels}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return task or UNKNOWN


def last_scores(folder: Path) -> dict[str, tuple[int, float]]:
    """Reads the last of each score of a run, with its step: {"eval/loss": (1000, 0.12), ...}; {}: it has none."""
    last: dict[str, tuple[int, float]] = {}
    for line in read_metrics(folder):
        scores = {name: value for name, value in line.items() if name.startswith(("eval/", "train/loss"))}
        last |= {name: (int(line["step"]), value) for name, value in scores.items()}
    return last


def read_table(folder: Path) -> str:
    """Reads the table of scores that an evaluation wrote into its OUTPUT_DIR.

    Raises:
        UserError: there is none.
    """
    try:
        return (folder / TABLE).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"no {TABLE} in {folder}: give the OUTPUT_DIR of music_synth.evaluate ({error})") from error


# --- the weights -------------------------------------------------------------------------------------------------


def save_exported(path: Path, params: Any, step: int, dtype: str) -> None:
    """Writes parameters as one safetensors file, of dtype "float32", "float16" or "bfloat16".

    Raises:
        UserError: a value that is not finite, or not in that dtype.
    """
    from safetensors.flax import save_file

    tensors = {key: jnp.asarray(leaf).astype(dtype) for key, leaf in flatten_dict(params, sep="/").items()}
    for key, array in tensors.items():
        if not np.isfinite(np.asarray(array, np.float32)).all():
            raise UserError(f"{key} has values that are not finite in {dtype}: export it as float32")
    save_file(tensors, str(path), metadata={"format": FORMAT, "step": str(step)})


def load_exported(path: Path, step: int | None) -> tuple[Any, int]:
    """Reads the parameters that `save_exported` wrote, float32, and the step they are of; `step`: which it must be.

    Raises:
        UserError: it cannot be read, is of another kind, or of another step.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            meta = file.metadata() or {}
            types = {file.get_slice(key).get_dtype() for key in file.keys()}
        # NumPy's reader is ten times as fast, but knows no bfloat16.
        with safe_open(str(path), framework="flax" if "BF16" in types else "numpy") as file:
            tensors = {key: np.asarray(file.get_tensor(key)).astype(np.float32) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}): get it again") from error
    written = meta.get("step", "")
    if meta.get("format") != FORMAT or not (written.isascii() and written.isdecimal() and len(written) < 19):
        raise UserError(
            f"{path} is not of music_synth: its header says format {meta.get('format')!r}, step {written[:20]!r}"
        )
    for key in tensors:
        if any("/".join(key.split("/")[:depth]) in tensors for depth in range(1, key.count("/") + 1)):
            raise UserError(f"{path}: tensor {key!r} lies inside another: get the file again")
    if step not in (None, int(written)):
        raise UserError(f"no checkpoint of step {step} in {path.parent}: there is {written}")
    return unflatten_dict(tensors, sep="/"), int(written)
