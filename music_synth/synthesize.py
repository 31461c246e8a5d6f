"""Plays a MIDI file: `python -m music_synth.synthesize in.mid --checkpoint MODEL_DIR --out out.wav`."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from music_synth import config, errors
from music_synth.audio.io import WRITABLE, write_audio
from music_synth.audio.mel import FRAME_RATE
from music_synth.chaining import sample_chain
from music_synth.errors import UserError
from music_synth.evaluation.report import PICTURE_SUFFIXES, plot_piece
from music_synth.midi.notes import Note, read_midi
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.seam import Seam
from music_synth.vocoder.inverter import GRIFFIN_LIM, Inverter, load_inverter

RING_OUT_SECONDS = 1.0  # what is kept after the end of the last note


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


def sample_piece(
    notes: Sequence[Note], model: Seam, params, tokenizer: Tokenizer, seed: int = 0, progress: bool = False
) -> np.ndarray:
    """The first half of `synthesize`: notes -> log-mel float32 [T, M]."""
    if not notes:
        raise UserError("no notes to play")
    num_frames = math.ceil((max(note.offset for note in notes) + RING_OUT_SECONDS) * FRAME_RATE)
    segments = tokenizer.encode(notes, num_frames)
    chain = sample_chain(model, params, [segments], [seed])
    bar = tqdm(chain, desc="sampling", total=len(segments), unit="segment", disable=not progress)
    return np.concatenate([mel[0] for mel in bar])[:num_frames]  # [T, M]


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


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python -m music_synth.synthesize", "Plays a MIDI file through a decoder.")
    parser.add_argument("midi", type=Path, help="MIDI file to play")
    parser.add_argument("--checkpoint", required=True, type=Path, help="MODEL_DIR of a training run")
    parser.add_argument("--out", required=True, type=Path, help=f"audio to write ({', '.join(WRITABLE)})")
    parser.add_argument("--plot", type=Path, help="also draw piano roll, mel and waveform (.png, .pdf, .svg)")
    parser.add_argument("--step", type=int, help="training step of the checkpoint (default: the newest)")
    parser.add_argument("--sampler", help="diffusion only: ddim or ddpm (default: as the run's config says)")
    parser.add_argument("--steps", type=int, help="diffusion only: sampling steps a segment")
    parser.add_argument("--guidance", type=float, help="diffusion only: guidance scale, 1 = none")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers, 0 or more (default: 0)")
    parser.add_argument(
        "--inverter", help=f"mel to audio: {GRIFFIN_LIM}, a file or a run's MODEL_DIR (default: the one that ships)"
    )
    flags = parser.parse_args(argv)
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed}: must be in 0 .. 2^32 - 1")
    if flags.guidance is not None and not math.isfinite(flags.guidance):
        raise UserError(f"--guidance {flags.guidance}: must be a finite number, 1 for none")
    check_writable(flags.out, tuple(WRITABLE))
    if flags.plot:
        check_writable(flags.plot, PICTURE_SUFFIXES)
    return flags


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    notes = read_midi(flags.midi)
    inverter = load_inverter(flags.inverter)
    model, tokenizer, params, step = config.load_run(flags.checkpoint, flags.step)
    asked = {"name": flags.sampler, "num_steps": flags.steps, "guidance_scale": flags.guidance}
    model = model.with_sampling(**{name: value for name, value in asked.items() if value is not None})
    print(f"{flags.midi}: {len(notes)} notes; {type(model).__name__} of {flags.checkpoint}, step {step}")
    if flags.inverter == GRIFFIN_LIM:
        print("Griffin-Lim makes the audio, which sounds metallic; leave out --inverter for the trained inverter")

    begin = time.perf_counter()
    mel = sample_piece(notes, model, params, tokenizer, flags.seed, progress=True)
    sampled = time.perf_counter()
    audio = inverter(mel)
    done = time.perf_counter()
    write_audio(flags.out, audio)
    seconds, spent = len(mel) / FRAME_RATE, done - begin
    print(
        f"{flags.out}: {seconds:.1f} s of music in {spent:.1f} s, {seconds / spent:.2f} times real time "
        f"(compiling and sampling {sampled - begin:.1f} s, mel to audio {done - sampled:.1f} s)"
    )
    if flags.plot:
        title = f"{flags.midi.name}: {type(model).__name__}, step {step}"
        plot_piece(flags.plot, notes, mel, audio, title=title)
        print(f"{flags.plot}: piano roll, mel and waveform")


if __name__ == "__main__":
    errors.run(main)
