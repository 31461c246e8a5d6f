"""Scores checkpoints: python -m music_synth.evaluate --gin_file=evaluate.gin --checkpoints=runs/a,runs/b

Prints a table, and writes it with all numbers and a report to be seen and heard. What is scored, and how, is in
music_synth/evaluation/evaluator.py and measures.py. --gin.NAME=VALUE sets the knobs of the recipe (TASK, SPLIT,
MAX_SECONDS, OUTPUT_DIR, ...). The same command goes on where it was broken off.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from music_synth import config, errors, runs
from music_synth.compilation import keep_compiled
from music_synth.data.feed import open_feed
from music_synth.errors import UserError
from music_synth.evaluation import evaluator, measures, report
from music_synth.evaluation.clips import file_checksum
from music_synth.evaluation.embeddings import WITH_PATH, load_embeddings
from music_synth.evaluation.evaluator import Checkpoint
from music_synth.evaluation.measures import Tools
from music_synth.evaluation.transcription import BasicPitch
from music_synth.midi.tokenizer import Tokenizer
from music_synth.playing import Decoder
from music_synth.training.writer import read_metrics
from music_synth.vocoder import neural

BASIC_PITCH = "basic_pitch"


def evaluate(
    checkpoints: Sequence[str],
    task: str,
    split: str = "test",
    output_dir: str = "runs/evaluation",
    max_seconds: float | None = None,
    samplers: Sequence[str] = ("",),
    batch_size: int = 8,
    seed: int = 0,
    inverter: str | None = None,
    embeddings: Mapping[str, str] | None = None,
    transcriber: str | None = BASIC_PITCH,
    num_examples: int = 12,
    data_dir: str | None = None,
    beam_runner: str | None = None,
    beam_options: str = "",
    trust: bool = False,
) -> None:
    """Scores checkpoints on held-out pieces: prints a table, writes it, scores.json and report.html.

    Args:
      checkpoints: MODEL_DIRs of training runs in the order of the table; each one's newest checkpoint counts.
      task: name of a task, or path of a prepared folder; its `train` split gives the mean spectrum.
      split: what is scored.
      output_dir: gets the table, the numbers, the report, and every clip that was made.
      max_seconds: as much of the split, from its start; None: all of it.
      samplers: settings that every checkpoint is scored with, each "name=ddim,num_steps=20"; "": as it was trained.
        A decoder that has none of these settings is scored once, as it was trained.
      batch_size: segments sampled side by side: faster, at the cost of memory; the numbers stay.
      seed: of the sampling.
      inverter: makes the audio; None: the one that ships.
      embeddings: paths of those that need one, by name: {"vggish": "/models/vggish"}.
      transcriber: hears the notes: "basic_pitch", "MODULE:NAME" of a callable, audio [S] -> list of Note, that hears
        instruments too, or None.
      num_examples: excerpts in the report.
      data_dir: where tfds keeps its data sets.
      trust: whether SavedModels, which are programs, may run.
      beam_runner, beam_options: of Apache Beam, which then makes and measures the clips; None: this process does.

    Raises:
      UserError: a checkpoint that cannot be loaded, no such task or split, an output that cannot be written.
    """
    if not checkpoints:
        raise UserError("no checkpoints to score: give --checkpoints=MODEL_DIR,MODEL_DIR")
    if batch_size < 1:
        raise UserError(f"evaluate.batch_size = {batch_size}: must be at least 1")
    folder = make_folder(output_dir)
    open_tools = functools.partial(load_tools, inverter, tuple(sorted((embeddings or {}).items())), transcriber, trust)
    tools = open_tools()
    inverter_sum = file_checksum(neural.SHIPPED if inverter is None else inverter)
    clips = folder / "clips"
    rows = []
    for opener in plan(checkpoints, samplers):
        rows += evaluator.model_rows(opener, clips, inverter_sum, seed, batch_size, opener.about())
    feed = open_feed(task, Tokenizer(), batch_size=1, data_dir=data_dir)  # whole pieces: no tokenizer matters
    targets = evaluator.store_targets(evaluator.take(feed.pieces(split), max_seconds), clips, tools, inverter_sum)
    if not targets.names:
        raise UserError(f"{task} has no pieces in its split {split!r}")
    mean_spectrum = evaluator.mean_log_mel(feed.pieces("train"))
    baseline, *ceilings = evaluator.reference_rows(
        mean_spectrum, clips, (inverter or "the shipped inverter", inverter_sum)
    )
    rows = [baseline, *rows, *ceilings]
    options = [f"--{option.removeprefix('--')}" for option in beam_options.split(",") if option]
    beam = [*options, f"--runner={beam_runner}"] if beam_runner else None
    scored = list(evaluator.score(rows, targets, open_tools, batch_size, beam, progress=True))
    scores = {
        "task": task,
        "split": split,
        "num_clips": len(targets.names),
        "seconds": targets.seconds,
        "seed": seed,
        "inverter": inverter or "the shipped inverter",
        "transcriber": transcriber,
        "reference": "recordings" if targets.have_audio else "the data set's mel through the inverter",
        "note": "Intervals of 95 % over clips.",
        "clips": targets.names,
        "columns": [dataclasses.asdict(column) for column in measures.columns(list(tools.embeddings))],
        "rows": [dataclasses.asdict(row) | {"cells": measures.as_json(row.cells)} for row in scored],
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    table = report.to_markdown(scores)
    (folder / "table.md").write_text(table, encoding="utf-8")
    print(table)
    report.write_html(folder / "report.html", scores, report.make_examples(clips, scores, num_examples))
    print(f"report: {folder / 'report.html'}; table: {folder / 'table.md'}; all numbers: {folder / 'scores.json'}")


# --- what is scored, and with what -------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenCheckpoint:
    """Opens a run's newest checkpoint, here or in another process, with sampler settings in place of its own."""

    model_dir: str
    sampling: tuple[tuple[str, Any], ...] = ()

    def __call__(self) -> Checkpoint:
        """UserError if there is none, or it has no such settings."""
        model, tokenizer, params, step = load_run(self.model_dir)
        settings = dict(self.sampling)
        said = "".join(f", {name} {value}" for name, value in settings.items())
        name = f"{type(model).__name__} ({self.model_dir}, step {step}{said})"
        return Checkpoint(name, Decoder(model.with_sampling(**settings), params, tokenizer))

    def about(self) -> dict[str, Any]:
        """For scores.json: which run, how it samples, and how it learned."""
        model, _, params, step = load_run(self.model_dir)
        sampled = model.with_sampling(**dict(self.sampling))
        return {
            "model_dir": self.model_dir,
            "step": step,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "given": dict(self.sampling),
            "sampler": dataclasses.asdict(sampled.sampler) if hasattr(sampled, "sampler") else {},
            "training": learning_curve(self.model_dir),
        }


load_run = functools.lru_cache(maxsize=1)(runs.load)  # the groups of clips of a row come one after the other


def learning_curve(model_dir: str) -> list[dict[str, float]]:
    """What a run said of itself at each evaluation: {step, minutes of training, eval/...}, from its metrics.jsonl."""
    minutes, curve = 0.0, []
    for line in read_metrics(model_dir):
        minutes = line.get("train/minutes", minutes)
        scores = {name: value for name, value in line.items() if name.startswith("eval/")}
        if scores:
            step = {"step": line["step"], "minutes": minutes}
            if curve and curve[-1]["step"] == line["step"]:
                curve[-1] |= scores
            else:
                curve.append(step | scores)
    return curve


def plan(checkpoints: Sequence[str], samplers: Sequence[str]) -> list[OpenCheckpoint]:
    """Every checkpoint with every sampler; a decoder that has none of the settings is there once, as it was trained.

    Raises:
      UserError: settings that do not read as such, or that no checkpoint has; a run that is none.
    """
    settings = [parse_sampler(text) for text in samplers or ("",)]
    openers, fitting, refusals = [], set(), defaultdict(list)
    for model_dir in checkpoints:
        model = load_run(model_dir)[0]
        own = []
        for number, sampling in enumerate(settings):
            try:
                model.with_sampling(**sampling)
            except UserError as error:
                refusals[number].append(f"{model_dir}: {error}")
                continue
            fitting.add(number)
            own.append(OpenCheckpoint(model_dir, tuple(sampling.items())))
        openers += own or [OpenCheckpoint(model_dir)]
    for number, text in enumerate(samplers):
        if number not in fitting:
            raise UserError(f"--sampler {text}: {'; '.join(refusals[number])}")
    return openers


def parse_sampler(text: str) -> dict[str, Any]:
    """ "name=ddim,num_steps=20" -> {"name": "ddim", "num_steps": 20}; UserError if it does not read so."""
    settings = {}
    for setting in filter(None, text.split(",")):
        name, equals, value = setting.partition("=")
        if not equals or not value:
            raise UserError(f"--sampler {text}: {setting!r} is not NAME=VALUE")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = value.strip()
    return settings


@functools.lru_cache(maxsize=1)
def load_tools(
    inverter: str | None, embeddings: tuple[tuple[str, str], ...], transcriber: str | None, trust: bool
) -> Tools:
    """UserError if something of it is not there."""
    paths = dict(embeddings)
    transcribe, hears_programs = load_transcriber(transcriber)
    return Tools(
        runs.load_inverter(inverter, trust),
        load_embeddings(paths, trust),
        transcribe,
        hears_programs,
        transcriber or "",
        {name: file_checksum(path) for name, path in paths.items()},
    )


def load_transcriber(name: str | None) -> tuple[Any, bool]:
    """(transcriber, whether it hears instruments); in its place, why there is none."""
    if name is None:
        return "needs --transcriber", False
    if name == BASIC_PITCH:
        return BasicPitch(), False
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("it is not MODULE:NAME")
        found = getattr(importlib.import_module(module), attribute)
        if not callable(found):
            raise TypeError("it cannot be called")
    except Exception as error:  # a module may fail in any way
        raise UserError(f"transcriber {name!r}: {error}; give basic_pitch, or MODULE:NAME of a callable") from error
    return found, True


def make_folder(output_dir: str) -> Path:
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").touch()
    except OSError as error:
        raise UserError(f"cannot write into {output_dir} ({error.strerror})") from error
    return folder


# --- flags -------------------------------------------------------------------------------------------------------


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser(prog="python -m music_synth.evaluate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--gin_file", metavar="FILE", help="recipe (default: evaluate.gin); may be repeated")
    parser.add_argument("--gin.NAME", metavar="VALUE", help="sets a knob, or one parameter")
    parser.add_argument("--checkpoints", metavar="DIR,DIR", help="MODEL_DIRs of training runs")
    parser.add_argument(
        "--sampler",
        action="append",
        metavar="NAME=VALUE,...",
        help="settings that checkpoints are scored with, such as num_steps=5; may be repeated",
    )
    for name in WITH_PATH:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"of {name}'s weights, for its distances")
    parser.add_argument("--transcriber", metavar="MODULE:NAME", help="hears the notes (default: basic_pitch)")
    parser.add_argument("--trust", action="store_true", help="let SavedModels, which are programs, run")
    parser.add_argument("--beam_runner", help="Apache Beam's runner, to share the work: DirectRunner, FlinkRunner, ...")
    parser.add_argument("--beam_options", help="options of Apache Beam, by commas")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    keep_compiled()
    files, overrides, rest = config.split_flags(argv)
    flags = parse_flags(rest)
    given = {
        "checkpoints": [name for name in flags.checkpoints.split(",") if name] if flags.checkpoints else None,
        "samplers": flags.sampler,
        "embeddings": {name: path for name in WITH_PATH if (path := getattr(flags, name))} or None,
        "beam_runner": flags.beam_runner,
        "beam_options": flags.beam_options,
    }
    overrides += [f"evaluate.{name}={value!r}" for name, value in given.items() if value is not None]
    config.parse(files or ["evaluate.gin"], overrides)
    work = config.build("evaluate", overrides)
    if ":" in (work.keywords.get("transcriber") or ""):
        raise UserError("evaluate.transcriber: code is named on the command line alone, by --transcriber=MODULE:NAME")
    work(trust=flags.trust, **({"transcriber": flags.transcriber} if flags.transcriber else {}))


if __name__ == "__main__":
    errors.run(main)
