"""The script that compares samplers, on a run that was never trained."""

import json
import runpy
from pathlib import Path

import pytest

from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare_samplers.py"))


def test_rows_are_sampled_once_and_the_cheapest_is_named(script, tmp_path, capsys):
    prepared = tiny_runs.prepare(tmp_path / "prepared")
    run = tiny_runs.start(tmp_path / "run", "diffusion.gin", prepared)
    out = tmp_path / "samplers.json"
    argv = [str(run), f"--task={prepared}", f"--out={out}", "--seconds=1.28", "--reference=2", "--guidance=1"]
    argv += ["--samplers=ddim", "--steps=1"]
    script["main"](argv)
    (rows,) = json.loads(out.read_text()).values()
    assert [row["work"] for row in rows.values()] == [2, 1]
    shown = capsys.readouterr().out
    table = [line.split(" | ")[0] for line in shown.splitlines() if line.startswith("| d")]
    assert table == ["| ddpm, 2 steps", "| ddim, 1 step"]
    assert "cheapest that is no worse than ddpm, 2 steps: " in shown
    written = out.stat().st_mtime_ns
    script["main"](argv)

    def of_table(text):
        return text[text.index("| sampler") :]  # above it stands the date

    assert of_table(capsys.readouterr().out) == of_table(shown) and out.stat().st_mtime_ns == written
    for wrong, said in (
        (f"--out={tmp_path / 'nowhere' / 'samplers.json'}", "no folder"),
        (f"--out={tmp_path}", "cannot be read as scores"),
        ("--steps=4,x", "'4,x'"),
        ("--steps=4,0", "num_steps = 0"),
        ("--guidance=a", "'a'"),
        ("--guidance=nan", "guidance_scale = nan"),
        ("--seconds=nan", "--seconds nan"),
        ("--seconds=0", "--seconds 0"),
    ):
        with pytest.raises(UserError, match=said):
            script["main"]([*argv, wrong])
    for damaged in (out.read_text()[:-9], "[]", '{"a": {"b": {"name": "c"}}}'):
        out.write_text(damaged)
        with pytest.raises(UserError, match="cannot be read as scores"):
            script["main"](argv)
        assert out.read_text() == damaged


def test_work_counts_rows_of_the_network(script):
    work = script["work"]
    assert [work(Sampler("ddim", 8)), work(Sampler("ddim", 8, 2.0)), work(Sampler("heun", 8))] == [8, 16, 15]


def test_no_worse_is_better_or_inside_the_interval_in_all(script):
    reference = {"log_mel": [5, 4, 6], "frechet": [30, 28, 40], "onset_f1": [0.6, 0.5, 0.7]}
    good = {"log_mel": [5.9, 0, 0], "frechet": [10, 0, 0], "onset_f1": [0.51, 0, 0]}
    assert script["is_no_worse"](good, reference)
    for worse in ({"log_mel": [6.1, 0, 0]}, {"frechet": [41, 0, 0]}, {"onset_f1": [0.49, 0, 0]}):
        assert not script["is_no_worse"](good | worse, reference)
