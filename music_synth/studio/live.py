"""Live mode: keys are heard while they are held.

Whenever a key moves, and before what is made runs out, a short stretch is made anew from the moment at which it will be
heard: the decoder reads the mel before that moment and the keys that are down, which it takes to stay down, and says
what comes; so the inverter can look ahead. What was to follow is replaced. Decoders that can play their mean do
(temperature 0): it is one pass of the network, and two stretches of it agree where they overlap.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from music_synth.audio.mel import FRAME_RATE, HOP_LENGTH, MIN_LOG_MEL, NUM_MELS, SAMPLE_RATE
from music_synth.errors import UserError, one_line
from music_synth.midi.notes import Note
from music_synth.midi.tokenizer import Events
from music_synth.playing import Decoder
from music_synth.studio import protocol
from music_synth.studio.outbox import Outbox
from music_synth.studio.protocol import Key, Live, Voice
from music_synth.studio.worker import Worker
from music_synth.vocoder.inverter import Inverter
from music_synth.vocoder.istft import ISTFTGenerator
from music_synth.vocoder.neural import NeuralInverter

FRAMES = 42  # of a stretch of mel
RUN_UP = 32  # frames before it that the inverter is given
LOOK_AHEAD = ISTFTGenerator().as_played().reach[1]  # of its last frames, which only help the inverter: 0.54 s are left
RENEW_SECONDS = 0.2  # before what is made runs out
HELD_SECONDS = 10.0  # that a key which is down is taken to last on
FORGOTTEN_SECONDS = 3.0  # after its end, when nothing of a note is heard
QUIET = MIN_LOG_MEL + 2.0  # below this level all of a mel is silence
FIRST_MARGIN = 0.06  # seconds between asking for a stretch and hearing it, until it has been measured
SPARE_SECONDS = 0.012  # for the way to the page
MEASURED = 20  # stretches whose time to make counts


def short(decoder: Decoder) -> Decoder:
    """A decoder of stretches of `FRAMES` if its network has no fixed length, which plays its mean if it can."""
    model: Any = decoder.model
    if model.can_sample(temperature=0.0):
        model = model.with_sampling(temperature=0.0)
    if model.network.decoder != "convolutional":
        return dataclasses.replace(decoder, model=model)
    network = dataclasses.replace(model.network, target_frames=FRAMES)
    tokenizer = dataclasses.replace(decoder.tokenizer, segment_frames=FRAMES)
    return Decoder(dataclasses.replace(model, network=network), decoder.params, tokenizer, decoder.timbre)


@dataclass
class Timeline:
    """The mel of what was and will be heard, and the notes, on the clock of the page's live ring."""

    end: int = 0  # frame after the last of `mel`
    mel: np.ndarray = field(default_factory=lambda: np.zeros((0, NUM_MELS), np.float32))
    notes: list[Note] = field(default_factory=list)
    held: dict[int, int] = field(default_factory=dict)  # pitch -> its note

    def before(self, frame: int, count: int) -> np.ndarray:
        """The mel [count, 128] up to `frame`; silence where nothing was made."""
        result = np.full((count, NUM_MELS), MIN_LOG_MEL, np.float32)
        begin = self.end - len(self.mel)
        first, last = max(begin, frame - count), min(self.end, frame)
        if first < last:
            result[first - (frame - count) : last - (frame - count)] = self.mel[first - begin : last - begin]
        return result

    def replace(self, frame: int, mel: np.ndarray, kept: int) -> None:
        """Puts a mel at `frame` in place of what was there and after; keeps `kept` frames before it."""
        self.mel, self.end = np.concatenate([self.before(frame, kept), mel]), frame + len(mel)

    def move(self, key: Key, frame: int, program: int, drum: bool) -> None:
        """A key goes down or up at the beginning of a frame."""
        now = frame / FRAME_RATE
        if key.pitch in self.held:
            number = self.held.pop(key.pitch)
            note = self.notes[number]
            self.notes[number] = note._replace(offset=max(now, note.onset + 0.01))
        if key.velocity:
            self.held[key.pitch] = len(self.notes)
            self.notes.append(Note(key.pitch, key.velocity, program, now, now + HELD_SECONDS, drum))

    def sounding(self, frame: int) -> list[Note]:
        """The notes that can still be heard; those that are held last on. The others are forgotten."""
        now = frame / FRAME_RATE
        down = set(self.held.values())
        kept = [i for i, note in enumerate(self.notes) if i in down or note.offset > now - FORGOTTEN_SECONDS]
        place = {number: i for i, number in enumerate(kept)}
        self.notes = [self.notes[i]._replace(offset=now + HELD_SECONDS) if i in down else self.notes[i] for i in kept]
        self.held = {pitch: place[number] for pitch, number in self.held.items()}
        return self.notes


class LivePlayer:
    """A client's live mode; a job of the worker that goes before the others."""

    urgent, patient = True, False

    def __init__(
        self, live: Live, open_decoder: Callable[[Voice], Decoder], inverter: Inverter, outbox: Outbox, worker: Worker
    ):
        self.live, self.inverter, self.outbox, self.worker = live, inverter, outbox, worker
        self.timeline = Timeline()
        self._open_decoder = open_decoder
        self._decoder: Decoder | None = None
        self._keys: deque[Key] = deque()
        self._clock: tuple[int, float] | None = None  # sample that the page was at, and when it said so
        self._took: deque[float] = deque(maxlen=MEASURED)
        self._until = 0  # frame up to which there is audio
        self._number = 0
        self._due = 0.0  # when a turn is due that makes more of the same, monotonic
        self.ended = False

    def press(self, key: Key) -> None:
        """A key has moved."""
        self._clock = key.at, time.monotonic()
        self._keys.append(key)
        self.worker.wants_turn(self)

    def stop(self) -> None:
        self.ended = True
        self.worker.forget(self)

    def turn(self) -> bool:
        if self.ended:
            return False
        try:
            if self._decoder is None:
                self._warm()
            elif self._clock is not None and not self.outbox.is_full:
                self._make(*self._clock)
        except UserError as error:
            self.stop()
            self.outbox.put({"type": "live", "ready": False, "message": one_line(error)})
        return False

    def _warm(self) -> None:
        """Compiles what live mode takes."""
        assert self.live.voice is not None
        decoder = short(self._open_decoder(self.live.voice))
        note = Note(60, 80, self.live.program, 0.0, 1.0, self.live.drum)
        for _ in range(2):
            self._play(decoder, [note], 0, Timeline())
        self._decoder = decoder
        self.outbox.put({"type": "live", "ready": True})

    @property
    def margin(self) -> float:
        """Seconds from now at which what is made now can be heard."""
        took = sorted(self._took)
        return (took[int(0.9 * len(took))] if took else FIRST_MARGIN) + SPARE_SECONDS

    def _make(self, at: int, said: float) -> None:
        assert self._decoder is not None
        begin, keys = time.monotonic(), []
        while self._keys:
            keys.append(self._keys.popleft())
        now = at / SAMPLE_RATE + begin - said
        frame = int(np.ceil((now + self.margin) * FRAME_RATE))
        if not keys and self._until > frame + RENEW_SECONDS * FRAME_RATE:
            self._renew(self._until / FRAME_RATE - now)
            return
        for key in keys:
            self.timeline.move(key, frame, self.live.program, self.live.drum)
        notes = self.timeline.sounding(frame)
        mel, audio = self._play(self._decoder, notes, frame, self.timeline)
        self._took.append(time.monotonic() - begin)
        self._until = frame + len(audio) // HOP_LENGTH
        numbers = [key.number for key in keys if key.velocity]
        if numbers:
            self.outbox.put({"type": "live-keys", "keys": numbers})
        self.outbox.put(protocol.pcm_frame(0, 0, frame * HOP_LENGTH, audio, kind=protocol.LIVE))
        self.worker.counts.audio_seconds += len(audio) / SAMPLE_RATE
        if self.timeline.held or mel.max() > QUIET:
            self._renew(self._until / FRAME_RATE - now)

    def _renew(self, left: float) -> None:
        """Asks for a turn before what is made, `left` seconds of it, runs out."""
        now, wait = time.monotonic(), max(0.0, left - self.margin - RENEW_SECONDS)
        if not now < self._due <= now + wait:  # else one comes in time
            self._due = now + wait
            self.outbox.later(wait, self.worker.wants_turn, self)

    def _play(
        self, decoder: Decoder, notes: list[Note], frame: int, timeline: Timeline
    ) -> tuple[np.ndarray, np.ndarray]:
        """The mel [42, 128] and the audio of a stretch that begins at `frame`."""
        self._number += 1
        context = timeline.before(frame, max(decoder.model.network.context_frames, RUN_UP))
        tokens = decoder.tokenizer.encode_window(Events.from_notes(notes), frame, FRAMES, timbre=decoder.timbre)
        mel = decoder.sample_one([tokens], self._number, 0, context)[:FRAMES]
        timeline.replace(frame, mel, len(context))
        origin = (frame - RUN_UP) / FRAME_RATE
        shifted = [note.since(origin) for note in notes]
        clip = timeline.before(frame + FRAMES, RUN_UP + FRAMES)
        wanted = RUN_UP + FRAMES - LOOK_AHEAD
        if isinstance(self.inverter, NeuralInverter):
            audio = next(self.inverter.stream([clip], shifted, stretch=wanted, early=False))
        else:
            audio = self.inverter(clip, shifted)
        return mel, audio[RUN_UP * HOP_LENGTH : wanted * HOP_LENGTH]
