"""The benchmark script, for a twentieth of a second a measurement."""

import json
import runpy
from pathlib import Path

import pytest

from music_synth.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


def test_every_section_is_measured(main, made_tasks, made_data_dir, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    argv = ["--task=made", f"--data_dir={made_data_dir}", "--seconds=0.05", "--repeats=2", f"--out={out}"]
    main([*argv, "--batch_size=4"])
    report, shown = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert [result["section"] for result in report["results"]] == [*["feed"] * 3, "tokenizer", *["mel"] * 2]
    assert report["cores"] >= 1 and "--task=made" in report["command"] and report["device"] and report["cpu"]
    for result in report["results"]:
        assert 0 < result["lowest"] <= result["median"] <= result["highest"]
        assert result["per_core"] == result["median"] / report["cores"]
        (line,) = [line for line in shown if line.startswith(result["name"] + "  ")]
        assert f"{result['median']:,.0f}" in line and line.endswith(f"{result['unit']}/s")
    assert report["date"] in shown[0] and report["command"] in shown[0]


def test_a_form_that_cannot_be_read_is_left_out(main, made_tasks, made_data_dir, tmp_path, capsys):
    argv = ["feed", "--task=made", f"--data_dir={made_data_dir}", "--seconds=0", "--repeats=1"]
    main([*argv, f"--cache={tmp_path}", f"--prepared={tmp_path / 'none'}", f"--out={tmp_path / 'report.json'}"])
    told = capsys.readouterr().err
    assert "left out: seqio cache: task 'made' is not cached" in told
    assert "left out: prepared arrays: no folder" in told
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["name"] == "made, tfds data set"


@pytest.mark.parametrize("argv, message", [(["speed"], "no section 'speed'"), (["--repeats=0"], "at least 1")])
def test_user_errors(main, argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
