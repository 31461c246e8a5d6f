"""The benchmark script, for a twentieth of a second a measurement."""

import json
import re
import runpy
from pathlib import Path

import pytest

from music_synth.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def main(script):
    return script["main"]


def test_every_form_of_the_data_is_measured(main, script, made_tasks, made_data_dir, tmp_path, capsys):
    out = tmp_path / "new" / "report.json"
    argv = ["feed", "tokenizer", "mel", "--task=made", f"--data_dir={made_data_dir}", "--seconds=0.05", "--repeats=2"]
    main([*argv, f"--out={out}", "--batch_size=4"])
    report, shown = json.loads(out.read_text()), capsys.readouterr().out.splitlines()
    assert [result["section"] for result in report["results"]] == [*["feed"] * 3, "tokenizer", *["mel"] * 2]
    assert report["cores"] >= 1 and "--task=made" in report["command"] and report["device"] and report["cpu"]
    for result in report["results"]:
        assert 0 < result["lowest"] <= result["median"] <= result["highest"]
        assert result["per_core"] == result["median"] / report["cores"]
        (line,) = [line for line in shown if line.startswith(result["name"] + "  ")]
        assert script["short"](result["median"]) in line and line.endswith(f"{result['unit']}/s")
        assert result["peak_memory"] > 1e8
    assert report["date"] in shown[0] and report["command"] in shown[0]


@pytest.mark.slow
def test_networks_are_measured_beside_the_plain_way(main, quick_compilation, tmp_path, capsys):
    out = tmp_path / "report.json"
    argv = ["decoder", "piece", "training", "--sizes=tiny", "--gin_file=smoke.gin", "--gin.SAMPLING_STEPS=3"]
    argv += ["--piece_seconds=4", "--inverter=griffin_lim", "--train_batch=2"]
    main([*argv, "--seconds=0", "--repeats=1", f"--out={out}"])
    results = {result["name"].removeprefix("tiny, "): result for result in json.loads(out.read_text())["results"]}
    assert list(results) == "encode|step|guided step|segment|piece|first audio of a stream|training".split("|")
    for name, result in results.items():
        assert result["median"] > 0
        if name != "training":
            assert result["times_faster"] == pytest.approx(result["median"] / result["plain"])
    for name in ("step", "guided step"):
        difference = float(re.search(r"differs by (\S+)", results[name]["about"])[1])
        assert 0 <= difference < 1e-4  # on some machines both compute the same
    assert "3 steps" in results["segment"]["about"]
    for name in ("step", "guided step", "training"):
        share = results[name]["gflops"] / results[name]["matrix_product"]
        assert 0 < results[name]["utilization"] == pytest.approx(share)
    assert "times faster" in capsys.readouterr().out


def test_a_form_that_cannot_be_read_is_left_out(main, made_tasks, made_data_dir, tmp_path, capsys):
    argv = ["feed", "--task=made", f"--data_dir={made_data_dir}", "--seconds=0", "--repeats=1"]
    main([*argv, f"--cache={tmp_path}", f"--prepared={tmp_path / 'none'}", f"--out={tmp_path / 'report.json'}"])
    told = capsys.readouterr().err
    assert "left out: seqio cache: task 'made' is not cached" in told
    assert "left out: prepared arrays: no folder" in told
    (result,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert result["name"] == "made, the data set itself"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["speed"], "no section 'speed'"),
        (["--repeats=0"], "at least 1"),
        (["--out={folder}"], "is a folder; name a file"),
        (["--out={folder}/file/report.json"], "cannot make its folder"),
    ],
)
def test_user_errors(main, tmp_path, argv, message):
    """All of them before anything is measured."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        main([argument.format(folder=tmp_path) for argument in argv])
