"""Whole runs of the toy: resuming, stopping, what is written, and what goes wrong."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tqdm import tqdm

from music_synth.errors import UserError
from music_synth.midi.tokenizer import Tokenizer
from music_synth.training import loop, partitioning
from music_synth.training.batches import cut_tokens, on_devices, prefetch
from music_synth.training.checkpoint import load_params, saved_steps
from music_synth.training.held_out import first_held_out
from music_synth.training.optimizer import adamw
from tests.training.test_writer import events, lines
from tests.training.toy import TOKENS, VOCAB, Toy, ToyFeed, train_toy

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]


def params_of(model_dir):
    return {ema: load_params(model_dir, ema=ema)[0] for ema in (True, False)}


def assert_identical(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def curve(model_dir, name):
    return {line["step"]: line[name] for line in lines(Path(model_dir)) if name in line}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of ten steps without a stop."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_toy(str(folder))
    return folder


def test_it_learns(tmp_path):
    train_toy(str(tmp_path), num_steps=200, log_every=20, checkpoint_every=200, eval_every=100)
    losses, held_out = curve(tmp_path, "train/loss"), curve(tmp_path, "eval/loss")
    assert losses[200] < 0.5 * losses[20]
    assert held_out[200] < held_out[100]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path, uninterrupted):
    train_toy(str(tmp_path), num_steps=4)
    train_toy(str(tmp_path), num_steps=10)
    assert_identical(params_of(tmp_path), params_of(uninterrupted))
    loss, expected = curve(tmp_path, "train/loss"), curve(uninterrupted, "train/loss")
    assert loss == expected and len(loss) == 5


def test_a_new_run_starts_from_given_parameters_and_one_that_goes_on_does_not(tmp_path, uninterrupted, capsys):
    """The first loss is that of the parameters of another run."""
    params, asked = load_params(uninterrupted)[0], []

    def initial(model):
        asked.append(model)
        return params

    train_toy(str(tmp_path), num_steps=1, log_every=1, initial=initial)
    assert "parameters from" in capsys.readouterr().out
    key = jax.random.fold_in(jax.random.split(jax.random.key(0))[1], 0)
    loss, _ = asked[0].loss(params, next(ToyFeed().train_batches()), key, train=True)
    np.testing.assert_allclose(curve(tmp_path, "train/loss")[1], loss, rtol=1e-6)
    first = params_of(tmp_path)
    train_toy(str(tmp_path), num_steps=1, log_every=1, initial=initial)
    assert len(asked) == 1
    assert_identical(params_of(tmp_path), first)


def test_data_follow_the_step(tmp_path):
    """The feed is asked to begin at the batch that comes next."""
    asked = []

    class Watched(ToyFeed):
        def train_batches(self, start_step=0):
            asked.append(start_step)
            return super().train_batches(start_step)

    for steps in (3, 5):
        loop.train(Toy(), Watched(), adamw(1e-2), model_dir=str(tmp_path), num_steps=steps, num_samples=0)
    assert asked == [0, 3]


def test_a_finished_run_has_nothing_left_to_do(uninterrupted, capsys):
    before = params_of(uninterrupted)
    state = train_toy(str(uninterrupted), num_steps=10)
    assert int(state.step) == 10
    assert_identical(params_of(uninterrupted), before)
    assert "step 10" in capsys.readouterr().out


def prefetching():
    return any(thread.name == "prefetch" for thread in threading.enumerate())


# --- processes that are stopped from outside -------------------------------------------------------------------------


def start(model_dir, *arguments):
    """The toy in a process of its own. Delay: time to be killed in."""
    command = [sys.executable, "-m", "tests.training.toy", str(model_dir), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(model_dir, step, process, seconds=120.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if max(saved_steps(Path(model_dir) / "checkpoints"), default=0) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.stderr.read()}")


def test_killed_at_a_random_moment_and_started_again_it_ends_the_same(tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    settings = {"num_steps": 24, "checkpoint_every": 2}
    process = start(tmp_path / "killed", "delay=0.05", *(f"{k}={v}" for k, v in settings.items()))
    wait_for_step(tmp_path / "killed", rng.choice([2, 4, 8]), process)
    time.sleep(rng.uniform(0.0, 0.3))  # anywhere in a step, a save or the removal of an old checkpoint
    process.kill()
    process.communicate()
    killed_at = max(saved_steps(tmp_path / "killed" / "checkpoints"))
    assert 2 <= killed_at < 24, f"seed {seed}"
    train_toy(str(tmp_path / "killed"), **settings)
    train_toy(str(tmp_path / "whole"), **settings)
    assert_identical(params_of(tmp_path / "killed"), params_of(tmp_path / "whole"))
    assert curve(tmp_path / "killed", "train/loss") == curve(tmp_path / "whole", "train/loss"), f"seed {seed}"


def test_sigterm_saves_before_it_ends(tmp_path):
    process = start(tmp_path, "num_steps=100000", "delay=0.02", "checkpoint_every=4")
    wait_for_step(tmp_path, 4, process)
    checkpoint_at = max(saved_steps(tmp_path / "checkpoints"))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    last = errors.strip().splitlines()[-1]
    stopped_at = max(saved_steps(tmp_path / "checkpoints"))
    assert last.startswith(f"error: stopped by SIGTERM after step {stopped_at}: checkpoint saved in {tmp_path}")
    assert stopped_at >= checkpoint_at
    assert "Traceback" not in errors
    assert max(curve(tmp_path, "train/loss")) == stopped_at


def test_sigterm_in_between_loses_no_step(tmp_path, uninterrupted):
    """Stopped between two checkpoints, the run goes on with the very next step."""

    class Stopping(ToyFeed):
        def train_batches(self, start_step=0):
            for k, batch in enumerate(super().train_batches(start_step), start=start_step):
                if k == 7 and start_step == 0:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    settings = {"model_dir": str(tmp_path), "log_every": 2, "checkpoint_every": 100, "num_samples": 0}
    settings |= {"eval_every": 100}
    optimizer = adamw(1e-2)
    with pytest.raises(UserError, match="stopped by SIGTERM after step"):
        loop.train(Toy(), Stopping(), optimizer, num_steps=10, **settings)
    assert 1 <= saved_steps(tmp_path / "checkpoints")[-1] < 10
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    loop.train(Toy(), Stopping(), optimizer, num_steps=10, **settings)
    assert_identical(params_of(tmp_path), params_of(uninterrupted))


# --- what is written -------------------------------------------------------------------------------------------------


def test_evaluation_has_its_own_key_for_each_batch_and_the_same_at_every_time(tmp_path):
    train_toy(str(tmp_path), num_steps=4, eval_every=2)
    draws = list(curve(tmp_path, "eval/draw").values())
    assert len(draws) == 2 and draws[0] == draws[1]
    feed, keys = ToyFeed(), [jax.random.fold_in(jax.random.key(0), i) for i in range(3)]
    weights = [batch["mel_mask"].sum() for batch in feed.eval_batches()]
    drawn = [float(jax.random.uniform(key)) for key in keys]
    assert len(set(drawn)) == 3
    np.testing.assert_allclose(draws[0], np.average(drawn, weights=weights), rtol=1e-6)


def test_samples_become_pictures_sounds_and_a_distance(tmp_path):
    seen = []

    def inverter(mel):
        seen.append(mel.shape)
        return np.zeros(len(mel) * 320, np.float32)

    settings = {"model_dir": str(tmp_path), "num_steps": 2, "num_samples": 3, "config_text": "a.b = 1\n"}
    loop.train(Toy(), ToyFeed(), adamw(1e-2), inverter=inverter, **settings)
    tags = [value.tag for event in events(tmp_path) for value in event.summary.value]
    assert {f"target_above_sample/{i}" for i in range(3)} <= set(tags)
    assert {f"{kind}/{i}" for i in range(3) for kind in ("target", "sample")} <= set(tags)
    assert seen == [(6, 4)] * 6
    assert (tmp_path / "config.gin").read_text() == "a.b = 1\n"
    batch = first_held_out(ToyFeed(), 3)
    assert len(batch["mel"]) == 3
    sampled = Toy()(load_params(tmp_path)[0], batch)
    error = np.abs(np.asarray(sampled) - batch["mel"])[batch["mel_mask"]].mean() * 8.685889638
    np.testing.assert_allclose(curve(tmp_path, "eval/sample_error_db")[2], error, rtol=1e-4)
    assert curve(tmp_path, "eval/sample_stft_distance")[2] == pytest.approx(0, abs=0.01)  # both are silent
    assert "eval/sample_stft_distance" in tags and "eval/sample_frechet_log_mel" not in tags  # 6 frames are no second


def test_the_logged_loss_is_the_mean_since_the_last_line(tmp_path):
    train_toy(str(tmp_path / "fine"), num_steps=4, log_every=1)
    train_toy(str(tmp_path / "coarse"), num_steps=4, log_every=4)
    fine = list(curve(tmp_path / "fine", "train/loss").values())
    assert len(fine) == 4
    np.testing.assert_allclose(curve(tmp_path / "coarse", "train/loss")[4], np.mean(fine), rtol=1e-6)


def test_minutes_are_told_between_the_lines_of_the_log_and_count_on(tmp_path):
    """With every evaluation and checkpoint, also of a run that breaks off before the log's first line."""
    settings = {"model_dir": str(tmp_path), "log_every": 100, "checkpoint_every": 2, "eval_every": 3, "num_samples": 0}
    with pytest.raises(UserError, match="step 5"):
        loop.train(Toy(poison=True), ToyFeed(poisoned_step=4), adamw(1e-2), num_steps=20, **settings)
    before = curve(tmp_path, "train/minutes")
    assert list(before) == [2, 3, 4] and 0 < before[2] < before[3] < before[4]
    assert curve(tmp_path, "eval/loss").keys() == {3}
    loop.train(Toy(poison=True), ToyFeed(), adamw(1e-2), num_steps=5, **settings)
    assert curve(tmp_path, "train/minutes")[5] > before[4]


def test_the_bar_tells_loss_speed_and_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        loop, "progress_bar", lambda start, steps, shown: tqdm(total=steps, initial=start, mininterval=0)
    )
    train_toy(str(tmp_path), num_steps=4)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss " in shown and "examples/s" in shown and "<00:00" in shown


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    settings = {"model_dir": str(tmp_path), "num_steps": 20, "log_every": 100, "checkpoint_every": 2, "num_samples": 0}
    with pytest.raises(UserError) as told:
        loop.train(Toy(poison=True), ToyFeed(poisoned_step=4), adamw(1e-2), **settings)
    message = str(told.value)
    assert "loss is nan at step 5: lower the learning rate" in message
    assert f"checkpoint 4 is kept in {tmp_path}" in message
    assert saved_steps(tmp_path / "checkpoints") == [2, 4]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_params(tmp_path)[0]))


def test_a_tokenizer_that_the_note_roll_cannot_read_is_refused(tmp_path):
    feed = ToyFeed(tokenizer=Tokenizer(velocity_bins=127))
    model = Toy(network=dataclasses.replace(Toy().network, note_roll=True))
    with pytest.raises(UserError, match=r"Tokenizer\.vocabulary = Vocabulary\(velocity_bins=127"):
        loop.train(model, feed, adamw(1e-2), model_dir=str(tmp_path), num_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_suit_the_network_is_refused():
    batch = ToyFeed().batch(0, 0)

    def check(batch, pieces=1):
        return on_devices(batch, Toy(), partitioning.make_mesh(), pieces, [TOKENS])

    jax.tree.map(np.testing.assert_array_equal, check(batch), batch)
    with pytest.raises(UserError, match=f"note token {VOCAB} is beyond NetworkConfig.vocab_size"):
        check(dict(batch, note_tokens=np.full((8, TOKENS), VOCAB, np.int32)))
    with pytest.raises(UserError, match="brings no context"):
        check({name: array for name, array in batch.items() if not name.startswith("context")})
    with pytest.raises(UserError, match=r"mel of the feed is \(5, 4\)"):
        check(dict(batch, mel=batch["mel"][:, :5]))
    with pytest.raises(UserError, match="batch size 8 must be a multiple of 3"):
        check(batch, pieces=3)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to MODEL_DIR .*file/run"):
        train_toy(str(tmp_path / "file" / "run"))


def test_data_without_a_validation_split_fail_before_training(tmp_path):
    class TrainingOnly(ToyFeed):
        def train_batches(self, start_step=0):
            raise AssertionError("training began")

        def eval_batches(self):
            return iter(())

    with pytest.raises(UserError, match="validation split holds no segment"):
        loop.train(Toy(), TrainingOnly(), adamw(1e-2), model_dir=str(tmp_path), num_steps=1)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"num_steps": 0}, r"train\.num_steps = 0: must be in 1\.\.100000000"),
        ({"num_steps": 10**9}, r"train\.num_steps = 1000000000"),
        ({"num_samples": -1}, r"train\.num_samples = -1: must be in 0\.\."),
        ({"seed": 2**70}, r"train\.seed = "),
        ({"log_every": 0}, r"train\.log_every = 0"),
        ({"token_buckets": (0, 5)}, r"shortest_token_bucket = 0"),
        ({"ema_decay": 1.0}, r"train\.ema_decay = 1\.0"),
        ({"keep_checkpoints": 0}, r"train\.keep_checkpoints = 0"),
        ({"model_parallelism": 2}, r"model_parallelism = 2"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, setting, said):
    with pytest.raises(UserError, match=said):
        train_toy(str(tmp_path), **setting)


def test_errors_of_the_feed_reach_the_caller_and_leave_no_thread(tmp_path):
    class Broken(ToyFeed):
        def train_batches(self, start_step=0):
            yield self.batch(0, 0)
            raise UserError("the disk is gone")

    with pytest.raises(UserError, match="the disk is gone"):
        loop.train(Toy(), Broken(), adamw(1e-2), model_dir=str(tmp_path), num_steps=5, num_samples=0)
    assert not prefetching()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_tokens_are_cut_to_the_shortest_bucket_that_holds_them():
    def cut(longest, width=2048, buckets=(128, 256, 512)):
        tokens = np.zeros((2, width), np.int32)
        tokens[0, :3] = 7
        tokens[1, : longest or 0] = 7
        tokens[0, : min(longest, 3)] = 7
        return cut_tokens({"note_tokens": tokens}, buckets)["note_tokens"]

    assert [cut(n).shape[1] for n in (0, 1, 128, 129, 256, 512, 513)] == [128, 128, 128, 256, 256, 512, 2048]
    for n in (1, 128, 129, 513):
        assert (cut(n) != 0).sum() == n + 3 if n > 3 else True
    assert cut(5, width=100).shape[1] == 100  # buckets beyond the width change nothing


def test_prefetch_keeps_order_and_runs_ahead():
    made = []

    def items():
        for i in range(6):
            made.append(i)
            yield i

    ahead = prefetch(items(), size=2)
    assert next(ahead) == 0
    end = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < end:  # one taken, two waiting, one in hand
        time.sleep(0.01)
    assert made == [0, 1, 2, 3]
    assert list(ahead) == [1, 2, 3, 4, 5]


def test_prefetch_stops_its_thread_when_closed():
    endless = prefetch(iter(lambda: 0, 1))
    next(endless)
    assert prefetching()
    endless.close()
    assert not prefetching()


def test_metrics_file_holds_plain_numbers(uninterrupted):
    for line in (uninterrupted / "metrics.jsonl").read_text().splitlines():
        assert all(isinstance(value, (int, float)) for value in json.loads(line).values())
