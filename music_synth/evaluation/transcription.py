"""From audio back to notes, and how well two lists of notes agree.

A transcriber tells what can be heard of the notes in a piece of audio, so its scores on sampled audio mean something
only beside its scores on the recording: that is their ceiling.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from music_synth.audio.io import resample
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.errors import UserError, needing
from music_synth.midi.notes import Note, hertz_of


class Transcriber(Protocol):
    """Any program that writes down the notes of audio [S], float32 at 16 kHz."""

    def __call__(self, audio: np.ndarray) -> list[Note]: ...


# --- basic-pitch -------------------------------------------------------------------------------------------------

MODEL_RATE = 22_050  # Hz, of the audio that basic-pitch takes
HOP = 256  # samples between its frames: 86.13 frames a second
WINDOW = 2 * MODEL_RATE - HOP  # samples in one call: 43,844
WINDOW_FRAMES = 172
MARGIN = 15  # frames at either end of a window that are left to its neighbors
INNER_FRAMES = WINDOW_FRAMES - 2 * MARGIN
LOWEST_PITCH, NUM_PITCHES = 21, 88  # of the piano
WINDOWS_PER_CALL = 8  # bounds the memory
OUTPUTS = {"notes": 1, "onsets": 2, "contours": 0}  # numbers at the end of the model's names for them
VELOCITY = 127  # of a note whose activation is 1


class Posteriors(NamedTuple):
    """What basic-pitch hears, between 0 and 1; frame k is at k * 256 / 22050 s."""

    onsets: np.ndarray  # float32 [T, 88]: a note begins
    notes: np.ndarray  # float32 [T, 88]: a note sounds
    contours: np.ndarray  # float32 [T, 264]: a pitch sounds, three bins a semitone


@dataclass(frozen=True)
class BasicPitch:
    """Notes by the network of Bittner et al. 2022 ("A lightweight instrument-agnostic model ...") in basic-pitch.

    It hears pitches and times from A0 to C8, and how strong they are. It cannot tell instruments, so every note has
    program 0, and it knows no drums: it finds few or wrong pitches in them. Of its scores those with programs and drums
    say nothing, and it works best on few instruments.

    Notes come from the posteriors as the paper makes them: each onset peak, the last first, is followed until the
    activation stays low; what is then left of the activation makes further notes, the strongest first.
    """

    onset_threshold: float = 0.5
    note_threshold: float = 0.3  # activation under which a note does not sound
    min_seconds: float = 0.1277  # shorter notes are left out
    max_gap: int = 11  # frames that a note may stay under the threshold and go on

    def __call__(self, audio: np.ndarray) -> list[Note]:
        """Notes in the order of their onsets. Of silence: none. UserError as `posteriors` raises it."""
        heard = posteriors(audio)
        end = len(audio) / SAMPLE_RATE
        notes = []
        for start, stop, bin_, strength in self.find_notes(heard.onsets, heard.notes):
            onset, offset = start * HOP / MODEL_RATE, min(stop * HOP / MODEL_RATE, end)
            velocity = int(np.clip(round(VELOCITY * strength), 1, 127))
            if onset < offset:
                notes.append(Note(LOWEST_PITCH + bin_, velocity, 0, onset, offset))
        return sorted(notes, key=lambda note: (note.onset, note.pitch))

    def find_notes(self, onsets: np.ndarray, activation: np.ndarray) -> list[tuple[int, int, int, float]]:
        """Finds (first frame, end frame, pitch bin, mean activation) of each note, from posteriors [T, 88]."""
        left = activation.astype(np.float64)  # what no note has claimed yet
        min_frames = round(self.min_seconds * MODEL_RATE / HOP)
        found = []

        def claim(start: int, stop: int, bin_: int) -> None:
            """Frames start..stop - 1 of a pitch and of its neighbors, which a strong note also excites."""
            if stop - start > min_frames:
                found.append((start, stop, bin_, float(activation[start:stop, bin_].mean())))
            left[start:stop, max(0, bin_ - 1) : bin_ + 2] = 0

        likely = rising_onsets(onsets, activation)
        for start, bin_ in sorted(peaks(likely, self.onset_threshold), reverse=True):
            stop = self.follow(left[start:, bin_]) + start
            if stop - start > min_frames:
                claim(start, stop, bin_)
        strong = np.argwhere(left > self.note_threshold)
        strongest_first = np.argsort(-left[tuple(strong.T)], kind="stable")
        for middle, bin_ in strong[strongest_first].tolist():
            if left[middle, bin_]:  # not claimed in the meantime
                stop = self.follow(left[middle:, bin_]) + middle
                start = middle + 1 - self.follow(left[middle::-1, bin_])
                claim(start, stop, bin_)
        return found

    def follow(self, activation: np.ndarray) -> int:
        """Frames [T] until the activation falls under the threshold for longer than the gap, or the end."""
        sounding = np.flatnonzero(activation >= self.note_threshold)
        if not sounding.size or sounding[0] >= self.max_gap:
            return 0
        breaks = np.flatnonzero(np.diff(sounding) > self.max_gap)
        return int(sounding[breaks[0]] if breaks.size else sounding[-1]) + 1


def posteriors(audio: np.ndarray) -> Posteriors:
    """Runs basic-pitch on audio [S], float32 at 16 kHz; T = ceil(S * 22050 / 16000 / 256).

    The audio is cut into windows of 2 s that overlap by 30 frames, of which each window gives up half: what a window
    says near its ends is not used. Windows know nothing of each other, so their number in a call changes nothing.

    Raises:
      UserError: the audio is empty or not finite; basic-pitch or onnxruntime is not installed.
    """
    audio = checked_audio(audio, "basic-pitch", 0.0)
    return _posteriors(audio.tobytes())


@functools.lru_cache(maxsize=2)  # the notes and the embedding of a clip come from one run
def _posteriors(audio_bytes: bytes) -> Posteriors:
    session = basic_pitch_session()
    audio = resample(np.frombuffer(audio_bytes, np.float32), SAMPLE_RATE, MODEL_RATE)
    num_frames = -(-len(audio) // HOP)
    num_windows = -(-num_frames // INNER_FRAMES)
    # A step of whole frames: time stays exact over any length.
    starts = np.arange(num_windows) * INNER_FRAMES * HOP
    padded = np.zeros(starts[-1] + WINDOW, np.float32)
    padded[MARGIN * HOP : MARGIN * HOP + len(audio)] = audio
    name = session.get_inputs()[0].name
    outputs = {key: f"StatefulPartitionedCall:{number}" for key, number in OUTPUTS.items()}
    parts: dict[str, list[np.ndarray]] = {key: [] for key in outputs}
    for first in range(0, num_windows, WINDOWS_PER_CALL):
        windows = np.stack([padded[start : start + WINDOW] for start in starts[first : first + WINDOWS_PER_CALL]])
        made = session.run(list(outputs.values()), {name: windows[:, :, None]})  # [W, 172, bins] each
        for key, values in zip(outputs, made, strict=True):
            parts[key].extend(values[:, MARGIN:-MARGIN])
    return Posteriors(**{key: np.concatenate(values)[:num_frames] for key, values in parts.items()})


@functools.cache
def basic_pitch_session():
    """Opens the ONNX file of the package basic-pitch, opened without importing the package (which wants TensorFlow)."""
    from music_synth.interop.runtimes import open_onnx

    spec = importlib.util.find_spec("basic_pitch")
    if spec is None or spec.origin is None:
        raise UserError("basic-pitch is not installed: pip install --no-deps basic-pitch")
    return open_onnx(Path(spec.origin).parent / "saved_models" / "icassp_2022" / "nmp.onnx")


def rising_onsets(onsets: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """Raises onset posteriors [T, 88] where the activation jumps: to its rise over one and two frames, scaled."""
    padded = np.concatenate([np.zeros((2, activation.shape[1])), activation])
    rise = np.minimum(padded[2:] - padded[1:-1], padded[2:] - padded[:-2])
    rise[:2] = 0
    highest = rise.max(initial=0)
    return np.maximum(onsets, rise * (onsets.max(initial=0) / highest)) if highest > 0 else onsets


def peaks(values: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Finds (frame, bin) of the local maxima over time of values [T, bins] that reach the threshold."""
    padded = np.pad(values, ((1, 1), (0, 0)), constant_values=np.inf)  # an edge is no peak
    higher = (values > padded[:-2]) & (values > padded[2:]) & (values >= threshold)
    return [(int(frame), int(bin_)) for frame, bin_ in np.argwhere(higher)]


def checked_audio(audio: np.ndarray, name: str, min_seconds: float) -> np.ndarray:
    """Returns float32 [S]; UserError if it is empty, shorter than `min_seconds` or not finite."""
    audio = np.asarray(audio)
    if audio.ndim != 1 or not np.issubdtype(audio.dtype, np.floating):
        raise ValueError(f"{name} takes mono floats [S], not {audio.dtype} {audio.shape}")
    seconds = len(audio) / SAMPLE_RATE
    if not len(audio) or seconds < min_seconds:
        raise UserError(f"{seconds:.2f} s of audio are too short for {name}: it needs {min_seconds:g} s")
    if not np.isfinite(audio).all():
        when = (~np.isfinite(audio)).argmax() / SAMPLE_RATE
        raise UserError(f"the audio is not finite (NaN or infinity) at {when:.2f} s")
    return np.ascontiguousarray(audio, np.float32)


# --- scores ------------------------------------------------------------------------------------------------------

ONSET_TOLERANCE = 0.05  # seconds
OFFSET_RATIO = 0.2  # of the reference note's length; at least the tolerance
PITCH_TOLERANCE = 50.0  # cents
VELOCITY_TOLERANCE = 0.1  # of velocities between 0 and 1, after the best scaling
GRANULARITIES: dict[str, Callable[[int], int]] = {
    "flat": lambda program: 0,
    "midi_class": lambda program: 8 * (program // 8),
    "full": lambda program: program,
}
MEASURES = ("precision", "recall", "f1")


def note_scores(reference: Iterable[Note], estimate: Iterable[Note]) -> dict[str, float]:
    """Computes precision, recall and F1 of a clip's notes, as MT3 (Gardner et al. 2022) and mir_eval define them.

    A note is found if its pitch is right and its onset within 50 ms; notes are paired one to one, as many as can be.
    Nothing found, or nothing to find, is 0. Keys are `<what>_<precision|recall|f1>`, where what is

        onset                        drums left out, instruments ignored
        onset_offset                 also the offset, within 50 ms or 20 % of the reference's length
        onset_velocity, onset_offset_velocity    also the velocity, within 10 % after the best linear fit
        flat, midi_class, full       onset, offset and program (drums: onset), each program against its like: all
                                     programs alike, by General MIDI's classes of eight, or as they are
        flat_nondrum, ...            the same without drums
        drum                         drums alone, by onset; hits of other `program` count as other instruments

    Notes that do not last (onset = offset) are passed over.
    """
    reference, estimate = ([note for note in notes if note.offset > note.onset] for notes in (reference, estimate))
    pitched = without_drums(reference), without_drums(estimate)
    scores: dict[str, float] = {}
    for name, offset, velocity in (
        ("onset", False, False),
        ("onset_offset", True, False),
        ("onset_velocity", False, True),
        ("onset_offset_velocity", True, True),
    ):
        values = match(*pitched, offset_ratio=OFFSET_RATIO if offset else None, velocity=velocity)
        scores.update(prefixed(name, values))
    for granularity, to_class in GRANULARITIES.items():
        tracks = by_program(reference, to_class), by_program(estimate, to_class)
        for suffix, counted in (("", None), ("_nondrum", False)):
            scores.update(prefixed(f"{granularity}{suffix}", program_scores(*tracks, counted)))
    scores.update(prefixed("drum", program_scores(*tracks, True)))
    return scores


def without_drums(notes: Iterable[Note]) -> list[Note]:
    return [note for note in notes if not note.is_drum and note.offset > note.onset]


def by_program(notes: Iterable[Note], to_class: Callable[[int], int]) -> dict[tuple[int, bool], list[Note]]:
    """Notes by (class of program, is_drum); a drum's program stays."""
    tracks = defaultdict(list)
    for note in notes:
        tracks[note.program if note.is_drum else to_class(note.program), note.is_drum].append(note)
    return tracks


def program_scores(reference: dict, estimate: dict, drums: bool | None) -> tuple[float, float, float]:
    """Scores over tracks from `by_program`: precision weighted by estimated notes, recall by those of the reference.

    drums: count drums alone (True), all but drums (False), or all (None).
    """
    correct_estimates = correct_references = num_estimates = num_references = 0.0
    for program, is_drum in {**reference, **estimate}:
        if drums is not None and drums != is_drum:
            continue
        tracks = reference.get((program, is_drum), []), estimate.get((program, is_drum), [])
        precision, recall, _ = match(*tracks, offset_ratio=None if is_drum else OFFSET_RATIO)
        num_references, num_estimates = num_references + len(tracks[0]), num_estimates + len(tracks[1])
        correct_references += recall * len(tracks[0])
        correct_estimates += precision * len(tracks[1])
    precision = correct_estimates / num_estimates if num_estimates else 0.0
    recall = correct_references / num_references if num_references else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def match(
    reference: Sequence[Note],
    estimate: Sequence[Note],
    offset_ratio: float | None = OFFSET_RATIO,
    velocity: bool = False,
    tolerance: float = ONSET_TOLERANCE,
) -> tuple[float, float, float]:
    """Computes precision, recall and F1 by mir_eval; offset_ratio None: offsets do not matter."""
    if not reference or not estimate:
        return 0.0, 0.0, 0.0
    with needing("note scores need mir_eval", "eval"):
        from mir_eval import transcription, transcription_velocity
    settings = {
        "onset_tolerance": tolerance,
        "offset_min_tolerance": tolerance,
        "offset_ratio": offset_ratio,
        "pitch_tolerance": PITCH_TOLERANCE,
    }
    (times, pitches, velocities), (est_times, est_pitches, est_velocities) = as_arrays(reference), as_arrays(estimate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if velocity:
            scores = transcription_velocity.precision_recall_f1_overlap(
                times, pitches, velocities, est_times, est_pitches, est_velocities,
                velocity_tolerance=VELOCITY_TOLERANCE, **settings,
            )  # fmt: skip
        else:
            scores = transcription.precision_recall_f1_overlap(times, pitches, est_times, est_pitches, **settings)
    precision, recall, f1 = map(float, scores[:3])
    return precision, recall, f1


def as_arrays(notes: Sequence[Note]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times in seconds [n, 2], pitches in Hz [n], velocities [n]."""
    times = np.array([(note.onset, note.offset) for note in notes], np.float64)
    pitches = hertz_of(np.array([note.pitch for note in notes], np.float64))
    return times, pitches, np.array([note.velocity for note in notes], np.float64)


def prefixed(name: str, values: Iterable[float]) -> dict[str, float]:
    return dict(zip((f"{name}_{measure}" for measure in MEASURES), values, strict=True))
