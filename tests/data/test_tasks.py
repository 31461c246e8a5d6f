"""seqio's own view of the data: tasks, mixtures and the offline cache."""

import importlib
import itertools

import numpy as np
import pytest

from music_synth.data import seqio_windows, tasks
from music_synth.data.examples import cut_window, pad_window
from music_synth.data.feed import open_feed
from music_synth.data.quiet_tensorflow import seqio, tf
from music_synth.data.seqio_windows import NoteToMelFeatureConverter
from music_synth.errors import UserError
from music_synth.midi.tokenizer import Events, Tokenizer

LENGTHS = {"inputs": 2048, "targets": 256, "targets_context": 256}


def test_importing_registers_nothing():
    for name in ("synthetic", "synthetic_nocontext"):
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
    importlib.reload(seqio_windows)
    assert "synthetic" not in seqio.TaskRegistry.names()


def test_tasks_have_the_agreed_features():
    names = tasks.register_tasks()
    assert names[:2] == ["synthetic", "synthetic_nocontext"] and names[-2:] == ["mega", "mega_nocontext"]
    assert len(names) == 2 * (len(tasks.DATA_SETS) + 1)
    assert tasks.register_tasks(Tokenizer(velocity_bins=127)) == names  # anew
    task, without = tasks.registered("synthetic"), tasks.registered("synthetic", context=False)
    assert without.name == "synthetic_nocontext"
    assert set(task.output_features) == {"inputs", "targets", "targets_context"}
    assert set(without.output_features) == {"inputs", "targets"}
    assert task.output_features["inputs"].vocabulary.vocab_size == 1664
    for name in ("targets", "targets_context"):
        feature = task.output_features[name]
        assert isinstance(feature, seqio.ContinuousFeature) and feature.dtype == tf.float32 and feature.rank == 2
    assert task.supports_caching
    assert set(task.splits) == {"train", "validation", "test"}


def test_unknown_data_set_names_the_choices():
    with pytest.raises(UserError, match="unknown data set 'maestro5': choose from synthetic"):
        tasks.build("maestro5")
    with pytest.raises(UserError, match="synthetic:5min"):
        tasks.build("synthetic:big")


@pytest.fixture
def registered(made_tasks, made_data_dir):
    """The tasks made and made_nocontext, and few, whose training split has two pieces."""
    made_tasks.register_tasks(names=["made"], data_dir=made_data_dir)
    few = made_tasks.RecordSource("made:1.0.0", str(made_data_dir), splits={"train": "validation"}, read_only=True)
    made_tasks.register_data_set("few", few)
    return made_tasks


def test_plain_seqio_reads_the_task(registered, made):
    """Any trainer over seqio gets the data: one epoch, every window once."""
    dataset = seqio.get_dataset(
        "made", LENGTHS, NoteToMelFeatureConverter(), dataset_split="train", shuffle=True, seed=1
    )
    rows = list(dataset.as_numpy_iterator())
    assert len(rows) == sum(
        max(1, round(size / 256)) for piece in made["train"] for size in block_sizes(len(piece.mel))
    )
    assert rows[0]["mel"].shape == (256, 128) and rows[0]["note_tokens"].shape == (2048,)
    again = list(
        seqio.get_dataset(
            "made", LENGTHS, NoteToMelFeatureConverter(), dataset_split="train", shuffle=True, seed=1
        ).as_numpy_iterator()
    )
    for a, b in zip(rows, again, strict=True):
        np.testing.assert_array_equal(a["mel"], b["mel"])


def block_sizes(frames):
    bounds = np.arange(-(-frames // 2048) + 1) * frames // -(-frames // 2048)
    return np.diff(bounds)


def test_mixture_rates(registered, made, made_data_dir, find_window):
    registered.register_mixture("mix", ["made", "few"])
    mixture = tasks.registered("mix")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    assert rates == {"made": 5**0.3, "few": 2**0.3}
    feed = open_feed("mix", Tokenizer(), 8, seed=0, data_dir=str(made_data_dir))
    mels = [piece.mel for split in ("train", "validation") for piece in made[split]]
    batches = itertools.islice(feed.train_batches(), 40)
    from_made = [find_window(mel, mels)[0] < 5 for batch in batches for mel in batch["mel"]]
    share = 5**0.3 / (5**0.3 + 2**0.3)
    assert abs(np.mean(from_made) - share) < 3.5 * np.sqrt(share * (1 - share) / len(from_made))
    assert [piece.id for piece in feed.pieces("test")] == ["test-0"]
    assert [piece.id[:5] for piece in feed.pieces("train")] == ["valid"] * 2 + ["train"] * 5  # few, made


def test_offline_cache(registered, made, made_data_dir, tmp_path, find_window, monkeypatch):
    from music_synth.data import cache

    monkeypatch.setattr(cache, "MIN_FILES", 3)
    cache.write_cache("made", tmp_path, made_data_dir)
    completed = (tmp_path / "made" / "COMPLETED").stat()
    cache.write_cache("made", tmp_path, made_data_dir)
    assert (tmp_path / "made" / "COMPLETED").stat().st_mtime_ns == completed.st_mtime_ns  # it was there
    with pytest.raises(UserError, match="'few' is not cached"):
        tasks.use_cache(tasks.registered("few"), tmp_path)

    tokenizer = Tokenizer(velocity_bins=127)  # the cache does not know of it
    settings = {"data_dir": str(made_data_dir), "cache_dir": str(tmp_path), "empty_context": 0.0}
    feed = open_feed("made", tokenizer, 8, **settings)
    batches = list(itertools.islice(feed.train_batches(), 6))
    resumed = list(itertools.islice(open_feed("made", tokenizer, 8, **settings).train_batches(4), 2))
    for batch, expected in zip(resumed, batches[4:], strict=True):
        for name in batch:
            np.testing.assert_array_equal(batch[name], expected[name])
    mels = [piece.mel.astype(np.float16) for piece in made["train"]]
    events = [Events.from_notes(piece.notes) for piece in made["train"]]
    seen = set()
    for batch in batches:
        for i, mel in enumerate(batch["mel"]):
            piece, start = find_window(mel, mels)
            row = pad_window(
                cut_window(mels[piece], events[piece], tokenizer, start, 256), tokenizer, 256, training=True
            )
            for name in batch:
                np.testing.assert_array_equal(batch[name][i], row[name])
            seen.add(piece)
    assert seen == set(range(5))


def test_seqio_evaluates_with_our_metrics(made_tasks, made_data_dir):
    """What is right has no error and finds notes; what is louder by 1 everywhere is 8.7 dB off."""
    tokenizer = Tokenizer(velocity_bins=32)
    made_tasks.register_tasks(tokenizer, names=["made"], data_dir=made_data_dir)
    evaluator = seqio.Evaluator(
        "made", NoteToMelFeatureConverter(), sequence_length=LENGTHS, async_compute_metrics=False
    )
    assert [task.name for task in evaluator.eval_tasks] == ["made"]

    def scores(offset):
        def predict(dataset, model_feature_shapes=None):
            return [(index, batch["mel"] + offset) for index, batch in dataset.as_numpy_iterator()]

        future, _ = evaluator.evaluate(compute_metrics=True, predict_fn=predict)
        return {name: float(getattr(value, "value", value)) for name, value in future.result()["made"].items()}

    right, louder = scores(0.0), scores(1.0)
    for name in ("error_db", "frechet_log_mel", "reconstruction_log_mel"):
        assert right[name] == pytest.approx(0, abs=1e-5)
    assert louder["error_db"] == pytest.approx(8.6859, rel=1e-4)
    assert louder["frechet_log_mel"] == pytest.approx(128, rel=1e-3)  # the means of 128 bins move by 1
    assert right["onset_f1"] > 0.2
