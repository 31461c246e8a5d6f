"""What can play: decoders, the SoundFont, and the recording of a piece that has one."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from music_synth.audio.io import audio_to_int16
from music_synth.data.synthetic import render
from music_synth.errors import UserError
from music_synth.midi.notes import Note
from music_synth.midi.segments import TOKEN_BUCKETS
from music_synth.playing import Decoder
from music_synth.studio import limits
from music_synth.studio.pieces import StudioPiece
from music_synth.studio.protocol import Edit, Voice
from music_synth.studio.tracks import Memory, Stretch, decoded, recorded
from music_synth.vocoder.inverter import Inverter

WARM_BUCKETS = 5  # numbers of note tokens, from the fewest


@dataclass(eq=False, repr=False)  # printing the parameters would take seconds
class Voices:
    """All that can play, by what the page calls it."""

    decoders: Sequence[tuple[str, Decoder]]
    inverter: Inverter
    soundfont: Path | None = None  # None: the one of pretty_midi
    _settings: set[tuple] = field(default_factory=set)
    _rendered: OrderedDict[bytes, Future[np.ndarray]] = field(default_factory=OrderedDict)
    _renderer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "soundfont"))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def describe(self) -> list[dict[str, Any]]:
        """What the page offers: the decoders, and how each can sample."""
        return [
            {
                "name": name,
                "temperature": decoder.model.can_sample(temperature=1),
                "steps": decoder.model.can_sample(num_steps=1),
                "timbres": list(decoder.tokenizer.timbres),
            }
            for name, decoder in self.decoders
        ]

    def decoder(self, voice: Voice) -> Decoder:
        """Finds the decoder of a voice, as it samples there. UserError: there is none, or it has no such settings."""
        if voice.checkpoint >= len(self.decoders):
            raise UserError(f"there is no checkpoint {voice.checkpoint}: {len(self.decoders)} are open")
        decoder = self.decoders[voice.checkpoint][1]
        given = {"temperature": voice.temperature, "num_steps": voice.steps}
        changed = {name: value for name, value in given.items() if value is not None}
        decoder = dataclasses.replace(decoder, timbre=voice.timbre)
        if not changed:
            return decoder
        with self._lock:
            self._settings.add((voice.checkpoint, voice.temperature, voice.steps))
            if len(self._settings) > limits.MAX_SETTINGS:
                self._settings.discard((voice.checkpoint, voice.temperature, voice.steps))
                raise UserError(f"more than {limits.MAX_SETTINGS} samplings were asked for: use one of before")
        return dataclasses.replace(decoder, model=decoder.model.with_sampling(**changed))

    def play(
        self, voice: Voice, piece: StudioPiece, edit: Edit, at: int, memory: Memory, change: bool
    ) -> Iterator[Stretch | Future]:
        """Plays an edited piece from the segment, or the moment, of sample `at` on; yields what is to be waited for.

        Raises:
          UserError: there is no such voice, for this piece.
        """
        if voice.kind == "recording":
            if piece.recording is None:
                raise UserError(f"{piece.name} has no recording")
            yield from recorded(piece.recording(), at)
            return
        notes, midi = piece.edited(edit)
        if not notes:
            return
        if voice.kind == "soundfont":
            rendering = self._render(midi)
            if not rendering.done():
                yield rendering
            yield from recorded(rendering.result(), at)
        else:
            yield from decoded(self.decoder(voice), self.inverter, notes, voice.seed, at, memory, change)

    def _render(self, midi: bytes) -> Future[np.ndarray]:
        """The sound of a MIDI file by the SoundFont, int16 [S], in a thread of its own: one piece at a time."""
        with self._lock:
            if midi not in self._rendered:
                self._rendered[midi] = self._renderer.submit(_rendering, midi, self.soundfont)
            self._rendered.move_to_end(midi)
            while len(self._rendered) > limits.MAX_RENDERED:
                self._rendered.popitem(last=False)[1].cancel()
            return self._rendered[midi]

    def warm(self, notes: Sequence[Note]) -> Iterator[None]:
        """Compiles, step by step, what the first decoder takes to play `notes`."""
        for stretch in decoded(self.decoders[0][1], self.inverter, notes, 0, 0, Memory(), False):
            if stretch.audio is not None:
                return
            yield

    def warm_others(self, notes: Sequence[Note]) -> Iterator[None]:
        """Compiles, step by step, what it takes to play pieces of other numbers of notes, by all decoders."""
        for _, decoder in self.decoders:
            tokens, _ = decoder.tokenize(notes)
            for size in [size for size in TOKEN_BUCKETS if size < decoder.model.network.max_tokens][:WARM_BUCKETS]:
                decoder.sample_one([np.resize(tokens[0], size)], 0, 0)
                yield

    def close(self) -> None:
        self._renderer.shutdown(wait=False, cancel_futures=True)


def _rendering(midi: bytes, soundfont: Path | None) -> np.ndarray:
    return audio_to_int16(render(midi, soundfont=soundfont))


@functools.lru_cache(maxsize=1)
def instrument_names() -> list[str]:
    """The names of General MIDI's 128 programs."""
    from pretty_midi import program_to_instrument_name

    return [program_to_instrument_name(program) for program in range(128)]
