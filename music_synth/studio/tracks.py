"""A piece as one voice plays it, a stretch at a time, from any moment on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from music_synth.audio.io import audio_from_int16
from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, log_mel
from music_synth.midi.notes import Note
from music_synth.midi.segments import token_bucket
from music_synth.playing import Decoder
from music_synth.studio import limits
from music_synth.vocoder.inverter import Inverter, stream_audio

STRETCH_SECONDS = 4.0  # of a sound that is there already
RUN_UP = 64  # frames before a segment that the inverter hears when it begins there
REACH_SECONDS = 2.0  # for which a note can ring on after its end


class Stretch(NamedTuple):
    """Some of a track: audio, or a mel, that begins at a sample or a frame of the piece."""

    audio: np.ndarray | None  # float32 or int16 [S]
    mel: np.ndarray | None  # log-mel [T, M]
    start: int  # sample of the audio, frame of the mel


class Made(NamedTuple):
    """A segment as it was sampled last."""

    tokens: bytes  # digest of its note tokens
    key: bytes  # digest of all that it came from: tokens and context, and the context's own
    mel: np.ndarray  # float32 [T, M]


@dataclass
class Memory:
    """What a voice has made of a piece: the newest segments by their number."""

    made: dict[int, Made] = field(default_factory=dict)

    def keep(self, number: int, made: Made) -> Made:
        self.made.pop(number, None)
        self.made[number] = made
        if len(self.made) > limits.MAX_MADE:
            del self.made[next(iter(self.made))]
        return made


def decoded(
    decoder: Decoder, inverter: Inverter, notes: Sequence[Note], seed: int, at: int, memory: Memory, change: bool
) -> Iterator[Stretch]:
    """Plays notes from the segment of sample `at` on; from the beginning these are the samples of `Decoder.play`.

    A segment has the one before it for a context: as it was made before, if it was and its notes are still the same, or
    if this is a `change` of what is being heard. Else the one before is made first, without a context of its own. The
    inverter hears the end of it, too. Segments whose notes and context have not changed are not made anew.
    """
    frames, mels_of = decoder.tokenizer.segment_frames, memory.made
    tokens, num_frames = decoder.tokenize(notes)
    digests = [hashlib.sha256(segment.tobytes()).digest() for segment in tokens]
    first = min(at // (frames * HOP_LENGTH), len(tokens) - 1)
    before = mels_of.get(first - 1)
    if before is not None and not (change or before.tokens == digests[first - 1]):
        before = None
    start = max(first - 1, 0)
    # Of the padding, too: mels of another are equal up to rounding alone.
    origin_key = b"%d %d" % (start, token_bucket(max(map(len, tokens)), decoder.model.network.max_tokens))
    new: list[Stretch] = []

    def mels() -> Iterator[np.ndarray]:
        context = None
        for number in range(start, len(tokens)):
            left = num_frames - number * frames
            if number == first - 1 and before is not None:
                context = before
            else:
                key = hashlib.sha256((context.key if context else origin_key) + digests[number]).digest()
                known = mels_of.get(number)
                if known is None or known.key != key:
                    mel = decoder.sample_one(tokens, seed, number, None if context is None else context.mel)
                    known = memory.keep(number, Made(digests[number], key, mel))
                context = known
            if number >= first:
                new.append(Stretch(None, context.mel[:left], number * frames))
                yield context.mel[:left]
            else:
                yield context.mel[frames - run_up :]

    run_up = min(RUN_UP, frames) if first else 0
    begin = first * frames - run_up
    origin = begin / FRAME_RATE
    if begin:
        notes = [note.since(origin) for note in notes if note.offset > origin - REACH_SECONDS]
    position, wanted = begin * HOP_LENGTH, first * frames * HOP_LENGTH
    for audio in stream_audio(inverter, mels(), notes):
        yield from new
        new.clear()
        skipped = min(max(wanted - position, 0), len(audio))
        if skipped < len(audio):
            yield Stretch(audio[skipped:], None, position + skipped)
        position += len(audio)
    yield from new


def recorded(audio: np.ndarray, at: int) -> Iterator[Stretch]:
    """Plays audio that is there, int16 [S], from sample `at` on."""
    length = int(STRETCH_SECONDS * FRAME_RATE) * HOP_LENGTH
    for start in range(at // HOP_LENGTH * HOP_LENGTH, len(audio), length):
        part = audio[start : start + length]
        window = audio_from_int16(audio[start : start + length + HOP_LENGTH])
        yield Stretch(None, log_mel(window, np)[: -(-len(part) // HOP_LENGTH)], start // HOP_LENGTH)
        yield Stretch(part, None, start)
