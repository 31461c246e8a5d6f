"""The evaluate command: table, scores, report and what they say; samplers and inverters held against a reference."""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import soundfile

from music_synth import evaluate as entry
from music_synth import runs
from music_synth.errors import UserError
from music_synth.evaluation import measures, scoring
from music_synth.evaluation.measures import Cell
from music_synth.midi.tokenizer import Tokenizer
from music_synth.models.base import SpectrogramModel
from tests import tiny_runs

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = [
    "mean spectrum of the training set",
    "mean spectrum of each piece",
    "Autoregressive",  # its mean plus Gaussian noise
    "Diffusion",
    *["Autoregressive"] * 4,  # as it is, and its mean; of whole pieces, and of single segments
    *["Diffusion"] * 4,
    "ground truth audio",
    "ground truth",
]


def flags_of(folder):
    return [
        "--gin_file=evaluate.gin",
        f"--gin.TASK={folder / 'prepared'}",
        f"--gin.OUTPUT_DIR={folder / 'scores'}",
        "--gin.MAX_SECONDS=7",  # 300 frames and the first 50 of the next piece
        "--gin.evaluate.batch_size=2",
        "--inverter=griffin_lim",  # compiles nothing
        f"--checkpoints={folder / 'autoregressive'},{folder / 'diffusion'}",
        "--sampler=num_steps=2,name=ddpm",
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(folder, printed text): both kinds of run scored on the test split of a prepared folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    prepared = tiny_runs.prepare(folder / "prepared", audio=True)
    for kind in ("autoregressive", "diffusion"):
        tiny_runs.start(folder / kind, f"{kind}.gin", prepared)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        entry.main(flags_of(folder))
    return folder, "\n".join(printed)


def read_scores(folder):
    return json.loads((folder / "scores" / "scores.json").read_text())


def test_table_and_scores_agree(evaluated):
    folder, printed = evaluated
    table, scores = (folder / "scores" / "table.md").read_text(), read_scores(folder)
    assert table in printed
    assert "2 clips, 7 s" in table and "split test" in table
    assert (scores["num_clips"], scores["seconds"], scores["split"]) == (2, 7.0, "test")
    lines = table.splitlines()[4 : 4 + len(ROWS)]
    for name, row, line in zip(ROWS, scores["rows"], lines, strict=True):
        assert row["name"].startswith(name)
        assert line.startswith(f"| {row['name']}")
        assert f"{row['cells']['log_mel']['value']:.2f}" in line
    assert all(f"{folder}/{kind}, step 0" in table for kind in ("autoregressive", "diffusion"))
    given = [row["about"]["given"] for row in scores["rows"][4:12:2]]
    assert given == [{}, {"temperature": 0}, {"num_steps": 2, "name": "ddpm"}, {"temperature": 0}]
    assert "vggish" not in lines[0] and "(needs --vggish PATH)" in table.splitlines()[-1]


def test_scores_are_those_of_the_data(evaluated):
    folder, _ = evaluated
    mean, own_mean, _, _, *models, recording, inverted = read_scores(folder)["rows"]
    # The target is independent noise of deviation 2 around -4, so the mean's error is 2 sqrt(2 / pi) nepers.
    error = mean["cells"]["log_mel"]["value"]
    assert error == pytest.approx(20 / np.log(10) * 2 * np.sqrt(2 / np.pi), rel=0.02)
    assert own_mean["cells"]["log_mel"]["value"] < error
    for row in (*models, recording):  # never trained; and the audio is not that of the mel
        assert row["cells"]["log_mel"]["value"] > error
        assert np.isfinite(row["cells"]["stft"]["value"]) and row["cells"]["stft"]["clips"] == 2
    assert recording["cells"]["stft"]["value"] == recording["cells"]["log_mel_distance"]["value"] == 0
    assert recording["cells"]["basic_pitch_frechet"]["value"] == pytest.approx(0, abs=1e-9)
    assert inverted["cells"]["stft"]["value"] > 0
    assert all(row["cells"]["cost"]["value"] > 0 for row in models)
    assert {row["mode"] for row in models} == {"whole pieces", "single segments with true context"}


def test_the_report_holds_everything_and_asks_for_nothing(evaluated):
    """Rows, plots, and both pieces as every system plays them; no address but data in the page, and the studio's."""
    folder, printed = evaluated
    page = (folder / "scores" / "report.html").read_text()
    assert str(folder / "scores" / "report.html") in printed
    assert "viewport" in page and page.count("<tr") == 1 + len(ROWS)
    sources = re.findall(r'(?:src|href)="(.{20})', page)
    assert len(sources) > 10 and all(source.startswith(("data:", "http://127.0.0.1:")) for source in sources)
    assert 'src="http' not in page  # the studio is a link, nothing that the page loads
    sounds = re.findall(r'src="data:audio/flac;base64,([^"]+)"', page)
    assert len(sounds) == 2 * (1 + 4 + 1)  # target, two models and their means, inverter
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])))
    assert (len(audio), rate) == (300 * 320, 16000)
    assert page.count("<svg") == 2 and page.count("<rect") > 5


def test_it_goes_on_where_it_was_broken_off(evaluated):
    folder, _ = evaluated
    before = read_scores(folder)
    clips = folder / "scores" / "clips"
    kept = {path: path.stat().st_mtime_ns for path in clips.rglob("*.npz")}
    lost = next(path for path in kept if path.parent.name.startswith("recording"))
    lost.unlink()
    entry.main(flags_of(folder))
    assert {path for path, time in kept.items() if path.stat().st_mtime_ns != time} == {lost}
    assert [row["cells"] for row in read_scores(folder)["rows"]] == [row["cells"] for row in before["rows"]]


def test_samplers_must_be_those_of_a_decoder(evaluated):
    folder, _ = evaluated
    for wrong, said in (("num_steps", "NAME=VALUE"), ("steps=3", "no setting 'steps'"), ("num_steps=0", "at least 1")):
        with pytest.raises(UserError, match=said):
            entry.main([*flags_of(folder), f"--sampler={wrong}"])
    runs = [str(folder / kind) for kind in ("autoregressive", "diffusion")]
    for order in (runs, runs[::-1]):  # the reason of each, whichever comes last
        with pytest.raises(UserError, match="at least 1") as told:
            scoring.plan(order, ["num_steps=0"])
        assert all(f"{run}: " in str(told.value) for run in runs)


def test_samplers_and_inverters_are_held_against_a_reference(evaluated, tmp_path, capsys):
    """Beside what was scored before, whose clips are taken as they are."""
    folder, _ = evaluated
    (tmp_path / "clips").symlink_to(folder / "scores" / "clips")
    argv = [f"--checkpoints={folder / 'diffusion'}", "--reference=num_steps=2,name=ddpm", "--sampler=num_steps=1"]
    argv += [f"--gin.OUTPUT_DIR={tmp_path}", "--inverter=shipped", "--transcriber=none"]
    entry.main([*flags_of(folder)[:-2], *argv])
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    models = [(row["mode"][:6], row["about"]["given"], row.get("no_worse")) for row in rows if row["kind"] == "model"]
    ddpm, one_step, mean = {"num_steps": 2, "name": "ddpm"}, {"num_steps": 1}, {"temperature": 0}
    assert [model[:2] for model in models] == [
        (mode, given) for given in (ddpm, one_step, mean) for mode in ("whole ", "single", "whole ")
    ]
    assert [model[2] is None for model in models] == [True, True, *[False] * 7]
    assert [row.get("no_worse") is None for row in rows if row["kind"] == "ceiling"] == [True, True, False]
    table = capsys.readouterr().out
    assert "| no worse than the reference |" in table and "cheapest that is no worse than the reference: " in table
    whole = next(line for line in table.splitlines() if "name ddpm), whole pieces" in line)
    assert whole.endswith("| reference |")
    assert "note F1, onset" in table.split("Not taken:")[1]


def test_inverters_are_scored_without_a_decoder(evaluated, tmp_path):
    folder, _ = evaluated
    argv = [*flags_of(folder)[:-2], "--checkpoints=", "--gin.CLIP_SECONDS=2", f"--gin.OUTPUT_DIR={tmp_path}"]
    entry.main([*argv, "--transcriber=none"])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [row["kind"] for row in scores["rows"]] == ["baseline", "baseline", "ceiling", "ceiling"]
    assert scores["seconds"] == 4.0 and scores["rows"][3]["cells"]["cost"]["value"] > 0


def test_no_worse_is_better_or_inside_the_interval_in_all():
    columns = measures.columns(["log_mel"])
    reference = {"log_mel": Cell(5, 4, 6), "log_mel_frechet": Cell(30, 28, 40), "onset_f1": Cell(0.6, 0.5, 0.7)}
    reference |= {"calibration": Cell(0.5, 0.4, 0.6), "cost": Cell(1.0), "stft": Cell(1.0)}
    good = {"log_mel": Cell(5.9), "log_mel_frechet": Cell(10), "onset_f1": Cell(0.51), "stft": Cell(0.9)}
    good |= {"calibration": Cell(9.0), "cost": Cell(9.0), "onset_offset_f1": Cell(0.0)}  # which say nothing of it

    def is_no_worse(cells):
        return scoring.is_no_worse(*map(measures.as_json, (cells, reference)), columns)

    assert is_no_worse(good)
    for key, value in {"log_mel": 6.1, "log_mel_frechet": 41, "onset_f1": 0.49, "stft": 1.01}.items():
        assert not is_no_worse(good | {key: Cell(value)})


@dataclasses.dataclass(frozen=True)
class Hot(SpectrogramModel):
    """A decoder that has a temperature."""

    temperature: float = 1.0

    def with_sampling(self, **settings):
        if set(settings) - {"temperature"}:
            raise UserError("no setting")
        return dataclasses.replace(self, **settings)


def test_a_decoder_that_has_a_mean_is_scored_at_it_too(monkeypatch):
    monkeypatch.setattr(scoring, "load_run", lambda path: runs.Run(Hot(), Tokenizer(), {}, 0))

    def given(*args):
        return [dict(opener.sampling) for opener in scoring.plan(["a"], *args)]

    assert given([""]) == [{}, {"temperature": 0}]
    assert given(["temperature=0", ""]) == [{"temperature": 0}, {}]
    assert given(["temperature=0.7"], "temperature=1") == [{"temperature": 1}, {"temperature": 0.7}, {"temperature": 0}]


def test_transcribers_that_are_none_are_refused(tmp_path, monkeypatch):
    (tmp_path / "broken_ears.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    for wrong, said in (
        ("basic-pitch", "not MODULE:NAME"),
        ("no_such_ears:hear", "no_such_ears"),
        ("math:pi", "cannot be called"),
        ("broken_ears:hear", "division by zero"),
    ):
        with pytest.raises(UserError, match=said):
            scoring.load_transcriber(wrong)


@pytest.mark.slow  # starts two processes, each of which imports JAX and loads what it works with: 60 s
def test_beam_in_two_processes_gives_the_same_scores(evaluated, tmp_path):
    folder, _ = evaluated
    pytest.importorskip("apache_beam")
    beam = ["--beam_runner=DirectRunner", "--beam_options=direct_num_workers=2,direct_running_mode=multi_processing"]
    entry.main([*flags_of(folder), *beam, f"--gin.OUTPUT_DIR={tmp_path}"])
    made = json.loads((tmp_path / "scores.json").read_text())
    before = {(row["name"], row["mode"]): row["cells"] for row in read_scores(folder)["rows"]}
    for row in made["rows"]:
        for key, cell in row["cells"].items():
            if key != "cost" and "value" in cell:
                assert cell["value"] == pytest.approx(
                    before[row["name"], row["mode"]][key]["value"], rel=1e-4, abs=1e-6
                )
