"""The MIDI pieces in data/ are what data/README.md says."""

import re
from pathlib import Path

import pytest

from music_synth.data import synthetic
from music_synth.midi.notes import read_midi
from music_synth.midi.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
ROWS = re.findall(r"\| `(\w+\.mid)` \|.*\| `(\w+)` `(\d+)` \|", (DATA / "README.md").read_text())


def test_all_are_listed():
    assert sorted(name for name, _, _ in ROWS) == sorted(path.name for path in DATA.glob("*.mid"))
    assert [kind for _, kind, _ in ROWS] == list(synthetic.KINDS)


@pytest.mark.parametrize("name, kind, seed", ROWS)
def test_piece(name, kind, seed, tmp_path):
    arguments = ["--kind", kind, "--seed", seed, "--seconds", "30", "--out", str(tmp_path / name)]
    synthetic.main(arguments)
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), "the composer changed: make the pieces anew"
    notes = read_midi(DATA / name, as_published=True)
    assert 20 < max(note.offset for note in notes) < 40
    assert any(note.is_drum for note in notes) == (kind == "band")
    assert max(len(tokens) for tokens in Tokenizer().encode(notes)) < 1000


def test_they_are_new_to_the_model_but_their_instruments_are_not():
    specs = [spec for split in synthetic.SPLITS for spec in synthetic.plan_split(split, 40)]
    data_set = [synthetic.compose(spec) for spec in specs]
    heard = {
        n.program
        for spec, midi in zip(specs, data_set, strict=True)
        if "train" in spec.id
        for n in read_midi(midi, as_published=True)
    }
    for name, _, _ in ROWS:
        assert (DATA / name).read_bytes() not in data_set
        assert {note.program for note in read_midi(DATA / name, as_published=True)} <= heard
