"""Scores decoders on held-out pieces: what stands in the table, how its clips are made, and by whom.

A row of the table is a `Row`: a source, which makes the clips, and where they are kept. Every checkpoint has two:

* whole pieces, generated as a listener hears them: the context of a segment is what the model wrote before;
* single segments with their true context, joined.

Beside them stand the training set's mean spectrum (what no model should fail to beat), the ground truth's audio (the
ceiling: what perfection gets) and the ground truth through the inverter (what is lost after the decoder). What is
measured of all of them is in `measures`, where the clips lie in `clips`.

The work falls into groups of clips, of which each is made and then measured. One process does them in turn; Apache
Beam, if it is asked, spreads them over processes or machines that see the same folder.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, log_mel
from music_synth.errors import UserError
from music_synth.evaluation import measures
from music_synth.evaluation.clips import MAX_SLUG, SCORES, Folder, Sound, Target, checksum, slug, target_name
from music_synth.evaluation.measures import Cell, Tools
from music_synth.midi.notes import Note
from music_synth.playing import Decoder, Segment, piece_seed, whole_mels

WHOLE, SINGLE = "whole pieces", "single segments with true context"
BASELINE, MODEL, CEILING = "baseline", "model", "ceiling"


class Piece(Protocol):
    """A whole piece of a split, as `Feed.pieces` yields it; a frozen dataclass."""

    id: str
    notes: list[Note]
    mel: np.ndarray  # log-mel [T, M]
    audio: np.ndarray | None  # [S]; None where the feed does not keep it


class Checkpoint(NamedTuple):
    """A trained decoder and its name in the table."""

    name: str
    decoder: Decoder


# --- where clips come from ---------------------------------------------------------------------------------------


class Source(Protocol):
    """Makes clips. A frozen dataclass that can be sent to another process."""

    def make(self, targets: Sequence[Target], tools: Tools) -> Iterator[tuple[int, Sound, dict[str, float]]]:
        """(which of the targets, its clip, what it cost) in any order. UserError if it cannot."""


@dataclass(frozen=True)
class MeanSpectrum:
    """The same spectrum in all frames; never played."""

    log_mel: np.ndarray  # [M]

    def make(self, targets: Sequence[Target], tools: Tools) -> Iterator[tuple[int, Sound, dict[str, float]]]:
        for index, target in enumerate(targets):
            yield index, Sound(np.broadcast_to(self.log_mel, target.mel.shape), None), {}


@dataclass(frozen=True)
class Recording:
    """The ground truth's audio itself; its mel is taken anew, and differs where data and mel disagree."""

    def make(self, targets: Sequence[Target], tools: Tools) -> Iterator[tuple[int, Sound, dict[str, float]]]:
        for index, target in enumerate(targets):
            yield index, Sound(mel_of(target.audio, len(target.mel)), target.audio), {}


@dataclass(frozen=True)
class ThroughInverter:
    """The ground truth's mel, made audio."""

    def make(self, targets: Sequence[Target], tools: Tools) -> Iterator[tuple[int, Sound, dict[str, float]]]:
        for index, target in enumerate(targets):
            audio = tools.inverter(target.mel, target.notes)
            yield index, Sound(mel_of(audio, len(target.mel)), audio), {}


@dataclass(frozen=True)
class Sampled:
    """What a checkpoint samples from the notes."""

    open_checkpoint: Callable[[], Checkpoint]
    mode: str  # WHOLE or SINGLE
    seed: int
    batch_size: int  # segments side by side: changes the speed, not the numbers

    def make(self, targets: Sequence[Target], tools: Tools) -> Iterator[tuple[int, Sound, dict[str, float]]]:
        decoder = self.open_checkpoint().decoder
        tokens = [decoder.tokenizer.encode(target.notes, len(target.mel)) for target in targets]
        mels = [target.mel for target in targets]
        seeds = [piece_seed(target.id, self.seed) for target in targets]
        if self.mode == WHOLE:
            batches = decoder.sample_pieces(tokens, seeds, self.batch_size)
        else:
            batches = decoder.sample_segments(tokens, mels, seeds, self.batch_size)
        seconds: list[float] = []  # of each call, a second of mel
        for index, mel in whole_mels(timed(batches, seconds), [len(mel) for mel in mels]):
            # Without the first call, which compiles; the median, as a call of fewer rows may compile too.
            cost = float(np.median(seconds[1:] or seconds))
            yield index, Sound(mel, tools.inverter(mel, targets[index].notes)), {measures.COST.key: cost}


def timed(batches: Iterable[list[Segment]], seconds: list[float]) -> Iterator[list[Segment]]:
    """Yields the batches; `seconds` gets how long a second of mel took in each."""
    start = time.perf_counter()
    for batch in batches:
        seconds.append((time.perf_counter() - start) / (len(batch) * len(batch[0].mel) / FRAME_RATE))
        yield batch
        start = time.perf_counter()


def mel_of(audio: np.ndarray, num_frames: int) -> np.ndarray:
    """The first frames of the log-mel of audio [S], which is extended with silence if it is too short."""
    return log_mel(np.pad(audio, (0, max(0, num_frames * HOP_LENGTH - len(audio)))), np)[:num_frames]


# --- pieces ------------------------------------------------------------------------------------------------------


def take(pieces: Iterable[Piece], max_seconds: float | None = None) -> Iterator[Piece]:
    """The pieces in order until `max_seconds` are full; the last one is cut there. None: all of them."""
    if max_seconds is not None and not max_seconds > 0:
        raise UserError(f"max_seconds = {max_seconds}: must be positive, or None for the whole split")
    left = float("inf") if max_seconds is None else max(1, round(max_seconds * FRAME_RATE))
    for piece in pieces:
        taken = cut(piece, left) if left < len(piece.mel) else piece
        left -= len(taken.mel)
        yield taken
        if left <= 0:
            return


def cut(piece: Piece, num_frames: int) -> Piece:
    """The first `num_frames` frames of a piece; notes that sound at the cut end there."""
    end = num_frames / FRAME_RATE
    notes = [note._replace(offset=min(note.offset, end)) for note in piece.notes if note.onset < end]
    # One hop more: the last frame's window reaches into it.
    audio = None if piece.audio is None else piece.audio[: (num_frames + 1) * HOP_LENGTH]
    return dataclasses.replace(piece, notes=notes, mel=piece.mel[:num_frames], audio=audio)


def mean_log_mel(pieces: Iterable[Piece]) -> np.ndarray:
    """Mean log-mel [M] over all frames of the pieces, float32."""
    total, count = 0.0, 0
    for piece in pieces:
        total = total + piece.mel.sum(axis=0, dtype=np.float64)
        count += len(piece.mel)
    if not count:
        raise UserError("the training split is empty: its mean spectrum cannot be taken")
    return (total / count).astype(np.float32)


class Targets(NamedTuple):
    """The clips of a split, on disk."""

    folder: Folder
    names: list[str]
    seconds: float
    have_audio: bool  # else the mel through the inverter stands for the recording


def store_targets(pieces: Iterable[Piece], folder: Path, tools: Tools, inverter_sum: str) -> Targets:
    """Writes the pieces one by one. Those whose audio the feed does not keep get that of their mel.

    `inverter_sum` is the checksum of the inverter's files, by which what it made is told from what another one did.
    """
    kept, names, seconds, have_audio = Folder(folder / "target"), [], 0.0, True
    for piece in pieces:
        have_audio &= piece.audio is not None
        name = target_name(piece, heard=inverter_sum if piece.audio is None else "recording")
        needed = len(piece.mel) * HOP_LENGTH
        if not kept.has_target(name):
            audio = tools.inverter(piece.mel, piece.notes) if piece.audio is None else piece.audio
            audio = audio[: needed + HOP_LENGTH]
            audio = np.pad(audio, (0, max(0, needed - len(audio))))
            kept.write_target(name, Target(piece.id, piece.notes, piece.mel, audio))
        names.append(name)
        seconds += len(piece.mel) / FRAME_RATE
    return Targets(kept, names, seconds, have_audio)


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


@dataclass(frozen=True)
class Scored:
    """A row with its numbers."""

    name: str
    kind: str
    mode: str
    failed: str  # why the clips could not be made
    cells: dict[str, Cell]
    drift: dict[str, list[dict[str, float]]]  # measure -> the k-th 5.12 s
    folder: str  # of its clips
    about: dict[str, Any]


def reference_rows(mean_spectrum: np.ndarray, folder: Path, inverter: tuple[str, str]) -> list[Row]:
    """The rows beside the models; `inverter` is its name and the checksum of its files."""
    name, inverter_sum = inverter
    return [
        Row(
            "mean spectrum of the training set",
            BASELINE,
            MeanSpectrum(mean_spectrum),
            at(folder, "mean", mean_spectrum),
        ),
        Row("ground truth audio", CEILING, Recording(), at(folder, "recording", 0)),
        Row(f"ground truth through {name}", CEILING, ThroughInverter(), at(folder, "inverter", inverter_sum)),
    ]


def model_rows(
    open_checkpoint: Callable[[], Checkpoint],
    folder: Path,
    inverter_sum: str,
    seed: int,
    batch_size: int,
    about: Mapping[str, Any] | None = None,
) -> list[Row]:
    """Whole pieces and single segments of a checkpoint. `about` is kept with the scores."""
    checkpoint = open_checkpoint()
    decoder = checkpoint.decoder
    identity = (decoder.params, repr(decoder.model), repr(decoder.tokenizer), inverter_sum, seed)
    return [
        Row(
            checkpoint.name,
            MODEL,
            Sampled(open_checkpoint, mode, seed, batch_size),
            at(folder, f"{checkpoint.name} {mode.split()[0]}", identity),
            mode,
            about or {},
        )
        for mode in (WHOLE, SINGLE)
    ]


def at(folder: Path, name: str, *identity: Any) -> Folder:
    return Folder(folder / f"{slug(name)[-MAX_SLUG:]}-{checksum(identity)}")


def make(row: Row, targets: Folder, names: Sequence[str], tools: Tools) -> list[str]:
    """Makes the clips of a row that are missing; returns the names of those that are there. A failure is kept."""
    missing = [name for name in names if not row.folder.has_sound(name)]
    try:
        for index, sound, cost in (
            row.source.make([targets.read_target(name) for name in missing], tools) if missing else ()
        ):
            row.folder.write_json(missing[index], SCORES, cost)
            row.folder.write_sound(missing[index], sound)
    except UserError as error:
        for name in missing:
            if not row.folder.has_sound(name):
                row.folder.write_json(name, SCORES, {"failed": str(error)})
    return [name for name in names if row.folder.has_sound(name)]


def score(
    rows: Sequence[Row],
    targets: Targets,
    open_tools: Callable[[], Tools],
    group_size: int = 8,
    beam_options: Sequence[str] | None = None,
    progress: bool = False,
) -> Iterator[Scored]:
    """The rows with their numbers, in order.

    Args:
      open_tools: gives the tools; with Beam, in each process, for which it must be possible to send it there.
      group_size: clips made together.
      beam_options: of Apache Beam, "--runner=FlinkRunner" among them; None: no Beam.
      progress: a bar on stderr.

    Raises:
      UserError: the folder cannot be written, the pipeline failed.
    """
    groups = [
        list(group) for group in np.array_split(np.array(targets.names), max(1, -(-len(targets.names) // group_size)))
    ]
    if beam_options is not None:
        spread([(row, group) for row in rows for group in groups], targets.folder, open_tools, beam_options)
    tools = open_tools()
    with tqdm(total=len(rows) * len(targets.names), unit="clip", disable=not progress) as bar:
        for row in rows:
            bar.set_description(f"{row.name}{', ' * bool(row.mode)}{row.mode}"[:60])
            for group in groups if beam_options is None else ():
                for name in make(row, targets.folder, group, tools):
                    measures.measure_clip(row.folder, targets.folder, name, tools)
                bar.update(len(group))
            yield summarized(row, targets, tools)


def summarized(row: Row, targets: Targets, tools: Tools) -> Scored:
    scores = [row.folder.read_json(name, SCORES) for name in targets.names]
    failed = next((own["failed"] for own in scores if "failed" in own), "")
    cells = {} if failed else measures.summarize(row.folder, targets.folder, targets.names, tools)
    if isinstance(row.source, Recording) and not targets.have_audio:
        cells = {"log_mel": Cell(missing="needs recordings: prepare_data --audio keeps them")}
    drifts = {} if failed else {key: measures.drift(row.folder, targets.names, key) for key in ("log_mel", "stft")}
    return Scored(row.name, row.kind, row.mode, failed, cells, drifts, row.folder.path.name, dict(row.about))


def spread(
    work: Sequence[tuple[Row, list[str]]], targets: Folder, open_tools: Callable[[], Tools], beam_options: Sequence[str]
) -> None:
    """Makes and measures all groups of clips by Apache Beam; the results lie in the folders."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(f"--beam_runner needs Apache Beam ({error}): pip install 'music_synth[data]'") from error
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
