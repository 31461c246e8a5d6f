"""Trained things from everywhere, and what is refused of those that others sent: nothing of it runs, or leads away."""

import dataclasses
import json
import os
import random
import shutil
import sys
import time
import warnings
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest

from music_synth import config, gin_files, gin_objects, runs
from music_synth.diffusion.objective import Diffusion
from music_synth.diffusion.sampler import Sampler
from music_synth.errors import UserError
from music_synth.interop import decoders, inverters, model_card, runtimes, t5x
from music_synth.midi.vocabulary import Vocabulary
from music_synth.models.layers import NetworkConfig
from music_synth.pipeline import SpectrogramDiffusionPipeline
from music_synth.training import checkpoint, initial
from tests import golden_arrays, t5x_folders, tiny_runs

CASES = Path(__file__).with_name("cases") / "config"
GOLDEN = golden_arrays.GOLDEN


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of diffusion.gin, never trained."""
    folder = tmp_path_factory.mktemp("runs")
    return tiny_runs.start(folder / "run", "diffusion.gin", tiny_runs.prepare(folder / "prepared"))


@pytest.fixture
def received(run, tmp_path):
    """The run as somebody sent it, with lines appended to its config."""

    def sent(*lines):
        shutil.copytree(run, tmp_path / "sent")
        with (tmp_path / "sent" / "config.gin").open("a") as file:
            file.write("\n".join(["", *lines, ""]))
        return tmp_path / "sent"

    return sent


def refused(load, *arguments, **options):
    """The one line that refuses, within seconds."""
    begin = time.monotonic()
    with pytest.raises(UserError) as told:
        load(*arguments, **options)
    assert time.monotonic() - begin < 10  # a second or two, on a machine that does nothing else
    assert "\n" not in str(told.value)
    return str(told.value)


# --- what is recognized ----------------------------------------------------------------------------------------------


def test_every_form_is_told_apart(run, tmp_path):
    published = t5x_folders.make(tmp_path / "t5x", "context")
    (published.parent / "config.gin").write_text("T5Config.num_heads = 2\n")
    for path, kind in ((run, "run"), (published, "t5x"), (GOLDEN / "diffusers_tiny", "diffusers")):
        assert runs.kind_of(path) == kind
        loaded = runs.load(path)
        assert jax.tree.structure(loaded.params) == jax.tree.structure(
            jax.eval_shape(loaded.model.init, jax.random.key(0))
        )
        assert loaded.tokenizer.segment_frames == loaded.model.network.target_frames
    step = runs.load(published).step
    assert runs.load(published.parent, step).step == step
    assert f"no checkpoint of step {step + 1}" in refused(runs.load, published, step + 1)
    assert "has no steps" in refused(runs.load, GOLDEN / "diffusers_tiny", 3)
    assert "no checkpoint of step 5" in refused(runs.load, run, 5)


def test_folders_that_are_nothing_are_named(tmp_path):
    assert "no folder" in refused(runs.load, tmp_path / "nowhere")
    assert "is not recognized" in refused(runs.load, tmp_path)
    (tmp_path / "config.gin").write_text(
        "train.model = @VocoderObjective()\nVocoderObjective.generator = @MelGANGenerator()\n"
    )
    assert "is a run of an inverter" in refused(runs.load, tmp_path)


def test_what_ships_goes_by_its_name(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SHIPPED_DIR", tmp_path / "package")
    assert "no weights of 'shipped'" in refused(runs.load, "shipped")
    model, tokenizer, params, step = runs.load(run)
    folder = tmp_path / "package/diffusion"
    folder.mkdir(parents=True)
    model_card.export(runs.load_trained(run), (run / "config.gin").read_text(), folder)
    loaded = runs.load("shipped")
    assert (loaded.model, loaded.tokenizer, loaded.step) == (model, tokenizer, step)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert runs.kind_of("shipped") == "export"
    jax.tree.map(np.testing.assert_array_equal, initial.InitialCheckpoint("shipped")(model), params)
    assert SpectrogramDiffusionPipeline.from_pretrained("shipped", inverter="griffin_lim").model == model
    (tmp_path / "shipped").mkdir()
    assert "shipped is not recognized" in refused(runs.load, "shipped")  # a folder of that name comes first


def test_a_decoder_of_the_other_kind_gives_what_reads_notes(run, tmp_path):
    config.parse(["autoregressive.gin", "smoke.gin"], [f"MODEL_DIR={tmp_path}", f"TASK={run.parent / 'prepared'}"])
    model = config.build("train").keywords["model"]
    with pytest.warns(UserWarning, match="another kind: continuous_encoder, decoder here begin at random"):
        params = initial.InitialCheckpoint(run)(model)
    theirs = runs.load(run).params
    assert set(params) == {"token_encoder", "continuous_encoder", "note_roll", "prior", "decoder"}
    assert theirs["note_roll"].keys() - params["note_roll"].keys() == {"latents"}  # which the other kind has not
    for part in ("note_roll", "prior"):
        shared = {name: theirs[part][name] for name in params[part]}
        jax.tree.map(np.testing.assert_array_equal, params[part], shared)
    layer = params["token_encoder"]["layers_0"]
    jax.tree.map(np.testing.assert_array_equal, layer, theirs["encoder"]["layers_0"])
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, jax.eval_shape(model.init, jax.random.key(0)))


# --- configs that others wrote ---------------------------------------------------------------------------------------

SAID = {
    "brackets.gin": "more than 30 brackets in one another",
    "feed_builds_data.gin": "train.model = @Feed(): nothing is called 'Feed'",
    "load_inverter_loop.gin": "train.model = @load_inverter(): nothing is called 'load_inverter'",
    "load_inverter_savedmodel.gin": "train.model = @load_inverter(): nothing is called 'load_inverter'",
    "macro_loop.gin": "go in a circle",
    "model_none.gin": "train.model = None is no ",
    "network_loop.gin": "Diffusion.network = @Diffusion(): must be NetworkConfig",
    "tokenizer_none.gin": "Feed.tokenizer = None is no Tokenizer",
    "wrong_kind.gin": "Diffusion.schedule = @Sampler(): must be Schedule",
}


@pytest.fixture
def opened():
    """The files that Python opened, but for modules."""
    paths, active = [], [True]

    def note(event, arguments):
        if active[0] and event == "open" and isinstance(arguments[0], (str, bytes)):
            paths.append(os.fsdecode(arguments[0]))

    sys.addaudithook(note)  # cannot be removed again
    yield paths
    active[0] = False


@pytest.mark.parametrize("case", sorted(SAID))
def test_a_received_config_makes_a_model_or_nothing(received, opened, monkeypatch, case):
    folder = received((CASES / case).read_text().replace("THIS_FOLDER", "."))
    monkeypatch.chdir(folder.parent)
    (folder.parent / "shared" / "part").mkdir(parents=True)
    (folder.parent / "shared" / "part" / "saved_model.pb").write_bytes(b"a program")
    monkeypatch.setattr(runtimes, "open_saved_model", lambda *_: pytest.fail("a program would have run"))
    opened.clear()
    said = refused(runs.load, folder)
    assert SAID[case] in said and str(folder / "config.gin") in said
    code = (".py", ".pyc", ".so")
    outside = [path for path in opened if not path.endswith(code) and not Path(path).resolve().is_relative_to(folder)]
    assert outside == []


def test_all_cases_are_tried():
    assert {path.name for path in CASES.iterdir()} == {*SAID, "macro_bomb_for_T5X.gin"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("include '/etc/passwd'", "includes no other file"),
        ("include 'diffusion.gin'", "includes no other file"),
        ("NetworkConfig.num_encoder_layers = 1000000", "must be at most 512"),
        ("NetworkConfig.model_dim = 1000000", "must be at most 16,384"),
        ("Sampler.num_steps = 1000000000", "must be at most 100,000"),
        ("SAMPLING_STEPS = 10000000000000000000000000000000", "a number of 32 digits: too large"),
        ("SEGMENT_FRAMES = 100000000", "must be at most"),
        ("Diffusion.sampler = @Sampler", "write @Sampler()"),
        ("Diffusion.los_norm = 'l1'", "has no parameter 'los_norm'"),
        ("Diffusion.network = @train()", "nothing is called 'train'"),
        ("Diffusion.loss_norm = %NOTHING", "nothing sets NOTHING"),
        ("Sampler.rho = @Sampler()", "must be float"),
        ("Sampler.clip_quantile = 0.9", "Sampler has no parameter 'clip_quantile'"),
        # Tokenizer and network, as in training.
        ("Tokenizer.segment_frames = 128", "Tokenizer.segment_frames = 128, but NetworkConfig.target_frames = 256"),
        ("NetworkConfig.context_frames = 100000", "context_frames = 100000, but target_frames = 256"),
        ("NetworkConfig.num_mels = 64", "num_mels = 64"),
        ("Tokenizer.velocity_bins = 4", "NetworkConfig.vocabulary"),
        ("Tokenizer.max_shift_steps = 500", "NetworkConfig.vocabulary"),
        ("Tokenizer.max_tokens = 4096", "Tokenizer.max_tokens = 4096, but NetworkConfig.max_tokens = 2048"),
    ],
)
def test_received_lines_that_are_refused(received, line, said):
    assert said in refused(runs.load, received(line))


def test_a_parameter_that_is_gone_may_be_said_where_it_did_nothing(run, received):
    assert runs.load(received("Sampler.guidance_rescale = 0.0")).model == runs.load(run).model


def test_what_nobody_asks_for_is_not_looked_at(run, received):
    """A config says also how the run was trained: with data, inverters and folders that are not here."""
    folder = received("train.inverter = @load_inverter()", "load_inverter.name = 'elsewhere'", "Feed.task = '/nowhere'")
    assert runs.load(folder).model == runs.load(run).model


def test_a_config_is_a_plain_file_of_bounded_size(received):
    folder = received()
    (folder / "config.gin").write_bytes(b"#" * (gin_files.MAX_BYTES + 1))
    assert "larger than 1 MB" in refused(runs.load, folder)
    (folder / "config.gin").unlink()
    (folder / "config.gin").symlink_to("/dev/zero")
    assert "no config.gin" in refused(runs.load, folder)  # that is a plain file


def test_macros_that_double_are_refused(tmp_path):
    t5x_folders.make(tmp_path, "context")
    shutil.copy(CASES / "macro_bomb_for_T5X.gin", tmp_path / "config.gin")
    assert "stand for more than 100,000 values" in refused(runs.load, tmp_path)


def test_files_that_double_are_refused(tmp_path):
    for number in range(30):
        includes = f"include 'f{number + 1}.gin'\n" * 2
        (tmp_path / f"f{number}.gin").write_text(includes)
    (tmp_path / "f30.gin").write_text("A = 1\n")
    assert "more than 100 files" in refused(gin_files.read, tmp_path / "f0.gin", gin_files.included_beside)
    assert gin_files.included_beside("../run/config.gin", tmp_path / "f0.gin") is None
    assert gin_files.included_around("/etc/passwd", tmp_path / "f0.gin") is None


def test_scopes_are_those_of_gin():
    bindings = {
        "Diffusion.sampler": gin_objects.Reference("few/Sampler", True),
        "few/Sampler.num_steps": 3,
        "Sampler.num_steps": 9,
        "Sampler.name": "ddpm",
    }
    model = gin_objects.Maker(bindings | {"x": gin_objects.Reference("Diffusion", True)}, gin_objects.PARTS).value("x")
    assert (model.sampler.num_steps, model.sampler.name) == (3, "ddpm")


# --- files that others packed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inside", ["config.gin", "checkpoints", "checkpoints/0/params", "checkpoints/0/params/_METADATA"]
)
def test_links_out_of_a_run_are_refused(received, tmp_path, inside):
    folder = received()
    (folder / inside).rename(tmp_path / "elsewhere")
    (folder / inside).symlink_to(tmp_path / "elsewhere")
    assert "is a link that leads out of" in refused(runs.load, folder)


def test_links_within_a_folder_are_followed(received):
    folder = received()
    (folder / "config.gin").rename(folder / "settings")
    (folder / "config.gin").symlink_to("settings")
    assert runs.load(folder).step == 0


def test_a_cache_of_the_hub_is_read(tmp_path):
    repository = tmp_path / "models--owner--name"
    shutil.copytree(GOLDEN / "diffusers_tiny", repository / "blobs")
    for path in [path for path in (repository / "blobs").rglob("*") if path.is_file()]:
        link = repository / "snapshots" / "abc" / path.relative_to(repository / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
    assert runs.load(repository / "snapshots" / "abc").model == runs.load(GOLDEN / "diffusers_tiny").model


def test_a_run_of_another_shape_is_refused_before_it_is_read(received, monkeypatch):
    from music_synth.training import checkpoint

    monkeypatch.setattr(checkpoint, "_read", lambda *_: pytest.fail("arrays were read"))
    assert "has shape" in refused(runs.load, received("NetworkConfig.mlp_dim = 32"))


def test_a_run_with_timbres_begins_where_one_without_was():
    network = NetworkConfig(
        model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1, max_tokens=16,
        target_frames=8, context_frames=8, note_roll=True,
    )  # fmt: skip
    vocabulary = Vocabulary(timbres=("hall", "room"))
    plain, named = Diffusion(network), Diffusion(dataclasses.replace(network, vocabulary=vocabulary))
    params = tiny_runs.random_like(plain.init)
    more = initial.with_optional_parts(params, named)
    assert more.keys() - params.keys() == {"timbre"}
    checkpoint.check_shapes(more, named, "it")
    notes = [vocabulary.velocity_id + 1, vocabulary.program_id, vocabulary.pitch_id + 60, 1]
    mel = np.random.default_rng(0).normal(-4, 2, (1, 8, 128)).astype(np.float32)

    def roll(model, params, first):
        batch = {"note_tokens": np.array([[first, *notes]]), "context_mel": mel, "context_mask": np.ones((1, 8), bool)}
        return np.asarray(model._encode(params, batch, None).roll)

    before = roll(plain, params, vocabulary.end_id + 1)
    np.testing.assert_allclose(roll(named, more, vocabulary.end_id + 1), before, atol=1e-5)
    back = initial.with_optional_parts(more, plain)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    harmonic = Diffusion(dataclasses.replace(network, roll_harmonics=4))
    more = initial.with_optional_parts(params, harmonic)
    checkpoint.check_shapes(more, harmonic, "it")
    jax.tree.map(np.testing.assert_array_equal, initial.with_optional_parts(more, plain), params)


def test_a_run_with_latents_and_a_table_begins_where_one_without_was():
    network = NetworkConfig(
        model_dim=16, num_heads=2, head_dim=8, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=1, max_tokens=16,
        target_frames=8, context_frames=0, note_roll=True, num_prior_layers=1,
    )  # fmt: skip
    plain = Diffusion(network, condition_dropout=0.0, sampler=Sampler(clip_x_0=False, temperature=0.0))
    richer = dataclasses.replace(plain, network=dataclasses.replace(network, note_latents=2, roll_table=True))
    params = tiny_runs.random_like(plain.init)
    more = initial.with_optional_parts(params, richer)
    checkpoint.check_shapes(more, richer, "it")
    ids = network.vocabulary
    tokens = np.array([[ids.end_id + 1, ids.velocity_id + 1, ids.program_id, ids.pitch_id + 60, 1]])
    before, after = (
        m.sample(p, {"note_tokens": tokens}, jax.random.key(0)) for m, p in ((plain, params), (richer, more))
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, initial.with_optional_parts(more, plain), params)


def test_saved_models_ask_for_trust(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"a program")
    assert "is a SavedModel, which is a program" in refused(runs.load_inverter, tmp_path)
    assert "is a SavedModel, which is a program" in refused(inverters.load_saved_model, tmp_path)


def pointing(folder, leaf):
    """A T5X checkpoint in `folder` with one leaf that is said so."""
    (folder / "checkpoint_1").mkdir(parents=True)
    contents = {"version": 3, "optimizer": {"target": {"x": leaf}, "state": {"step": np.int32(1)}}}
    (folder / "checkpoint_1" / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return folder / "checkpoint_1"


@pytest.mark.parametrize("path", ["/{}/secret", "../secret", "x/../../secret", "", "a\0b"])
def test_pointers_out_of_a_checkpoint_are_refused(tmp_path, path):
    t5x_folders.write_zarr(tmp_path / "secret", np.ones(3, np.float32))
    path = path.format(str(tmp_path).strip("/"))
    for number, leaf in enumerate((f"PLACEHOLDER://{path}", {"driver": "zarr", "kvstore": {"path": path}})):
        folder = pointing(tmp_path / str(number), leaf)
        assert "points to" in refused(t5x.read, folder)
    folder = pointing(tmp_path / "link", "PLACEHOLDER://x")
    (folder / "x").symlink_to(tmp_path / "secret")
    assert "is a link that leads out of" in refused(t5x.read, folder)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"shape": [1 << 40], "chunks": [1 << 40]}, "more than the checkpoint's files can hold"),
        ({"shape": [1 << 62, 1 << 62], "chunks": [1, 1]}, "more than the checkpoint's files can hold"),
        ({"shape": [3], "chunks": [1 << 40]}, "more than the checkpoint's files can hold"),
        ({"shape": [3], "chunks": [0]}, "shape [3] in chunks of [0]"),
        ({"shape": [-3], "chunks": [3]}, "shape [-3]"),
        ({"dtype": "|O"}, "it is of dtype '|O'"),
        ({"compressor": {"id": "blosc"}}, "it is packed by 'blosc'"),
    ],
)
def test_arrays_that_claim_too_much_are_refused(tmp_path, layout, said):
    folder = pointing(tmp_path, "PLACEHOLDER://x")
    t5x_folders.write_zarr(folder / "x", np.ones(3, np.float32))
    said_there = json.loads((folder / "x" / ".zarray").read_text())
    (folder / "x" / ".zarray").write_text(json.dumps(said_there | layout))
    assert said in refused(t5x.read, folder)


def test_chunks_are_not_unpacked_beyond_their_size(tmp_path):
    import gzip

    folder = pointing(tmp_path, "PLACEHOLDER://x")
    t5x_folders.write_zarr(folder / "x", np.ones(3, np.float32))
    (folder / "x" / "0").write_bytes(gzip.compress(bytes(1 << 26)))  # 64 kB that unpack to 64 MB
    assert "longer than its array" in refused(t5x.read, folder)


# --- noise -----------------------------------------------------------------------------------------------------------


def mutated(rng, data):
    """`data` with a few bytes changed, cut, repeated or swapped with others of it."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[i % len(data)] = rng.randrange(256)
        elif kind == 1:
            del data[i : min(j, i + 40)]
        elif kind == 2:
            data[j:j] = data[i : min(j, i + 40)]
        elif kind == 3:
            data[i:i] = rng.choice([b"@", b"%", b"()", b"[[", b"{", b"'", b"\n", b"1e99", b"-", b"None", b".", b"/"])
        else:
            data[i:i] = bytes(rng.randrange(256) for _ in range(8))
        data = data or bytearray(b"x")
    return bytes(data)


def outcome(action):
    """Whether an action went well, or was refused in one line; whatever else it raises is a fault."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            action()
    except UserError as error:
        assert "\n" not in str(error)
        return False
    return True


def made(path):
    maker = gin_objects.Maker(gin_files.read(path, gin_files.none_included), gin_objects.PARTS, str(path))
    return maker.value("train.model"), maker.value("Feed.tokenizer")


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))]


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_in_configs_is_refused_in_one_line(run, tmp_path, seed):
    """Or changes nothing that matters."""
    rng, text = random.Random(seed), (run / "config.gin").read_bytes()
    path, count, good = tmp_path / "config.gin", 0, 0
    end = time.monotonic() + 4
    while time.monotonic() < end or count < 20:
        path.write_bytes(mutated(rng, text))
        good += outcome(lambda: made(path))
        outcome(lambda: gin_files.read_values(path))
        count += 1
    assert 0 < good < count


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_in_checkpoints_of_t5x_is_refused_in_one_line(tmp_path, seed):
    rng = random.Random(seed)
    folder = t5x_folders.make(tmp_path, "autoregressive")
    files = [folder / "checkpoint", *sorted(folder.glob("*/.zarray"))[:2], *sorted(folder.glob("*/0.0"))[:2]]
    whole = {path: path.read_bytes() for path in files}
    count, refusals, end = 0, 0, time.monotonic() + 4
    while time.monotonic() < end or count < 10:
        path = rng.choice(files)
        path.write_bytes(mutated(rng, whole[path]))
        refusals += not outcome(lambda: decoders.read_t5x(tmp_path, num_heads=2))
        path.write_bytes(whole[path])
        count += 1
    assert refusals
