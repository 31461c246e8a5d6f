"""From a folder of recordings to an instrument: every step, again, and broken off."""

import json
import shutil

import jax
import numpy as np
import pytest
import soundfile

from music_synth import adopt, runs
from music_synth.data.prepared import read_manifest
from music_synth.errors import UserError
from music_synth.midi.notes import midi_bytes
from music_synth.training import loop
from tests import tiny_runs
from tests.data.datasets.test_pairs import played, tune

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six recordings, one of them late and one with notes that a program wrote; a run to start from; a rehearsal."""
    folder = tmp_path_factory.mktemp("adopt")
    (folder / "my takes").mkdir()
    for number in range(6):
        audio = played(tune(number, 7), 7, late=0.3 * (number == 2))
        soundfile.write(folder / "my takes" / f"take {number}.flac", audio, 16000)
        name = f"take {number}{'.transcribed' * (number == 3)}.mid"
        (folder / "my takes" / name).write_bytes(midi_bytes(tune(number, 7)))
    tiny_runs.prepare(folder / "rehearsal", audio=True)
    tiny_runs.start(folder / "start", "diffusion.gin", folder / "rehearsal")
    return folder


def arguments(place, out, *more):
    knobs = {"REHEARSAL": place / "rehearsal", "TRAIN_STEPS": 4, "BATCH_SIZE": 2}
    fast = {"train.eval_every": 2, "train.checkpoint_every": 2, "train.token_buckets": "(2048,)"}
    gin = [f"--gin.{name}={value}" for name, value in (knobs | fast).items()]
    return [str(place / "my takes"), f"--out={out}", f"--checkpoint={place / 'start'}", "--workers=1", *gin, *more]


@pytest.mark.slow
def test_every_step_once_and_what_is_there_is_kept(place, tmp_path, monkeypatch, capsys):
    out = tmp_path / "mine"
    save = loop.Checkpointer.save

    def killed(self, state, data_position):
        save(self, state, data_position)
        if data_position == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Checkpointer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        adopt.main(arguments(place, out))
    monkeypatch.undo()
    told = capsys.readouterr().out
    assert "6 pairs, 0.7 minutes" in told and "s late, mended" in told and "--- tuning" in told
    assert (out / "check" / "table.txt").read_text() in told and len(list((out / "check").glob("*.png"))) == 3
    data = read_manifest(out / "data")
    assert sum(map(len, data.values())) == 6 and not list(out.glob(".*"))
    adopt.main(arguments(place, out))
    told = capsys.readouterr().out
    assert "is not read" in told and "going on from step 2" in told
    assert "log-mel error, dB: " in told and "s that it did not learn from" in told
    scores = json.loads((out / "evaluation" / "scores.json").read_text())
    models = [row["name"] for row in scores["rows"] if row["kind"] == "model"]
    assert any(str(place / "start") in name for name in models) and any("best" in name for name in models)
    assert (out / "evaluation" / "report.html").exists()
    made, best = runs.load(out / "instrument"), runs.load(out / "run" / "best")
    assert made.step == best.step and made.model == best.model
    jax.tree.map(np.testing.assert_array_equal, made.params, best.params)
    card = (out / "instrument" / "README.md").read_text()
    assert "the notes of 1 of 6 pieces are transcribed by a program" in card
    assert "| rehearsed | noise 1, as prepared arrays, 25% of the examples |" in card


@pytest.mark.slow
@pytest.mark.parametrize("heard, temperature", [([0.5, 0.1, 0.2, 0.6], 0.3), ([0.5, 0.495], 1.0)])
def test_the_temperature_falls_until_as_many_notes_are_heard(place, tmp_path, monkeypatch, heard, temperature):
    """What is heard stands here in place of basic-pitch's scores, which say nothing of a tiny decoder."""
    shutil.copytree(place / "start", tmp_path / "best")
    left = list(heard)  # two seconds are one piece
    monkeypatch.setattr(adopt, "note_scores", lambda reference, estimate: {"onset_f1": left.pop(0)})
    adopt.settle(place / "start", tmp_path / "best", place / "rehearsal", 2.0)
    assert not left and runs.load(tmp_path / "best").model.sampler.temperature == temperature


@pytest.mark.parametrize(
    "more, message",
    [
        (["--checkpoint=nothing"], "no folder nothing|has no config.gin"),
        (["--minutes=0"], "--minutes 0.0: must be positive"),
        (["--minutes=inf"], "--minutes inf: must be positive and finite"),
        (["--workers=-5"], "--workers -5"),
        (["--program=200"], "--program"),
        (["--gin_file=diffusion.gin"], "adopt follows finetune.gin"),
        (["--out=/proc/no/folder"], "cannot write /proc/no/folder"),
        (["--max_offset=-1"], "--max_offset"),
    ],
)
def test_user_errors(place, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        adopt.main(arguments(place, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_too_few_for_a_held_out_split(place, tmp_path):
    (tmp_path / "source" / "train").mkdir(parents=True)
    for suffix in (".flac", ".mid"):
        (tmp_path / "source" / "train" / f"a{suffix}").write_bytes(
            (place / "my takes" / f"take 1{suffix}").read_bytes()
        )
    argv = arguments(place, tmp_path / "out")
    with pytest.raises(UserError, match="pairs has no recordings for validation"):
        adopt.main([str(tmp_path / "source"), *argv[1:]])
