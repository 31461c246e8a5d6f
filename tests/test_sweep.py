"""scripts/sweep.py: what it plans, how it merges seeds, and a whole small sweep that goes on where it stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from music_synth.errors import UserError
from music_synth.evaluation import report
from tests import tiny_runs

spec = importlib.util.spec_from_file_location("sweep", Path(__file__).parents[1] / "scripts" / "sweep.py")
sweep = importlib.util.module_from_spec(spec)
sys.modules["sweep"] = sweep  # where its dataclasses look
spec.loader.exec_module(sweep)


def planned(*argv):
    flags = sweep.parse_flags(["--out=o", *argv])
    return sweep.plan(flags.models, flags, ["BATCH_SIZE=4"])


def test_every_model_is_trained_with_every_seed_and_the_same_budget():
    runs = planned("--steps=9", "--seeds=0,3", "a: diffusion.gin", "b, small: autoregressive.gin nocontext.gin X=1")
    assert [(run.name, run.seed) for run in runs] == [("a", 0), ("b, small", 0), ("a", 3), ("b, small", 3)]
    assert runs[3].model_dir == Path("o/b-small-seed3")
    assert runs[3].arguments[:2] == ("--gin_file=autoregressive.gin", "--gin_file=nocontext.gin")
    assert {"--gin.TRAIN_STEPS=9", "--gin.BATCH_SIZE=4", "--gin.X=1", "--gin.train.seed=3"} < set(runs[3].arguments)
    assert "--gin.train.max_minutes=2.5" in planned("--minutes=2.5", "a: diffusion.gin")[0].arguments


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a: diffusion.gin"], "--steps, or --minutes"),
        (["--steps=1", "diffusion.gin"], "NAME: RECIPE.gin"),
        (["--steps=1", "a: diffusion.gin fast"], "'fast' is neither a file nor NAME=VALUE"),
        (["--steps=1", "a: difusion.gin"], "did you mean diffusion.gin"),
        (["--steps=1", "a b: diffusion.gin", "A-b: diffusion.gin"], "two models go to o/a-b-seed0"),
        (["--steps=1", "--seeds=0,x", "a: diffusion.gin"], "0,x"),
        (["--steps=1", "a: diffusion.gin X='y"], "X='y.*: no closing quotation"),
        (["--steps=1", "--evaluate='", "a: diffusion.gin"], "no closing quotation"),
    ],
)
def test_what_is_no_sweep_is_refused(argv, said):
    with pytest.raises(UserError, match=said):
        planned(*argv)


def row(model_dir, value, given=None, failed=""):
    curve = [{"step": 1, "minutes": value, "eval/sample_error_db": 2 * value}]
    about = {"model_dir": model_dir, "step": 1, "parameters": 5, "given": given or {}, "sampler": {}, "training": curve}
    cells = {} if failed else {"log_mel": {"value": value, "clips": 2}, "stft": {"missing": "failed: silent"}}
    drift = {} if failed else {"log_mel": [{"value": value, "clips": 2}]}
    return {"name": model_dir, "kind": "model", "mode": "whole", "failed": failed, "folder": "f"} | {
        "cells": cells,
        "drift": drift,
        "about": about,
    }


def test_seeds_are_merged_to_mean_and_deviation():
    runs = planned("--steps=1", "a: diffusion.gin", "b: autoregressive.gin")
    a0, b0, a1, _ = (str(run.model_dir) for run in runs)
    mean = row("x", 9.0) | {"kind": "baseline", "name": "mean spectrum", "mode": "", "about": {}}
    rows = [mean, row(a0, 1.0), row(a1, 3.0), row(a0, 5.0, {"num_steps": 2}), row(a1, 5.0, {"num_steps": 2})]
    rows += [row(b0, 2.0, failed="not finite")]
    columns = [{"key": "log_mel", "title": "error", "higher_is_better": False, "digits": 2, "essential": True}]
    columns += [columns[0] | {"key": "stft", "title": "STFT"}]
    scores = {"rows": rows, "columns": columns, "num_clips": 2, "seconds": 7.0, "reference": "r", "task": "t"}
    merged = sweep.merge(scores | {"split": "test"}, runs, {runs[3]: "no room"})
    names = [(row["name"], row["failed"]) for row in merged["rows"]]
    assert names == [
        ("mean spectrum", ""),
        ("a", ""),
        ("a, num_steps 2", ""),
        ("b", f"{b0}: not finite"),
        ("b, seed 1", "no room"),
    ]
    cell = merged["rows"][1]["cells"]["log_mel"]
    assert (cell["value"], cell["low"], cell["high"]) == (2.0, 1.0, 3.0)
    assert cell["spread"] == pytest.approx(2**0.5)
    assert merged["rows"][1]["about"]["training"] == [{"step": 1, "minutes": 2.0, "eval/sample_error_db": 4.0}]
    table = report.to_markdown(merged)
    assert "| a, whole | **2.00 ± 1.41** |" in table and "Not taken: STFT (failed: silent)." in table
    assert "| b, seed 1 | failed: no room |" in table


@pytest.mark.parametrize("order", [1, -1])
def test_a_model_of_which_one_seed_cannot_be_scored_says_so(order):
    rows = [row("a0", 1.0), row("a1", 0.0, failed="not finite")][::order]
    merged = sweep.merged("a", "model", "whole", rows, own=False)
    assert merged["failed"] == "a1: not finite" and merged["drift"] == {"log_mel": []}
    assert not any("value" in cell for cell in merged["cells"].values())


def test_a_training_that_was_broken_off_is_not_gone_on_with_by_other_arguments(tmp_path, monkeypatch):
    said = ["error: no room\n", "Traceback\n", "", ""]

    def broken_off(command, log):
        log.seek(0)
        log.truncate()
        log.write(said.pop(0))
        return 3

    monkeypatch.setattr(sweep, "call", broken_off)
    run = sweep.Run("a", 0, tmp_path / "a", ("--gin.X=1",))
    other = sweep.Run("a", 0, run.model_dir, ("--gin.X=2",))
    log = run.model_dir / "train.log"
    assert sweep.train(run) == f"no room (see {log})"
    assert sweep.train(other) == sweep.train(run) == f"ended with status 3 (see {log})"  # nothing was saved yet
    (run.model_dir / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(UserError, match=r"trained otherwise \(--gin.X=1 --gin.X=2\)"):
        sweep.train(other)
    assert sweep.train(run) == f"ended with status 3 (see {log})"


@pytest.mark.slow  # trains twice and scores, in processes of their own
def test_a_sweep_goes_on_where_it_stopped(tmp_path, capfd, quick_compilation, monkeypatch):
    monkeypatch.setattr(sweep.signal, "signal", lambda *_: None)  # pytest keeps its own handler
    prepared = tiny_runs.prepare(tmp_path / "prepared", audio=True)
    argv = [f"--out={tmp_path / 'out'}", f"--task={prepared}", "--steps=2", "--seeds=0,1", "--sampler=num_steps=1"]
    argv += ["--evaluate=--gin.MAX_SECONDS=3", "tiny: diffusion.gin smoke.gin nocontext.gin"]
    sweep.main([*argv, "--train_only"])
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("trained.json")}
    assert len(trained) == 2
    sweep.main(argv)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    rows = {(row["name"], row["mode"]): row for row in scores["rows"]}
    assert {name for name, mode in rows if mode == "whole pieces"} == {"tiny, num_steps 1", "tiny, temperature 0"}
    assert len([row for row in scores["rows"] if row["name"].endswith("plus Gaussian noise")]) == 1  # seeds are merged
    whole = rows["tiny, num_steps 1", "whole pieces"]
    assert whole["cells"]["log_mel"]["spread"] > 0
    assert len(whole["about"]["model_dirs"]) == 2 and whole["about"]["training"][-1]["step"] == 2
    assert (tmp_path / "out" / "table.md").read_text() in capfd.readouterr().out
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000
    with pytest.raises(UserError, match=r"trained otherwise \(--gin.TRAIN_STEPS=2 --gin.TRAIN_STEPS=3\)"):
        sweep.main([word.replace("--steps=2", "--steps=3") for word in argv])
