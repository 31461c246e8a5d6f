"""Plays MIDI files: `python -m music_synth.synthesize in.mid --out out.wav`.

The decoder that ships plays, or what --checkpoint names. Several files, or a folder of them, become a folder of audio
files. `--out -` plays while it samples: raw samples on stdout, for a player or an encoder:

    python -m music_synth.synthesize in.mid --out - | aplay -t raw -f S16_LE -r 16000
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from music_synth import errors, runs
from music_synth.audio.io import WRITABLE, audio_to_int16, audio_writer
from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, NUM_MELS, SAMPLE_RATE
from music_synth.compilation import keep_compiled
from music_synth.errors import UserError, telling
from music_synth.midi.notes import Note, read_midi
from music_synth.midi.segments import frames_of, num_segments
from music_synth.midi.smf import SUFFIXES as MIDI_SUFFIXES
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import Params, SpectrogramModel
from music_synth.models.layers import DTYPES
from music_synth.pictures import PICTURE_SUFFIXES, plot_piece
from music_synth.playing import Decoder, Segment
from music_synth.vocoder.inverter import GRIFFIN_LIM, MEL_ONLY, Inverter, stream_audio

STDOUT = Path("-")
ACCELERATED_BATCH = 16  # pieces side by side on an accelerator; on a CPU one after the other is as fast
LONG_SECONDS = 3600  # of a piece that is played only if --long asks for it


# --- from Python -------------------------------------------------------------------------------------------------


def synthesize(
    notes: Sequence[Note],
    model: SpectrogramModel,
    params: Params,
    tokenizer: Tokenizer,
    inverter: Inverter | None = None,
    seed: int = 0,
    progress: bool = False,
    timbre: str = "",
) -> tuple[np.ndarray, np.ndarray]:
    """Plays notes; returns the audio and the log-mel that it was made from.

    The piece is sampled in segments, each with the one before it as its context. It ends a second after its last note
    (`midi.segments.RING_OUT_SECONDS`); the published code keeps the whole last segment instead.

    Args:
      notes: of any length; times in seconds.
      inverter: mel -> audio; the trained one that ships with the package if None.
      seed: the same seed, notes and parameters give the same audio on the same machine.
      progress: show a bar, in segments, on stderr.
      timbre: what to sound like, of `tokenizer.timbres`; "": what the model makes of all of them.

    Returns:
      audio float32 [320 T] at 16 kHz and log-mel float32 [T, M].

    Raises:
      UserError: there are no notes, no such timbre, or the model's output is not finite.
    """
    segments = Decoder(model, params, tokenizer, timbre).stream(notes, seed)
    mel = np.concatenate(list(tqdm(segments, desc="sampling", unit="segment", disable=not progress)))
    return (inverter or runs.load_inverter())(mel, notes), mel


def synthesize_stream(
    notes: Sequence[Note],
    model: SpectrogramModel,
    params: Params,
    tokenizer: Tokenizer,
    inverter: Inverter | None = None,
    seed: int = 0,
    timbre: str = "",
) -> Iterator[np.ndarray]:
    """Plays notes as it samples them: the audio of `synthesize`, up to rounding, in parts float32 [S] as they are done.

    The first part comes when one segment has been sampled. It is shorter than a segment by what the inverter must see
    of the future (0.3 s of the one that ships), and all parts are late by as much. Inverters that cannot stream
    (Griffin-Lim, those of other projects) give one part at the end.
    """
    mels = Decoder(model, params, tokenizer, timbre).stream(notes, seed)
    return stream_audio(inverter or runs.load_inverter(), mels, notes)


# --- the command -------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    keep_compiled()
    say = functools.partial(print, file=sys.stderr if flags.out == STDOUT else sys.stdout, flush=True)
    targets = outputs(flags.midi, flags.out)
    if len(targets) > 1 and flags.plot:
        raise UserError(f"--plot is for one piece, and {len(targets)} are given")
    pieces, failed = read_pieces(list(targets), flags.long)
    seconds = sum(frames_of(notes) for notes in pieces.values()) / FRAME_RATE
    what = str(next(iter(pieces))) if len(pieces) == 1 else f"{len(pieces)} pieces"
    say(f"{what}: {sum(map(len, pieces.values())):,} notes, {in_words(seconds)} of music")
    inverter = runs.load_inverter(flags.inverter, flags.trust)
    run = runs.load(flags.checkpoint, flags.step)
    settings = {
        "name": flags.sampler,
        "num_steps": flags.steps,
        "guidance_scale": flags.guidance,
        "temperature": flags.temperature,
        "texture": flags.texture,
    }
    model = run.model.with_sampling(**{name: value for name, value in settings.items() if value is not None})
    if flags.dtype:
        model = dataclasses.replace(model, network=dataclasses.replace(model.network, dtype=flags.dtype))
    say(f"played by {type(model).__name__} of {flags.checkpoint}, step {run.step}")
    if flags.inverter == GRIFFIN_LIM:
        say("Griffin-Lim makes the audio, which sounds metallic; leave out --inverter for the trained inverter")
    decoder = run._replace(model=model).decoder(flags.timbre)
    batch_size = flags.batch_size or (1 if jax.default_backend() == "cpu" else ACCELERATED_BATCH)
    mel, audio = play(decoder, pieces, targets, inverter, flags.seed, batch_size, say, keep=bool(flags.plot))
    if flags.plot:
        title = f"{what}: {type(model).__name__}, step {run.step}"
        plot_piece(flags.plot, {"sampled log-mel": mel}, next(iter(pieces.values())), audio, title)
        say(f"{flags.plot}: piano roll, mel and waveform")
    if failed:
        raise UserError(f"{len(failed)} of {len(targets)} files are not played: {', '.join(map(str, failed))}")


def play(
    decoder: Decoder,
    pieces: Mapping[Path, Sequence[Note]],
    targets: Mapping[Path, Path],
    inverter: Inverter,
    seed: int,
    batch_size: int,
    say: Callable[[str], None],
    keep: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Plays pieces into their targets as they come; returns their mel [T, M] and audio [S] if `keep` asks for them."""
    files, streaming, begin, samples = list(pieces), STDOUT in targets.values(), time.perf_counter(), 0
    mels: list[np.ndarray] = []
    audio: list[np.ndarray] = []
    total = sum(num_segments(frames_of(notes), decoder.tokenizer.segment_frames) for notes in pieces.values())
    with (
        contextlib.ExitStack() as unfinished,
        tqdm(desc="sampling", total=total, unit="segment", disable=streaming) as bar,
    ):

        def on_segment(segment: Segment) -> None:
            bar.update()
            if keep:
                mels.append(segment.mel)

        writers: dict[Path, tuple[contextlib.ExitStack, Callable[[np.ndarray], None]]] = {}
        for part in decoder.play(list(pieces.values()), inverter, seed, batch_size, on_segment):
            file = files[part.piece]
            if file not in writers:
                stack = contextlib.ExitStack()
                unfinished.push(stack)  # closes what is open if something fails
                output = raw_samples(say) if streaming else audio_writer(targets[file])
                writers[file] = stack, stack.enter_context(output)
            stack, write = writers[file]
            write(part.audio)
            if streaming and not samples:
                say(f"first {len(part.audio) / SAMPLE_RATE:.1f} s of audio after {time.perf_counter() - begin:.2f} s")
            samples += len(part.audio)
            if keep:
                audio.append(part.audio)
            if part.ended:
                stack.close()
                if len(pieces) > 1:
                    say(f"{targets[file]}: {in_words(frames_of(pieces[file]) / FRAME_RATE)} of music")
    spent, seconds = time.perf_counter() - begin, samples / SAMPLE_RATE
    out = next(iter(targets.values()))
    where = "stdout" if streaming else out if len(targets) == 1 else out.parent
    say(f"{where}: {seconds:.1f} s of music in {spent:.1f} s, {seconds / spent:.2f} times real time (with compiling)")
    if not audio:
        return np.zeros((0, NUM_MELS), np.float32), np.zeros(0, np.float32)
    return np.concatenate(mels)[: samples // HOP_LENGTH], np.concatenate(audio)


# --- what comes in -----------------------------------------------------------------------------------------------


def midi_files(paths: Sequence[Path]) -> list[Path]:
    """Lists the files among the paths, and those in the folders among them, by name."""
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in MIDI_SUFFIXES)
        if not found:
            raise UserError(f"there is no MIDI file ({', '.join(MIDI_SUFFIXES)}) in the folder {path}")
        files += found
    return files


def read_pieces(files: Sequence[Path], long: bool) -> tuple[dict[Path, list[Note]], list[Path]]:
    """Reads the notes of files, of at most an hour unless `long`; lists those that cannot be played, with a warning.

    Raises:
      UserError: none can.
    """
    pieces, failed = {}, []
    for file in files:
        try:
            notes = read_midi(file)
            seconds = frames_of(notes) / FRAME_RATE
            if seconds > LONG_SECONDS and not long:
                raise UserError(f"{file} is {in_words(seconds)} of music: --long plays more than an hour")
            pieces[file] = notes
        except UserError as error:
            if len(files) == 1:
                raise
            warnings.warn(f"not played: {error}", stacklevel=2)
            failed.append(file)
    if not pieces:
        raise UserError(f"none of {len(files)} files can be played: {', '.join(map(str, failed))}")
    return pieces, failed


def in_words(seconds: float) -> str:
    """Says a length: "7.5 s", "3 min 20 s", "23 h 54 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole = divmod(round(seconds), 60)
    return f"{minutes} min {whole} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --- what goes out -----------------------------------------------------------------------------------------------


def outputs(midi: Sequence[Path], out: Path | None) -> dict[Path, Path]:
    """Finds {MIDI file: where its audio goes}: `out` for one file; for several, or a folder, files in the folder `out`.

    Without `out` one file goes beside itself, and never over what is there: that may be its recording.

    Raises:
      UserError: there is no such file, or it could not be written.
    """
    files = midi_files(midi)
    if out is None:
        if len(midi) > 1 or midi[0].is_dir():
            raise UserError("--out is missing: for several pieces name a folder")
        out = midi[0].with_suffix(".wav")
        if out.exists():
            raise UserError(f"{out} is there already: name a file by --out")
    if out == STDOUT:
        if len(files) > 1:
            raise UserError(f"--out - is for one piece, and {len(files)} are given")
        if sys.stdout is None or sys.stdout.closed:
            raise UserError("--out -: stdout is closed; give a player to pipe into, or name a file")
        if sys.stdout.isatty():
            raise UserError("--out -: stdout is a terminal; pipe into a player: ... | aplay -t raw -f S16_LE -r 16000")
        return {files[0]: out}
    if len(midi) == 1 and not midi[0].is_dir():
        check_writable(out, tuple(WRITABLE))
        return {midi[0]: out}
    if out.suffix.lower() in WRITABLE and not out.is_dir():
        raise UserError(f"--out {out}: for several pieces name a folder, not a file")
    sources: dict[Path, Path] = {}
    for file in files:
        path = out / f"{file.stem}.wav"
        if path in sources:
            raise UserError(f"{sources[path]} and {file} would both become {path}: give the folder once, or rename one")
        sources[path] = file
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; for several pieces name a folder")
    with telling(f"--out {out}: cannot make this folder"):
        out.mkdir(exist_ok=True)
    for path in sources:
        check_writable(path, tuple(WRITABLE))
    return {file: path for path, file in sources.items()}


def check_writable(path: Path, suffixes: Sequence[str]) -> None:
    """Refuses, before work begins, an output that could not be written after it."""
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: the name must end in {' or '.join(suffixes)}")
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    with telling(f"{path}: cannot write into {folder}"):
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file to write")
        if not folder.is_dir():
            raise UserError(f"{path}: there is no folder {folder} to write it into")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{path} cannot be overwritten (no permission)")
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def raw_samples(say: Callable[[str], None]) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields a function that writes audio [S] to stdout, as s16le at 16 kHz.

    When the reader closes the pipe, as players are closed, the block ends without complaint.

    Raises:
      UserError: stdout cannot be written for another reason, such as a full disk behind `> file`.
    """

    def write(audio: np.ndarray) -> None:
        sys.stdout.buffer.write(audio_to_int16(audio).astype("<i2").tobytes())
        sys.stdout.buffer.flush()

    try:
        yield write
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that what is left is not flushed at exit
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"--out -: cannot write ({error.strerror or error})") from error
        say("stopped: the reader closed the pipe")


# --- flags -------------------------------------------------------------------------------------------------------


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python -m music_synth.synthesize", __doc__)
    parser.add_argument("midi", type=Path, nargs="+", help="MIDI files to play, or folders of them")
    parser.add_argument(
        "--checkpoint",
        default=runs.SHIPPED,
        help=f"MODEL_DIR of a run, an export, a T5X or diffusers folder; or what ships: {', '.join(runs.DECODERS)}"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"audio to write ({', '.join(WRITABLE)}); a folder for several pieces; - for stdout (s16le, 16 kHz, mono);"
        " default: beside the MIDI file, under its name, if there is none",
    )
    parser.add_argument("--plot", type=Path, help="also draw piano roll, mel and waveform (.png, .pdf, .svg)")
    parser.add_argument("--long", action="store_true", help="play pieces of more than an hour")
    parser.add_argument("--step", type=int, help="training step of the checkpoint (default: the newest)")
    parser.add_argument("--sampler", help="diffusion only: ddim, ddpm, ... (default: as the run's config says)")
    parser.add_argument("--steps", type=int, help="diffusion only: sampling steps a segment")
    parser.add_argument("--guidance", type=float, help="diffusion only: guidance scale, 1 = none")
    parser.add_argument(
        "--temperature", type=float, help="how far samples differ: 0 plays the decoder's mean, 1 as trained"
    )
    parser.add_argument(
        "--texture", type=float, help="diffusion only: 0: samples differ in how their notes came out alone; 1: in all"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of activations (default: as trained); bfloat16 is for accelerators"
    )
    parser.add_argument(
        "--timbre",
        default="",
        help="SoundFont or room to sound like, of those that the model knows (default: a mixture)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers, 0 or more (default: 0)")
    parser.add_argument(
        "--batch_size",
        type=int,
        help=f"pieces sampled side by side (default: {ACCELERATED_BATCH} on an accelerator; one by one on a CPU)",
    )
    parser.add_argument(
        "--inverter",
        help=f"mel to audio: {runs.SHIPPED} (the default), {MEL_ONLY} (the same, not told the notes), {GRIFFIN_LIM}, a"
        " file or a run's MODEL_DIR",
    )
    parser.add_argument("--trust", action="store_true", help="let an --inverter that is a SavedModel, a program, run")
    flags = parser.parse_args(argv)
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: must be in 0 .. 2^32 - 1")
    for name in ("guidance", "temperature", "texture"):
        value = getattr(flags, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name} {value}: must be a finite number, 0 or more")
    if flags.batch_size is not None and flags.batch_size < 1:
        raise UserError(f"--batch_size {flags.batch_size}: must be at least 1")
    if flags.plot:
        check_writable(flags.plot, PICTURE_SUFFIXES)
    return flags


if __name__ == "__main__":
    errors.run(main)
