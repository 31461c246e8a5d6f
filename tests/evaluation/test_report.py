"""The table of an evaluation, and its page, in a browser too."""

import json
import re
import shutil
import subprocess
from urllib.parse import parse_qs

import numpy as np
import pytest

from music_synth import playing
from music_synth.evaluation import report
from music_synth.pictures import piano_roll_svg
from tests.test_pictures import NOTES


def scores():
    """scores.json of two models in two modes between a baseline and a ceiling; one of them failed."""

    def cell(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "clips": 2}

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
    rows[1] |= {"folder": "first", "against": ""}
    rows[2] |= {"against": "first", "no_worse": True}
    common = {"task": "t", "split": "test", "num_clips": 2, "seconds": 9.0, "reference": "recordings", "note": "Note."}
    return common | {"rows": rows, "columns": columns}


def test_the_table_tells_the_best_the_failed_and_the_missing():
    lines = report.to_markdown(scores()).splitlines()
    assert lines[2] == "| | log-mel error, dB ↓ | note F1 ↑ | sampling ↓ | no worse than the reference |"
    assert lines[5] == "| first <model>, whole | 5.25 | 0.500 | 0.100 | reference |"
    assert lines[6] == "| second model, whole | **4.75** | 0.500 | 0.100 | yes |"  # nothing is best where all are alike
    assert lines[7] == "| third model, whole | failed: segment 1: not finite | failed | failed |  |"
    assert lines[10] == "Not taken: kernel (needs --vggish PATH)."


def test_links_lead_to_the_same_moment_in_the_studio():
    table = scores() | {"seed": 3}
    assert report.studio_link(table, "p", 1.0) == report.studio_command(table) == ""  # no row says which run it is
    runs = iter([("runs/a", {}), ("runs/b c", {"num_steps": 2}), ("runs/a", {"rho": 3.0})])
    for row in table["rows"]:
        if row["kind"] == "model":
            row["about"]["model_dir"], row["about"]["given"] = next(runs)
    command = "music_synth studio --task t --split test --checkpoint runs/a --checkpoint 'runs/b c'"
    assert report.studio_command(table) == command
    address, query = report.studio_link(table, "a/p 1", 5.0).split("?")
    seed = playing.piece_seed("a/p 1", 3)
    voices = [f"decoder:0,seed={seed}", f"decoder:1,seed={seed},steps=2", "recording"]
    assert parse_qs(query) == {"piece": ["a/p 1"], "t": ["5.00"], "voice": voices} and address == report.STUDIO


def test_of_what_should_be_one_the_nearest_is_best():
    column = {"key": "change", "title": "change", "higher_is_better": None, "digits": 2, "essential": True}
    made = scores()
    for row, value in zip(made["rows"][1:3], (0.7, 1.2), strict=True):
        row["cells"]["change"] = {"value": value}
    lines = report.to_markdown(made | {"columns": [column]}).splitlines()
    assert lines[2].startswith("| | change → 1 |") and lines[6].startswith("| second model, whole | **1.20** |")


def write_page(path):
    rng = np.random.default_rng(0)
    mel = rng.normal(-4, 2, (500, 128)).astype(np.float32)
    sounds = [report.excerpt(name, mel, rng.normal(0, 0.1, 160_000)) for name in ("target", "first <model>")]
    roll = piano_roll_svg(NOTES, 10.0)
    examples = [{"title": f"piece {k}", "link": "", "roll": roll, "sounds": sounds} for k in range(2)]
    report.write_html(path, scores(), examples)
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
