"""The studio: a page in the browser that plays MIDI files through trained decoders, to change and to compare.

    python -m music_synth.studio
    python -m music_synth.studio --checkpoint runs/a --checkpoint runs/b --task /data/prepared

Without --checkpoint it plays the decoder that ships. The page is at the address that is printed; the studio ends with
Ctrl-C. docs/studio.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from music_synth import errors, runs
from music_synth.compilation import keep_compiled
from music_synth.errors import UserError, needing, telling
from music_synth.midi.notes import Note
from music_synth.playing import Decoder, compile_inverter
from music_synth.studio import limits

PORT = 8765


def main(argv: list[str]) -> None:
    flags = parse_flags(argv)
    with needing("the studio needs more", "studio"):
        import uvicorn

        from music_synth.studio.access import is_loopback
        from music_synth.studio.server import Studio, make_app
    from music_synth.studio.pieces import Library
    from music_synth.studio.sources import choose_pieces
    from music_synth.studio.voices import Voices

    keep_compiled()
    threadpool_limits(1, "blas")  # its threads spin while they wait: live mode took three times as long
    listening = listen(flags.host, flags.port)
    token = None if is_loopback(flags.host) else secrets.token_urlsafe(24)
    inverter = runs.load_inverter(flags.inverter, flags.trust)
    # Compiled beside all that follows.
    threading.Thread(target=compile_inverter, args=(inverter, [Note(60, 80, 0, 0.0, 1.0)]), daemon=True).start()
    decoders = open_decoders(flags.checkpoint or [runs.SHIPPED], flags.step)
    voices = Voices(decoders, inverter, flags.soundfont)
    library = Library(choose_pieces(flags.midi, flags.task, flags.split, decoders[0][1].tokenizer))
    studio = Studio(voices, library)
    address = f"http://{flags.host if ':' not in flags.host else f'[{flags.host}]'}:{listening.getsockname()[1]}/"
    address += f"?token={token}" if token else ""
    print(f"studio: {address}", flush=True)
    if flags.open:
        threading.Timer(0.5, webbrowser.open, [address]).start()
    config = uvicorn.Config(
        make_app(studio, token),
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=2 * limits.MAX_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws_ping_timeout=60,
        limit_concurrency=8 * limits.MAX_CLIENTS,
        timeout_graceful_shutdown=3,
        server_header=False,
        proxy_headers=False,
    )
    serve(uvicorn.Server(config), listening)
    print("studio: ended", flush=True)
    if studio.worker.is_alive:  # in a compilation, which cannot be broken off, and Python's end would abort
        os._exit(0)


def serve(server: Any, listening: socket.socket) -> None:
    """Runs a uvicorn server until SIGTERM or Ctrl-C, which both end it in order, with exit status 0."""

    @contextlib.contextmanager
    def ended_by_signals() -> Iterator[None]:
        def end(*_: object) -> None:
            server.force_exit, server.should_exit = server.should_exit, True  # a second one does not wait

        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    server.capture_signals = ended_by_signals
    server.run(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """Opens the port, before anything that takes time. UserError: it is taken, or no such address is here."""
    with telling(f"cannot listen on {host}, port {port} (--port chooses another, 0 any)"):
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)


def open_decoders(paths: list[str], step: int | None) -> list[tuple[str, Decoder]]:
    """Loads decoders, each under a short name of its own."""
    decoders: list[tuple[str, Decoder]] = []
    for path in paths:
        name = Path(os.path.normpath(path)).name
        taken = [other for other, _ in decoders]
        name = f"{name} ({len(taken) + 1})" if name in taken else name
        decoders.append((name, runs.load(path, step).decoder()))
    return decoders


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = errors.ArgumentParser("python -m music_synth.studio", __doc__)
    parser.add_argument("midi", type=Path, nargs="*", help="MIDI files to offer, or folders of them (default: data/)")
    parser.add_argument(
        "--checkpoint",
        action="append",
        metavar="PATH",
        help="of a decoder, as for synthesize (default: the one that ships); repeated: voices to compare",
    )
    parser.add_argument("--step", type=int, help="training step of the checkpoints (default: the newest)")
    parser.add_argument("--inverter", help="mel to audio, as for synthesize (default: the one that ships)")
    parser.add_argument("--trust", action="store_true", help="let an --inverter that is a SavedModel, a program, run")
    parser.add_argument("--task", help="also offer the held-out pieces of a data set: a task, or a prepared folder")
    parser.add_argument("--split", default="test", help="of --task (default: test)")
    parser.add_argument("--soundfont", type=Path, help="of the voice SoundFont (default: TimGM6mb)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on; beyond this machine a token is asked for")
    parser.add_argument("--port", type=int, default=PORT, help=f"to listen on, 0 for any (default: {PORT})")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    flags = parser.parse_args(argv)
    if not 0 <= flags.port < 65536:
        raise UserError(f"--port {flags.port}: must be in 0 .. 65535")
    if flags.soundfont is not None and not flags.soundfont.is_file():
        raise UserError(f"--soundfont {flags.soundfont}: there is no such file")
    return flags


if __name__ == "__main__":
    errors.run(main)
