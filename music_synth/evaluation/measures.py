"""What is measured: of every clip by itself, and from that of a whole row of the table.

| key                          | of a clip                                            | of a row                       |
|------------------------------|------------------------------------------------------|--------------------------------|
| `log_mel`                    | mean absolute log-mel difference, dB                 | mean, all frames               |
| `change`                     | mean absolute change from frame to frame, dB         | over the recordings' own       |
| `calibration`                | log-mel difference of samples of two seeds, dB       | over `log_mel`                 |
| `stft`                       | multi-resolution STFT distance                       | mean, all clips                |
| `onset_f1` and others        | transcribed notes against those to be heard          | mean, all clips                |
| `<embedding>_distance`       | mean distance of frames, pair by pair                | mean, all clips                |
| `<embedding>_frechet`, `_frechet_infinity`, `_kernel` | frames                      | of all frames                  |

Calibration and change tell a generator from a regression and from noise: both are 1 where a decoder draws from the
distribution of the recordings, near 0 of a regression, and change is far above 1 of noise.

Intervals are percentile bootstraps over clips, 95 %. A clip of which a number cannot be taken (shorter than an
embedding's window, say) is left out of that number, and the reason kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from music_synth.audio.mel import DB_PER_NEPER, HOP_LENGTH, MIN_LOG_MEL
from music_synth.errors import UserError
from music_synth.evaluation.clips import SCORES, Folder, Sound, Target
from music_synth.evaluation.embeddings import Embedding
from music_synth.evaluation.statistics import (
    Gaussian,
    bootstrap_interval,
    frechet_distance,
    frechet_distance_at_infinity,
    kernel_distance,
    reconstruction_distance,
)
from music_synth.evaluation.transcription import Transcriber, note_scores
from music_synth.midi.notes import Note
from music_synth.vocoder.inverter import Inverter
from music_synth.vocoder.objective import FLOOR, RESOLUTIONS, stft_sums

SEGMENT_FRAMES = 256  # over which drift is told: 5.12 s
MAX_FRAMES = 8192  # of an embedding that the limit at infinity and the kernel distance look at, evenly from all clips
MAX_GROUPS = 32  # of clips, that a Fréchet distance's interval draws
FRECHET_RESAMPLES = 40
NEEDS_PROGRAMS = "needs --transcriber MODULE:NAME, one that hears instruments"


@dataclass(frozen=True)
class Tools:
    """What clips are made and measured with."""

    inverters: Mapping[str, Inverter]  # by name; the first plays all rows, the others beside it
    embeddings: Mapping[str, Embedding | str] = field(default_factory=dict)  # a str says why it is absent
    transcriber: Transcriber | str = "needs a transcriber"
    hears_programs: bool = False
    transcriber_name: str = ""
    checksums: Mapping[str, str] = field(default_factory=dict)  # of the files of embeddings, by name


@dataclass(frozen=True)
class Column:
    """A number of the table."""

    key: str
    title: str
    higher_is_better: bool | None = False  # None: 1 is best
    digits: int = 2
    essential: bool = False  # stands in the Markdown table


NOTE_COLUMNS = (
    Column("onset_f1", "note F1, onset", True, 3, essential=True),
    Column("onset_offset_f1", "note F1, onset and offset", True, 3, essential=True),
    Column("flat_f1", "note F1, onset, offset and drums", True, 3),
    Column("midi_class_f1", "note F1, and program class", True, 3),
    Column("full_f1", "note F1, and program", True, 3),
    Column("drum_f1", "drum F1", True, 3),
)
DISTANCES = {  # of an embedding's frames
    "distance": "distance", "frechet": "Fréchet", "frechet_infinity": "Fréchet at infinity", "kernel": "kernel distance"
}  # fmt: skip
COST = Column("cost", "cost, s a second", digits=3, essential=True)  # of sampling; of an inverter where only it works
BETWEEN = "between"  # of a clip's scores: how far a sample of another seed is
PITCH_ONLY = ("onset_f1", "onset_offset_f1")  # what a transcriber without instruments can be scored by


def columns(names: Sequence[str]) -> list[Column]:
    """Lists the columns of the table, for embeddings of these names."""
    made = [
        Column("log_mel", "log-mel error, dB", essential=True),
        Column("stft", "STFT distance", essential=True),
        Column("calibration", "calibration", None, essential=True),
        Column("change", "frame-to-frame change", None, essential=True),
    ]
    for name in names:
        for kind, title in DISTANCES.items():
            made.append(Column(f"{name}_{kind}", f"{name} {title}", digits=3, essential=kind == "frechet"))
    return [*made, *NOTE_COLUMNS, COST]


# --- a clip ------------------------------------------------------------------------------------------------------


def log_mel_error(mel: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Takes {value in dB, frames, segments: the same of every 5.12 s}; what lies under the floor counts as the floor.

    Both log-mel [T, M].
    """
    if mel.shape != target.shape:
        raise ValueError(f"mel of shape {mel.shape} against a target of shape {target.shape}")
    difference = np.maximum(mel, MIN_LOG_MEL).astype(np.float64) - np.maximum(target, MIN_LOG_MEL)
    frames = DB_PER_NEPER * np.abs(difference).mean(axis=1)  # [T]
    segments = [float(frames[first : first + SEGMENT_FRAMES].mean()) for first in range(0, len(mel), SEGMENT_FRAMES)]
    return {"value": float(frames.mean()), "frames": len(frames), "segments": segments}


def frame_change(mel: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Takes the mean absolute change from frame to frame of log-mels [T, M]: {value, target, in dB; frames: T - 1}."""
    if len(mel) < 2:
        raise UserError("a clip of one frame does not change")
    own, other = (
        float(DB_PER_NEPER * np.abs(np.diff(np.maximum(one, MIN_LOG_MEL).astype(np.float64), axis=0)).mean())
        for one in (mel, target)
    )
    return {"value": own, "target": other, "frames": len(mel) - 1}


def stft_error(audio: np.ndarray, target: np.ndarray) -> dict[str, Any]:
    """Takes {value: convergence + log-magnitude error, mean of 4 resolutions; segments: the latter of every 5.12 s}.

    Both audio [S]; the longer is cut. Convergence is over the whole clip, so that a silent stretch of the target is no
    division by zero; the spectra are of 5.12 s at a time.
    """
    length = min(len(audio), len(target))
    if not np.any(target[:length]):
        raise UserError("the target is silent: no spectral convergence")
    block = SEGMENT_FRAMES * HOP_LENGTH
    parts, segments = [], []
    for first in range(0, length, block):
        pair = [
            np.pad(x[first : min(first + block, length)], (0, max(0, first + block - length))) for x in (audio, target)
        ]
        difference, power, log_sum = (np.asarray(x, np.float64) for x in _stft_sums(*pair))  # [resolutions] each
        share = min(1.0, (length - first) / block)
        parts.append((difference, power, log_sum, np.full(len(RESOLUTIONS), share)))
        segments.append(float(np.mean(log_sum / share)))
    difference, power, log_sum, share = np.sum(parts, axis=0)
    return {"value": float(np.mean(np.sqrt(difference / (power + FLOOR)) + log_sum / share)), "segments": segments}


@jax.jit
def _stft_sums(audio: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`stft_sums` of audio [S] each, [resolutions] of each."""
    sums = [stft_sums(audio[None], target[None], *resolution) for resolution in RESOLUTIONS]
    difference, power, log_error = map(jnp.concatenate, zip(*sums, strict=True))
    return difference, power, log_error


def measure_clip(row: Folder, targets: Folder, name: str, tools: Tools) -> None:
    """Measures of a clip what is not measured yet, into its scores; a number that cannot be taken says why.

    The frames of embeddings are those of the target too, which are taken where they are missing.
    """
    scores = row.read_json(name, SCORES)
    target, sound = targets.read_target(name), row.read_sound(name)
    for key, measure in _measures(row, targets, name, target, sound, tools).items():
        if key not in scores or "failed" in scores[key]:
            try:
                scores[key] = measure()
            except UserError as error:
                scores[key] = {"failed": str(error)}
    row.write_json(name, SCORES, scores)


def _measures(
    row: Folder, targets: Folder, name: str, target: Target, sound: Sound, tools: Tools
) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "log_mel": functools.partial(log_mel_error, sound.mel, target.mel),
        "change": functools.partial(frame_change, sound.mel, target.mel),
    }
    if sound.audio is None or target.audio is None:
        return found
    found["stft"] = functools.partial(stft_error, sound.audio, target.audio)
    if not isinstance(tools.transcriber, str):
        found[f"notes-{tools.transcriber_name}"] = functools.partial(
            _score_notes, tools.transcriber, target.notes, sound.audio
        )
    for key, embedding in embeddings_of(tools).items():
        pair = ((targets, target.audio), (row, sound.audio))
        found[key] = functools.partial(_embed, pair, name, key, embedding)
    return found


def _embed(pair: Sequence[tuple[Folder, np.ndarray]], name: str, key: str, embedding: Embedding) -> dict[str, Any]:
    """Takes frames of a target and of a clip, in their folders, where they are missing; and how far they lie apart."""
    kind, frames = f"{key}.npy", []
    for folder, audio in pair:
        found = folder.find_array(name, kind)
        if found is None:
            found = np.asarray(embedding.embed(audio), np.float32)
            folder.write(name, kind, functools.partial(np.save, arr=found))
        frames.append(found)
    return {"value": reconstruction_distance(*frames)}


def _score_notes(transcriber: Transcriber, notes: Sequence[Note], audio: np.ndarray) -> dict[str, float]:
    """Scores what a transcriber hears; UserError for whatever goes wrong in it: it may be anyone's."""
    try:
        heard = [Note(*note) for note in transcriber(audio)]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the transcriber fails: {type(error).__name__}: {error}") from error
    return note_scores(notes, heard)


def embeddings_of(tools: Tools) -> dict[str, Embedding]:
    """Gives those that are there, by the key under which a clip keeps their frames."""
    return {
        f"{name}-{tools.checksums.get(name, '0')}": embedding
        for name, embedding in tools.embeddings.items()
        if not isinstance(embedding, str)
    }


# --- a row -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A number of the table, or why there is none."""

    value: float | None = None
    low: float | None = None  # of the 95 % interval
    high: float | None = None
    clips: int = 0  # that count
    r_squared: float | None = None  # of the fit, of a limit
    missing: str = ""  # "failed: ..." or "needs ..."
    left_out: Mapping[str, int] = field(default_factory=dict)  # clips, by reason


def summarize(row: Folder, targets: Folder, names: Sequence[str], tools: Tools, seed: int = 0) -> dict[str, Cell]:
    """Makes the cells of a row by column, from the scores of its clips. Columns that say nothing of it are absent."""
    scores = [row.read_json(name, SCORES) for name in names]
    cells = {
        "log_mel": _mean_cell(scores, "log_mel", seed, weight="frames"),
        "change": _ratio_cell(scores, "change", "change", "target", seed),
    }
    if any(BETWEEN in score for score in scores):
        cells["calibration"] = _ratio_cell(scores, BETWEEN, "log_mel", "value", seed)
    if not any("stft" in score for score in scores):
        return cells
    cells["stft"] = _mean_cell(scores, "stft", seed)
    for column in NOTE_COLUMNS:
        if isinstance(tools.transcriber, str):
            cells[column.key] = Cell(missing=tools.transcriber)
        elif column.key not in PITCH_ONLY and not tools.hears_programs:
            cells[column.key] = Cell(missing=NEEDS_PROGRAMS)
        else:
            cells[column.key] = _mean_cell(scores, f"notes-{tools.transcriber_name}", seed, value=column.key)
    for name, embedding in tools.embeddings.items():
        if isinstance(embedding, str):
            cells |= {f"{name}_{kind}": Cell(missing=embedding) for kind in DISTANCES}
    for key, embedding in embeddings_of(tools).items():
        own = _distance_cells(row, targets, names, scores, key, seed)
        cells |= {f"{embedding.name}_{kind}": cell for kind, cell in own.items()}
    speeds = [score[COST.key] for score in scores if COST.key in score]
    return cells | ({COST.key: Cell(float(np.median(speeds)), clips=len(speeds))} if speeds else {})


def drift(row: Folder, names: Sequence[str], key: str) -> list[dict[str, float]]:
    """Takes the mean over clips of the score of their k-th 5.12 s, for every k: [{value, clips}]."""
    columns: dict[int, list[float]] = defaultdict(list)
    for name in names:
        for k, value in enumerate(row.read_json(name, SCORES).get(key, {}).get("segments", ())):
            columns[k].append(value)
    return [{"value": float(np.mean(values)), "clips": len(values)} for values in columns.values()]


def _mean_cell(scores: Sequence[dict], key: str, seed: int, value: str = "value", weight: str | None = None) -> Cell:
    """Takes the mean over clips of a number, the clips alike or by their `weight`."""
    good = [score[key] for score in scores if value in score.get(key, {})]
    reasons = (score.get(key, {}).get("failed", "not measured") for score in scores if value not in score.get(key, {}))
    left_out = dict(Counter(reasons))  # plain: asdict cannot copy a Counter
    weights = [score[weight] if weight else 1 for score in good]
    pairs = [(score[value] * weight, weight) for score, weight in zip(good, weights, strict=True)]
    return _quotient(pairs, seed, left_out)


def _ratio_cell(scores: Sequence[dict], above: str, below: str, value: str, seed: int) -> Cell:
    """Takes the ratio of two numbers of the clips, each the mean over all frames: `above`, and `value` of `below`."""
    good = [(score[above], score[below]) for score in scores if "value" in score.get(above, {}) and below in score]
    good = [(top, bottom) for top, bottom in good if value in bottom]
    left_out = {"not measured": len(scores) - len(good)} if len(good) < len(scores) else {}
    pairs = [(top["value"] * top["frames"], bottom[value] * bottom["frames"]) for top, bottom in good]
    return _quotient(pairs, seed, left_out)


def _quotient(pairs: Sequence[tuple[float, float]], seed: int, left_out: Mapping[str, int]) -> Cell:
    """Takes sum / sum over clips, with its interval."""

    def quotient(pairs: Sequence[tuple[float, float]]) -> float:
        above, below = np.sum(pairs, axis=0)
        return float(above / below) if below else math.nan

    if not pairs:
        return Cell(missing=_failed(left_out))
    value = quotient(pairs)
    if not math.isfinite(value):
        return Cell(missing="failed: nothing to compare with")
    low, high = bootstrap_interval(pairs, np.random.default_rng(seed), quotient)
    return Cell(value, _number(low), _number(high), len(pairs), left_out=left_out)


def _distance_cells(
    row: Folder, targets: Folder, names: Sequence[str], scores: Sequence[dict], key: str, seed: int
) -> dict[str, Cell]:
    distance = _mean_cell(scores, key, seed)
    names = [name for name, score in zip(names, scores, strict=True) if "value" in score.get(key, {})]
    if not names:
        return dict.fromkeys(DISTANCES, distance)
    num_groups = min(len(names), MAX_GROUPS)
    groups = [(Gaussian(), Gaussian()) for _ in range(num_groups)]  # of reference and judged frames
    pooled: tuple[list, list] = ([], [])
    share = max(1, MAX_FRAMES // len(names))
    for number, frames in enumerate(_frames(row, targets, names, key)):
        for group, own, pool in zip(groups[number % num_groups], frames, pooled, strict=True):
            group.add(own)
            pool.append(own[np.linspace(0, len(own) - 1, min(len(own), share)).astype(int)])
    reference, judged = map(np.concatenate, pooled)
    rng = np.random.default_rng(seed)

    @functools.cache  # few clips are drawn alike again and again
    def distance_of(chosen: tuple[int, ...]) -> float:
        pairs = [groups[number] for number in chosen]
        return frechet_distance(*(Gaussian.merged(side) for side in zip(*pairs, strict=True)))

    cell = functools.partial(Cell, clips=len(names), left_out=distance.left_out)

    def drawn(chosen: Sequence[int]) -> float:
        return distance_of(tuple(sorted(chosen)))

    def frechet() -> Cell:
        low, high = bootstrap_interval(range(num_groups), rng, drawn, num_resamples=FRECHET_RESAMPLES)
        return cell(drawn(range(num_groups)), _number(low), _number(high))

    def at_infinity() -> Cell:
        limit, r_squared = frechet_distance_at_infinity(reference, judged, rng)
        return cell(limit, r_squared=r_squared)

    def kernel() -> Cell:
        return cell(kernel_distance(reference, judged, rng))

    cells = {"distance": distance}
    for kind, take in (("frechet", frechet), ("frechet_infinity", at_infinity), ("kernel", kernel)):
        try:
            cells[kind] = take()
        except (UserError, ValueError, np.linalg.LinAlgError) as error:
            cells[kind] = Cell(missing=f"failed: {error}")
    return cells


def _frames(row: Folder, targets: Folder, names: Sequence[str], key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reads reference and judged frames of each clip, of equal number."""
    for name in names:
        reference, judged = (np.load(folder.file(name, f"{key}.npy")) for folder in (targets, row))
        n = min(len(reference), len(judged))
        yield reference[:n], judged[:n]


def _failed(reasons: Mapping[str, int]) -> str:
    return f"failed: {max(reasons, key=reasons.__getitem__)}" if reasons else "failed: no clips"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_json(cells: Mapping[str, Cell]) -> dict[str, dict[str, Any]]:
    """Says of each cell what it says, without what it does not."""
    return {
        key: {name: value for name, value in dataclasses.asdict(cell).items() if value not in (None, "", {})}
        for key, cell in cells.items()
    }
