#!/usr/bin/env python
"""Trains and compares several models under one budget, and merges their scores into one table and report.

    python scripts/sweep.py --out runs/sweep --task runs/prepared --steps 300 --seeds 0,1 \\
      "autoregressive: autoregressive.gin" \\
      "autoregressive, no context: autoregressive.gin nocontext.gin" \\
      "diffusion: diffusion.gin" \\
      "diffusion, small, no context: diffusion.gin models/small.gin nocontext.gin LEARNING_RATE=1e-3"

Each argument is a model: its name in the table, a colon, its recipe and overlays, and what else it sets. What all of
them set stands as --gin.NAME=VALUE. Every model is trained once a seed into OUT/<name>-seed<seed>.

All trained models are then scored by music_synth.evaluate, once with every --sampler (name=ddim,num_steps=5), and the
scores merged into OUT/table.md, scores.json and report.html: mean and standard deviation over seeds.

The same command goes on where it stopped: what is trained and scored stays as it is. With --minutes the updates of a
run and their compilation are timed, evaluations aside, and --steps says over how many updates the learning rate falls.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from music_synth import config, errors
from music_synth.errors import UserError
from music_synth.evaluation import report
from music_synth.evaluation.clips import slug
from music_synth.files import write_whole
from music_synth.training.checkpoint import FOLDER as CHECKPOINTS
from music_synth.training.checkpoint import saved_steps
from music_synth.training.writer import last_value

STARTED = "started.json"  # in a MODEL_DIR: by which arguments it is trained
TRAINED = "trained.json"  # ... and that the training came to its end


@dataclass(frozen=True)
class Run:
    """One training: a model with one seed."""

    name: str  # of the model
    seed: int
    model_dir: Path
    arguments: tuple[str, ...]  # of music_synth.train


def plan(models: Sequence[str], flags: argparse.Namespace, shared: Sequence[str]) -> list[Run]:
    """All trainings, seed by seed, so that a sweep cut short has every model at least once.

    Args:
      models: "NAME: RECIPE.gin OVERLAY.gin NAME=VALUE ...", as on the command line.
      shared: overrides "NAME=VALUE" of all of them.

    Raises:
      UserError: a model that does not read so, two of one name, a recipe that is nowhere.
    """
    runs = []
    for seed in flags.seeds:
        for model in models:
            name, colon, words = model.partition(":")
            name = name.strip()
            words = split_words(words)
            files = [word for word in words if word.endswith(".gin") and "=" not in word]
            overrides = [word for word in words if word not in files]
            wrong = [word for word in overrides if "=" not in word]
            if not name or not colon or not files or wrong:
                said = f"{wrong[0]!r} is neither a file nor NAME=VALUE" if wrong else "a name, a colon, a recipe"
                raise UserError(f'model {model!r}: {said}; write "NAME: RECIPE.gin [OVERLAY.gin] [KNOB=VALUE]"')
            model_dir = flags.out / f"{slug(name)}-seed{seed}"
            if any(model_dir == run.model_dir for run in runs):
                raise UserError(f"two models go to {model_dir}: give them names that differ in letters or digits")
            budget = [f"TRAIN_STEPS={flags.steps}"] if flags.steps else []
            budget += [f"train.max_minutes={flags.minutes}"] if flags.minutes else []
            own = [f"MODEL_DIR={model_dir}", f"train.seed={seed}", f"Feed.seed={seed}"]
            task = [f"TASK={flags.task}"] if flags.task else []
            overrides = [*task, *budget, *shared, *overrides, *own]
            for file in files:
                config.find(file)
            arguments = [f"--gin_file={file}" for file in files] + [f"--gin.{override}" for override in overrides]
            runs.append(Run(name, seed, model_dir, tuple(arguments)))
    return runs


def train(run: Run) -> str | None:
    """Trains what is not trained yet; returns why that failed, or None.

    Raises:
      UserError: the folder holds a training by another command.
    """
    started, trained = run.model_dir / STARTED, run.model_dir / TRAINED
    if trained.is_file() or saved_steps(
        run.model_dir / CHECKPOINTS
    ):  # else there is nothing that would be gone on from
        before = next((json.loads(file.read_text()) for file in (trained, started) if file.is_file()), None)
        if before is not None and before["arguments"] != list(run.arguments):
            changed = " ".join(sorted(set(run.arguments) ^ set(before["arguments"])))
            raise UserError(f"{run.model_dir} was trained otherwise ({changed}): choose another --out, or remove it")
    if trained.is_file():
        return None
    run.model_dir.mkdir(parents=True, exist_ok=True)
    mark(started, run)
    log = run.model_dir / "train.log"
    command = [sys.executable, "-m", "music_synth.train", *run.arguments]
    with log.open("a") as file:
        status = call(command, file)
    if status:
        last = ["", *log.read_text(errors="replace").strip().splitlines()][-1]
        said = last.removeprefix("error: ") if last.startswith("error: ") else f"ended with status {status}"
        return f"{said} (see {log})"
    mark(trained, run)
    return None


def mark(file: Path, run: Run) -> None:
    about = {"arguments": run.arguments, "date": time.strftime("%Y-%m-%d %H:%M")}
    write_whole(file, json.dumps(about, indent=1))


def call(command: Sequence[str], output) -> int:
    """Runs a command; ends it, and lets it save, if this process is ended."""
    process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def evaluate(runs: Sequence[Run], flags: argparse.Namespace) -> dict[str, Any]:
    """Scores all runs in one call, which does not repeat what it did before; returns its scores.json."""
    folder = flags.out / "evaluation"
    command = [sys.executable, "-m", "music_synth.evaluate", f"--gin.OUTPUT_DIR={folder}"]
    command += [f"--checkpoints={','.join(str(run.model_dir) for run in runs)}"]
    command += [f"--gin.TASK={flags.task}"] if flags.task else []
    command += [f"--sampler={sampler}" for sampler in flags.sampler or ()]
    if call([*command, *flags.evaluate], None):
        raise UserError("the evaluation failed, as said above; the same command goes on from there")
    return json.loads((folder / "scores.json").read_text(encoding="utf-8"))


# --- merging -----------------------------------------------------------------------------------------------------


def merge(scores: dict[str, Any], runs: Sequence[Run], failures: dict[Run, str]) -> dict[str, Any]:
    """The scores with one row for all seeds of a model, sampler and mode: mean and standard deviation of its cells.

    A run that failed to train has a row that says why.
    """
    model_of = {str(run.model_dir): run for run in runs}
    groups: dict[tuple, list[dict]] = {}
    for row in scores["rows"]:
        if "model_dir" in row["about"]:
            name = model_of[row["about"]["model_dir"]].name
            name += "".join(f", {key} {value}" for key, value in row["about"]["given"].items())
            name += f", through {row['about']['through']}" if "through" in row["about"] else ""
            name += " plus Gaussian noise" if row["kind"] == "baseline" else ""
            groups.setdefault((name, row["kind"], row["mode"]), []).append(row)
        else:
            groups[row["name"], row["kind"], row["mode"]] = [row]
    rows = [merged(*key, rows, own="model_dir" not in rows[0]["about"]) for key, rows in groups.items()]
    for run, reason in failures.items():
        failed = {"name": f"{run.name}, seed {run.seed}", "kind": "model", "mode": "", "failed": reason}
        rows.append(failed | {"cells": {}, "drift": {}, "folder": "", "about": {}})
    order = {"baseline": 0, "model": 1, "ceiling": 2}
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    note = f"Mean ± standard deviation over seeds {seeds}; in small print the lowest to the highest."
    return scores | {"rows": sorted(rows, key=lambda row: order[row["kind"]]), "note": note}


def merged(name: str, kind: str, mode: str, rows: Sequence[dict], own: bool) -> dict[str, Any]:
    """One row of several; of a single one that no seed changes (`own`), itself."""
    if own:
        return rows[0]
    failed = [f"{row['name']}: {row['failed']}" for row in rows if row["failed"]]
    cells = {}
    for key in {key for row in rows for key in row["cells"]}:
        values = [row["cells"][key]["value"] for row in rows if "value" in row["cells"].get(key, {})]
        if len(values) < len(rows):
            cells[key] = next(row["cells"].get(key, {}) for row in rows if "value" not in row["cells"].get(key, {}))
        else:
            cells[key] = {"value": statistics.fmean(values), "low": min(values), "high": max(values), "values": values}
            cells[key] |= {"spread": statistics.stdev(values)} if len(values) > 1 else {}
    drifts = [row["drift"] for row in rows]  # {} of a row that failed
    drift = {
        key: [
            mean_of(points, ("value", "clips")) for points in zip(*(own.get(key, ()) for own in drifts), strict=False)
        ]
        for key in sorted(set().union(*drifts))
    }
    curves = zip(*(row["about"]["training"] for row in rows), strict=False)
    training = [mean_of(points, points[0].keys()) for points in curves]
    about = {"model_dirs": [row["about"]["model_dir"] for row in rows], "training": training}
    about |= {key: rows[0]["about"][key] for key in ("step", "parameters", "given", "sampler")}
    made = {"name": name, "kind": kind, "mode": mode, "failed": "; ".join(failed), "cells": cells, "drift": drift}
    return made | {"folder": rows[0]["folder"], "about": about}


def mean_of(points: Sequence[dict[str, float]], keys) -> dict[str, float]:
    return {key: statistics.fmean(point[key] for point in points) for key in keys if all(key in p for p in points)}


def main(argv: list[str]) -> None:
    files, shared, rest = config.split_flags(argv)
    if files:
        raise UserError('--gin_file is not for a sweep: name recipes in the models, "NAME: RECIPE.gin"')
    flags = parse_flags(rest)
    runs = plan(flags.models, flags, shared)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM; the same command goes on from there"))
    failures = {}
    for number, run in enumerate(runs, start=1):

        def say(text: str, run: Run = run, number: int = number) -> None:
            print(f"[{number} of {len(runs)}] {run.name}, seed {run.seed}: {text}", flush=True)

        if not (run.model_dir / TRAINED).is_file():
            say(f"training; log: {run.model_dir / 'train.log'}")
        failure = train(run)
        say(f"failed: {failure}" if failure else f"trained, {last_value(run.model_dir, 'train/minutes'):.1f} minutes")
        failures |= {run: failure} if failure else {}
    trained = [run for run in runs if run not in failures]
    if not trained:
        raise UserError("no training came to its end")
    if flags.train_only:
        return
    scores = merge(evaluate(trained, flags), runs, failures)
    (flags.out / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    table = report.to_markdown(scores)
    (flags.out / "table.md").write_text(table, encoding="utf-8")
    examples = report.make_examples(flags.out / "evaluation" / "clips", scores, flags.num_examples)
    report.write_html(flags.out / "report.html", scores, examples, title="Sweep")
    print(f"\n{table}\nreport: {flags.out / 'report.html'}; table: table.md, all numbers: scores.json beside it")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python scripts/sweep.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("models", nargs="+", metavar="MODEL", help='"NAME: RECIPE.gin [OVERLAY.gin] [KNOB=VALUE]"')
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="of everything (default: runs/sweep)")
    parser.add_argument("--task", help="a task, or a prepared folder (default: what the recipes say)")
    parser.add_argument("--steps", type=int, help="updates of every run")
    parser.add_argument("--minutes", type=float, help="of training of every run")
    parser.add_argument("--seeds", type=numbers, default=(0, 1), metavar="S,S", help="(default: 0,1)")
    parser.add_argument("--gin.NAME", metavar="VALUE", help="what every model sets")
    parser.add_argument("--sampler", action="append", metavar="NAME=VALUE,...", help="to score with; may be repeated")
    parser.add_argument(
        "--evaluate", type=split_words, default=(), metavar="FLAGS", help='--evaluate="--gin.MAX_SECONDS=60 --vggish=P"'
    )
    parser.add_argument("--num_examples", type=int, default=12, help="excerpts in the report (default: 12)")
    parser.add_argument("--train_only", action="store_true", help="do not score yet")
    flags = parser.parse_args(argv)
    if flags.steps is None and flags.minutes is None:
        raise UserError("a sweep compares under one budget: give --steps, or --minutes")
    return flags


def split_words(text: str) -> list[str]:
    """As a shell would; UserError if a quote is left open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{text!r}: {str(error).lower()}") from error


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


if __name__ == "__main__":
    errors.run(main)
