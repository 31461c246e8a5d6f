"""What is saved comes back, damage is noticed, and a checkpoint of something else is refused by name."""

import functools
import os
import resource
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from music_synth.errors import UserError
from music_synth.training import checkpoint, loop, partitioning
from music_synth.training.checkpoint import Checkpointer, check_shapes, load_params, saved_steps
from music_synth.training.optimizer import adafactor, adamw
from music_synth.training.step import create_state
from tests.training.toy import Toy

pytestmark = pytest.mark.usefixtures("quick_compilation")


@functools.cache
def abstract(model=Toy(), optimizer=adamw(1e-2), ema_decay=0.9):  # noqa: B008
    shapes = jax.eval_shape(lambda: create_state(model, optimizer, jax.random.key(0), ema_decay))
    layout = partitioning.state_shardings(partitioning.make_mesh(), shapes, model.logical_axes())
    return jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, layout)


def some_state(step: int, like=None):
    """A state of random numbers, other ones at each step."""
    rng = np.random.default_rng(step)

    def fill(leaf):
        values = rng.normal(size=leaf.shape) * 100
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, like or abstract()).replace(step=jnp.asarray(step, jnp.int32))


def assert_same(a, b):
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), a, b)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    checkpointer = Checkpointer(folder, keep=3)
    for step in (10, 20, 30):
        checkpointer.save(some_state(step), data_position=step + 1)
    return folder


@pytest.fixture
def saved(tmp_path, original):
    """A run's folder with checkpoints 10, 20 and 30, to do with as one likes."""
    return shutil.copytree(original, tmp_path / "run")


@pytest.mark.parametrize("optimizer", [adamw(1e-2), adafactor(1e-2, min_dim_to_factor=4)], ids=["adamw", "adafactor"])
@pytest.mark.parametrize("ema_decay", [0.9, 0.0], ids=["ema", "no ema"])
def test_everything_comes_back_bit_for_bit(tmp_path, optimizer, ema_decay):
    like = abstract(optimizer=optimizer, ema_decay=ema_decay)
    state = some_state(7, like)
    Checkpointer(tmp_path).save(state, data_position=9)
    restored, position = Checkpointer(tmp_path).restore_latest(like)
    assert_same(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert position == 9


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert Checkpointer(tmp_path).restore_latest(abstract()) is None


def test_only_the_newest_are_kept(saved):
    checkpointer = Checkpointer(saved, keep=2)
    checkpointer.save(some_state(40), data_position=40)
    assert saved_steps(saved / "checkpoints") == [30, 40]


def test_params_are_loaded_without_the_rest(saved):
    averaged, step = load_params(saved)
    assert step == 30
    assert_same(averaged, jax.tree.map(np.asarray, some_state(30).ema_params))
    plain, step = load_params(saved, step=20, ema=False)
    assert step == 20
    assert_same(plain, jax.tree.map(np.asarray, some_state(20).params))
    assert isinstance(averaged["notes"]["embedding"], np.ndarray)


def test_params_stand_in_for_an_average_that_is_not_kept(tmp_path):
    state = some_state(5, abstract(ema_decay=0.0))
    Checkpointer(tmp_path).save(state, data_position=5)
    assert_same(load_params(tmp_path)[0], jax.tree.map(np.asarray, state.params))


@pytest.fixture
def no_room():
    """Files of this process may not grow beyond 1,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_room_is_told_in_one_line_and_loses_nothing(saved, no_room, capfd):
    checkpointer = Checkpointer(saved)
    with pytest.raises(UserError) as told:
        checkpointer.save(some_state(40), data_position=40)
    reason = "File too large; when that is mended, the same command goes on from the newest checkpoint"
    assert str(told.value) == f"cannot save checkpoint 40 in {saved / 'checkpoints'}: {reason}"
    assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == ["10", "20", "30"]
    assert_same(checkpointer.restore_latest(abstract())[0], some_state(30))
    assert "Traceback" not in capfd.readouterr().err


def test_older_checkpoints_go_only_when_the_new_one_is_on_the_disk(saved, monkeypatch):
    steps_at_sync = []
    real = checkpoint.sync_folder

    def watched(folder):
        steps_at_sync.append(saved_steps(saved / "checkpoints"))
        real(folder)

    monkeypatch.setattr(checkpoint, "sync_folder", watched)
    Checkpointer(saved, keep=1).save(some_state(40), data_position=40)
    assert steps_at_sync == [[10, 20, 30, 40]]
    assert saved_steps(saved / "checkpoints") == [40]


# --- damage ----------------------------------------------------------------------------------------------------------


def newest_files(model_dir: Path) -> list[Path]:
    return sorted(path for path in (model_dir / "checkpoints" / "30").rglob("*") if path.is_file())


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


def largest(model_dir: Path) -> Path:
    return max(newest_files(model_dir), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, Path.unlink, flip_a_bit], ids=["truncated", "missing", "one bit"])
def test_a_damaged_newest_checkpoint_is_passed_over(saved, damage):
    damage(largest(saved))
    with pytest.warns(UserWarning, match="checkpoints/30 is damaged and passed over"):
        (restored, position) = Checkpointer(saved).restore_latest(abstract())
    assert_same(restored, some_state(20))
    assert position == 21
    assert saved_steps(saved / "checkpoints") == [10, 20]
    Checkpointer(saved).save(some_state(30), data_position=30)  # the place is free again
    assert_same(Checkpointer(saved).restore_latest(abstract())[0], some_state(30))


def test_any_truncated_file_is_harmless_or_noticed(saved):
    like, noticed = abstract(), 0
    originals = {path: path.read_bytes() for path in newest_files(saved)}
    assert len(originals) > 10
    for path, data in originals.items():
        truncate(path)
        checkpointer = Checkpointer(saved)
        try:
            state, _ = checkpointer._restore(saved / "checkpoints" / "30", like)
            assert_same(state, some_state(30))
        except Exception as error:
            assert type(error).__name__ == "Damaged", f"{path}: {error!r}"
            noticed += 1
        path.write_bytes(data)
    assert noticed > 5


def test_playing_passes_damage_over_and_changes_nothing(saved):
    for path in newest_files(saved):
        truncate(path)
    before = sorted(saved.rglob("*"))
    with pytest.warns(UserWarning, match="damaged"):
        params, step = load_params(saved)
    assert step == 20
    assert_same(params, jax.tree.map(np.asarray, some_state(20).ema_params))
    assert sorted(saved.rglob("*")) == before


def test_a_run_of_which_nothing_can_be_read_does_not_start_afresh(saved):
    for path in (saved / "checkpoints").rglob("manifest.ocdbt"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        Checkpointer(saved).restore_latest(abstract())
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no readable checkpoint"):
        load_params(saved)


def test_what_a_killed_save_leaves_is_no_checkpoint_and_is_cleared_away(saved):
    (saved / "checkpoints" / "40.orbax-checkpoint-tmp-123").mkdir()
    (saved / "checkpoints" / "40.orbax-checkpoint-tmp-123" / "params").mkdir()
    assert load_params(saved)[1] == 30
    assert (saved / "checkpoints" / "40.orbax-checkpoint-tmp-123").exists()  # a reader lets a writer's work be
    checkpointer = Checkpointer(saved)
    assert int(checkpointer.restore_latest(abstract())[0].step) == 30
    checkpointer.save(some_state(40), data_position=40)
    assert [path.name for path in (saved / "checkpoints").iterdir() if "tmp" in path.name] == []


# --- checkpoints of something else -----------------------------------------------------------------------------------


def test_other_shapes_are_named(saved):
    with pytest.raises(UserError) as told:
        Checkpointer(saved).restore_latest(abstract(Toy(width=16)))
    assert "context/wi/kernel has shape (4, 8) there and (4, 16) here" in str(told.value)
    assert str(saved) in str(told.value)


def test_a_missing_and_a_superfluous_tensor_are_named(saved):
    class Wider(Toy):
        def init(self, rng):
            return super().init(rng) | {"extra": {"kernel": jnp.ones((2, 3))}}

        def logical_axes(self):
            return super().logical_axes() | {"extra": {"kernel": (None, None)}}

    with pytest.raises(UserError, match=r"has no extra/kernel, .* shape \(2, 3\)"):
        Checkpointer(saved).restore_latest(abstract(Wider()))
    params, _ = load_params(saved)
    with pytest.raises(UserError, match="has no extra/kernel"):
        check_shapes(params, Wider(), "there")
    params["spare"] = np.ones((5,), np.float32)
    with pytest.raises(UserError, match=r"has spare with shape \(5,\), which this configuration lacks"):
        check_shapes(params, Toy(), "there")


def test_another_optimizer_is_refused(saved):
    with pytest.raises(UserError, match="another configuration: it has no opt_state"):
        Checkpointer(saved).restore_latest(abstract(optimizer=adafactor(1e-2)))


def test_ema_asked_of_a_run_without_is_refused(tmp_path):
    Checkpointer(tmp_path).save(some_state(5, abstract(ema_decay=0.0)), data_position=5)
    with pytest.raises(UserError, match="holds no ema_params"):
        Checkpointer(tmp_path).restore_latest(abstract())


def test_no_folder_no_checkpoint_no_such_step(saved, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        load_params(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no checkpoint in .*empty"):
        load_params(tmp_path / "empty")
    with pytest.raises(UserError, match=r"no checkpoint of step 25 .* there are 10, 20, 30"):
        load_params(saved, step=25)


def test_a_run_goes_on_laid_out_over_the_mesh(saved):
    mesh = partitioning.make_mesh()
    _, like = loop.state_to_make(Toy(), adamw(1e-2), mesh, seed=0, ema_decay=0.9)
    state, position = Checkpointer(saved).restore_latest(like)
    assert position == 31
    assert_same(state, some_state(30))
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
