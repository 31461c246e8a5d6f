"""Pictures: what is drawn where, and that a file comes out."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from music_synth import pictures
from music_synth.audio.mel import MAX_LOG_MEL, MIN_LOG_MEL, log_mel, mel_bin, mel_matrix
from music_synth.errors import UserError
from music_synth.midi.notes import Note

NOTES = [
    Note(60, 90, 0, 0.0, 0.5),
    Note(64, 90, 0, 0.5, 1.5),
    Note(40, 90, 33, 0.2, 0.9),
    Note(38, 90, 0, 0.25, 0.3, is_drum=True),
    Note(90, 90, 0, 5.0, 6.0),  # after the end
]


def axes():
    return Figure().subplots()


def test_piano_roll_has_every_note_at_its_place():
    panel = axes()
    pictures.draw_piano_roll(panel, NOTES, 1.0)
    bars = [segment.tolist() for collection in panel.collections for segment in collection.get_segments()]
    assert bars == [[[0.0, 60], [0.5, 60]], [[0.5, 64], [1.0, 64]], [[0.2, 40], [0.9, 40]]]
    assert len({tuple(c.get_colors()[0]) for c in panel.collections}) == 2  # a color a program
    drums = next(line for line in panel.lines if line.get_label() == "drums")
    assert (drums.get_marker(), drums.get_xdata()[0], drums.get_ydata()[0]) == ("x", 0.25, 38)
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["0 Acoustic Grand Piano", "33 Electric Bass (finger)", "drums"]


def test_frequencies_stand_at_the_mel_bins_where_they_sound():
    bins = np.linspace(0, 8000, 513)
    for k in (5, 40, 100, 127):
        peak = bins[mel_matrix()[:, k].argmax()]
        assert mel_bin(float(peak)) == pytest.approx(k, abs=0.5)
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    assert log_mel(tone, np)[10].argmax() == pytest.approx(mel_bin(1000), abs=1)


def test_mel_and_waveform_share_the_time_axis():
    mel = np.full((50, 128), MIN_LOG_MEL, np.float32)
    panel = axes()
    image = pictures.draw_mel(panel, mel)
    assert image.get_extent()[:2] == [0, 1.0]
    panel = axes()
    pictures.draw_waveform(panel, np.concatenate([np.zeros(8000), np.full(8000, 0.5)]).astype(np.float32))
    outline = panel.collections[0].get_paths()[0].vertices
    assert outline[:, 0].max() == pytest.approx(0.98)
    assert np.ptp(outline[outline[:, 0] < 0.49, 1]) == 0
    assert outline[:, 1].max() == 0.5


@pytest.mark.parametrize("suffix", pictures.PICTURE_SUFFIXES)
def test_a_picture_is_written(tmp_path, suffix):
    path = tmp_path / f"piece{suffix}"
    mel = np.random.default_rng(0).normal(size=(60, 128)).astype(np.float32)
    title = "cost $5_^ and $6.mid"  # no formula
    pictures.plot_piece(path, {"target": mel[:50], title: mel}, NOTES, np.zeros(60 * 320, np.float32), title)
    assert path.stat().st_size > 5000


def test_a_picture_of_nothing(tmp_path):
    pictures.plot_piece(tmp_path / "a.png", {"sampled": np.zeros((0, 128), np.float32)}, (), np.zeros(0, np.float32))
    assert (tmp_path / "a.png").is_file()


def test_unwritable_pictures_are_refused(tmp_path):
    mel, audio = np.zeros((4, 128), np.float32), np.zeros(1280, np.float32)
    with pytest.raises(UserError, match=r"\.gif"):
        pictures.plot_piece(tmp_path / "a.gif", {"mel": mel}, NOTES, audio)
    with pytest.raises(UserError, match="cannot be written"):
        pictures.plot_piece(tmp_path / "no" / "a.png", {"mel": mel}, NOTES, audio)


def test_a_mel_has_low_notes_at_the_bottom_and_loud_ones_bright():
    mel = np.full((5, 3), MIN_LOG_MEL - 1)  # [T, M]
    mel[2, 0] = MAX_LOG_MEL + 5  # lowest bin
    image = pictures.mel_image(mel)
    assert image.shape == (3, 5, 3) and image.dtype == np.uint8
    assert np.argwhere(image.sum(-1) > 600).tolist() == [[2, 2]]
    levels = np.linspace(MIN_LOG_MEL, MAX_LOG_MEL, 9)
    assert np.all(np.diff([pictures.mel_image(np.full((1, 1), level)).sum() for level in levels]) > 0)


def test_a_mel_has_the_same_colors_in_a_plot_and_as_an_image():
    mel = np.random.default_rng(0).uniform(MIN_LOG_MEL, MAX_LOG_MEL, (50, 128))
    image = pictures.draw_mel(axes(), mel)
    plotted = image.to_rgba(image.get_array(), bytes=True)[::-1, :, :3].astype(int)  # its first row is the lowest
    assert np.abs(plotted - pictures.mel_image(mel)).max() <= 3  # a color map has 256 steps
