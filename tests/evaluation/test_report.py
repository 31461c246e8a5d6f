"""Pictures: what is drawn where, and that a file comes out; the page of an evaluation, in a browser too."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from matplotlib.figure import Figure

from music_synth.audio.mel import MIN_LOG_MEL, log_mel, mel_matrix
from music_synth.errors import UserError
from music_synth.evaluation import report
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
    report.draw_piano_roll(panel, NOTES, 1.0)
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
        assert report.mel_bin(float(peak)) == pytest.approx(k, abs=0.5)
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    assert log_mel(tone, np)[10].argmax() == pytest.approx(report.mel_bin(1000), abs=1)


def test_mel_and_waveform_share_the_time_axis():
    mel = np.full((50, 128), MIN_LOG_MEL, np.float32)
    panel = axes()
    image = report.draw_mel(panel, mel)
    assert image.get_extent()[:2] == [0, 1.0]
    panel = axes()
    report.draw_waveform(panel, np.concatenate([np.zeros(8000), np.full(8000, 0.5)]).astype(np.float32))
    outline = panel.collections[0].get_paths()[0].vertices
    assert outline[:, 0].max() == pytest.approx(0.98)
    assert np.ptp(outline[outline[:, 0] < 0.49, 1]) == 0
    assert outline[:, 1].max() == 0.5


@pytest.mark.parametrize("suffix", report.PICTURE_SUFFIXES)
def test_a_picture_is_written(tmp_path, suffix):
    path = tmp_path / f"piece{suffix}"
    mel = np.random.default_rng(0).normal(size=(60, 128)).astype(np.float32)
    report.plot_piece(path, NOTES, mel, np.zeros(60 * 320, np.float32), target_mel=mel[:50], title="Title")
    assert path.stat().st_size > 5000


def test_a_picture_of_nothing(tmp_path):
    report.plot_piece(tmp_path / "a.png", [], np.zeros((0, 128), np.float32), np.zeros(0, np.float32))
    assert (tmp_path / "a.png").is_file()


def test_unwritable_pictures_are_refused(tmp_path):
    mel, audio = np.zeros((4, 128), np.float32), np.zeros(1280, np.float32)
    with pytest.raises(UserError, match=r"\.gif"):
        report.plot_piece(tmp_path / "a.gif", NOTES, mel, audio)
    with pytest.raises(UserError, match="cannot be written"):
        report.plot_piece(tmp_path / "no" / "a.png", NOTES, mel, audio)


def scores():
    """scores.json of two models in two modes between a baseline and a ceiling; one of them failed."""
    cell = lambda value: {"value": value, "low": value - 0.1, "high": value + 0.1, "clips": 2}
    columns = [
        {"key": "log_mel", "title": "log-mel error, dB", "higher_is_better": False, "digits": 2, "essential": True},
        {"key": "onset_f1", "title": "note F1", "higher_is_better": True, "digits": 3, "essential": True},
        {"key": "cost", "title": "sampling", "higher_is_better": False, "digits": 3, "essential": True},
        {"key": "vggish_kernel", "title": "kernel", "higher_is_better": False, "digits": 3, "essential": False},
    ]
    drift = {"log_mel": [{"value": 5.0, "clips": 2}, {"value": 6.0, "clips": 1}], "stft": []}
    curve = [{"step": k, "minutes": k, "eval/sample_error_db": 9.0 - k} for k in (1, 2)]
    rows = [
        {"name": name, "kind": kind, "mode": mode, "failed": failed, "drift": drift, "folder": "f"}
        | {"cells": {} if failed else {"log_mel": cell(value), "onset_f1": cell(0.5), "cost": {"value": 0.1}}}
        | {"about": {"training": curve}}
        for name, kind, mode, value, failed in (
            ("mean spectrum", "baseline", "", 13.0, ""),
            ("first <model>", "model", "whole", 5.25, ""),
            ("second model", "model", "whole", 4.75, ""),
            ("third model", "model", "whole", 0.0, "segment 1: not finite"),
            ("recording", "ceiling", "", 0.0, ""),
        )
    ]
    rows[1]["cells"]["vggish_kernel"] = {"missing": "needs --vggish PATH"}
    common = {"task": "t", "split": "test", "num_clips": 2, "seconds": 9.0, "reference": "recordings", "note": "Note."}
    return common | {"rows": rows, "columns": columns}


def test_the_table_tells_the_best_the_failed_and_the_missing():
    lines = report.to_markdown(scores()).splitlines()
    assert lines[2] == "| | log-mel error, dB ↓ | note F1 ↑ | sampling ↓ |"
    assert lines[5] == "| first <model>, whole | 5.25 | 0.500 | 0.100 |"
    assert lines[6] == "| second model, whole | **4.75** | 0.500 | 0.100 |"  # nothing is best where all are alike
    assert lines[7] == "| third model, whole | failed: segment 1: not finite | failed | failed |"
    assert lines[10] == "Not taken: kernel (needs --vggish PATH)."


def write_page(path):
    rng = np.random.default_rng(0)
    mel = rng.normal(-4, 2, (500, 128)).astype(np.float32)
    sounds = [report.Excerpt(name, mel, rng.normal(0, 0.1, 160_000)) for name in ("target", "first <model>")]
    report.write_html(path, scores(), [report.Example(f"piece {k}", NOTES, 10.0, sounds) for k in range(2)])
    return path.read_text()


def test_the_page_is_one_file_with_all_of_it(tmp_path):
    page = write_page(tmp_path / "report.html")
    assert "first &lt;model&gt;" in page and "<model>" not in page
    assert page.count("<audio") == 4 and page.count("<svg") == 2
    assert page.count("<img") == 4 + len(report.plots(scores()))
    assert "5.15 to 5.35" in page and "failed: segment 1: not finite" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_single_segments_do_not_stand_for_whole_pieces_that_failed():
    made = scores()
    models = [row for row in made["rows"] if row["kind"] == "model"]
    made["rows"] += [row | {"mode": "single"} for row in models]
    of_both = [caption for caption, _ in report.plots(made)]
    assert sum("sampling cost, whole pieces" in caption for caption in of_both) == 2
    for row in models:
        row |= {"failed": "not finite", "cells": {}, "drift": {}}
    assert not any("sampling cost" in caption for caption, _ in report.plots(made))


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [500, 1400])
def test_the_page_plays_from_a_file_in_a_browser(tmp_path, width):
    """Opened as a file: every picture is shown, nothing is wider than the window, and a clip plays."""
    # The browser's clock runs ahead while nothing happens, that of the sound does not: so something happens.
    look = """<script>
    const audio = document.querySelector("audio"), say = (text) => { document.body.dataset.said = text; };
    const burn = () => { let sum = 0; for (let i = 0; i < 1e6; i++) sum += Math.sqrt(i); return sum; };
    const wait = (turns) => burn() && (audio.currentTime || !turns ? say(JSON.stringify({
      duration: audio.duration, time: audio.currentTime, width: document.documentElement.scrollWidth,
      shown: [...document.images].every((image) => image.naturalWidth > 0)})) : setTimeout(() => wait(turns - 1), 10));
    audio.play().then(() => wait(2000)).catch(say);
    </script></body>"""
    path = tmp_path / "report.html"
    path.write_text(write_page(path).replace("</body>", look))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --autoplay-policy=no-user-gesture-required --dump-dom"
    flags += f" --virtual-time-budget=30000 --window-size={width},900 --user-data-dir={tmp_path / 'browser'}"
    for _ in range(3):  # where other work holds the sound up, it may not have begun when that time is over
        done = subprocess.run([CHROMIUM, *flags.split(), path.as_uri()], capture_output=True, text=True, timeout=120)
        said = re.search(r"data-said='?\"?({.*?})", done.stdout.replace("&quot;", '"'))
        found = json.loads(said[1]) if said else {"time": 0}
        if found["time"] > 0:
            break
    assert said, done.stdout[-500:] + done.stderr[-500:]
    assert found["duration"] == 10 and found["time"] > 0
    assert found["shown"] and found["width"] <= width
