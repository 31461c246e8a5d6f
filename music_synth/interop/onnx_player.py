"""Plays MIDI files with onnxruntime and NumPy alone; JAX is not imported:

    python -m music_synth.interop.onnx_player in.mid --decoder decoder.onnx --inverter inverter.onnx --out out.wav

The files are written by `convert RUN decoder.onnx --to onnx` and `convert shipped inverter.onnx --notes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from music_synth import errors
from music_synth.audio.io import write_audio
from music_synth.audio.mel import SAMPLE_RATE
from music_synth.errors import UserError
from music_synth.interop.inverters import load_onnx
from music_synth.interop.runtimes import open_onnx, reason
from music_synth.midi.notes import Note, read_midi
from music_synth.midi.segments import frames_of, pad_tokens
from music_synth.midi.tokenizer import Tokenizer

ABOUT = "music_synth tokenizer"  # under which a decoder's file keeps its settings
MEL = "mel"  # its output
DRAWN = ("noise", "latents")  # its inputs that are standard normal
Noise = Callable[[int, tuple[int, ...]], np.ndarray]  # number of a segment, shape of an input -> standard normal


class OnnxDecoder:
    """A decoder that `onnx_decoder` wrote. UserError if the file is none."""

    def __init__(self, path: Path):
        self.path, self.session = path, open_onnx(path)
        said = self.session.get_modelmeta().custom_metadata_map.get(ABOUT)
        self.shapes = {given.name: tuple(given.shape) for given in self.session.get_inputs()}
        if said is None or not {"note_tokens", "noise"} <= self.shapes.keys():
            raise UserError(f"{path} is no decoder: python -m music_synth.convert RUN decoder.onnx --to onnx makes one")
        try:
            given: dict[str, Any] = json.loads(said)
            settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            self.tokenizer = Tokenizer(**settings)
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: its settings of a tokenizer do not parse ({error})") from error

    def stream(self, notes: Sequence[Note], seed: int = 0, noise: Noise | None = None) -> Iterator[np.ndarray]:
        """Samples a piece: its log-mel float32 [t, M], a segment at a time, each with the one before as its context.

        Args:
          noise: None: NumPy's, from the seed and the segment's number.

        Raises:
          UserError: there are no notes, or onnxruntime fails.
        """
        num_frames = frames_of(notes)
        context_frames = self.shapes.get("context_mask", (1, 0))[1]
        before: np.ndarray | None = None
        for number, tokens in enumerate(self.tokenizer.encode(notes, num_frames)):
            random = np.random.default_rng([seed, number])
            given = {"note_tokens": pad_tokens(tokens, self.shapes["note_tokens"][1])[None]}
            for name in DRAWN:
                if shape := self.shapes.get(name):
                    given[name] = noise(number, shape) if noise else random.standard_normal(shape, np.float32)
            if context_frames:
                none = np.zeros(self.shapes["context_mel"], np.float32)
                given["context_mel"] = none if before is None else before
                given["context_mask"] = np.full(self.shapes["context_mask"], before is not None, np.float32)
            try:
                mel = self.session.run([MEL], given)[0]
            except Exception as error:
                raise UserError(f"{self.path} fails in segment {number}: {reason(error)}") from error
            before = mel[:, mel.shape[1] - context_frames :]
            yield mel[0, :num_frames]
            num_frames -= mel.shape[1]


def play(notes: Sequence[Note], decoder: OnnxDecoder, inverter: Any, seed: int = 0) -> np.ndarray:
    """Plays a piece: audio float32 [S] at 16 kHz."""
    return inverter(np.concatenate(list(decoder.stream(notes, seed))), notes)


def main(argv: list[str]) -> None:
    parser = errors.ArgumentParser("python -m music_synth.interop.onnx_player", __doc__)
    parser.add_argument("file", type=Path, help="MIDI file")
    parser.add_argument("--decoder", type=Path, required=True, help=".onnx file of a decoder")
    parser.add_argument("--inverter", type=Path, required=True, help=".onnx file of an inverter")
    parser.add_argument("--out", type=Path, required=True, help="audio file to write")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    flags = parser.parse_args(argv)
    audio = play(read_midi(flags.file), OnnxDecoder(flags.decoder), load_onnx(flags.inverter), flags.seed)
    write_audio(flags.out, audio)
    print(f"{flags.out}: {len(audio) / SAMPLE_RATE:.1f} s")


if __name__ == "__main__":
    errors.run(main)
