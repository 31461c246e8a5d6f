"""Plays MIDI files: `python -m music_synth.synthesize in.mid --checkpoint MODEL_DIR --out out.wav`.

Several files, or a folder of them, become a folder of audio files. `--out -` plays while it samples: raw samples on
stdout, for a player or an encoder:

    python -m music_synth.synthesize in.mid --checkpoint MODEL_DIR --out - | aplay -t raw -f S16_LE -r 16000
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from music_synth import config, errors
from music_synth.audio.io import WRITABLE, audio_to_int16, write_audio
from music_synth.audio.mel import FRAME_RATE, SAMPLE_RATE
from music_synth.chaining import sample_pieces
from music_synth.compilation import keep_compiled
from music_synth.errors import UserError
from music_synth.midi.notes import Note, read_midi
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import DTYPES
from music_synth.models.seam import Seam
from music_synth.pictures import PICTURE_SUFFIXES, plot_piece
from music_synth.vocoder.inverter import GRIFFIN_LIM, Inverter, load_inverter, stream_audio

RING_OUT_SECONDS = 1.0  # what is kept after the end of the last note
MIDI_SUFFIXES = (".mid", ".midi")  # of the files of a folder
STDOUT = "-"
ACCELERATED_BATCH = 16  # pieces side by side on an accelerator; on a CPU one after the other is as fast


def synthesize(
    notes: Sequence[Note],
    model: Seam,
    params,
    tokenizer: Tokenizer,
    inverter: Inverter | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Notes -> audio and the log-mel that it was made from.

    The piece is sampled in segments, each with the one before it as its context. It ends `RING_OUT_SECONDS`
    after its last note; the published code keeps the whole last segment instead.

    Args:
      notes: of any length; times in seconds.
      inverter: mel -> audio; the trained one that ships with the package if None.
      seed: the same seed, notes and parameters give the same audio on the same machine.
      progress: show a bar, in segments, on stderr.

    Returns:
      audio float32 [320 T] at 16 kHz and log-mel float32 [T, M].

    Raises:
      UserError: there are no notes, or the model's output is not finite.
    """
    mel = sample_piece(notes, model, params, tokenizer, seed, progress)
    return (inverter or load_inverter())(mel), mel


def synthesize_stream(
    notes: Sequence[Note],
    model: Seam,
    params,
    tokenizer: Tokenizer,
    inverter: Inverter | None = None,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """`synthesize` as it goes: the same audio, up to rounding, in parts float32 [S] as they are done.

    The first part comes when one segment has been sampled. It is shorter than a segment by what the inverter must see
    of the future (2.1 s of the one that ships), and all parts are late by as much. Inverters that cannot stream
    (Griffin-Lim, those of other projects) give one part at the end.
    """
    return stream_audio(inverter or load_inverter(), sample_stream(notes, model, params, tokenizer, seed))


def sample_stream(
    notes: Sequence[Note], model: Seam, params, tokenizer: Tokenizer, seed: int = 0
) -> Iterator[np.ndarray]:
    """The log-mel of a piece, float32 [t, M] a segment, as it is sampled."""
    segments, num_frames = tokenize(notes, tokenizer)
    for _, mel in sample_pieces(model, params, [segments], [seed], batch_size=1):
        yield mel[:num_frames]
        num_frames -= len(mel)


def sample_piece(
    notes: Sequence[Note], model: Seam, params, tokenizer: Tokenizer, seed: int = 0, progress: bool = False
) -> np.ndarray:
    """The first half of `synthesize`: notes -> log-mel float32 [T, M]."""
    ((_, mel),) = sample_many([notes], model, params, tokenizer, seed, 1, progress)
    return mel


def sample_many(
    pieces: Sequence[Sequence[Note]],
    model: Seam,
    params,
    tokenizer: Tokenizer,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """Log-mels of many pieces, `batch_size` sampled side by side; each is what it would be alone, up to rounding.

    Yields (index of a piece, its log-mel float32 [T, M]) when it is done; the order is `sample_pieces`'s.
    """
    segments, lengths = zip(*(tokenize(notes, tokenizer) for notes in pieces), strict=True)
    parts: list[list[np.ndarray]] = [[] for _ in pieces]
    sampled = sample_pieces(model, params, segments, [seed] * len(pieces), batch_size)
    total = sum(map(len, segments))
    for piece, mel in tqdm(sampled, desc="sampling", total=total, unit="segment", disable=not progress):
        parts[piece].append(mel)
        if len(parts[piece]) == len(segments[piece]):
            yield piece, np.concatenate(parts[piece])[: lengths[piece]]
            parts[piece] = []


def tokenize(notes: Sequence[Note], tokenizer: Tokenizer) -> tuple[list[np.ndarray], int]:
    """Note tokens of a piece's segments, and its frames: it ends `RING_OUT_SECONDS` after its last note."""
    if not notes:
        raise UserError("no notes to play")
    num_frames = math.ceil((max(note.offset for note in notes) + RING_OUT_SECONDS) * FRAME_RATE)
    return tokenizer.encode(notes, num_frames), num_frames


# --- the command -------------------------------------------------------------------------------------------------


def check_writable(path: Path, suffixes: Sequence[str]) -> None:
    """Refuses, before work begins, an output that could not be written after it."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: the name must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent} to write it into")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{path} cannot be overwritten (no permission)")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path}: cannot write into {path.parent} ({error.strerror})") from error


def midi_files(paths: Sequence[Path]) -> list[Path]:
    """The files among the paths, and those in the folders among them, by name."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in MIDI_SUFFIXES)
            if not found:
                raise UserError(f"there is no MIDI file ({' or '.join(MIDI_SUFFIXES)}) in the folder {path}")
            files += found
        else:
            files.append(path)
    return files


def outputs(midi: Sequence[Path], out: Path) -> dict[Path, Path]:
    """{MIDI file: its audio file}: `out` of one file; of several, or of a folder, files in the folder `out`."""
    if len(midi) == 1 and not midi[0].is_dir():
        check_writable(out, tuple(WRITABLE))
        return {midi[0]: out}
    if out.suffix.lower() in WRITABLE and not out.is_dir():
        raise UserError(f"--out {out}: for several pieces name a folder, not a file")
    files = midi_files(midi)
    written = {file: out / f"{file.stem}.wav" for file in files}
    for one, other in itertools.combinations(files, 2):
        if written[one] == written[other]:
            raise UserError(f"{one} and {other} would both become {written[one]}: give the folder once, or rename one")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; for several pieces name a folder")
    try:
        out.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot make this folder ({error.strerror})") from error
    for path in written.values():
        check_writable(path, tuple(WRITABLE))
    return written


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python -m music_synth.synthesize", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("midi", type=Path, nargs="+", help="MIDI files to play, or folders of them")
    parser.add_argument("--checkpoint", required=True, type=Path, help="MODEL_DIR of a training run")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help=f"audio to write ({', '.join(WRITABLE)}); a folder for several pieces; - for stdout (s16le, 16 kHz, mono)",
    )
    parser.add_argument("--plot", type=Path, help="also draw piano roll, mel and waveform (.png, .pdf, .svg)")
    parser.add_argument("--step", type=int, help="training step of the checkpoint (default: the newest)")
    parser.add_argument("--sampler", help="diffusion only: ddim, ddpm, ... (default: as the run's config says)")
    parser.add_argument("--steps", type=int, help="diffusion only: sampling steps a segment")
    parser.add_argument("--guidance", type=float, help="diffusion only: guidance scale, 1 = none")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of activations (default: as trained); bfloat16 is for accelerators"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers, 0 or more (default: 0)")
    parser.add_argument(
        "--batch_size",
        type=int,
        help=f"pieces sampled side by side (default: {ACCELERATED_BATCH} on an accelerator; one by one on a CPU)",
    )
    parser.add_argument(
        "--inverter", help=f"mel to audio: {GRIFFIN_LIM}, a file or a run's MODEL_DIR (default: the one that ships)"
    )
    flags = parser.parse_args(argv)
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: must be in 0 .. 2^32 - 1")
    if flags.guidance is not None and not math.isfinite(flags.guidance):
        raise UserError(f"--guidance {flags.guidance}: must be a finite number, 1 for none")
    if flags.batch_size is not None and flags.batch_size < 1:
        raise UserError(f"--batch_size {flags.batch_size}: must be at least 1")
    if flags.plot:
        check_writable(flags.plot, PICTURE_SUFFIXES)
    return flags


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    keep_compiled()
    streaming = str(flags.out) == STDOUT
    say = functools.partial(print, file=sys.stderr if streaming else sys.stdout, flush=True)
    files = midi_files(flags.midi)
    if len(files) > 1 and (streaming or flags.plot):
        raise UserError(f"{'--out -' if streaming else '--plot'} is for one piece, and {len(files)} are given")
    targets = {files[0]: flags.out} if streaming else outputs(flags.midi, flags.out)
    if streaming and sys.stdout.isatty():
        raise UserError("--out -: stdout is a terminal; pipe it into a player: ... | aplay -t raw -f S16_LE -r 16000")
    pieces = [read_midi(file) for file in targets]
    inverter = load_inverter(flags.inverter)
    model, tokenizer, params, step = config.load_run(flags.checkpoint, flags.step)
    asked = {"name": flags.sampler, "num_steps": flags.steps, "guidance_scale": flags.guidance}
    model = model.with_sampling(**{name: value for name, value in asked.items() if value is not None})
    if flags.dtype:
        model = dataclasses.replace(model, network=dataclasses.replace(model.network, dtype=flags.dtype))
    what = next(iter(targets)) if len(targets) == 1 else f"{len(targets)} pieces"
    say(f"{what}: {sum(map(len, pieces))} notes; {type(model).__name__} of {flags.checkpoint}, step {step}")
    if flags.inverter == GRIFFIN_LIM:
        say("Griffin-Lim makes the audio, which sounds metallic; leave out --inverter for the trained inverter")

    if streaming:
        mel, audio = play(pieces[0], model, params, tokenizer, inverter, flags.seed, say)
    else:
        mel, audio = write(targets, pieces, model, params, tokenizer, inverter, flags.seed, flags.batch_size, say)
    if flags.plot:
        title = f"{next(iter(targets)).name}: {type(model).__name__}, step {step}"
        plot_piece(flags.plot, {"sampled log-mel": mel}, pieces[0], audio, title)
        say(f"{flags.plot}: piano roll, mel and waveform")


def write(targets, pieces, model, params, tokenizer, inverter, seed, batch_size, say) -> tuple[np.ndarray, np.ndarray]:
    """Samples the pieces and writes each when it is done. Returns mel and audio of the last one."""
    batch_size = batch_size or (1 if jax.default_backend() == "cpu" else ACCELERATED_BATCH)
    begin, inverting, seconds = time.perf_counter(), 0.0, 0.0
    for piece, mel in sample_many(pieces, model, params, tokenizer, seed, batch_size, progress=True):
        sampled = time.perf_counter()
        audio = inverter(mel)
        out = list(targets.values())[piece]
        write_audio(out, audio)
        inverting += time.perf_counter() - sampled
        seconds += len(mel) / FRAME_RATE
        if len(pieces) > 1:
            say(f"{out}: {len(mel) / FRAME_RATE:.1f} s of music")
    spent = time.perf_counter() - begin
    say(
        f"{out if len(pieces) == 1 else out.parent}: {seconds:.1f} s of music in {spent:.1f} s, "
        f"{seconds / spent:.2f} times real time (compiling and sampling {spent - inverting:.1f} s, "
        f"mel to audio {inverting:.1f} s)"
    )
    return mel, audio


def play(notes, model, params, tokenizer, inverter, seed, say) -> tuple[np.ndarray, np.ndarray]:
    """Samples a piece and writes its audio to stdout as it comes. Returns mel and audio, as far as they came."""
    begin = time.perf_counter()
    mels: list[np.ndarray] = []
    audio: list[np.ndarray] = []
    kept = lambda mel: mels.append(mel) or mel
    first = None
    try:
        for part in stream_audio(inverter, map(kept, sample_stream(notes, model, params, tokenizer, seed))):
            audio.append(part)
            sys.stdout.buffer.write(audio_to_int16(part).astype("<i2").tobytes())
            sys.stdout.buffer.flush()
            if first is None:
                first = time.perf_counter() - begin
                say(f"first {len(part) / SAMPLE_RATE:.1f} s of audio after {first:.2f} s")
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that what is left is not flushed at exit
        if not isinstance(error, BrokenPipeError):  # such as a full disk behind `> file`
            raise UserError(f"--out -: cannot write ({error.strerror or error})") from error
        say("stopped: the reader closed the pipe")  # as players are: no reason to complain
    spent, seconds = time.perf_counter() - begin, sum(map(len, audio)) / SAMPLE_RATE
    say(f"{seconds:.1f} s of music in {spent:.1f} s, {seconds / spent:.2f} times real time (with compiling)")
    return np.concatenate(mels), np.concatenate(audio)


if __name__ == "__main__":
    errors.run(main)
