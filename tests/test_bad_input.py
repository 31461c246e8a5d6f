"""Malformed input through the command lines: each one clear line, exit status 1, and the bad thing named.

Every case is a command line as a user types it, with {w} standing for a folder of broken things, and what the line
must contain. Most run in this process, through the same `errors.run` as the commands; a few as real processes.
"""

import importlib
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from music_synth import config, errors
from music_synth.interop.model_card import FORMAT, WEIGHTS
from music_synth.midi.notes import Note, write_midi
from tests import tiny_runs

HEADER = b"MThd\0\0\0\6\0\0\0\1\1\xe0"  # one track, 480 ticks a beat


def track(events: bytes) -> bytes:
    return b"MTrk" + len(events).to_bytes(4, "big") + events


NOTE = b"\0\x90\x3c\x40\x60\x80\x3c\x40"
END = b"\0\xff\x2f\0"
MIDI_FILES = {
    "empty.mid": b"",
    "text.mid": b"These are my notes: C D E.\n",
    "wave.mid": b"RIFF\x24\0\0\0WAVEfmt ",
    "zeros.mid": bytes(1000),
    "half_header.mid": HEADER[:9],
    "no_tracks.mid": b"MThd\0\0\0\6\0\1\0\0\1\xe0",
    "no_division.mid": b"MThd\0\0\0\6\0\0\0\1\0\0" + track(NOTE + END),
    "header_only.mid": HEADER,
    "cut_off.mid": HEADER + track(NOTE + END)[:-6],
    "no_notes.mid": HEADER + track(b"\0\xc0\x05" + END),
    "no_status.mid": HEADER + track(b"\0\x3c\x40" + END),
    "endless_delta.mid": HEADER + track(b"\xff\xff\xff\xff\xff\x90\x3c\x40" + END),
    "smpte_zero.mid": b"MThd\0\0\0\6\0\0\0\1\xe2\0" + track(NOTE + END),
}

GIN_FILES = {
    "syntax.gin": "include 'diffusion.gin'\nTRAIN_STEPS = = 3\n",
    "open_bracket.gin": "include 'diffusion.gin'\nevaluate.checkpoints = ['a'\n",
    "name.gin": "include 'diffusion.gin'\nDifusion.loss_norm = 'l1'\n",
    "parameter.gin": "include 'diffusion.gin'\nDiffusion.los_norm = 'l1'\n",
    "reference.gin": "include 'diffusion.gin'\nOPTIMIZER = @adam()\n",
    "macro.gin": "include 'diffusion.gin'\ntrain.num_steps = %TRAINING_STEPS\n",
    "include.gin": "include 'difusion.gin'\n",
    "itself.gin": "include 'itself.gin'\n",
    "import.gin": "import os\n",
    "nothing.gin": "",
    "scores.gin": "include 'evaluate.gin'\n",
}

TRAIN = "train --gin_file=diffusion.gin --gin_file=smoke.gin --gin.MODEL_DIR={w}/new --gin.TASK={w}/prepared"
PLAY = "synthesize {w}/in.mid --checkpoint={w}/run --out={w}/out.wav"
SCORE = "evaluate --gin.TASK={w}/prepared --gin.OUTPUT_DIR={w}/scores"

CASES = [
    # MIDI files
    ("synthesize {w}/missing.mid --checkpoint={w}/run --out={w}/out.wav", "missing.mid"),
    ("synthesize {w} --checkpoint={w}/run --out={w}/out.wav", "folder"),
    *[(f"synthesize {{w}}/{name} --checkpoint={{w}}/run --out={{w}}/out.wav", name) for name in MIDI_FILES],
    # checkpoints
    ("synthesize {w}/in.mid --checkpoint={w}/nowhere --out={w}/out.wav", "no folder", "nowhere"),
    ("synthesize {w}/in.mid --checkpoint={w}/in.mid --out={w}/out.wav", "in.mid"),
    ("synthesize {w}/in.mid --checkpoint={w}/empty_folder --out={w}/out.wav", "config.gin", "empty_folder"),
    ("synthesize {w}/in.mid --checkpoint={w}/no_checkpoint --out={w}/out.wav", "no checkpoint", "no_checkpoint"),
    ("synthesize {w}/in.mid --checkpoint={w}/broken_config --out={w}/out.wav", "config.gin", "broken_config"),
    ("synthesize {w}/in.mid --checkpoint={w}/binary_config --out={w}/out.wav", "config.gin", "binary_config"),
    ("synthesize {w}/in.mid --checkpoint={w}/empty_config --out={w}/out.wav", "config.gin", "train.model"),
    ("synthesize {w}/in.mid --checkpoint={w}/other_shapes --out={w}/out.wav", "shape", "other_shapes"),
    ("synthesize {w}/in.mid --checkpoint={w}/damaged --out={w}/out.wav", "no readable checkpoint", "damaged"),
    (PLAY + " --step=7", "step 7"),
    (PLAY + " --step=-1", "step -1"),
    # conversions
    ("convert {w}/nowhere {w}/new", "no folder", "nowhere"),
    ("convert {w}/empty_folder {w}/new", "empty_folder", "not recognized"),
    ("convert {w}/in.mid {w}/new", "in.mid", "not recognized"),
    ("convert {w}/run {w}/empty_config", "empty_config", "there already"),
    ("convert {w}/damaged {w}/new", "no readable checkpoint", "damaged"),
    ("convert {w}/run {w}/new --to=torch", "'torch'", "t5x"),
    ("convert {w}/run", "target"),
    # flags of synthesize
    (PLAY + " --steps=0", "num_steps = 0"),
    (PLAY + " --steps=many", "'many'"),
    (PLAY + " --steps=2.5", "'2.5'"),
    (PLAY + " --sampler=leapfrog", "'leapfrog'", "ddim"),
    (PLAY + " --guidance=-1", "-1"),
    (PLAY + " --guidance=nan", "nan"),
    (PLAY + " --guidance=loud", "'loud'"),
    (PLAY + " --seed=-1", "--seed -1"),
    (PLAY + " --seed=1e3", "'1e3'"),
    (PLAY + " --inverter={w}/no_inverter", "no_inverter"),
    (PLAY + " --sampl=ddim", "--sampl=ddim"),
    (PLAY + " --temperature=-1", "--temperature -1"),
    (PLAY + " --temperature=nan", "--temperature nan"),
    (PLAY + " another.mid", "another.mid"),
    (PLAY + " --batch_size=0", "--batch_size 0"),
    ("synthesize {w}/in.mid {w}/in.mid --checkpoint={w}/run --out={w}/all", "both", "in.wav"),
    ("synthesize {w}/in.mid {w}/in.mid --checkpoint={w}/run --out=-", "--out -", "one piece"),
    ("synthesize {w}/in.mid {w}/in.mid --checkpoint={w}/run --out={w}/in.mid/all", "in.mid/all"),
    ("synthesize {w}/prepared --checkpoint={w}/run --out={w}/all", "no MIDI file", "prepared"),
    ("synthesize {w}/in.mid --checkpoint={w}/autoregressive --out={w}/out.wav --steps=20", "num_steps"),
    ("synthesize", "midi"),
    ("synthesize {w}/in.mid --checkpoint={w}/run --out={w}/out.mp3", "out.mp3", ".wav"),
    ("synthesize {w}/in.mid --checkpoint={w}/run --out={w}/out", "/out"),
    ("synthesize {w}/in.mid --checkpoint={w}/run --out={w}/no/out.wav", "/no"),
    ("synthesize {w}/in.mid --checkpoint={w}/run --out={w}/folder.wav", "folder.wav"),
    ("synthesize {w}/in.mid --checkpoint={w}/run --out=/proc/out.wav", "/proc"),
    (PLAY + " --plot={w}/out.gif", "out.gif", ".png"),
    (PLAY + " --plot={w}/no/out.png", "/no"),
    ("synthesize {w}/in.mid --checkpoint={w}/run --out={w}/dangling.wav", "/nowhere"),
    ("synthesize {w}/in.mid --checkpoint={w}/nested_tensors --out={w}/out.wav", "nested_tensors", "inside another"),
    ("synthesize {w}/in.mid --checkpoint={w}/long_step --out={w}/out.wav", "long_step", "step '9999"),
    # configurations
    ("train", "--gin_file"),
    ("train --gin_file", "--gin_file"),
    ("train --gin_file=difusion.gin", "difusion.gin", "diffusion.gin"),
    ("train --gin_file={w}", "'{w}'"),
    ("train --gin_file={w}/in.mid", "in.mid"),
    ("train --gin_file={w}/syntax.gin", "syntax.gin, line 2"),
    ("train --gin_file={w}/open_bracket.gin", "open_bracket.gin"),
    ("train --gin_file={w}/name.gin", "Difusion", "Diffusion"),
    ("train --gin_file={w}/parameter.gin", "los_norm", "loss_norm"),
    ("train --gin_file={w}/reference.gin", "adam", "adamw"),
    ("train --gin_file={w}/macro.gin", "TRAINING_STEPS"),
    ("train --gin_file={w}/include.gin", "difusion.gin"),
    ("train --gin_file={w}/itself.gin", "itself.gin", "includes itself"),
    ("train --gin_file={w}/import.gin", "import.gin"),
    ("train --gin_file={w}/nothing.gin", "model"),
    (TRAIN + " --gin.TRAIN_STEP=3", "TRAIN_STEP", "TRAIN_STEPS"),
    (TRAIN + " --gin.TRAIN_STEPS", "TRAIN_STEPS"),
    (TRAIN + " --gin.TRAIN_STEPS=many", "'many'"),
    (TRAIN + " --gin.TRAIN_STEPS=-5", "-5"),
    (TRAIN + " --gin.BATCH_SIZE=0", "0"),
    (TRAIN + " --gin.Diffusion.loss_norm=l3", "'l3'", "l1"),
    (TRAIN + " --gin.Diffusion.condition_dropout=1.5", "1.5"),
    (TRAIN + " --gin.NetworkConfig.num_heads=0", "num_heads = 0"),
    (TRAIN + " --gin.NetworkConfig.dtype=float16", "'float16'"),
    (TRAIN + " --gin.NetworkConfig.model_dim=wide", "model_dim", "'wide'"),
    (TRAIN + " --gin.Tokenizer.granularity=fine", "'fine'"),
    (TRAIN + " --gin.adafactor.decay_rate=0.5", "adafactor.decay_rate"),
    (TRAIN + " --gin.LEARNING_RATE=-1.0", "-1.0"),
    (TRAIN + " --gin.LEARNING_RATE=1e400", "inf"),
    (TRAIN + " --gin.Feed.seed=-1", "seed = -1"),
    (TRAIN + " --gin.NetworkConfig.num_mels=64", "num_mels = 64"),
    (TRAIN + " --gin.train.model_dir=''", "model_dir"),
    (TRAIN + " --gin.TASK=synthetic:400min --gin.TRAIN_STEPS=-1", "-1"),  # before minutes of making data
    (TRAIN + " --gin.train.keep_checkpoints=0", "keep"),
    (TRAIN + " --gin.train.model_parallelism=3", "model_parallelism = 3"),
    (TRAIN + " --gin_dir=configs", "--gin_dir=configs"),
    (TRAIN + " --coordinator=localhost:1", "--num_processes"),
    (TRAIN + " --num_processes=two", "'two'"),
    (TRAIN + " --gin.MODEL_DIR={w}/in.mid", "in.mid"),
    (TRAIN + " --gin.MODEL_DIR={w}/run --gin.NetworkConfig.mlp_dim=32", "/run", "mlp", "another configuration"),
    # data folders
    (TRAIN + " --gin.TASK={w}/nowhere", "nowhere", "prepare_data"),
    (TRAIN + " --gin.TASK={w}/empty_folder", "empty_folder", "manifest.json"),
    (TRAIN + " --gin.TASK={w}/not_json", "not_json", "damaged"),
    (TRAIN + " --gin.TASK={w}/other_version", "version 99"),
    (TRAIN + " --gin.TASK={w}/missing_array", "missing"),
    (TRAIN + " --gin.TASK={w}/short_array", "bytes"),
    (TRAIN + " --gin.TASK={w}/no_train", "no_train", "train"),
    # evaluation
    (SCORE, "runs/autoregressive"),
    (SCORE + " --checkpoints={w}/nowhere", "no folder", "nowhere"),
    (SCORE + " --checkpoints={w}/run,{w}/damaged", "no readable checkpoint", "damaged"),
    (SCORE + " --checkpoints=,", "no checkpoints"),
    (SCORE + " --gin.CHECKPOINTS=nowhere", "evaluate.checkpoints", "'nowhere'"),
    (SCORE + " --checkpoints={w}/run --gin.SPLIT=exam", "'exam'", "test"),
    (SCORE + " --checkpoints={w}/run --gin.MAX_SECONDS=-1", "-1"),
    (SCORE + " --checkpoints={w}/run --gin.MAX_SECONDS=long", "'long'"),
    (SCORE + " --checkpoints={w}/run --gin.evaluate.batch_size=0", "batch_size = 0"),
    (SCORE + " --checkpoints={w}/run --gin.OUTPUT_DIR={w}/in.mid", "in.mid"),
    (SCORE + " --checkpoints={w}/run --gin.TASK={w}/nowhere", "nowhere"),
    (SCORE + " --checkpoints={w}/run --inverter={w}/no_inverter", "no_inverter"),
    (SCORE + " --checkpoints={w}/run --gin.evaluate.metric=fad", "metric"),
    (SCORE + " --checkpoint={w}/run", "--checkpoint="),
    (SCORE + " --checkpoints={w}/run --sampler=temperature=nan", "temperature = 'nan'", "float"),
    # convert
    ("convert {w}/run {w}/run.onnx --to=onnx --max_tokens=1", "--max_tokens 1"),
    # prepare_data
    ("prepare_data", "task"),
    ("prepare_data synthetic", "--out"),
    ("prepare_data synthetic --out={w}/in.mid", "in.mid"),
    ("prepare_data synthetic --out={w}/run", "/run", "not empty"),
    ("prepare_data synthetic --out=/proc/prepared", "/proc"),
    ("prepare_data synthetic --out={w}/in.mid/prepared", "in.mid"),
    ("prepare_data synthetic --out={w}/prepared2 --split=exam", "exam"),
]

AS_PROCESSES = [
    ("synthesize {w}/text.mid --checkpoint={w}/run --out={w}/out.wav", "text.mid"),
    ("train --gin_file=difusion.gin", "diffusion.gin"),
    ("evaluate --checkpoints={w}/nowhere", "nowhere"),
    ("prepare_data synthetic --out={w}/run", "not empty"),
]

WITH_TENSORFLOW = [
    (TRAIN + " --gin.TASK=sinthetic", "'sinthetic'", "synthetic"),
    ("prepare_data sinthetic --out={w}/prepared2", "'sinthetic'", "synthetic"),
    ("prepare_data synthetic:long --out={w}/prepared2", "long"),
]


@pytest.fixture(scope="module")
def w(tmp_path_factory) -> Path:
    """A folder with a good run, a good prepared folder and a good MIDI file among many broken ones."""
    w = tmp_path_factory.mktemp("w")
    for name, data in MIDI_FILES.items():
        (w / name).write_bytes(data)
    for name, text in GIN_FILES.items():
        (w / name).write_text(text)
    write_midi([Note(60, 90, 0, 0.0, 0.2)], w / "in.mid")
    (w / "empty_folder").mkdir()
    (w / "folder.wav").mkdir()

    good = tiny_runs.prepare(w / "prepared")
    for name, damage in {
        "not_json": lambda manifest: "{",
        "other_version": lambda manifest: json.dumps(manifest | {"version": 99}),
        "no_train": lambda manifest: json.dumps(
            manifest | {"splits": {"train": [], "validation": manifest["splits"]["validation"]}}
        ),
    }.items():
        shutil.copytree(good, w / name)
        manifest = w / name / "manifest.json"
        manifest.write_text(damage(json.loads(manifest.read_text())))
    for name in ("missing_array", "short_array"):
        shutil.copytree(good, w / name)
    next((w / "missing_array").rglob("*.mel.npy")).unlink()
    path = next((w / "short_array").rglob("*.mel.npy"))
    path.write_bytes(path.read_bytes()[:-1000])

    tiny_runs.start(w / "run", "diffusion.gin", good)
    tiny_runs.start(w / "autoregressive", "autoregressive.gin", good)
    for name, text in {
        "broken_config": "train.model = @Diffusion(\n",
        "binary_config": None,
        "empty_config": "# nothing\n",
        "other_shapes": (w / "run" / config.CONFIG_FILE).read_text().replace("model_dim = 16", "model_dim = 32"),
    }.items():
        shutil.copytree(w / "run", w / name)
        path = w / name / config.CONFIG_FILE
        path.write_bytes(bytes(range(256))) if text is None else path.write_text(text)
    shutil.copytree(w / "run", w / "no_checkpoint", ignore=shutil.ignore_patterns("checkpoints"))
    (w / "dangling.wav").symlink_to(w / "nowhere" / "out.wav")
    for name, tensors, step in (
        ("nested_tensors", ("encoder", "encoder/scale"), "7"),
        ("long_step", ("encoder",), "9" * 5000),
    ):
        (w / name).mkdir()
        shutil.copy(w / "run" / config.CONFIG_FILE, w / name)
        arrays = {key: np.zeros(2, np.float32) for key in tensors}
        save_file(arrays, w / name / WEIGHTS, metadata={"format": FORMAT, "step": step})
    shutil.copytree(w / "run", w / "damaged")
    rng = np.random.default_rng(0)
    for path in (w / "damaged" / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(rng.bytes(500))
    return w


def check(line: str, stderr: str, parts: tuple[str, ...], w: Path) -> None:
    errors_shown = [text for text in stderr.splitlines() if text.startswith("error:")]
    assert len(errors_shown) == 1, f"{line}: {stderr}"
    assert stderr.splitlines()[-1] == errors_shown[0]
    assert "Traceback" not in stderr
    assert len(errors_shown[0]) > len("error: ")
    for part in parts:
        assert part.format(w=w) in errors_shown[0]


@pytest.mark.filterwarnings("default")  # as a command shows them: a line each
@pytest.mark.parametrize("line, parts", [(line, parts) for line, *parts in CASES], ids=[line for line, *_ in CASES])
def test_bad_input_is_one_clear_line(line, parts, w, monkeypatch, capsys):
    command, *argv = shlex.split(line.format(w=w))
    monkeypatch.setattr(sys, "argv", [command, *argv])
    monkeypatch.chdir(w)  # away from any runs/ of the checkout
    main = importlib.import_module(f"music_synth.{command}").main
    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 1
    check(line, capsys.readouterr().err, parts, w)


@pytest.mark.parametrize("line, parts", [(line, parts) for line, *parts in AS_PROCESSES])
def test_bad_input_ends_the_process_with_status_1(line, parts, w):
    command, *argv = shlex.split(line.format(w=w))
    result = subprocess.run([sys.executable, "-m", f"music_synth.{command}", *argv], capture_output=True, text=True)
    assert result.returncode == 1
    check(line, result.stderr, parts, w)


def test_debug_shows_the_traceback(w):
    argv = [sys.executable, "-m", "music_synth.train", "--gin_file=difusion.gin", "--debug"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "UserError" in result.stderr


@pytest.mark.parametrize("line, parts", [(line, parts) for line, *parts in WITH_TENSORFLOW])
def test_wrong_data_sets_are_named(line, parts, w, monkeypatch, capsys):
    pytest.importorskip("seqio")
    test_bad_input_is_one_clear_line(line, parts, w, monkeypatch, capsys)


def test_there_are_fifty_cases_and_no_two_alike():
    lines = [line for line, *_ in CASES]
    assert len(lines) >= 50
    assert len(set(lines)) == len(lines)
