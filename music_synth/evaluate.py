"""Scores checkpoints: python -m music_synth.evaluate --gin_file=evaluate.gin --checkpoints=runs/a,runs/b

Prints a table, and writes it with all numbers and a report to be seen and heard. What is scored, and how, is in
music_synth/evaluation/. --gin.NAME=VALUE sets the knobs of the recipe (TASK, SPLIT, MAX_SECONDS, OUTPUT_DIR, ...). The
same command goes on where it was broken off.

Samplers against a reference, at several temperatures; inverters alone, on 30 s of each piece:

    python -m music_synth.evaluate --checkpoints=runs/a --reference=name=ddpm,num_steps=1000 \\
      --sampler=num_steps=4 --sampler=num_steps=8,temperature=0.7
    python -m music_synth.evaluate --checkpoints= --inverter=shipped --inverter=griffin_lim --gin.CLIP_SECONDS=30
"""

from __future__ import annotations

import argparse

from music_synth import config, errors
from music_synth.compilation import keep_compiled
from music_synth.errors import UserError
from music_synth.evaluation.embeddings import WITH_PATH


def main(argv: list[str]) -> None:
    keep_compiled()
    files, overrides, rest = config.split_flags(argv)
    flags = parse_flags(rest)
    checkpoints = None if flags.checkpoints is None else [name for name in flags.checkpoints.split(",") if name]
    if flags.checkpoints and not checkpoints:
        raise UserError("no checkpoints to score: give --checkpoints=PATH,PATH, or --checkpoints= for inverters alone")
    bound = {
        "checkpoints": checkpoints,
        "samplers": flags.sampler,
        "reference": flags.reference,
        "inverters": flags.inverter,
        "soundfont": flags.soundfont,
        "beam_runner": flags.beam_runner,
        "beam_options": flags.beam_options,
    }
    overrides += [f"evaluate.{name}={value!r}" for name, value in bound.items() if value is not None]
    config.parse(files or ["evaluate.gin"], overrides)
    evaluate = config.build("evaluate", overrides)
    evaluate(  # what runs programs of others is said on the command line alone
        transcriber=flags.transcriber,
        embeddings={name: path for name in WITH_PATH if (path := getattr(flags, name))},
        trust=flags.trust,
    )


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser(prog="python -m music_synth.evaluate", description=__doc__)
    parser.add_argument("--gin_file", metavar="FILE", help="recipe (default: evaluate.gin); may be repeated")
    parser.add_argument("--gin.NAME", metavar="VALUE", help="sets a knob, or one parameter")
    parser.add_argument("--checkpoints", metavar="PATH,PATH", help="of decoders, as for synthesize; empty: no decoder")
    parser.add_argument(
        "--sampler",
        action="append",
        metavar="NAME=VALUE,...",
        help="settings that checkpoints are scored with, such as num_steps=5,temperature=0.7; may be repeated",
    )
    parser.add_argument(
        "--reference", metavar="NAME=VALUE,...", help="settings of the row that the others are to be no worse than"
    )
    parser.add_argument(
        "--inverter",
        action="append",
        metavar="NAME",
        help="makes the audio, as for synthesize (default: shipped); repeated: whole pieces are played by each",
    )
    parser.add_argument("--soundfont", metavar="FILE", help="score the embedded test pieces rendered by this .sf2")
    for name in WITH_PATH:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"of {name}'s weights, for its distances")
    parser.add_argument(
        "--transcriber",
        default="basic_pitch",
        metavar="MODULE:NAME",
        help="hears the notes (default: basic_pitch); none: no note scores",
    )
    parser.add_argument("--trust", action="store_true", help="let SavedModels, which are programs, run")
    parser.add_argument("--beam_runner", help="Apache Beam's runner, to share the work: DirectRunner, FlinkRunner, ...")
    parser.add_argument("--beam_options", help="options of Apache Beam, by commas")
    return parser.parse_args(argv)


if __name__ == "__main__":
    errors.run(main)
