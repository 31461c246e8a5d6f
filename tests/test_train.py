"""The training command: every shipped recipe runs through it, and says what it does in its first lines."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from music_synth import config, runs, train
from music_synth.errors import UserError
from tests import tiny_runs

# Recipes differ little under the smoke overlay: what one compiled serves the next.
pytestmark = pytest.mark.usefixtures("quick_compilation")
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def header(path: Path) -> str:
    """The comment that a config opens with."""
    lines = path.read_text().splitlines()
    return "\n".join(lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))])


def command(path: Path) -> list[str]:
    """The arguments of the command in a config's first lines, and its entry point first; [] if it has none."""
    found = re.search(r"python -m music_synth\.(\w+)(.*)", header(path))
    return [found.group(1), *found.group(2).split()] if found else []


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


ALL = sorted(CONFIGS.rglob("*.gin"))
TRAINING = [path for path in ALL if command(path) == ["train", f"--gin_file={name(path)}"]]
INVERTERS = ["melgan", "istft", "informed"]
FRAGMENTS = [
    "deterministic.gin",
    "finetune.gin",
    "inverter.gin",
    "nocontext.gin",
    "papers/published.gin",
    "smoke.gin",
    "training.gin",
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny_runs.prepare(tmp_path_factory.mktemp("data") / "prepared", audio=True)


def test_every_config_is_a_recipe_or_a_known_fragment():
    recipes = [path for path in ALL if command(path) and name(path) not in FRAGMENTS]
    assert {name(path) for path in recipes} >= {"diffusion.gin", "autoregressive.gin", "evaluate.gin"}
    for path in ALL:
        if path.parent.name in ("models", "tasks", "t5x") or name(path) in FRAGMENTS:
            continue
        assert f"--gin_file={name(path)}" in command(path), f"{name(path)} does not open with its own command"
        assert header(path).startswith("# "), name(path)


@pytest.mark.parametrize("path", TRAINING, ids=name)
def test_recipe_says_hardware_and_what_to_expect(path):
    assert "# Hardware: " in header(path) and "# Expect: " in header(path)


def smoke_case(path: Path):
    """Published recipes that differ little from another's, and the dearest, run in the long tests only."""
    paper = path.parent.name == "papers" and path.name != "diffusion_base.gin"
    long = paper or path.name in ("melgan.gin", "informed.gin")
    return pytest.param(path, marks=[pytest.mark.slow] if long else [], id=name(path))


@pytest.mark.parametrize("path", [smoke_case(path) for path in TRAINING])
def test_recipe_trains_with_the_smoke_overlay(path, prepared, tmp_path, capsys):
    argv = [f"--gin_file={name(path)}", "--gin_file=smoke.gin"]
    train.main([*argv, f"--gin.MODEL_DIR={tmp_path / 'run'}", f"--gin.TASK={prepared}"])
    unread = set(config.unread())
    config.parse(["smoke.gin"])
    overlay = set(config.unread())  # all that the overlay binds: it suits recipes that read only part of it
    assert unread - overlay == set()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = {key for line in lines for key in line}
    assert {"train/loss", "eval/loss", "eval/sample_error_db"} <= logged
    if path.stem not in INVERTERS:  # those train on less than 1 s
        assert {"eval/sample_frechet_log_mel", "eval/sample_reconstruction_log_mel"} <= logged
    assert lines[-1]["step"] == 3
    assert str(tmp_path / "run") in capsys.readouterr().out
    if path.stem in INVERTERS:
        generator, params = runs.load_generator(tmp_path / "run")
        assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(generator.init, jax.random.key(0)))
        return
    model, tokenizer, params, step = runs.load(tmp_path / "run")
    assert step == 3 and tokenizer.segment_frames == model.network.target_frames == 256
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0)))


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.gin")), ids=name)
def test_sizes_are_overlays_of_any_recipe(path, prepared):
    for recipe in ("diffusion.gin", "autoregressive.gin"):
        config.parse([recipe, name(path)], [f"TASK={prepared}"])
        model = config.build("train").keywords["model"]
        assert model.network.model_dim == {"tiny": 128, "small": 512, "base": 768, "large": 1024}[path.stem]
        assert config.unread() == []


PUBLISHED_MILLIONS = {  # Hawthorne et al. 2022, table 3
    "autoregressive_small": 45,
    "diffusion_small_nocontext": 85,
    "diffusion_small": 104,
    "diffusion_base": 412,
}


@pytest.mark.parametrize("recipe", PUBLISHED_MILLIONS)
def test_published_models_have_their_published_sizes(recipe, prepared):
    config.parse([f"papers/{recipe}.gin"], [f"TASK={prepared}"])
    settings = config.build("train").keywords
    shapes = jax.eval_shape(settings["model"].init, jax.random.key(0))
    millions = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert round(millions) == PUBLISHED_MILLIONS[recipe]
    assert settings["num_steps"] == 500_000
    assert config.unread() == []
    assert f"{PUBLISHED_MILLIONS[recipe]} million" in header(CONFIGS / "papers" / f"{recipe}.gin")


def test_the_command_runs_in_a_process_of_its_own_and_goes_on(prepared, tmp_path):
    """From another folder, with flags as a user types them; the second call finds the first one's checkpoint."""
    argv = ["--gin_file=diffusion.gin", "--gin_file", "smoke.gin", f"--gin.TASK={prepared}", "--gin.MODEL_DIR=my run"]
    argv += ["--gin.train.num_samples=0"]

    def run(*more):
        command = [sys.executable, "-m", "music_synth.train", *argv, *more]
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stderr
    assert "starting in my run" in first.stdout
    assert "music_synth.synthesize FILE.mid --checkpoint 'my run'" in first.stdout
    assert "Traceback" not in first.stderr and "WARNING" not in first.stderr
    second = run("--gin.TRAIN_STEPS=4")
    assert second.returncode == 0, second.stderr
    assert "going on from step 3 in my run" in second.stdout
    assert "TRAIN_STEPS = 4" in (tmp_path / "my run" / "config.gin").read_text()
    losses = [json.loads(line) for line in (tmp_path / "my run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if "train/loss" in line] == [3, 4]


def test_help_is_help(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--gin_file" in shown and "--coordinator" in shown and "MODEL_DIR" in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "give a recipe: --gin_file=diffusion.gin"),
        (["--gin_file=diffusion.gin", "--coordinator=localhost:1"], "--coordinator, --num_processes and --process_id"),
        (["--gin_file=diffusion.gin", "--fast"], "--fast"),
        (["--gin_file=diffusion.gin", "extra"], "extra"),
    ],
)
def test_wrong_flags_are_named(argv, said):
    with pytest.raises(UserError, match=said):
        train.main(argv)
