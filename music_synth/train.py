"""Trains a decoder or an inverter:

    python -m music_synth.train --gin_file=diffusion.gin [--gin_file=...] [--gin.NAME=VALUE ...]

Recipes are found by name (configs/); upper-case names are the knobs:
  --gin.MODEL_DIR=runs/mine --gin.TASK=synthetic --gin.TRAIN_STEPS=20000 --gin.BATCH_SIZE=8
Starting again with the same MODEL_DIR goes on where the run stopped.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import jax

from music_synth import config, errors
from music_synth.compilation import keep_compiled
from music_synth.errors import UserError
from music_synth.models.base import SpectrogramModel
from music_synth.training.best import BEST


def main(argv: list[str]) -> None:
    """Flags -> configuration -> one call of `training.loop.train`."""
    keep_compiled()
    files, overrides, rest = config.split_flags(argv)
    flags = _flags(rest)
    if not files:
        raise UserError("give a recipe: --gin_file=diffusion.gin")
    _join_processes(flags)
    config.parse(files, overrides)
    train = config.build("train", overrides)
    model_dir = train.keywords["model_dir"]
    train(config_text=config.operative_text())
    if jax.process_index() == 0:
        if train.keywords.get("patience") is not None:
            model_dir = str(Path(model_dir) / BEST)
        print(f"done: checkpoints, {config.CONFIG_FILE}, metrics.jsonl and TensorBoard events are in {model_dir}")
        flag = (
            "--checkpoint"
            if isinstance(train.keywords["model"], SpectrogramModel)
            else "--checkpoint DECODER --inverter"
        )
        print(f"play: python -m music_synth.synthesize FILE.mid {flag} {shlex.quote(model_dir)} --out OUT.wav")


def _flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser(prog="python -m music_synth.train", description=__doc__)
    parser.add_argument("--gin_file", metavar="FILE", help="a recipe's name or a path; may be repeated")
    parser.add_argument("--gin.NAME", metavar="VALUE", help="sets a knob, or one parameter: --gin.adamw.b2=0.95")
    several = parser.add_argument_group("several processes (each sees its own devices)")
    several.add_argument("--distributed", action="store_true", help="find the others by the environment (Slurm, TPU)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where nothing says it")
    several.add_argument("--num_processes", type=int, metavar="N")
    several.add_argument("--process_id", type=int, metavar="I", help="from 0")
    return parser.parse_args(argv)


def _join_processes(flags: argparse.Namespace) -> None:
    explicit = (flags.coordinator, flags.num_processes, flags.process_id)
    if explicit == (None, None, None) and not flags.distributed:
        return
    if not flags.distributed and None in explicit:
        raise UserError("several processes need --coordinator, --num_processes and --process_id together")
    try:
        jax.distributed.initialize(*explicit)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes did not find each other: {error}") from error


if __name__ == "__main__":
    errors.run(main)
