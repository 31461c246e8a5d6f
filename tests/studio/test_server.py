"""Requests, sockets and files of a studio that runs in this process."""

import io
import json
import time
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pytest
import soundfile
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from music_synth.audio.io import audio_to_int16, audio_writer
from music_synth.midi.notes import midi_bytes, read_midi
from music_synth.studio import limits
from music_synth.studio.protocol import HEADER, LIVE, MEL, PCM
from tests.studio import tiny
from tests.studio.tiny import SEGMENT, get

pytestmark = pytest.mark.slow
ONE = {"kind": "decoder", "checkpoint": 0, "seed": 5}


class Client:
    """A page without a browser."""

    def __init__(self, address):
        self.connection, self.job = connect(f"ws://{address}/socket", max_size=None, ping_interval=None), 0

    def __enter__(self):
        self.socket = self.connection.__enter__()
        assert json.loads(self.socket.recv(30)) == {"type": "state", "ready": True}
        return self

    def __exit__(self, *error):
        self.connection.__exit__(*error)

    def send(self, **message):
        self.socket.send(json.dumps(message))

    def play(self, voices=(ONE,), at=0, **more):
        self.job += 1
        self.send(**{"type": "play", "job": self.job, "piece": "scale", "voices": list(voices), "at": at} | more)
        return self.job

    def receive(self, until, seconds=60.0):
        """Frames (kind, voice, position, numbers) and messages, up to the first of which `until` is true."""
        found, deadline = [], time.monotonic() + seconds
        while True:
            data = self.socket.recv(deadline - time.monotonic())
            if isinstance(data, str):
                item = json.loads(data)
            else:
                kind, voice, _, job, position, _ = HEADER.unpack(data[:16])
                if job != self.job and kind != LIVE:
                    continue
                item = (kind, voice, position, np.frombuffer(data[16:], np.uint8 if kind == MEL else "<i2"))
            found.append(item)
            if until(item):
                return found


def is_type(name):
    return lambda item: isinstance(item, dict) and item["type"] == name


def audio_of(items, voice=0):
    """(first sample, samples) of a voice; the frames follow each other."""
    frames = [item for item in items if not isinstance(item, dict) and item[0] == PCM and item[1] == voice]
    start = position = frames[0][2]
    for _, _, first, samples in frames:
        assert first == position
        position += len(samples)
    return start, np.concatenate([frame[3] for frame in frames])


def post(address, path, body, **headers):
    request = urllib.request.Request(f"http://{address}{path}", body, headers, method="POST")
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


def refused(address, path, body=None, **headers):
    """(status, what is said) of a request that fails."""
    with pytest.raises(urllib.error.HTTPError) as error:
        post(address, path, body, **headers) if body is not None else get(address, path)
    return error.value.code, error.value.read().decode()


def expected(studio, seed=5):
    """What `synthesize` writes of the piece."""
    decoder, notes = studio.voices.decoders[0][1], studio.library.get("scale").notes
    parts = decoder.play([notes], studio.voices.inverter, seed)
    return np.concatenate([part.audio for part in parts])


def test_the_page_and_its_parts_come_from_here(studio):
    address = studio[1]
    with urllib.request.urlopen(f"http://{address}/") as response:
        page = response.read().decode()
        assert "default-src 'self'" in response.headers["content-security-policy"]
    for file in tiny.static_files():
        with urllib.request.urlopen(f"http://{address}/{file.name}") as response:
            assert response.read() == file.read_bytes()
        assert "://" not in file.read_text().replace("http://www.w3.org/2000/svg", "").replace("${scheme}://", "")
    assert 'src="app.js"' in page
    about = get(address, "/api/about")
    assert [decoder["name"] for decoder in about["decoders"]] == ["one", "two"] and len(about["instruments"]) == 128
    assert [piece["id"] for piece in about["pieces"]] == ["scale", "tone"]
    assert get(address, "/health")["status"] == "ok"


def test_audio_is_that_of_synthesize_and_comes_with_its_mel(studio):
    with Client(studio[1]) as client:
        client.play()
        items = client.receive(is_type("end"))
    start, samples = audio_of(items)
    whole = audio_to_int16(expected(studio[0]))
    assert start == 0 and items[-1]["at"] == len(whole)
    np.testing.assert_array_equal(samples, whole)
    frames = sum(len(item[3]) // 128 for item in items if not isinstance(item, dict) and item[0] == MEL)
    assert frames * 320 == len(whole)


def test_a_seek_and_a_change_begin_with_the_segment_there(studio):
    with Client(studio[1]) as client:
        client.play(at=SEGMENT + 1000)
        first, plain = audio_of(client.receive(is_type("end")))
        client.play(at=SEGMENT + 1000, change=True, edit={"parts": {"0": {"program": 73}}})
        again, changed = audio_of(client.receive(is_type("end")))
    assert first == again == SEGMENT
    assert len(plain) == len(changed) and np.abs(plain - changed.astype(np.int32)).max() > 100


def test_only_so_much_is_made_ahead_of_the_cursor(studio, monkeypatch):
    monkeypatch.setattr(limits, "AHEAD_SECONDS", 5.0)
    with Client(studio[1]) as client:
        job = client.play()
        _, samples = audio_of(client.receive(lambda item: is_type("made")(item) and item["voice"] == 0))
        client.receive(lambda item: not isinstance(item, dict) and item[0] == PCM)
        with pytest.raises(TimeoutError):
            client.receive(is_type("end"), 1.0)
        client.send(type="cursor", job=job, at=4 * len(samples))
        client.receive(is_type("end"))


def test_voices_are_made_side_by_side(studio):
    voices = [ONE, {"kind": "soundfont"}, {**ONE, "checkpoint": 1}, {"kind": "recording"}]
    ended = set()

    def until(item):
        if isinstance(item, dict) and item["type"] in ("end", "error"):
            ended.add((item["voice"], item["type"]))
        return len(ended) == 4

    with Client(studio[1]) as client:
        client.play(voices)
        items = client.receive(until)
        assert ended == {(0, "end"), (1, "end"), (2, "end"), (3, "error")}  # this piece has no recording
        sounds = [audio_of(items, voice)[1] for voice in range(3)]
        assert not np.array_equal(sounds[0], sounds[2]) and np.abs(sounds[1]).max() > 1000
        ended.clear()
        client.play([{"kind": "recording"}], piece="tone", at=0)
        _, tone = audio_of(client.receive(is_type("end")))
        np.testing.assert_array_equal(tone, studio[0].library.get("tone").recording())


def test_a_client_that_leaves_stops_its_work(studio):
    with Client(studio[1]) as client:
        client.play(at=0)
        client.receive(is_type("made"))
    deadline = time.monotonic() + 10
    while studio[0].sessions or len(studio[0].worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_bad_messages_are_answered_and_change_nothing(studio):
    with Client(studio[1]) as client:
        client.socket.send("{")
        assert "not JSON" in client.receive(is_type("error"))[-1]["message"]
        client.play(piece="../../etc/passwd")
        assert "no piece" in client.receive(is_type("error"))[-1]["message"]
        client.play([{**ONE, "checkpoint": 9}])
        assert "no checkpoint 9" in client.receive(is_type("error"))[-1]["message"]
        client.play()
        client.receive(is_type("end"))
        client.socket.send(b"binary")
        with pytest.raises(ConnectionClosed):
            client.receive(lambda item: False, 10)


def test_other_sites_cannot_open_a_socket(studio):
    foreign = {"Origin": "http://evil.example"}
    with pytest.raises(InvalidStatus) as error, connect(f"ws://{studio[1]}/socket", additional_headers=foreign):
        pass
    assert error.value.response.status_code == 403
    assert refused(studio[1], "/api/pieces", b"x", Origin="http://evil.example")[0] == 403


def test_a_file_can_be_uploaded(studio):
    midi = midi_bytes(tiny.notes(pitch=48))
    head = json.loads(post(studio[1], "/api/pieces?name=mine.mid", midi))
    assert head["name"] == "mine.mid" and get(studio[1], f"/api/piece?id={head['id']}")["notes"][0][1] == 48
    body = json.dumps({"name": "keys", "notes": [[60, 90, 0, 1]]}).encode()
    head = json.loads(post(studio[1], "/api/pieces", body, **{"content-type": "application/json"}))
    assert get(studio[1], f"/api/piece?id={head['id']}")["notes"] == [[0, 60, 90, 0.0, 1.0]]
    assert refused(studio[1], "/api/pieces", b"no midi")[0] == 400
    assert refused(studio[1], "/api/pieces", bytes(limits.MAX_MIDI_BYTES + 1))[0] == 413
    assert refused(studio[1], "/api/piece?id=/etc/passwd")[0] == 400
    assert refused(studio[1], "/..%2f..%2fsetup.py")[0] == 404


def save(studio, format, edit=None, voice=ONE):
    body = {"piece": "scale", "edit": edit or {}, "voice": voice, "format": format}
    return post(studio[1], "/api/save", json.dumps(body).encode())


def test_saved_files_are_those_of_synthesize(studio, tmp_path):
    for format in ("wav", "flac"):
        with audio_writer(tmp_path / f"a.{format}") as write:
            write(expected(studio[0]).clip(-1, 1))
        assert save(studio, format) == (tmp_path / f"a.{format}").read_bytes()
    assert save(studio, "mid") == studio[0].library.get("scale").midi
    edited = read_midi(save(studio, "mid", {"transpose": 2, "parts": {"1": {"mute": True}}}))
    assert [note.pitch for note in edited[:3]] == [62, 63, 64] and not any(note.is_drum for note in edited)
    status, said = refused(studio[1], "/api/save", b'{"piece": "scale", "voice": {"kind": "decoder"}, "format": "exe"}')
    assert status == 400 and "format must be one of" in said


def test_stems_are_the_parts_alone(studio):
    archive = zipfile.ZipFile(io.BytesIO(save(studio, "stems", voice={"kind": "soundfont"})))
    assert archive.namelist() == ["01_Acoustic_Grand_Piano.wav", "02_Drums.wav"]
    piano, drums = (soundfile.read(io.BytesIO(archive.read(name)))[0] for name in archive.namelist())
    whole = soundfile.read(io.BytesIO(save(studio, "wav", voice={"kind": "soundfont"})))[0]
    length = min(len(piano), len(drums), len(whole))
    left = piano[:length] + drums[:length] - whole[:length]  # a few samples differ where drums begin
    assert np.linalg.norm(left) < 0.05 * np.linalg.norm(whole)


def test_live_keys_come_back_as_sound(studio):
    with Client(studio[1]) as client:
        client.send(type="live", voice=ONE, program=0)
        assert client.receive(is_type("live"))[-1]["ready"]
        client.send(type="key", pitch=60, velocity=100, at=16000, number=7)
        items = client.receive(lambda item: not isinstance(item, dict))
        assert {"type": "live-keys", "keys": [7]} in items
        kind, _, position, samples = items[-1]
        assert kind == LIVE and position > 16000 and len(samples) == 27 * 320
        later = client.receive(lambda item: not isinstance(item, dict))[-1]  # it is held: more comes by itself
        assert later[2] > position
        client.send(type="live", voice=None)


def test_numbers_for_monitoring(studio):
    with urllib.request.urlopen(f"http://{studio[1]}/metrics") as response:
        numbers = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines())
    assert float(numbers["music_synth_studio_audio_seconds_total"]) > 10
    assert int(numbers["music_synth_studio_errors_total"]) == 0
