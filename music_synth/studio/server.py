"""The studio's web server: the page, the pieces, and a WebSocket for each client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import resource
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from music_synth import __version__
from music_synth.errors import UserError, one_line
from music_synth.studio import limits, pieces, protocol, saving
from music_synth.studio.access import Guard
from music_synth.studio.outbox import Outbox
from music_synth.studio.pieces import Library
from music_synth.studio.protocol import Cursor, Key, Live, Play, Stop
from music_synth.studio.session import Session
from music_synth.studio.voices import Voices, instrument_names
from music_synth.studio.worker import Task, Worker

log = logging.getLogger(__name__)
STATIC = Path(__file__).with_name("static")


@dataclass(eq=False, repr=False)
class Studio:
    """What the requests share."""

    voices: Voices
    library: Library
    worker: Worker = field(default_factory=Worker)
    sessions: set[Session] = field(default_factory=set)
    ready: bool = False  # what the first piece takes is compiled
    began: float = field(default_factory=time.monotonic)
    refused: int = 0  # messages and files
    saves: int = 0  # files that are being made

    def start(self) -> None:
        """Starts the worker, which compiles what the first piece takes, then, while nobody plays, what others take."""
        self.worker.start()
        notes = list(next(iter(self.library.fixed.values())).notes)

        def warmed(error: Exception | None) -> None:
            if error is not None:
                log.error("warming up failed: %s", error)  # what is wrong is said to whoever plays

        def first_warmed(error: Exception | None) -> None:
            warmed(error)
            self.ready = True
            for session in list(self.sessions):
                session.outbox.put({"type": "state", "ready": True})
            self.worker.wants_turn(Task(self.voices.warm_others(notes), warmed, self.worker, patient=True))

        self.worker.wants_turn(Task(self.voices.warm(notes), first_warmed, self.worker))

    def stop(self) -> None:
        for session in list(self.sessions):
            session.close()
        self.worker.stop()
        self.voices.close()

    # --- requests ------------------------------------------------------------------------------------------------

    async def about(self, _: Request) -> Response:
        return JSONResponse(
            {
                "version": __version__,
                "decoders": self.voices.describe(),
                "instruments": instrument_names(),
                "pieces": self.library.heads(),
                "ready": self.ready,
            }
        )

    async def piece(self, request: Request) -> Response:
        piece = self.library.get(request.query_params.get("id", ""))
        return JSONResponse(await run_in_threadpool(piece.describe))

    async def upload(self, request: Request) -> Response:
        """Takes a MIDI file, or (JSON) notes that were played on keys."""
        body = await read_body(request, limits.MAX_MIDI_BYTES)
        if request.headers.get("content-type", "").startswith("application/json"):
            value = protocol.read_json(body)
            piece = await run_in_threadpool(pieces.from_phrase, value)
        else:
            name = request.query_params.get("name", "")[:100] or "a file"
            piece = await run_in_threadpool(pieces.from_midi, body, name)
        self.library.add(piece)
        return JSONResponse(piece.head())

    async def save(self, request: Request) -> Response:
        """Makes a file; the work stops when who asked for it leaves."""
        body = protocol.read_json(await read_body(request, limits.MAX_MESSAGE_BYTES))
        wanted = protocol.read(saving.Wanted, body, "save")
        piece = self.library.get(wanted.piece)
        if self.saves >= limits.MAX_SAVES:
            raise HTTPException(503, "other files are being made: try again in a moment")
        loop, folder = asyncio.get_running_loop(), Path(tempfile.mkdtemp(prefix="music_synth-"))
        ended: asyncio.Future[Exception | None] = loop.create_future()

        def done(error: Exception | None) -> None:
            loop.call_soon_threadsafe(end, error)

        def end(error: Exception | None) -> None:
            if not ended.done():
                ended.set_result(error)

        task = Task(saving.write(folder, wanted, piece, self.voices), done, self.worker)
        self.saves += 1
        try:
            self.worker.wants_turn(task)
            while not ended.done():
                await asyncio.wait([ended], timeout=0.5)
                if await request.is_disconnected():
                    raise HTTPException(499, "nobody waits for the file")
            if (error := ended.result()) is not None:
                raise error
            content = await run_in_threadpool((folder / f"file.{wanted.format}").read_bytes)
            return Response(content, media_type=saving.FORMATS[wanted.format])
        finally:
            self.saves -= 1
            task.cancel()
            await run_in_threadpool(shutil.rmtree, folder, True)

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok" if self.ready else "warming", "version": __version__})

    async def metrics(self, _: Request) -> Response:
        """Numbers in the text format of Prometheus."""
        counts = self.worker.counts
        numbers = {
            "clients": len(self.sessions),
            "waiting_jobs": len(self.worker),
            "turns_total": counts.turns,
            "errors_total": counts.errors,
            "refused_total": self.refused,
            "audio_seconds_total": round(counts.audio_seconds, 3),
            "busy_seconds_total": round(counts.busy_seconds, 3),
            "uploads": len(self.library.uploads),
            "resident_bytes": resident_bytes(),
            "uptime_seconds": round(time.monotonic() - self.began, 3),
        }
        return PlainTextResponse("".join(f"music_synth_studio_{name} {value}\n" for name, value in numbers.items()))

    async def socket(self, socket: WebSocket) -> None:
        """Serves a client until it leaves; then its work stops."""
        if len(self.sessions) >= limits.MAX_CLIENTS:
            await socket.close(4503, f"at most {limits.MAX_CLIENTS} clients")
            return
        await socket.accept()
        loop = asyncio.get_running_loop()
        outbox = Outbox(loop, lambda: session.wake())
        session = Session(outbox, self.voices, self.library, self.worker)
        self.sessions.add(session)
        outbox.put({"type": "state", "ready": self.ready})
        sender = asyncio.create_task(send_all(socket, outbox))
        try:
            while True:
                self._receive(session, await socket.receive_text())
        except (WebSocketDisconnect, RuntimeError, KeyError):  # KeyError: a binary message, which nothing asks for
            pass
        finally:
            self.sessions.discard(session)
            session.close()
            sender.cancel()
            with contextlib.suppress(Exception):
                await socket.close(1003)

    def _receive(self, session: Session, text: str) -> None:
        try:
            message = protocol.read_message(text)
            if isinstance(message, Play):
                session.play(message)
            elif isinstance(message, Cursor):
                session.move(message)
            elif isinstance(message, Live):
                session.set_live(message)
            elif isinstance(message, Key) and session.live is not None:
                session.live.press(message)
            elif isinstance(message, Stop):
                session.stop()
        except UserError as error:
            self.refused += 1
            session.outbox.put({"type": "error", "message": one_line(error)})


async def send_all(socket: WebSocket, outbox: Outbox) -> None:
    """Sends what comes; ends quietly with its client."""
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            data = await outbox.take()
            await (socket.send_text(data) if isinstance(data, str) else socket.send_bytes(data))


async def read_body(request: Request, most: int) -> bytes:
    """Reads a request's body, and stops at the first byte too many."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise HTTPException(413, f"at most {most:,} bytes are taken")
    except ClientDisconnect as error:
        raise HTTPException(400, "the request was broken off") from error
    return bytes(body)


def resident_bytes() -> int:
    """Memory of this process."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # not Linux: the most that it ever was
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_app(studio: Studio, token: str | None = None) -> Starlette:
    """Makes the web application, which starts and stops the studio with itself."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        studio.start()
        yield
        await run_in_threadpool(studio.stop)

    async def on_user_error(_: Request, error: Exception) -> Response:
        studio.refused += 1
        return PlainTextResponse(one_line(error), 400)

    routes = [
        Route("/health", studio.health),
        Route("/metrics", studio.metrics),
        Route("/api/about", studio.about),
        Route("/api/piece", studio.piece),
        Route("/api/save", studio.save, methods=["POST"]),
        Route("/api/pieces", studio.upload, methods=["POST"]),
        WebSocketRoute("/socket", studio.socket),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    handlers: dict[Any, Any] = {UserError: on_user_error, protocol.ProtocolError: on_user_error}
    return Starlette(
        routes=routes,
        middleware=[Middleware(functools.partial(Guard, token=token))],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
