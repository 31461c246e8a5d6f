"""A studio of small random voices, for tests: in this process, on a port of its own."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import uvicorn

from music_synth import runs
from music_synth.audio.io import audio_to_int16
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.diffusion.schedule import LogNormalSchedule
from music_synth.midi.notes import Note, midi_bytes
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.layers import NetworkConfig
from music_synth.playing import Decoder
from music_synth.studio.__main__ import listen
from music_synth.studio.pieces import Library, StudioPiece, from_midi
from music_synth.studio.server import Studio, make_app
from music_synth.studio.voices import Voices
from tests import tiny_runs

NETWORK = NetworkConfig(
    model_dim=8,
    num_heads=2,
    head_dim=4,
    mlp_dim=16,
    num_encoder_layers=1,
    num_decoder_layers=1,
    num_prior_layers=1,
    decoder="convolutional",
    note_roll=True,
    max_tokens=128,
    target_frames=256,
    context_frames=256,
)
SAMPLER = Sampler(name="euler", num_steps=2, grid="karras", min_log_snr=-4.2, max_log_snr=7.0, clip_x_0=False)
SEGMENT = 256 * 320  # samples


def decoder(scale: float = 4.0) -> Decoder:
    """An untrained decoder of the kind that ships; its samples are noise that heeds the notes."""
    schedule = LogNormalSchedule()
    model = Diffusion(NETWORK, schedule, "v", "v", "l2", condition_dropout=0.0, sampler=SAMPLER)
    params = tiny_runs.random_like(model.init)
    params = jax.tree.map(lambda leaf: leaf * np.float32(scale), params)
    return Decoder(model, params, Tokenizer(max_tokens=128))


def notes(seconds: float = 14.0, pitch: int = 60) -> list[Note]:
    """Two parts: a scale of half seconds, and drums a second apart."""
    count = int(2 * (seconds - 1))
    scale = [Note(pitch + i % 12, 80, 0, 0.5 * i, 0.5 * i + 0.4, False, 0) for i in range(count)]
    drums = [Note(36, 100, 0, float(i), i + 0.1, True, 1) for i in range(count // 2)]
    return sorted(scale + drums, key=lambda note: note.onset)


def piece(seconds: float = 14.0) -> StudioPiece:
    return from_midi(midi_bytes(notes(seconds)), "a scale", "scale")


def recorded_piece() -> StudioPiece:
    t = np.arange(6 * 16000) / 16000
    samples = audio_to_int16((0.3 * np.sin(2 * np.pi * 440 * t)).astype(np.float32))
    midi = midi_bytes([Note(69, 90, 0, 0.0, 5.0)])
    return StudioPiece("tone", "a tone", midi, (Note(69, 90, 0, 0.0, 5.0),), lambda: samples)


@contextlib.contextmanager
def running(port: int = 0) -> Iterator[tuple[Studio, str]]:
    """Yields a studio that is ready, and its address."""
    voices = Voices([("one", decoder()), ("two", decoder(5.0))], runs.load_inverter())
    studio = Studio(voices, Library([piece(), recorded_piece()]))
    listening = listen("127.0.0.1", port)
    address = f"127.0.0.1:{listening.getsockname()[1]}"
    config = uvicorn.Config(
        make_app(studio), log_level="error", ws="websockets-sansio", ws_max_size=1 << 17, ws_ping_timeout=60
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + 300
        while not studio.ready:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.05)
        yield studio, address
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def get(address: str, path: str):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=30) as response:
        return json.load(response)


def static_files() -> list[Path]:
    return sorted((Path(__file__).parents[2] / "music_synth/studio/static").iterdir())
