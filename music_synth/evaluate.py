"""Scores checkpoints: python -m music_synth.evaluate --gin_file=evaluate.gin --checkpoints=runs/a,runs/b

What is scored, and how, is in music_synth/evaluation/evaluator.py. --gin.NAME=VALUE sets the knobs of the
recipe (TASK, SPLIT, MAX_SECONDS, OUTPUT_DIR, ...).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from music_synth import config, errors
from music_synth.audio.io import write_audio
from music_synth.audio.mel import FRAME_RATE
from music_synth.data.feed import open_feed
from music_synth.errors import UserError
from music_synth.evaluation import evaluator
from music_synth.evaluation.evaluator import Checkpoint, Piece
from music_synth.evaluation.report import plot_piece
from music_synth.midi.tokenizer import Tokenizer
from music_synth.vocoder.inverter import load_inverter

EXAMPLE_FRAMES = 20 * FRAME_RATE  # of a piece that is drawn and written as audio


def evaluate(
    checkpoints: Sequence[str],
    task: str,
    split: str = "test",
    output_dir: str = "runs/evaluation",
    max_seconds: float | None = None,
    batch_size: int = 8,
    seed: int = 0,
    inverter: str | None = None,
    num_examples: int = 1,
    data_dir: str | None = None,
) -> None:
    """Scores checkpoints on held-out pieces: prints a table, writes it and scores.json into `output_dir`.

    Args:
      checkpoints: MODEL_DIRs of training runs in the order of the table; each one's newest checkpoint counts.
      task: name of a task, or path of a prepared folder; its `train` split gives the mean spectrum.
      split: what is scored.
      max_seconds: as much of the split, from its start; None: all of it.
      batch_size: pieces sampled side by side: faster, at the cost of memory; the numbers stay.
      seed: of the sampling.
      inverter: makes the audio, and a row of the table: what is lost after the decoder; None: the one that ships.
      num_examples: pieces of which the beginning is drawn beside its target, and written as audio.
      data_dir: where tfds keeps its data sets.

    Raises:
      UserError: a checkpoint that cannot be loaded, no such task or split, an output that cannot be written.
    """
    if not checkpoints:
        raise UserError("no checkpoints to score: give --checkpoints=MODEL_DIR,MODEL_DIR")
    if batch_size < 1:
        raise UserError(f"evaluate.batch_size = {batch_size}: must be at least 1")
    folder = make_folder(output_dir)
    vocode = load_inverter(inverter)
    loaded = [load_checkpoint(model_dir) for model_dir in checkpoints]
    feed = open_feed(task, Tokenizer(), batch_size=1, data_dir=data_dir)  # whole pieces: no tokenizer matters
    pieces = evaluator.take(feed.pieces(split), max_seconds)
    if not pieces:
        raise UserError(f"{task} has no pieces in its split {split!r}")
    drawn: list[str] = []

    def on_piece(name: str, piece: Piece, mel: np.ndarray) -> None:
        if sum(line.startswith(f"{name}:") for line in drawn) < num_examples:
            drawn.append(f"{name}: {write_example(folder, name, piece, mel, vocode)}")

    rows = evaluator.score(
        pieces,
        evaluator.mean_log_mel(feed.pieces("train")),
        loaded,
        vocode,
        inverter or "the shipped inverter",
        batch_size,
        seed,
        on_piece,
        progress=True,
    )
    seconds = sum(len(piece.mel) for piece in pieces) / FRAME_RATE
    amount = f"{len(pieces)} piece{'s' * (len(pieces) > 1)}, {seconds:.0f} s"
    heading = f"Mean absolute log-mel error on `{task}`, split {split}: {amount}. Lower is better."
    table = evaluator.to_markdown(rows, heading)
    (folder / "table.md").write_text(table, encoding="utf-8")
    scores = {
        "metric": "mean absolute log-mel error, dB",
        "task": task,
        "split": split,
        "num_pieces": len(pieces),
        "seconds": seconds,
        "seed": seed,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    print(table)
    for line in drawn:
        print(line)
    print(f"table: {folder / 'table.md'}; scores: {folder / 'scores.json'}")


def load_checkpoint(model_dir: str) -> Checkpoint:
    """The newest checkpoint of a run, named for the table. UserError if it cannot be loaded."""
    model, tokenizer, params, step = config.load_run(model_dir)
    return Checkpoint(f"{type(model).__name__} ({model_dir}, step {step})", model, tokenizer, params)


def write_example(folder: Path, name: str, piece: Piece, mel: np.ndarray, vocode) -> Path:
    """Draws and sounds the beginning of a sampled piece; returns the picture's path."""
    beginning = evaluator.cut(piece, min(EXAMPLE_FRAMES, len(mel)))
    mel = mel[:EXAMPLE_FRAMES]
    audio = vocode(mel)
    stem = "".join(letter if letter.isalnum() else "-" for letter in f"{name}-{piece.id}").strip("-")
    picture = folder / f"{stem}.png"
    write_audio(picture.with_suffix(".wav"), audio)
    plot_piece(picture, beginning.notes, mel, audio, target_mel=beginning.mel, title=f"{piece.id}: {name}")
    return picture


def make_folder(output_dir: str) -> Path:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").touch()
    except OSError as error:
        raise UserError(f"cannot write into {output_dir} ({error.strerror})") from error
    return folder


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser(prog="python -m music_synth.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gin_file", metavar="FILE", help="recipe (default: evaluate.gin); may be repeated")
    parser.add_argument("--gin.NAME", metavar="VALUE", help="sets a knob, or one parameter")
    parser.add_argument("--checkpoints", metavar="DIR,DIR", help="MODEL_DIRs of training runs")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    files, overrides, rest = config.split_flags(argv)
    flags = parse_flags(rest)
    if flags.checkpoints:
        names = [name for name in flags.checkpoints.split(",") if name]
        overrides.append(f"evaluate.checkpoints={names!r}")
    config.parse(files or ["evaluate.gin"], overrides)
    config.build("evaluate", overrides)()


if __name__ == "__main__":
    errors.run(main)
