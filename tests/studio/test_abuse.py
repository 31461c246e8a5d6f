"""A thousand malformed requests, frames and files, and twenty clients: the studio goes on, and so do the others."""

import contextlib
import json
import random
import socket
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from music_synth.audio.io import audio_to_int16
from music_synth.midi.notes import midi_bytes
from music_synth.studio.server import resident_bytes
from tests.studio import tiny
from tests.studio.test_server import ONE, Client, audio_of, expected, is_type

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::music_synth.midi.smf.MidiWarning")]
PLAY = {"type": "play", "job": 1, "piece": "scale", "voices": [ONE], "at": 0, "edit": {"parts": {"0": {"gain": 1.0}}}}
VALUES = (
    None, True, -1, 2**40, 1e308, "", "x" * 3000, "../../etc/passwd", [], {}, [[]] * 9, {"a": {"b": []}}, "\ud800",
)  # fmt: skip
LINES = (
    "GET / HTTP/1.1", "GET /../../etc/passwd HTTP/1.1", "GET /%2e%2e/%2e%2e/setup.py HTTP/1.1", "FOO BAR",
    "GET " + "/a" * 4000 + " HTTP/1.1", "POST /api/pieces HTTP/1.1", "POST /api/save HTTP/1.1", "\x16\x03\x01",
    "GET /api/piece?id=%00%ff HTTP/1.1", "GET /socket HTTP/1.1", "DELETE /metrics HTTP/9.9", "PUT /api/about HTTP/1.1",
)  # fmt: skip
HEADERS = (
    "Host: 127.0.0.1", "Host: evil.example", "Origin: http://evil.example", "Content-Length: 99999999999", "A" * 9000,
    "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Transfer-Encoding: chunked", "\x00: \x00",
    "Content-Type: application/json", "Cookie: studio_token=\xff", "Content-Length: -1",
)  # fmt: skip


@pytest.fixture(scope="module")
def studio():
    """Compiled as for users, not quickly: there is much to play."""
    with tiny.running() as running:
        yield running


def mutated(rng, value):
    """A JSON value with some of it replaced by what does not belong there."""
    if rng.random() < 0.15:
        return rng.choice(VALUES)
    if isinstance(value, dict):
        result = {key: mutated(rng, one) for key, one in value.items() if rng.random() > 0.05}
        return result | ({"more": rng.choice(VALUES)} if rng.random() < 0.1 else {})
    return [mutated(rng, one) for one in value] if isinstance(value, list) else value


def damaged(rng, data):
    """Bytes with some of them changed, cut or repeated."""
    result = bytearray(data)
    for _ in range(rng.randrange(1, 20)):
        result[rng.randrange(len(result))] = rng.randrange(256)
    first, last = sorted(rng.choices(range(len(result)), k=2))
    return bytes(result[: rng.choice([len(result), last])] + result[first:last] * rng.choice([0, 0, 3]))


def send_raw(rng, address):
    host, port = address.split(":")
    with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 10) as raw:
        raw.settimeout(0.05)
        lines = [rng.choice(LINES), *rng.sample(HEADERS, rng.randrange(5)), "", rng.choice(["", "{", "x" * 500])]
        raw.sendall("\r\n".join(lines).encode("latin-1"))
        raw.recv(1000)


def send_file(rng, address, midi):
    kind = rng.choice(["application/octet-stream", "application/json"])
    body = damaged(rng, midi)
    if kind == "application/json":
        body = json.dumps(mutated(rng, {"name": "n", "notes": [[60, 90, 0.0, 1.0]], "program": 0})).encode()
    path = rng.choice(["/api/pieces", "/api/pieces?name=%00", "/api/save"])
    request = urllib.request.Request(f"http://{address}{path}", body, {"content-type": kind}, method="POST")
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        assert error.code in (400, 413), (error.code, body)


def send_frames(rng, address):
    with contextlib.suppress(ConnectionClosed, OSError), connect(f"ws://{address}/socket", max_size=None) as client:
        for _ in range(10):
            message = rng.choice([PLAY, {"type": "cursor", "job": 1, "at": 5, "selected": 0}, {"type": "stop"}])
            text = json.dumps(mutated(rng, message))
            frame = rng.choice([text, text, text, text[: len(text) // 2], "\0" * 99, "[" * 20000])
            client.send(frame if rng.random() < 0.95 else frame.encode())


def test_a_thousand_malformed_requests_and_twenty_clients(studio):
    address, rng, problems = studio[1], random.Random(0), []
    whole = audio_to_int16(expected(studio[0]))
    before = resident_bytes()

    def listen(number):
        """One of those who only want to hear their piece, twice."""
        try:
            with Client(address) as client:
                for _ in range(2):
                    client.play()
                    np.testing.assert_array_equal(audio_of(client.receive(is_type("end"), 240))[1], whole)
        except BaseException as error:
            problems.append((number, repr(error)[:500]))

    clients = [threading.Thread(target=listen, args=(number,)) for number in range(20)]
    for client in clients:
        client.start()
    midi = midi_bytes(tiny.notes(4.0))
    for _ in range(300):
        send_raw(rng, address)
    for _ in range(300):
        send_file(rng, address, midi)
    for _ in range(40):  # of ten frames each
        send_frames(rng, address)
    for client in clients:
        client.join(300)
    assert not problems
    foreign = {"Origin": "http://evil.example"}
    with pytest.raises(InvalidStatus), connect(f"ws://{address}/socket", additional_headers=foreign):
        pass
    assert studio[0].worker.counts.errors == 0
    grown = (resident_bytes() - before) / 2**20
    print(f"memory has grown by {grown:.0f} MB")
    assert grown < 200
