"""The training loop. One step of it is `state.train_step`; everything a run writes lands in its `model_dir`."""

from __future__ import annotations

import contextlib
import math
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from music_synth.audio.mel import DB_PER_NEPER, SAMPLE_RATE, log_mel
from music_synth.errors import UserError
from music_synth.evaluation.embeddings import STATISTICS_FRAMES, log_mel_statistics
from music_synth.evaluation.statistics import Gaussian, frechet_distance, reconstruction_distance
from music_synth.files import write_whole
from music_synth.midi.segments import TOKEN_BUCKETS, token_bucket
from music_synth.pictures import mel_image
from music_synth.training import partitioning
from music_synth.training.checkpoint import Checkpointer
from music_synth.training.optimizer import Optimizer
from music_synth.training.state import TrainState, create_state, eval_step, train_step
from music_synth.training.writer import NoWriter, Writer, last_value
from music_synth.vocoder.objective import stft_distance

Batch = dict[str, np.ndarray]
RUN_AHEAD = 2  # steps that may be queued on the device: enough to hide the host, few enough to bound memory


def train(
    model: Any,
    feed: Any,
    optimizer: Optimizer,
    *,
    model_dir: str,
    num_steps: int,
    initial: Callable[[Any], Any] | None = None,  # model -> parameters a new run starts from (or None: random ones)
    max_minutes: float | None = None,  # of updates with their compilation, not of evaluations; None: no limit
    seed: int = 0,  # of parameters, noise and dropout; the order of examples is the feed's own
    num_microbatches: int = 1,  # pieces a batch is computed in, to save memory
    ema_decay: float = 0.999,  # of the average of the parameters that evaluation and playing use; 0: none
    model_parallelism: int = 1,  # devices that share one copy of the parameters
    token_buckets: Sequence[int] = TOKEN_BUCKETS,  # lengths that note tokens are cut to
    log_every: int = 100,  # steps, as are the next two
    checkpoint_every: int = 1000,
    eval_every: int = 1000,
    keep_checkpoints: int = 3,  # the newest
    num_eval_batches: int | None = 20,  # None: all of the validation split
    num_samples: int = 2,  # segments sampled at each evaluation, for distances, pictures and sounds; 0: none
    inverter: Callable[[np.ndarray], np.ndarray] | None = None,  # log-mel [T, M] -> audio [S], for the sounds
    config_text: str = "",  # kept as MODEL_DIR/config.gin
) -> TrainState:
    """Trains until step `num_steps` or for `max_minutes`, whichever is first, and saves.

    Goes on from the newest checkpoint in `model_dir` if there is one, the minutes of the run before included.

    Raises:
        UserError: stopped by SIGTERM or Ctrl-C (after saving), a loss that is not finite, a checkpoint of other
            shapes, a batch size that the devices do not divide, a model_dir that cannot be written.
    """
    check_counts(num_steps=num_steps, log_every=log_every, checkpoint_every=checkpoint_every, eval_every=eval_every)
    check_counts(num_eval_batches=num_eval_batches, shortest_token_bucket=min(token_buckets, default=0))
    check_minutes(max_minutes)
    model.check_feed(feed)
    mesh = partitioning.make_mesh(model_parallelism)
    rows, whole = partitioning.over_data(mesh), partitioning.whole(mesh)
    checkpointer = Checkpointer(make_folder(model_dir), keep_checkpoints)
    state, position = start_state(model, optimizer, mesh, checkpointer, seed, ema_decay, initial)
    step = start_step = saved_step = int(state.step)
    first = jax.process_index() == 0
    writer = open_writer(model_dir, step, config_text) if first else NoWriter()
    say(f"{num_params(state.params):,} parameters on {mesh.devices.size} {jax.default_backend()} device(s)")
    say(f"going on from step {step} in {model_dir}" if step else f"starting in {model_dir}")

    @cache  # compiled once for each stage of the training that the model has
    def update_of(stage: Any) -> Callable:
        return jax.jit(
            partial(train_step, stage, optimizer, num_microbatches, ema_decay),
            donate_argnums=0,
            out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), whole),
        )

    evaluate = jax.jit(partial(eval_step, model), out_shardings=whole)
    sample = jax.jit(model.sample, out_shardings=whole)
    ready = lambda batch: partitioning.put(rows, cut_tokens(check(batch), token_buckets))
    check = partial(checked, model=model, mesh=mesh, num_microbatches=num_microbatches)
    # What will be sampled. Fetched now, so that data without a validation split fail here and not in an hour.
    shown = cut_tokens(first_held_out(feed, num_samples), token_buckets)

    window: list[dict[str, jax.Array]] = []  # metrics of the steps since the last line of the log
    minutes = last_value(model_dir, "train/minutes") if step else 0.0  # up to that line
    budget = math.inf if max_minutes is None else max_minutes
    clock = time.monotonic()
    spent = lambda: {"train/minutes": minutes + (time.monotonic() - clock) / 60}  # up to now
    with (
        contextlib.closing(prefetch(map(ready, feed.train_batches(position)))) as batches,
        StopSignal() as stop,
        progress_bar(start_step, num_steps, first) as bar,
        contextlib.closing(writer),
    ):
        while step < num_steps and minutes < budget:
            batch = next(batches)
            state, metrics = update_of(model.at_step(step))(state, batch)
            step += 1
            window.append(metrics)
            if len(window) > RUN_AHEAD:
                jax.block_until_ready(window[-1 - RUN_AHEAD])
            bar.update()
            seconds = time.monotonic() - clock
            stopping, last = stop.requested(step), step == num_steps or minutes + seconds / 60 >= budget

            if step % log_every == 0 or stopping or last:
                means = mean_metrics(window, step, saved_step, model_dir)  # the only transfer from the device
                seconds = time.monotonic() - clock
                rate, minutes = len(window) * len(batch["mel"]) / seconds, minutes + seconds / 60
                speed = {"train/examples_per_second": rate, "train/minutes": minutes}
                writer.scalars(step, prefixed("train", means) | speed)
                bar.set_postfix_str(f"loss {means['loss']:.4f}, {rate:.1f} examples/s")
                window, clock = [], time.monotonic()
            if step % checkpoint_every == 0 or stopping or last:
                mean_metrics(window, step, saved_step, model_dir)  # never keeps parameters that are not finite
                checkpointer.save(state, data_position=step)
                saved_step = step
                if window:  # no line of the log: a run that goes on from here counts on from this one
                    writer.scalars(step, spent())
            if stopping:
                raise UserError(
                    f"stopped by {stop.name} after step {step}: checkpoint saved in {model_dir}; the same command"
                    " goes on from there"
                )
            if step % eval_every == 0 or last:
                jax.block_until_ready(window)  # so that the clock of updates stops after the last of them
                paused, so_far = time.monotonic(), spent()
                params = state.params if state.ema_params is None else state.ema_params
                held_out = first_n(feed.eval_batches(), num_eval_batches)
                means = mean_over_batches(evaluate, params, map(ready, held_out))
                writer.scalars(step, prefixed("eval", means) | so_far)
                if num_samples:
                    sampled = np.asarray(sample(params, partitioning.put(whole, shown), eval_key(0)))
                    write_samples(writer, step, sampled, shown, inverter)
                writer.flush()
                clock += time.monotonic() - paused
    return state


# --- the state, and where it goes --------------------------------------------------------------------------------


def start_state(
    model: Any,
    optimizer: Optimizer,
    mesh: Any,
    checkpointer: Checkpointer,
    seed: int,
    ema_decay: float,
    initial: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, int]:
    """The newest checkpoint's state, or a fresh one, laid out over the mesh; and the number of its next batch."""
    create = lambda params=None: create_state(model, optimizer, jax.random.key(seed), ema_decay, params)
    shapes = jax.eval_shape(create)
    layout = partitioning.state_shardings(mesh, shapes, model.logical_axes())
    like = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, layout)
    restored = checkpointer.restore_latest(like)
    if restored is not None:
        return restored
    params = initial(model) if initial is not None else None
    if params is not None:
        say(f"parameters from {initial}")
    return jax.jit(create, out_shardings=layout)(params), 0


def check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"train.{name} = {count}: must be at least 1")


def check_minutes(max_minutes: float | None) -> None:
    if max_minutes is not None and not max_minutes > 0:
        raise UserError(f"train.max_minutes = {max_minutes}: must be positive, or None")
    if max_minutes is not None and jax.process_count() > 1:
        raise UserError("train.max_minutes is for one process: the clocks of several would disagree; bound num_steps")


def make_folder(model_dir: str) -> Path:
    try:
        Path(model_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to MODEL_DIR {model_dir}: {error.strerror}") from error
    return Path(model_dir)


def open_writer(model_dir: str, step: int, config_text: str) -> Writer:
    writer = Writer(model_dir, step)
    if config_text:
        write_whole(Path(model_dir) / "config.gin", config_text)
        writer.text(step, "config", "    " + config_text.replace("\n", "\n    "))
    return writer


# --- batches -----------------------------------------------------------------------------------------------------


def cut_tokens(batch: Batch, buckets: Sequence[int]) -> Batch:
    """Cuts the padding of note_tokens [B, N], if there are any, to the shortest bucket that holds the longest row.

    Every process sees the whole batch, so all of them choose alike.
    """
    if "note_tokens" not in batch:
        return batch
    tokens = batch["note_tokens"]
    used = np.flatnonzero(np.any(tokens != 0, axis=0))
    longest = int(used[-1]) + 1 if used.size else 1
    return dict(batch, note_tokens=tokens[:, : token_bucket(longest, tokens.shape[1], buckets)])


def checked(batch: Batch, model: Any, mesh: Any, num_microbatches: int) -> Batch:
    """The batch, if it suits the model and the devices; else a UserError."""
    partitioning.check_batch_size(mesh, len(batch["mel"]), num_microbatches)
    model.check_batch(batch)
    return batch


def first_held_out(feed: Any, num_rows: int) -> Batch:
    """The first rows of the validation split; UserError if it is empty."""
    for batch in feed.eval_batches():
        return {name: array[:num_rows] for name, array in batch.items()}
    raise UserError("the validation split holds no segment to evaluate on: prepare the data with one")


def first_n(items: Iterable, n: int | None) -> Iterator:
    return (item for _, item in zip(range(n), items, strict=False)) if n is not None else iter(items)


def prefetch(items: Iterator, size: int = 2) -> Iterator:
    """Yields the items, made up to `size` ahead in a thread, so that the device never waits for the host."""
    made: queue.Queue = queue.Queue(size)
    closed = threading.Event()

    def offer(item) -> None:
        while not closed.is_set():
            with contextlib.suppress(queue.Full):
                return made.put(item, timeout=0.1)

    def make() -> None:
        try:
            for item in items:
                offer((item, None))
                if closed.is_set():
                    return
            offer((None, StopIteration()))
        except BaseException as error:  # carried over to the thread that waits for the item
            offer((None, error))

    thread = threading.Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        closed.set()
        thread.join()  # an interpreter that ends under a thread inside JAX crashes


# --- numbers, pictures, sounds -----------------------------------------------------------------------------------


def mean_metrics(window: list[dict[str, jax.Array]], step: int, saved_step: int, model_dir: str) -> dict[str, float]:
    """Means over the window that ends with `step`; UserError if a loss or a gradient in it is not finite."""
    values = jax.device_get(window)
    for number, metrics in enumerate(values, start=step - len(values) + 1):
        for name in ("loss", "grad_norm"):
            if not np.isfinite(metrics[name]):
                kept = f"checkpoint {saved_step} is kept" if saved_step else "there is no checkpoint yet"
                raise UserError(
                    f"{name} is {metrics[name]} at step {number}: lower the learning rate, lengthen the warm-up or"
                    f" clip the gradients (clip_norm), and start again; {kept} in {model_dir}"
                )
    return {name: float(np.mean([m[name] for m in values])) for name in (values[0] if values else ())}


def mean_over_batches(evaluate: Callable, params: Any, batches: Iterable) -> dict[str, float]:
    """Means of evaluation metrics over all frames that count. Batch i has a key of its own, always the same."""
    total: dict[str, float] = {}
    counted = 0.0
    for i, batch in enumerate(batches):
        metrics, weight = jax.device_get(evaluate(params, batch, eval_key(i)))
        counted += float(weight)
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + float(weight) * float(value)
    return {name: value / max(counted, 1.0) for name, value in total.items()}


def eval_key(i: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0), i)


def write_samples(writer: Writer, step: int, sampled: np.ndarray, batch: Batch, inverter: Callable | None) -> None:
    """Target above sample as one picture an example, both as sounds, and their distances.

    sampled: log-mel [B, T, M], which needs an inverter to be heard; or audio [B, S], as that of a vocoder.
    """
    target, mask = batch["mel"], batch["mel_mask"]  # [B, T, M], [B, T]
    is_audio = sampled.ndim == 2
    mel = log_mel(sampled, np) if is_audio else sampled
    scores = mel_distances(*([one[kept] for one, kept in zip(all_, mask, strict=True)] for all_ in (target, mel)))
    stft_distances = []
    for i in range(len(mel)):
        pair = [mel_image(one) for one in (target[i], mel[i])]  # [M, T, 3] each
        writer.image(step, f"target_above_sample/{i}", np.concatenate(pair, axis=0))
        if is_audio:
            sounds = {"sample": sampled[i], "target": batch["audio"][i]}
        else:
            sounds = {"sample": inverter(mel[i]), "target": inverter(target[i])} if inverter is not None else {}
        for name, audio in sounds.items():
            writer.audio(step, f"{name}/{i}", audio, SAMPLE_RATE)
        if sounds:
            made, recorded = (np.asarray(sounds[name])[None] for name in ("sample", "target"))
            stft_distances.append(float(jax.jit(stft_distance)(made, recorded)[0]))
    if stft_distances:
        scores["stft_distance"] = float(np.mean(stft_distances))
    if scores:
        writer.scalars(step, {f"eval/sample_{name}": value for name, value in scores.items()})


def mel_distances(targets: Sequence[np.ndarray], sampled: Sequence[np.ndarray]) -> dict[str, float]:
    """Distances of log-mels, [T, M] each, in pairs: the mean absolute error in dB over all frames; and between the
    log-mel statistics of those that last 1 s the Fréchet distance and the mean Euclidean one."""
    if not sum(map(len, targets)):
        return {}
    error = np.mean(np.abs(np.concatenate(sampled) - np.concatenate(targets)))
    distances = {"error_db": float(error) * DB_PER_NEPER}
    pairs = [pair for pair in zip(targets, sampled, strict=True) if len(pair[0]) >= STATISTICS_FRAMES]
    if pairs and np.isfinite(error):
        frames = [tuple(map(log_mel_statistics, pair)) for pair in pairs]
        of_targets, of_sampled = (Gaussian.merged(map(Gaussian.of, side)) for side in zip(*frames, strict=True))
        distances["frechet_log_mel"] = frechet_distance(of_targets, of_sampled)
        distances["reconstruction_log_mel"] = float(np.mean([reconstruction_distance(*pair) for pair in frames]))
    return distances


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def num_params(params: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# --- the console, and signals ------------------------------------------------------------------------------------


def say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def progress_bar(start_step: int, num_steps: int, shown: bool) -> tqdm:
    """Steps done, time left and steps a second; a line now and then where the output is a file."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=num_steps,
        initial=start_step,
        unit="step",
        disable=not shown,
        mininterval=interval,
        maxinterval=interval,
        dynamic_ncols=True,
    )


class StopSignal:
    """Notes SIGTERM and Ctrl-C, so that the loop can save first. A second Ctrl-C ends at once."""

    def __init__(self):
        self.name = ""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        # Several processes must stop at the same step: there JAX's own service catches SIGTERM.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`; the same answer in all processes."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return bool(self.name)

    def _note(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
