"""The evaluate command: table, scores, example and what they say."""

import json

import numpy as np
import pytest
import soundfile

from music_synth import evaluate as entry
from tests import tiny_runs

ROWS = ["mean spectrum", "Autoregressive", "Diffusion", "target through the shipped inverter", "target itself"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(folder, printed text): both kinds of run scored on the test split of a prepared folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    prepared = tiny_runs.prepare(folder / "prepared")
    runs = [tiny_runs.start(folder / kind, f"{kind}.gin", prepared) for kind in ("autoregressive", "diffusion")]
    flags = [
        "--gin_file=evaluate.gin",
        f"--gin.TASK={prepared}",
        f"--gin.OUTPUT_DIR={folder / 'scores'}",
        "--gin.MAX_SECONDS=7",  # 300 frames and the first 50 of the next piece
        "--gin.evaluate.batch_size=2",
        "--checkpoints=" + ",".join(map(str, runs)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words: printed.append(" ".join(map(str, words))))
        entry.main(flags)
    return folder, "\n".join(printed)


def test_table_and_scores_agree(evaluated):
    folder, printed = evaluated
    table = (folder / "scores" / "table.md").read_text()
    scores = json.loads((folder / "scores" / "scores.json").read_text())
    assert table in printed
    assert "2 pieces, 7 s" in table and "split test" in table
    assert (scores["num_pieces"], scores["seconds"], scores["split"]) == (2, 7.0, "test")
    lines = table.splitlines()[-len(ROWS) :]
    for name, row, line in zip(ROWS, scores["rows"], lines, strict=True):
        assert row["name"].startswith(name)
        assert line.startswith(f"| {row['name']} | {row['whole_pieces']:.2f} |")
    assert all(f"{folder}/{kind}, step 0" in table for kind in ("autoregressive", "diffusion"))


def test_scores_are_those_of_the_data(evaluated):
    folder, _ = evaluated
    scores = json.loads((folder / "scores" / "scores.json").read_text())
    mean, autoregressive, diffusion, vocoded, itself = scores["rows"]
    # The target is independent noise of deviation 2 around -4, so the mean's error is 2 sqrt(2 / pi) nepers.
    assert mean["whole_pieces"] == pytest.approx(20 / np.log(10) * 2 * np.sqrt(2 / np.pi), rel=0.02)
    assert itself["whole_pieces"] == 0
    assert vocoded["whole_pieces"] > 1
    for row in (autoregressive, diffusion):
        assert row["whole_pieces"] > mean["whole_pieces"]  # never trained
        assert np.isfinite(row["single_segments"])


def test_an_example_of_each_decoder_is_drawn_and_sounds(evaluated):
    folder, printed = evaluated
    pictures, sounds = (sorted((folder / "scores").glob(f"*.{suffix}")) for suffix in ("png", "wav"))
    assert len(pictures) == len(sounds) == 2
    for picture, sound in zip(pictures, sounds, strict=True):
        assert str(picture) in printed
        assert len(soundfile.read(sound)[0]) == 300 * 320
