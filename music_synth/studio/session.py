"""A client: what it plays, and the frames that wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from music_synth.audio.mel import SAMPLE_RATE
from music_synth.errors import UserError, one_line
from music_synth.studio import limits, protocol
from music_synth.studio.live import LivePlayer
from music_synth.studio.outbox import Outbox
from music_synth.studio.pieces import Library
from music_synth.studio.protocol import Cursor, Live, Play, Voice
from music_synth.studio.tracks import Memory, Stretch
from music_synth.studio.voices import Voices
from music_synth.studio.worker import Worker


@dataclass(eq=False)
class Track:
    """A voice of a plan."""

    stretches: Iterator[Stretch | Future]
    until: int  # sample up to which there is audio
    ended: bool = False
    waits: bool = False  # for what another thread makes
    worked: float = 0.0  # seconds of work since there was audio last
    begun: bool = False


@dataclass(eq=False)
class Plan:
    """What a `Play` asks for. Replaced as a whole, so that a turn under way cannot mix two."""

    play: Play
    tracks: list[Track]
    cursor: int
    selected: int

    def next_track(self) -> int | None:
        """The voice that is the least ahead of the cursor, with a lead for the one that is heard; None: all are."""
        leads: dict[int, float] = {}
        for number, track in enumerate(self.tracks):
            lead = (track.until - self.cursor) / SAMPLE_RATE
            if not (track.ended or track.waits) and lead < limits.AHEAD_SECONDS:
                leads[number] = lead - limits.FAVORED_SECONDS * (number == self.selected)
        return min(leads, key=lambda number: leads[number], default=None)


@dataclass(eq=False, repr=False)
class Session:
    """A job of the worker: makes what its client will hear next."""

    outbox: Outbox
    voices: Voices
    library: Library
    worker: Worker
    urgent: bool = False
    patient: bool = False
    plan: Plan | None = None
    live: LivePlayer | None = None
    _memories: dict[tuple[str, Voice], Memory] = field(default_factory=dict)

    def play(self, play: Play) -> None:
        """Turns to another job. UserError: no such piece."""
        piece = self.library.get(play.piece)
        wanted = {(play.piece, voice) for voice in play.voices}
        self._memories = {key: self._memories.get(key) or Memory() for key in wanted}
        tracks = [
            Track(
                self.voices.play(voice, piece, play.edit, play.at, self._memories[play.piece, voice], play.change),
                play.at,
            )
            for voice in play.voices
        ]
        self.plan = Plan(play, tracks, play.at, play.selected)
        self.worker.wants_turn(self)

    def move(self, cursor: Cursor) -> None:
        """Notes where the client is."""
        plan = self.plan
        if plan is not None and plan.play.job == cursor.job:
            plan.cursor, plan.selected = cursor.at, min(cursor.selected, len(plan.tracks) - 1)
            self.wake()

    def wake(self) -> None:
        if self.plan is not None and self.plan.next_track() is not None:
            self.worker.wants_turn(self)

    def stop(self) -> None:
        """Ends the job; what it was making is not sent."""
        self.plan = None
        self.worker.forget(self)

    def set_live(self, live: Live) -> None:
        """Turns live mode on or off."""
        if self.live is not None:
            self.live.stop()
        self.live = None
        if live.voice is not None:
            self.live = LivePlayer(live, self.voices.decoder, self.voices.inverter, self.outbox, self.worker)
            self.worker.wants_turn(self.live)

    def close(self) -> None:
        """Ends all that is made for the client."""
        self.stop()
        self.set_live(Live(None, 0, False))

    def turn(self) -> bool:
        """Makes the next stretch of the voice that needs it most."""
        plan = self.plan
        if plan is None or self.outbox.is_full:
            return False
        number = plan.next_track()
        if number is None:
            return False
        track, job = plan.tracks[number], plan.play.job
        begin = time.perf_counter()
        try:
            stretch = next(track.stretches)
        except StopIteration:
            track.ended = True
            if self.plan is plan:
                self.outbox.put({"type": "end", "job": job, "voice": number, "at": track.until})
            return True
        except Exception as error:
            track.ended = True
            self.worker.counts.errors += not isinstance(error, UserError)
            if self.plan is plan:
                said = one_line(error) if isinstance(error, UserError) else "this could not be played: see the log"
                self.outbox.put({"type": "error", "job": job, "voice": number, "message": said})
            if not isinstance(error, UserError):
                raise
            return True
        if isinstance(stretch, Future):
            self._wait(track, stretch)
        elif self.plan is plan:
            track.worked += time.perf_counter() - begin
            self._send(plan, number, stretch)
        return self.plan is not None

    def _wait(self, track: Track, future: Future) -> None:
        def go_on(_: Future) -> None:
            track.waits = False
            self.worker.wants_turn(self)

        track.waits = True
        future.add_done_callback(go_on)

    def _send(self, plan: Plan, number: int, stretch: Stretch) -> None:
        track, job = plan.tracks[number], plan.play.job
        if stretch.mel is not None:
            self.outbox.put(protocol.mel_frame(job, number, stretch.start, stretch.mel))
        if stretch.audio is not None:
            flags = 0 if track.begun else protocol.FIRST
            track.begun, track.until = True, stretch.start + len(stretch.audio)
            self.outbox.put(protocol.pcm_frame(job, number, stretch.start, stretch.audio, flags))
            made = len(stretch.audio) / SAMPLE_RATE
            self.worker.counts.audio_seconds += made
            self.outbox.put({"type": "made", "job": job, "voice": number, "seconds": made, "took": track.worked})
            track.worked = 0.0
