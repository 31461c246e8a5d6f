"""Scores decoders and inverters on held-out pieces: what stands in the table, and who makes its clips.

A row of the table is a `Row`: a source, which makes the clips (`sources`), and where they are kept (`clips`). Every
decoder has two:

* whole pieces, generated as a listener hears them: the context of a segment is what the model wrote before;
* single segments with their true context, joined.

Beside them stand floors, which no model should fail to beat: the mean spectrum of the training set, that of each piece
itself, and a decoder's mean with noise of the right color laid on it; and ceilings: the ground truth's audio (what
perfection gets) and the ground truth through each inverter (what is lost after the decoder). What is measured of all of
them is in `measures`.

The work falls into groups of clips, of which each is made and then measured. One process does them in turn; Apache
Beam, if it is asked, spreads them over processes or machines that see the same folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from music_synth.errors import UserError, needing
from music_synth.evaluation import measures
from music_synth.evaluation.clips import MAX_SLUG, SCORES, Folder, checksum, slug
from music_synth.evaluation.measures import Cell, Tools
from music_synth.evaluation.pieces import Targets
from music_synth.evaluation.sources import (
    SINGLE,
    WHOLE,
    Checkpoint,
    MeanSpectrum,
    Noisy,
    Recording,
    Revoiced,
    Sampled,
    Source,
    ThroughInverter,
)
from music_synth.vocoder.inverter import MEL_ONLY

BASELINE, MODEL, CEILING = "baseline", "model", "ceiling"

# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    kind: str  # BASELINE, MODEL or CEILING
    source: Source
    folder: Folder
    mode: str = ""  # of a model: WHOLE or SINGLE
    about: Mapping[str, Any] = field(default_factory=dict)  # of a model, for scores.json
    against: Folder | None = None  # of the row that it should be no worse than
    after: bool = False  # whether it takes the clips of another row, which come first


def reference_rows(mean: np.ndarray, folder: Path, inverters: Mapping[str, str]) -> list[Row]:
    """Lists the rows beside the models.

    mean: spectrum [M] of the training set. inverters: checksums of their files, by name.
    """
    rows = [
        Row("mean spectrum of the training set", BASELINE, MeanSpectrum(mean), at(folder, "mean", mean)),
        Row("mean spectrum of each piece itself", BASELINE, MeanSpectrum(), at(folder, "own mean", 0)),
        Row("ground truth audio", CEILING, Recording(), at(folder, "recording", 0)),
    ]
    first: Folder | None = None
    for name, file_sum in inverters.items():
        title, place = f"ground truth through {inverter_name(name)}", at(folder, f"inverter {name}", file_sum)
        rows.append(Row(title, CEILING, ThroughInverter(name), place, against=first))
        first = first or place
    return rows


def inverter_name(name: str) -> str:
    return {"shipped": "the shipped inverter", MEL_ONLY: "the shipped inverter without notes"}.get(name, name)


def model_rows(
    open_checkpoint: Callable[[], Checkpoint],
    folder: Path,
    inverters: Mapping[str, str],
    seed: int,
    batch_size: int,
    about: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Lists whole pieces and single segments of a checkpoint, and whole pieces through the inverters after the first.

    Args:
      inverters: checksums of their files, by name.
      about: kept with the scores.
    """
    checkpoint, about = open_checkpoint(), about or {}
    decoder, (first, *others) = checkpoint.decoder, inverters
    identity = (decoder.params, repr(decoder.model), repr(decoder.tokenizer), inverters[first], seed)
    rows = [
        Row(
            checkpoint.name,
            MODEL,
            Sampled(open_checkpoint, mode, first, seed, batch_size),
            at(folder, f"{checkpoint.name} {mode.split()[0]}", identity),
            mode,
            about,
        )
        for mode in (WHOLE, SINGLE)
    ]
    for name in others:
        place = at(folder, f"{checkpoint.name} {name}", identity, inverters[name])
        title = f"{checkpoint.name}, through {inverter_name(name)}"
        also = {"through": inverter_name(name)}
        source = Revoiced(rows[0].folder, name)
        rows.append(Row(title, MODEL, source, place, WHOLE, {**about, **also}, rows[0].folder, after=True))
    return rows


def noisy_row(mean: Row, targets: Targets, folder: Path, inverters: Mapping[str, str], seed: int) -> Row:
    """Makes the floor of a decoder that has a mean, what noise alone does to it; `mean`: its row of whole pieces."""
    source = Noisy(mean.folder, targets.folder, tuple(targets.names), next(iter(inverters)), seed)
    place = at(folder, f"{mean.name} noise", mean.folder.path.name, targets.names, seed)
    return Row(f"{mean.name} plus Gaussian noise", BASELINE, source, place, about=mean.about, after=True)


def at(folder: Path, name: str, *identity: Any) -> Folder:
    return Folder(folder / f"{slug(name)[-MAX_SLUG:]}-{checksum(identity)}")


# --- making and measuring ----------------------------------------------------------------------------------------


def make(row: Row, targets: Folder, names: Sequence[str], tools: Tools) -> list[str]:
    """Makes the clips of a row that are missing; returns the names of those that are there. A failure is kept."""
    missing = [name for name in names if row.folder.find_sound(name) is None]
    made = set(names) - set(missing)
    try:
        wanted = [targets.read_target(name) for name in missing]
        for index, sound, scores in row.source.make(missing, wanted, tools) if missing else ():
            row.folder.write_json(missing[index], SCORES, scores)
            row.folder.write_sound(missing[index], sound)
            made.add(missing[index])
    except UserError as error:
        for name in set(missing) - made:
            row.folder.write_json(name, SCORES, {"failed": str(error)})
    return [name for name in names if name in made]


def score(
    rows: Sequence[Row],
    targets: Targets,
    open_tools: Callable[[], Tools],
    group_size: int = 8,
    beam_options: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """Makes and measures the clips; yields the rows with their numbers, as of `summarized`, in order.

    Args:
      rows: one that takes the clips of another comes after it.
      open_tools: gives the tools; with Beam, in each process, for which it must be possible to send it there.
      group_size: clips made together.
      beam_options: of Apache Beam, "--runner=FlinkRunner" among them; None: no Beam.

    Raises:
      UserError: the folder cannot be written, the pipeline failed.
    """
    groups = [
        list(group) for group in np.array_split(np.array(targets.names), max(1, -(-len(targets.names) // group_size)))
    ]
    for after in (False, True) if beam_options is not None else ():
        work = [(row, group) for row in rows for group in groups if row.after == after]
        spread(work, targets.folder, open_tools, beam_options or ())
    tools = open_tools()
    with tqdm(total=len(rows) * len(targets.names), unit="clip") as bar:
        for row in rows:
            bar.set_description(f"{row.name}{', ' * bool(row.mode)}{row.mode}"[:60])
            for group in groups if beam_options is None else ():
                for name in make(row, targets.folder, group, tools):
                    measures.measure_clip(row.folder, targets.folder, name, tools)
                bar.update(len(group))
            yield summarized(row, targets, tools)


def summarized(row: Row, targets: Targets, tools: Tools) -> dict[str, Any]:
    """Makes what scores.json says of a row, from the scores of its clips.

    {name, kind, mode, about: of `Row`; folder of its clips; against: that of the row it should be no worse than, or "";
    failed: why the clips could not be made, or ""; cells: of `measures.as_json`; drift: {measure: of `measures.drift`}}
    """
    scores = [row.folder.read_json(name, SCORES) for name in targets.names]
    failed = next((own["failed"] for own in scores if "failed" in own), "")
    cells = {} if failed else measures.summarize(row.folder, targets.folder, targets.names, tools)
    if isinstance(row.source, Recording) and not targets.have_audio:
        cells = {"log_mel": Cell(missing="needs recordings: prepare_data --audio keeps them")}
    drifts = {} if failed else {key: measures.drift(row.folder, targets.names, key) for key in ("log_mel", "stft")}
    return {
        "name": row.name,
        "kind": row.kind,
        "mode": row.mode,
        "failed": failed,
        "cells": measures.as_json(cells),
        "drift": drifts,
        "folder": row.folder.path.name,
        "against": row.against.path.name if row.against else "",
        "about": dict(row.about),
    }


def spread(
    work: Sequence[tuple[Row, list[str]]], targets: Folder, open_tools: Callable[[], Tools], beam_options: Sequence[str]
) -> None:
    """Makes and measures all groups of clips by Apache Beam; the results lie in the folders."""
    with needing("--beam_runner needs Apache Beam", "data"):
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        with beam.Pipeline(options=PipelineOptions(list(beam_options))) as pipeline:
            groups = pipeline | beam.Create(list(work)) | "spread groups" >> beam.Reshuffle()
            made = groups | "make" >> beam.FlatMap(_make_group, targets, open_tools)
            made | "spread clips" >> beam.Reshuffle() | "measure" >> beam.Map(_measure_clip, targets, open_tools)
    except Exception as error:  # Beam wraps whatever goes wrong in a worker
        raise UserError(f"Apache Beam could not score: {error}") from error


def _make_group(
    group: tuple[Row, list[str]], targets: Folder, open_tools: Callable[[], Tools]
) -> list[tuple[Row, str]]:
    row, names = group
    return [(row, name) for name in make(row, targets, names, open_tools())]


def _measure_clip(clip: tuple[Row, str], targets: Folder, open_tools: Callable[[], Tools]) -> None:
    row, name = clip
    measures.measure_clip(row.folder, targets, name, open_tools())
