"""A run that ends when the held-out loss does not fall any more, and keeps its lowest point as a run of its own."""

import dataclasses

import pytest

from music_synth.errors import UserError
from music_synth.training import loop
from music_synth.training.best import Best
from music_synth.training.checkpoint import load_params, saved_steps
from music_synth.training.optimizer import adamw
from tests.training.test_loop import assert_identical, curve, params_of
from tests.training.toy import Toy, ToyFeed, train_toy

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Elsewhere(ToyFeed):
    """Trains toward a level beyond that of the held-out batches, whose loss falls first and then rises."""

    def train_batches(self, start_step=0):
        for batch in super().train_batches(start_step):
            yield batch | {"mel": batch["mel"] + 6.0}


def train(model_dir, rate=0.2, **settings):
    return loop.train(
        Toy(), Elsewhere(), adamw(rate), model_dir=str(model_dir), num_steps=80, log_every=4, checkpoint_every=4,
        eval_every=4, num_samples=0, **({"patience": 2, "ema_decay": 0.5} | settings),
    )  # fmt: skip


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that went on until two evaluations in a row were no better."""
    folder = tmp_path_factory.mktemp("stopped")
    train(folder, config_text="# a recipe\n")
    return folder


def test_it_ends_after_its_patience_and_keeps_the_lowest(stopped):
    losses = curve(stopped, "eval/loss")
    lowest = min(losses, key=losses.get)
    assert 0 in losses and 0 < lowest and max(losses) == lowest + 8 < 80
    assert saved_steps(stopped / "best" / "checkpoints") == [lowest]
    assert curve(stopped / "best", "eval/loss") == {step: loss for step, loss in losses.items() if step <= lowest}
    assert (stopped / "best" / "config.gin").read_text() == "# a recipe\n"
    assert load_params(stopped / "best")[1] == lowest and max(saved_steps(stopped / "checkpoints")) == max(losses)


def test_a_run_that_is_over_stays_so(stopped):
    before = params_of(stopped / "best")
    assert int(train(stopped).step) == max(curve(stopped, "eval/loss"))
    assert_identical(params_of(stopped / "best"), before)


@pytest.mark.slow
@pytest.mark.parametrize("killed_before", ["take", "scalars"])
def test_a_run_that_is_killed_at_an_evaluation_ends_the_same(stopped, tmp_path, monkeypatch, killed_before):
    """Before its state is kept, and before its loss is written."""
    losses = curve(stopped, "eval/loss")
    lowest = min(losses, key=losses.get)

    def killed(self, step, values):
        if killed_before == "scalars" and step == lowest and "eval/loss" in values:
            raise KeyboardInterrupt
        write(self, step, values)

    def killed_taking(self, state, step, loss):
        if killed_before == "take" and step == lowest:
            raise KeyboardInterrupt
        take(self, state, step, loss)

    write, take = loop.Writer.scalars, Best.take
    monkeypatch.setattr(loop.Writer, "scalars", killed)
    monkeypatch.setattr(Best, "take", killed_taking)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    train(tmp_path)
    assert_identical(params_of(tmp_path / "best"), params_of(stopped / "best"))
    assert curve(tmp_path, "eval/loss") == losses and curve(tmp_path / "best", "eval/loss") == curve(
        stopped / "best", "eval/loss"
    )


def test_a_start_that_nothing_improves_is_kept(stopped, tmp_path):
    """A rate that spoils everything: the best of the run is what it started from."""
    params, _ = load_params(stopped / "best")
    train(tmp_path, rate=3.0, initial=lambda model: params)
    assert saved_steps(tmp_path / "best" / "checkpoints") == [0]
    assert_identical(load_params(tmp_path / "best")[0], params)


def test_no_patience_keeps_nothing(tmp_path):
    train_toy(str(tmp_path), num_steps=4)
    assert not (tmp_path / "best").exists()
    with pytest.raises(UserError, match="patience = 0"):
        train_toy(str(tmp_path), num_steps=4, patience=0)
