"""Which pieces the studio begins with."""

import numpy as np
import pytest

from music_synth.errors import UserError
from music_synth.midi.notes import midi_bytes, write_midi
from music_synth.midi.tokenizer import Tokenizer
from music_synth.studio import sources
from tests import tiny_runs
from tests.studio import tiny


def test_files_and_folders(tmp_path, monkeypatch):
    for name in ("b_two.mid", "a.kar"):
        write_midi(tiny.notes(), tmp_path / name)
    chosen = sources.choose_pieces([tmp_path], None, "test", Tokenizer())
    assert [(piece.id, piece.name) for piece in chosen] == [("a", "a"), ("b_two", "b two")]
    (tmp_path / "bad.mid").write_bytes(b"MThd")
    with pytest.warns(UserWarning, match=r"left out: .*bad\.mid"):
        assert len(sources.choose_pieces([tmp_path], None, "test", Tokenizer())) == 2
    with pytest.raises(UserError, match=r"bad\.mid"):
        sources.choose_pieces([tmp_path / "bad.mid"], None, "test", Tokenizer())
    with pytest.raises(UserError, match="the same name"):
        sources.choose_pieces([tmp_path / "a.kar", tmp_path / "a.kar"], None, "test", Tokenizer())
    monkeypatch.setattr(sources, "default_data_dir", lambda: tmp_path / "none")
    composed = sources.choose_pieces([], None, "test", Tokenizer())
    assert composed and all(piece.notes for piece in composed)


def test_held_out_pieces_have_their_recordings(tmp_path):
    folder = tiny_runs.prepare(tmp_path / "prepared", audio=True)
    first, second = sources.held_out(str(folder), "test", Tokenizer())
    assert (first.id, second.id) == ("test/300", "test/100") and first.midi == midi_bytes(first.notes)
    samples = first.recording()
    assert samples.dtype == np.int16 and len(samples) == 300 * 320
    assert sources.held_out(str(tiny_runs.prepare(tmp_path / "mute")), "test", Tokenizer())[0].recording is None
    with pytest.raises(UserError, match="no split 'exam'"):
        sources.held_out(str(folder), "exam", Tokenizer())
