"""What waits to be sent to a client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from music_synth.studio import limits


class Outbox:
    """Frames from the worker's thread to a client's socket, counted."""

    def __init__(self, loop: asyncio.AbstractEventLoop, drained: Callable[[], None]):
        self._loop, self._drained = loop, drained
        self._queue: asyncio.Queue[bytes | str] = asyncio.Queue()
        self.pending = 0  # bytes

    def put(self, item: bytes | str | dict[str, Any]) -> None:
        """Appends a frame, or a message; from any thread."""
        data = json.dumps(item) if isinstance(item, dict) else item
        self.pending += len(data)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, data)

    def later(self, seconds: float, call: Callable[..., object], *args: object) -> None:
        """Calls a function of the main thread after some time."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, call, *args)

    async def take(self) -> bytes | str:
        data = await self._queue.get()
        was_full = self.is_full
        self.pending -= len(data)
        if was_full and not self.is_full:
            self._drained()
        return data

    @property
    def is_full(self) -> bool:
        return self.pending > limits.PENDING_BYTES
