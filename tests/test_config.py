"""Configurations: where they are found, what they may say, and what is said of mistakes in them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from music_synth import config, runs
from music_synth.errors import UserError
from music_synth.gin_files import read_values
from music_synth.training.checkpoint import Checkpointer
from music_synth.training.optimizer import adamw
from music_synth.training.step import create_state

ROOT = Path(__file__).parents[1]

# A whole run in a few lines, of which no test opens the feed.
RUN = """
train.model = @Diffusion()
Diffusion.network = @NetworkConfig()
NetworkConfig.model_dim = %WIDTH
WIDTH = 16
train.feed = @NoFeed()
Feed.tokenizer = @Tokenizer()
train.optimizer = @adamw()
adamw.learning_rate = @warmup_constant()
warmup_constant.learning_rate = %LEARNING_RATE
warmup_constant.warmup_steps = 10
LEARNING_RATE = 1e-3
train.model_dir = %MODEL_DIR
train.num_steps = 3
MODEL_DIR = 'runs/x'
"""


class NoFeed:
    train_batches = eval_batches = None

    def __init__(self, seed: int = 0): ...


@pytest.fixture(autouse=True)
def no_feed(monkeypatch):
    monkeypatch.setitem(config.CONFIGURABLES, "NoFeed", "tests.test_config:NoFeed")


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "run.gin"
    path.write_text(RUN)
    return path


def built(recipe, *overrides):
    config.parse([recipe], overrides)
    return config.build("train", overrides).keywords


# --- finding ---------------------------------------------------------------------------------------------------------


def test_recipes_are_found_by_bare_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config.find("diffusion.gin") == ROOT / "configs" / "diffusion.gin"
    assert config.find("models/tiny.gin") == ROOT / "configs" / "models" / "tiny.gin"


def test_a_file_here_comes_before_a_recipe_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "diffusion.gin").write_text("")
    assert config.find("diffusion.gin") == tmp_path / "diffusion.gin"
    assert config.find(tmp_path / "diffusion.gin") == tmp_path / "diffusion.gin"


def test_recipes_are_found_where_the_package_is_installed(tmp_path, monkeypatch):
    installed = tmp_path / "site-packages" / "music_synth"
    shutil.copytree(ROOT / "configs", installed / "configs")
    monkeypatch.setattr(config, "__file__", str(installed / "config.py"))
    assert config.find("diffusion.gin") == installed / "configs" / "diffusion.gin"


def test_a_recipe_may_say_what_is_retired_where_that_did_nothing(tmp_path):
    recipe = tmp_path / "old.gin"
    recipe.write_text("include 'diffusion.gin'\nDiffusion.distilled = False\nwarmup_cosine.final_fraction = 0.0\n")
    config.parse([recipe])
    recipe.write_text("include 'diffusion.gin'\nDiffusion.distilled = True\n")
    with pytest.raises(UserError, match="Diffusion has no parameter 'distilled'"):
        config.parse([recipe])


def test_setup_ships_every_config():
    text = (ROOT / "setup.py").read_text()
    assert '"music_synth.configs": "configs"' in text
    depth = max(len(path.relative_to(ROOT / "configs").parts) for path in (ROOT / "configs").rglob("*.gin"))
    patterns = re.search(r'"music_synth.configs": \[(.*?)\]', text).group(1)
    assert patterns == ", ".join('"' + "*/" * level + '*.gin"' for level in range(depth))


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config 'difusion.gin' .* did you mean diffusion\.gin"):
        config.find("difusion.gin")
    with pytest.raises(UserError, match=r"did you mean .*models/tiny\.gin"):
        config.find("model/tiny.gin")
    with pytest.raises(UserError, match=r"did you mean .*diffusion\.gin"):
        config.find("xyzzy")


# --- flags -----------------------------------------------------------------------------------------------------------


def test_flags_are_split_as_t5x_writes_them():
    argv = ["--gin_file=a.gin", "--x", "--gin_file", "b.gin", "--gin.TASK=x=y", "--gin.a/b.c=1", "rest"]
    assert config.split_flags(argv) == (["a.gin", "b.gin"], ["TASK=x=y", "a/b.c=1"], ["--x", "rest"])
    for wrong, said in ((["--gin_file"], "--gin_file needs a file"), (["--gin.TASK"], "--gin.TASK needs a value")):
        with pytest.raises(UserError, match=said):
            config.split_flags(wrong)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("MODEL_DIR=/tmp/my run", "/tmp/my run"),
        ("MODEL_DIR=runs/x-1.5", "runs/x-1.5"),
        ("MODEL_DIR='quoted'", "quoted"),
        ('MODEL_DIR="quoted"', "quoted"),
        ("MODEL_DIR=plain", "plain"),
        ("MODEL_DIR=3 little pigs", "3 little pigs"),
        ("train.model_dir=~/x", "~/x"),
        ("MODEL_DIR=a=b", "a=b"),
    ],
)
def test_strings_need_no_quotes(recipe, override, value):
    assert built(recipe, override)["model_dir"] == value


def test_later_files_and_overrides_win(recipe, tmp_path):
    overlay = tmp_path / "overlay.gin"
    overlay.write_text("train.num_steps = 4\nLEARNING_RATE = 0.5\n")
    config.parse([recipe, overlay], ["train.num_steps=5"])
    keywords = config.build("train").keywords
    assert keywords["num_steps"] == 5
    assert float(keywords["optimizer"].learning_rate(100)) == 0.5


def test_references_and_numbers_can_be_overridden(recipe):
    keywords = built(recipe, "train.optimizer=@adafactor()", "adafactor.learning_rate=2e-3", "WIDTH=32")
    assert keywords["model"].network.model_dim == 32
    np.testing.assert_allclose(keywords["optimizer"].learning_rate(0), 2e-3, rtol=1e-6)


def test_includes_are_looked_for_among_the_recipes_and_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "mine.gin").write_text("include 'models/small.gin'\ninclude 'more.gin'\n")
    (tmp_path / "more.gin").write_text("NetworkConfig.num_mels = 64\n")
    made = config.build_parts([tmp_path / "mine.gin"], [], "NetworkConfig.model_dim", "NetworkConfig.num_mels")
    assert made == [512, 64]


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = = 3\n", r"bad\.gin, line 1: .* in 'a = = 3'"),
        ("\n\nWIDTH = [1, 2\n", r"bad\.gin, line \d: .*"),
        ("WIDTH = 'open\n", r"bad\.gin, line 1: "),
        ("WIDTH = 3 4\n", r"bad\.gin, line 1: Expected newline in"),
        ("just words\n", r"bad\.gin, line 1: "),
        ("\nDifusion.loss_norm = 'l1'\n", r"bad\.gin, line 2: nothing is called 'Difusion': choose from Diffusion"),
        ("Diffusion.los_norm = 'l1'\n", r"line 1: Diffusion has no parameter 'los_norm': choose from loss_norm"),
        ("\n\ntrain.optimizer = @adam()\n", r"bad\.gin, line 3: nothing is called 'adam': choose from adamw"),
        ("adamw:\n  b1 = 0.5\n  b3 = 0.5\n", r"bad\.gin, line 3: adamw has no parameter 'b3'"),
        ("nonsense:\n  b1 = 0.5\n", r"bad\.gin, line 1: nothing is called 'nonsense'"),
        ("\ninclude 'difusion.gin'\n", r"bad\.gin, line 2: no config 'difusion.gin' .* diffusion\.gin"),
        ("include 'bad.gin'\n", r"bad\.gin, line 1: .*bad\.gin includes itself"),
        ("import os\n", r"bad\.gin, line 1: import has no place"),
        ("train.config_text = 'x'\n", r"train has no parameter 'config_text'"),
        ("train.num_steps = %STEPS\n", r"nothing sets STEPS, .* --gin\.STEPS=VALUE"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_its_place(tmp_path, text, said):
    (tmp_path / "bad.gin").write_text(text)
    with pytest.raises(UserError, match=said) as told:
        config.parse([tmp_path / "bad.gin"])
    assert "\n" not in str(told.value)


def test_a_mistake_in_an_included_file_is_placed_there(tmp_path):
    (tmp_path / "outer.gin").write_text("include 'inner.gin'\n")
    (tmp_path / "inner.gin").write_text("\nadamw.b9 = 1\n")
    with pytest.raises(UserError, match=r"^\S*inner\.gin, line 2: adamw has no parameter 'b9'"):
        config.parse([tmp_path / "outer.gin"])


def test_binary_files_are_refused(tmp_path):
    (tmp_path / "x.gin").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"cannot read config .*x\.gin"):
        config.parse([tmp_path / "x.gin"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("WIDHT=3", "--gin.WIDHT: no config given reads WIDHT; did you mean WIDTH"),
        ("adamw.b9=0.5", r"--gin\.adamw\.b9=0\.5: adamw has no parameter 'b9'"),
        ("adam.b1=0.5", r"--gin\.adam\.b1=0\.5: nothing is called 'adam': choose from adamw"),
        ("train.optimizer=@adma()", r"nothing is called 'adma'"),
        ("WIDTH=[1, 2", r"--gin\.WIDTH=\[1, 2: "),
        ("WIDTH=", r"--gin\.WIDTH=: "),
        ("WIDTH=many", r"NetworkConfig\.model_dim = 'many': must be int"),
        ("WIDTH=2.5", r"NetworkConfig\.model_dim = 2\.5: must be int"),
        ("WIDTH=True", r"NetworkConfig\.model_dim = True: must be int"),
        ("WIDTH=-4", r"NetworkConfig\.model_dim = -4"),
        ("LEARNING_RATE=fast", r"warmup_constant\.learning_rate = 'fast': must be float"),
        ("LEARNING_RATE=-1.0", r"warmup_constant\.learning_rate = -1\.0: must be a positive number"),
        ("MODEL_DIR=3", r"train\.model_dir = 3: must be str"),
        ("train.token_buckets=(1, 'a')", r"train\.token_buckets = \(1, 'a'\): must be Sequence\[int\]"),
        ("train.num_eval_batches=all", r"train\.num_eval_batches = 'all': must be int \| None"),
        ("Diffusion.loss_norm=l3", r"'l3'.*l1"),
        ("Diffusion.schedule=cosine", r"Diffusion\.schedule = 'cosine': must be"),
        ("muon.momentum=0.5", r"--gin\.muon\.momentum: nothing in this run reads it"),
    ],
)
def test_mistakes_in_a_flag_name_it(recipe, override, said):
    with pytest.raises(UserError, match=said) as told:
        built(recipe, override)
    assert "\n" not in str(told.value)
    assert "In call to" not in str(told.value)


def test_a_missing_argument_is_named(tmp_path):
    (tmp_path / "nothing.gin").write_text("")
    config.parse([tmp_path / "nothing.gin"])
    with pytest.raises(UserError, match="train is missing a required argument: 'model'"):
        config.build("train")


# --- building --------------------------------------------------------------------------------------------------------


def test_every_name_stands_for_something():
    for name in (*config.CONFIGURABLES, *config.ENTRIES):
        parameters = config._parameters(config.Maker({}, config.CONFIGURABLES), name)  # imports it
        assert parameters or name == "CosineSchedule", name  # which has none


def test_what_is_built_are_the_plain_classes(recipe):
    from music_synth.diffusion.objective import Diffusion

    model = built(recipe)["model"]
    assert type(model) is Diffusion
    assert hash(model) == hash(Diffusion(network=model.network))


def test_unread_bindings_are_listed(recipe):
    config.parse([recipe], ["muon.momentum=0.5"])
    assert "adamw.learning_rate" in config.unread()  # nothing is read yet
    config.build("train")
    assert config.unread() == ["Feed.tokenizer", "muon.momentum"]


def test_the_operative_config_makes_the_same_run_again(recipe, tmp_path):
    keywords = built(recipe, "WIDTH=32", "adamw.b2=0.95")
    text = config.operative_text()
    assert "adamw.b2 = 0.95" in text and "NetworkConfig.dropout_rate = 0.1" in text
    assert "config_text" not in text
    (tmp_path / "config.gin").write_text(text)
    again = built(tmp_path / "config.gin")
    assert again["model"] == keywords["model"]
    assert again["model_dir"] == keywords["model_dir"]
    assert {k: v for k, v in again.items() if isinstance(v, int)}.items() >= {"num_steps": 3}.items()


def test_a_recipe_is_written_with_given_parts(tmp_path):
    """Knobs that two parts share are set where they agree; the rest of the recipe stays."""
    from music_synth.diffusion.objective import Diffusion
    from music_synth.diffusion.schedule import LinearSchedule
    from music_synth.midi.tokenizer import Tokenizer
    from music_synth.models.layers import NetworkConfig

    model = Diffusion(NetworkConfig(max_tokens=64, target_frames=32), LinearSchedule(0.01, 0.1, 5))
    text = config.run_text("diffusion.gin", [model, Tokenizer(max_tokens=64, segment_frames=16)], ["MODEL_DIR=/my run"])
    (tmp_path / "config.gin").write_text(text)
    assert config.build_parts([tmp_path / "config.gin"], [], "train.model", "Feed.tokenizer", "train.model_dir") == [
        model,
        Tokenizer(max_tokens=64, segment_frames=16),
        "/my run",
    ]
    values = read_values(tmp_path / "config.gin")
    assert (values["MAX_TOKENS"], values["SEGMENT_FRAMES"], values["Tokenizer.segment_frames"]) == (64, 32, 16)
    assert values["train.optimizer"] == "@muon()"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(recipe, tmp_path):
    """A MODEL_DIR of a network too small to be of use, never trained."""
    small = "NetworkConfig.mlp_dim=16,NetworkConfig.num_encoder_layers=1,NetworkConfig.num_decoder_layers=1"
    keywords = built(recipe, *small.split(","), "NetworkConfig.max_tokens=16")
    folder = tmp_path / "run"
    folder.mkdir()
    text = (
        config.operative_text() + "\nFeed.tokenizer = @Tokenizer()\nTokenizer.ties = False\nTokenizer.max_tokens = 16\n"
    )
    (folder / "config.gin").write_text(text)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: create_state(keywords["model"], adamw(1e-3), jax.random.key(0), 0.9))
    state = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)
    Checkpointer(folder).save(state.replace(step=np.asarray(7, np.int32)), data_position=7)
    return folder, keywords["model"], state


def test_a_run_is_loaded_as_it_was(run_folder):
    folder, model, state = run_folder
    loaded, tokenizer, params, step = runs.load(folder)
    assert loaded == model and step == 7 and tokenizer.ties is False
    jax.tree.map(np.testing.assert_array_equal, params, state.ema_params)
    _, _, params, _ = runs.load(folder, step=7, ema=False)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_loading_leaves_the_configuration_in_force_alone(run_folder, recipe):
    built(recipe, "WIDTH=64")
    before = config.operative_text(), config.unread()
    runs.load(run_folder[0])
    assert (config.operative_text(), config.unread()) == before
    assert "64" in before[0]


def test_folders_that_are_no_run_are_named(run_folder, tmp_path):
    folder = run_folder[0]
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        runs.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty is not recognized: a run has config\.gin and checkpoints/"):
        runs.load(tmp_path / "empty")
    shutil.copy(folder / "config.gin", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no checkpoint in .*empty"):
        runs.load(tmp_path / "empty")
    (tmp_path / "empty" / "config.gin").write_text("")
    with pytest.raises(UserError, match=r"does not say train\.model"):
        runs.load(tmp_path / "empty")
    with (folder / "config.gin").open("a") as file:
        file.write("NetworkConfig.mlp_dim = 24\n")
    with pytest.raises(UserError, match=r"mlp.* has shape \(16, 16\) there and \(16, 24\) here"):
        runs.load(folder)


def test_importing_config_is_light():
    script = "import sys, music_synth.config; print([m for m in ('tensorflow', 'jax', 'orbax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
