"""Scores checkpoints, samplers and inverters: chooses the rows, the pieces and the tools, and writes the results."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from music_synth import runs
from music_synth.data.feed import open_feed
from music_synth.errors import UserError, telling
from music_synth.evaluation import evaluator, measures, report
from music_synth.evaluation.clips import file_checksum
from music_synth.evaluation.embeddings import load_embeddings
from music_synth.evaluation.evaluator import MODEL, Row
from music_synth.evaluation.measures import Column, Tools
from music_synth.evaluation.pieces import mean_log_mel, rendered, store_targets, take
from music_synth.evaluation.sources import WHOLE, Checkpoint
from music_synth.evaluation.transcription import BasicPitch, Transcriber
from music_synth.files import write_whole
from music_synth.midi.tokenizer import Tokenizer
from music_synth.runs import SHIPPED
from music_synth.training.step import num_params
from music_synth.training.writer import read_metrics
from music_synth.vocoder import neural
from music_synth.vocoder.inverter import MEL_ONLY

BASIC_PITCH = "basic_pitch"
MAX_EXAMPLES = 1000  # in a report
MEAN = {"temperature": 0}  # the setting by which a decoder that has it gives its mean


def evaluate(
    checkpoints: Sequence[str],
    task: str,
    split: str = "test",
    output_dir: str = "runs/evaluation",
    max_seconds: float | None = None,
    clip_seconds: float | None = None,
    samplers: Sequence[str] = ("",),
    reference: str | None = None,
    inverters: Sequence[str] = (SHIPPED,),
    batch_size: int = 8,
    seed: int = 0,
    embeddings: Mapping[str, str] | None = None,
    transcriber: str = BASIC_PITCH,
    trust: bool = False,
    soundfont: str | None = None,
    num_examples: int = 12,
    data_dir: str | None = None,
    beam_runner: str | None = None,
    beam_options: str = "",
) -> None:
    """Scores checkpoints on held-out pieces: prints a table, writes it, scores.json and report.html.

    A decoder that has a temperature is also scored at 0, its mean, and beside it that mean plus Gaussian noise.

    Args:
      checkpoints: of decoders, in the order of the table; of a run the newest counts. (): inverters alone are scored.
      task: name of a task, or path of a prepared folder; its `train` split gives the mean spectrum.
      split: what is scored.
      output_dir: gets the table, the numbers, the report, and every clip that was made.
      max_seconds: as much of the split, from its start; None: all of it.
      clip_seconds: as much of each piece, from its start; None: all of it.
      samplers: settings that every checkpoint is scored with, each "name=ddim,num_steps=20,temperature=0.7"; "": as it
        was trained. A decoder that has none of these settings is scored once, as it was trained.
      reference: settings of the row that the other models are held against: no worse is what lies inside its 95 %
        interval, or better, in every column of quality.
      inverters: make the audio, as for synthesize; the first plays all rows, the others the whole pieces beside it.
      batch_size: segments sampled side by side: faster, at the cost of memory; the numbers stay.
      seed: of the sampling.
      embeddings: paths of those that need one, by name: {"vggish": "/models/vggish"}.
      transcriber: hears the notes: "basic_pitch", "MODULE:NAME" of a callable, audio [S] -> list of Note, that hears
        instruments too, or "none".
      trust: whether SavedModels, which are programs, may run.
      soundfont: renders the embedded set's test pieces anew, in place of the split.
      num_examples: excerpts in the report.
      data_dir: where tfds keeps its data sets.
      beam_runner, beam_options: of Apache Beam, which then makes and measures the clips; None: this process does.

    Raises:
      UserError: a checkpoint that cannot be loaded, no such task or split, an output that cannot be written.
    """
    if batch_size < 1:
        raise UserError(f"evaluate.batch_size = {batch_size}: must be at least 1")
    if not 0 <= num_examples <= MAX_EXAMPLES:
        raise UserError(f"evaluate.num_examples = {num_examples}: must be in 0 .. {MAX_EXAMPLES}")
    if not inverters:
        raise UserError("no inverter to play with: leave out --inverter for the one that ships")
    folder = Path(output_dir)
    clips = folder / "clips"
    with telling(f"cannot write into {folder}"):  # now, not after an hour
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").touch()
    given = tuple(sorted((embeddings or {}).items()))
    open_tools = functools.partial(load_tools, tuple(inverters), given, transcriber, trust)
    tools = open_tools()
    sums = {name: file_checksum(neural.SHIPPED if name in (SHIPPED, MEL_ONLY) else name) for name in inverters}
    openers = plan(checkpoints, samplers, reference)
    models = []
    for opener in openers:
        models += evaluator.model_rows(opener, clips, sums, seed, batch_size, opener.about())
    feed = open_feed(task, Tokenizer(), batch_size=1, data_dir=data_dir)  # whole pieces: no tokenizer matters
    pieces = feed.pieces(split) if soundfont is None else rendered(Path(soundfont))
    targets = store_targets(take(pieces, max_seconds, clip_seconds), clips, tools, sums)
    if not targets.names:
        raise UserError(f"{task} has no pieces in its split {split!r}")
    means = [row for row in models if row.mode == WHOLE and row.about["given"] == MEAN and not row.after]
    floors = [evaluator.noisy_row(row, targets, clips, sums, seed) for row in means]
    references = evaluator.reference_rows(mean_log_mel(feed.pieces("train")), clips, sums)
    baselines = [row for row in references if row.kind == evaluator.BASELINE]
    rows = [*baselines, *floors, *models, *references[len(baselines) :]]
    if reference is not None:
        rows = [held_against(row, models) for row in rows]
    options = [f"--{option.removeprefix('--')}" for option in beam_options.split(",") if option]
    beam = [*options, f"--runner={beam_runner}"] if beam_runner else None
    order = sorted(rows, key=lambda row: row.after)  # what takes the clips of others comes after them
    made = evaluator.score(order, targets, open_tools, batch_size, beam)
    by_folder = {row["folder"]: row for row in made}
    columns = measures.columns(list(tools.embeddings))
    scores: dict[str, Any] = {
        "task": task if soundfont is None else f"the embedded test pieces by {Path(soundfont).name}",
        "split": split,
        "num_clips": len(targets.names),
        "seconds": targets.seconds,
        "seed": seed,
        "inverters": list(inverters),
        "transcriber": transcriber,
        "reference": "recordings" if targets.have_audio else "the data set's mel through the inverter",
        "note": "Intervals of 95 % over clips.",
        "clips": targets.names,
        "columns": [dataclasses.asdict(column) for column in columns],
        "rows": [judged(by_folder[row.folder.path.name], by_folder, columns) for row in rows],
    }
    table = report.to_markdown(scores)
    with telling(f"cannot write into {folder}"):
        write_whole(folder / "scores.json", json.dumps(scores, indent=1))
        write_whole(folder / "table.md", table)
    print(table)
    report.write_html(folder / "report.html", scores, report.make_examples(clips, scores, num_examples))
    if reference is not None:
        print(cheapest(scores["rows"]))
    print(f"report: {folder / 'report.html'}; table: {folder / 'table.md'}; all numbers: {folder / 'scores.json'}")


# --- what is scored ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenCheckpoint:
    """Opens a decoder, here or in another process, with sampler settings in place of its own."""

    path: str
    sampling: tuple[tuple[str, Any], ...] = ()
    is_reference: bool = False

    def __call__(self) -> Checkpoint:
        """Loads it; UserError if there is none, or it has no such settings."""
        run, settings = load_run(self.path), dict(self.sampling)
        said = "".join(f", {name} {value}" for name, value in settings.items())
        name = f"{type(run.model).__name__} ({self.path}, step {run.step}{said})"
        return Checkpoint(name, run._replace(model=run.model.with_sampling(**settings)).decoder())

    def about(self) -> dict[str, Any]:
        """Tells, for scores.json, which run it is, how it samples, and how it learned."""
        run = load_run(self.path)
        sampled = run.model.with_sampling(**dict(self.sampling))
        return {
            "model_dir": self.path,
            "step": run.step,
            "parameters": num_params(run.params),
            "given": dict(self.sampling),
            "is_reference": self.is_reference,
            "sampler": dataclasses.asdict(sampled.sampler) if hasattr(sampled, "sampler") else {},
            "training": learning_curve(self.path),
        }


load_run = functools.lru_cache(maxsize=1)(runs.load)  # the groups of clips of a row come one after the other


def learning_curve(model_dir: str) -> list[dict[str, float]]:
    """Reads what a run said of itself at each evaluation: {step, minutes of training, eval/...}."""
    minutes = 0.0
    curve: list[dict[str, float]] = []
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


def plan(checkpoints: Sequence[str], samplers: Sequence[str], reference: str | None = None) -> list[OpenCheckpoint]:
    """Pairs every checkpoint with every sampler, and with the mean of those that have one.

    A decoder that has none of the settings is there once, as it was trained. The reference comes first, once for every
    checkpoint that has its settings.

    Raises:
      UserError: settings that do not read as such, or that no checkpoint has; a run that is none.
    """
    asked = {text: parse_sampler(text) for text in (*([] if reference is None else [reference]), *(samplers or [""]))}
    references: list[OpenCheckpoint] = []
    openers: list[OpenCheckpoint] = []
    fitting, refusals = set(), defaultdict(list)
    for path in checkpoints:
        model = load_run(path).model
        own: list[OpenCheckpoint] = []
        for text, sampling in asked.items():
            try:
                model.with_sampling(**sampling)
            except UserError as error:
                refusals[text].append(f"{path}: {error}")
                continue
            fitting.add(text)
            opener = OpenCheckpoint(path, tuple(sampling.items()), is_reference=text == reference)
            (references if opener.is_reference else own).append(opener)
        openers += own or [OpenCheckpoint(path)]
        mean = OpenCheckpoint(path, tuple(MEAN.items()))
        if model.can_sample(**MEAN) and mean not in own:
            openers.append(mean)
    for text in asked:
        if text not in fitting and checkpoints:
            raise UserError(f"--sampler {text}: {'; '.join(refusals[text])}")
    return [*references, *openers]


def parse_sampler(text: str) -> dict[str, Any]:
    """Reads "name=ddim,num_steps=20" as {"name": "ddim", "num_steps": 20}; UserError if it does not read so."""
    settings: dict[str, Any] = {}
    for setting in filter(None, text.split(",")):
        name, equals, value = setting.partition("=")
        if not equals or not value:
            raise UserError(f"--sampler {text}: {setting!r} is not NAME=VALUE")
        try:
            settings[name.strip()] = json.loads(value)
        except ValueError:
            settings[name.strip()] = value.strip()
    return settings


# --- no worse than the reference ---------------------------------------------------------------------------------


def held_against(row: Row, models: Sequence[Row]) -> Row:
    """Gives a model's row the reference of its mode to be held against, that of its own run if there is one."""
    of_mode = [one for one in models if one.about["is_reference"] and one.mode == row.mode and not one.after]
    if row.kind != MODEL or row.after or row.about["is_reference"] or not of_mode:
        return row
    own = [one for one in of_mode if one.about["model_dir"] == row.about["model_dir"]]
    return dataclasses.replace(row, against=(own or of_mode)[0].folder)


def is_no_worse(cells: Mapping[str, Any], reference: Mapping[str, Any], columns: Sequence[Column]) -> bool:
    """Tells whether every number of quality lies inside the reference's 95 % interval, or is better."""
    for column in columns:
        own, other = cells.get(column.key, {}), reference.get(column.key, {})
        if not column.essential or column is measures.COST or column.higher_is_better is None:
            continue
        if "value" not in own or "value" not in other:
            continue
        limit = other.get("low" if column.higher_is_better else "high", other["value"])
        if own["value"] < limit if column.higher_is_better else own["value"] > limit:
            return False
    return True


def judged(row: dict[str, Any], rows: Mapping[str, Any], columns: Sequence[Column]) -> dict[str, Any]:
    """Says of a row whether it is no worse than the one, of `rows` by folder, that it is held against."""
    if not row["against"] or row["failed"]:
        return row
    other = rows[row["against"]]
    return row | {"no_worse": not other["failed"] and is_no_worse(row["cells"], other["cells"], columns)}


def cheapest(rows: Sequence[Mapping[str, Any]]) -> str:
    """Names the cheapest row of whole pieces that is no worse than its reference."""
    fit = [row for row in rows if row.get("no_worse") and row["mode"] == WHOLE and "cost" in row["cells"]]
    best = min(fit, key=lambda row: row["cells"]["cost"]["value"], default=None)
    return f"cheapest that is no worse than the reference: {best['name'] if best else 'none'}"


# --- with what ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def load_tools(
    inverters: tuple[str, ...], embeddings: tuple[tuple[str, str], ...], transcriber: str, trust: bool
) -> Tools:
    """Opens what clips are made and measured with; UserError if something of it is not there."""
    paths = dict(embeddings)
    transcribe, hears_programs = load_transcriber(transcriber)
    return Tools(
        {name: runs.load_inverter(name, trust) for name in inverters},
        load_embeddings(paths, trust),
        transcribe,
        hears_programs,
        transcriber,
        {name: file_checksum(path) for name, path in paths.items()},
    )


def load_transcriber(name: str) -> tuple[Transcriber | str, bool]:
    """Finds (transcriber, whether it hears instruments); in its place, why there is none."""
    if name == "none":
        return "needs --transcriber", False
    if name == BASIC_PITCH:
        return BasicPitch(), False
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("it is not MODULE:NAME")
        found: Callable = getattr(importlib.import_module(module), attribute)
        if not callable(found):
            raise TypeError("it cannot be called")
    except Exception as error:  # a module may fail in any way
        raise UserError(f"transcriber {name!r}: {error}; give basic_pitch, or MODULE:NAME of a callable") from error
    return found, True
