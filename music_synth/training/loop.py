"""The training loop. One step of it is `step.train_step`; everything a run writes lands in its `model_dir`."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from music_synth.errors import UserError
from music_synth.midi.segments import TOKEN_BUCKETS
from music_synth.training import partitioning
from music_synth.training.batches import cut_tokens, on_devices, prefetch
from music_synth.training.best import Best
from music_synth.training.checkpoint import Checkpointer
from music_synth.training.held_out import HeldOut, first_held_out
from music_synth.training.lock import lock_model_dir
from music_synth.training.optimizer import Optimizer
from music_synth.training.step import Batch, Feed, Metrics, Model, TrainState, create_state, num_params, train_step
from music_synth.training.writer import NoWriter, Writer, last_value

MAX_COUNT = 10**8  # of steps; the longest published runs have a million
RUN_AHEAD = 2  # steps that may be queued on the device: enough to hide the host, few enough to bound memory


def train(
    model: Model,
    feed: Feed,
    optimizer: Optimizer,
    *,
    model_dir: str,
    num_steps: int,
    initial: Callable[[Model], Any] | None = None,  # model -> parameters a new run starts from (or None: random ones)
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
    patience: int | None = None,  # evaluations in a row without a lower held-out loss that end the run; None: none do
    num_samples: int = 2,  # segments sampled at each evaluation, for distances, pictures and sounds; 0: none
    inverter: Callable[[np.ndarray], np.ndarray] | None = None,  # log-mel [T, M] -> audio [S], for the sounds
    config_text: str = "",  # kept as MODEL_DIR/config.gin
) -> TrainState:
    """Trains until step `num_steps`, for `max_minutes` or as `patience` says, whichever is first, and saves.

    With `patience` the state of the lowest held-out loss, the start's among them, is kept as the run MODEL_DIR/best.
    Goes on from the newest checkpoint in `model_dir` if there is one, the minutes of the run before included.

    Raises:
        UserError: stopped by SIGTERM or Ctrl-C (after saving), a loss that is not finite, a checkpoint of other
            shapes, a batch size that the devices do not divide, a model_dir that cannot be written or that another
            training is at work in.
    """
    check_settings(1, MAX_COUNT, num_steps=num_steps, num_eval_batches=num_eval_batches, patience=patience)
    check_settings(1, MAX_COUNT, log_every=log_every, checkpoint_every=checkpoint_every, eval_every=eval_every)
    check_settings(1, MAX_COUNT, shortest_token_bucket=min(token_buckets, default=0))
    check_settings(1, MAX_COUNT, keep_checkpoints=keep_checkpoints)
    check_settings(0, 2**32 - 1, seed=seed, num_samples=num_samples)
    if not model_dir:
        raise UserError("train.model_dir = '': name a folder for the run")
    check_minutes(max_minutes)
    model.check_feed(feed)
    mesh = partitioning.make_mesh(model_parallelism)
    create, like = state_to_make(model, optimizer, mesh, seed, ema_decay)
    with contextlib.ExitStack() as run:
        checkpointer = Checkpointer(run.enter_context(lock_model_dir(model_dir)), keep_checkpoints)
        restored, position = checkpointer.restore_latest(like) or (None, 0)
        params = None if initial is None or restored is not None else initial(model)
        if params is not None:
            say(f"parameters from {initial}")
        step = start_step = saved_step = 0 if restored is None else int(restored.step)
        say(f"{num_params(like.params):,} parameters on {mesh.devices.size} {jax.default_backend()} device(s)")
        say(f"going on from step {step} in {model_dir}" if step else f"starting in {model_dir}")
        first = jax.process_index() == 0
        writer = run.enter_context(contextlib.closing(Writer(model_dir, step) if first else NoWriter()))
        writer.config(step, config_text)
        best = Best(model_dir, patience, step)

        @cache  # compiled once for each stage of the training that the model has
        def update_of(stage: Model) -> Any:
            layout = jax.tree.map(lambda leaf: leaf.sharding, like)
            return jax.jit(
                partial(train_step, stage, optimizer, num_microbatches, ema_decay),
                donate_argnums=0,
                out_shardings=(layout, partitioning.whole(mesh)),
            )

        ready = partial(
            on_devices, model=model, mesh=mesh, num_microbatches=num_microbatches, token_buckets=token_buckets
        )
        # What will be sampled. Fetched now, so that data without a validation split fail here and not in an hour.
        shown = cut_tokens(first_held_out(feed, num_samples), token_buckets)
        held_out = HeldOut(model, feed, mesh, ready, shown, num_eval_batches, inverter)

        window: list[Metrics] = []  # of the steps since the last line of the log
        minutes = last_value(model_dir, "train/minutes") if step else 0.0  # up to that line
        budget = math.inf if max_minutes is None else max_minutes
        batches: Iterator[Batch] = run.enter_context(
            contextlib.closing(prefetch(map(ready, feed.train_batches(position))))
        )
        stop = run.enter_context(StopSignal())
        bar = run.enter_context(progress_bar(start_step, num_steps, first))

        def evaluate(minutes: float) -> None:
            params = state.params if state.ema_params is None else state.ema_params
            metrics = held_out.metrics(params)
            best.take(state, step, metrics["loss"])
            writer.scalars(step, prefixed("eval", metrics) | {"train/minutes": minutes})
            held_out.write_samples(writer, step, params)
            writer.flush()

        clock = time.monotonic()
        if restored is None:
            state, batches = first_state(partial(create, params), update_of(model.at_step(0)), like, batches)
        else:
            state = restored
        del params, restored  # for the whole run they would hold what the state has its own of
        if best.wants(step) and step % eval_every == 0:
            paused = time.monotonic()
            evaluate(minutes)
            clock += time.monotonic() - paused
        while step < num_steps and minutes < budget and not best.is_over:
            batch = next(batches)
            state, metrics = update_of(model.at_step(step))(state, batch)
            step += 1
            window.append(metrics)
            if len(window) > RUN_AHEAD:
                jax.block_until_ready(window[-1 - RUN_AHEAD])
            bar.update()
            now = minutes + (time.monotonic() - clock) / 60
            stopping, last = stop.requested(step), step == num_steps or now >= budget

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
                if window:  # no line of the log: a run that goes on from here counts on from this one
                    writer.scalars(step, {"train/minutes": minutes + (time.monotonic() - clock) / 60})
                writer.flush()
                checkpointer.save(state, data_position=step)
                saved_step = step
            if stopping:
                raise UserError(
                    f"stopped by {stop.name} after step {step}: checkpoint saved in {model_dir}; the same command"
                    " goes on from there"
                )
            if step % eval_every == 0 or last:
                jax.block_until_ready(window)  # so that the clock of updates stops after the last of them
                paused = time.monotonic()
                evaluate(minutes + (paused - clock) / 60)
                clock += time.monotonic() - paused
        best.close()
    return state


# --- before the first step ---------------------------------------------------------------------------------------


def state_to_make(
    model: Model, optimizer: Optimizer, mesh: Mesh, seed: int, ema_decay: float
) -> tuple[Callable[[Any], TrainState], TrainState]:
    """Returns what makes a fresh state of parameters (None: random ones), and its shapes, laid out over the mesh."""
    create = partial(create_state, model, optimizer, jax.random.key(seed), ema_decay)
    shapes = jax.eval_shape(create)
    layout = partitioning.state_shardings(mesh, shapes, model.logical_axes())
    like = jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, layout)
    return jax.jit(create, out_shardings=layout), like


def first_state(
    create: Callable[[], TrainState], update: Any, like: TrainState, batches: Iterator[Batch]
) -> tuple[TrainState, Iterator[Batch]]:
    """Makes the state while the jitted `update` compiles for the first batch; returns it, and the batches anew."""
    batch = next(batches)
    lowered = update.lower(like, batch)
    with ThreadPoolExecutor(1) as pool:  # each takes seconds to compile
        compiled = pool.submit(lowered.compile)
        state = create()
        compiled.result()
    return state, itertools.chain([batch], batches)


def check_settings(low: int, high: int, **values: int | None) -> None:
    """Raises UserError for a value, except None, that is not in low..high."""
    for name, value in values.items():
        if value is not None and not low <= value <= high:
            raise UserError(f"train.{name} = {value}: must be in {low}..{high}")


def check_minutes(max_minutes: float | None) -> None:
    """Raises UserError for a limit that is none, or that several processes cannot keep alike."""
    if max_minutes is not None and not max_minutes > 0:
        raise UserError(f"train.max_minutes = {max_minutes}: must be positive, or None")
    if max_minutes is not None and jax.process_count() > 1:
        raise UserError("train.max_minutes is for one process: the clocks of several would disagree; bound num_steps")


# --- numbers -----------------------------------------------------------------------------------------------------


def mean_metrics(window: list[dict[str, jax.Array]], step: int, saved_step: int, model_dir: str) -> dict[str, float]:
    """Returns means over the window that ends with `step`; UserError if a loss or gradient in it is not finite."""
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


def prefixed(prefix: str, values: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in values.items()}


# --- the console, and signals ------------------------------------------------------------------------------------


def say(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)


def progress_bar(start_step: int, num_steps: int, shown: bool) -> tqdm:
    """Shows steps done, time left and steps a second; a line now and then where the output is a file."""
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
        """Tells whether to stop after `step`; the same answer in all processes."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            if multihost_utils.reached_preemption_sync_point(step):
                self.name = "SIGTERM"
        return bool(self.name)

    def _note(self, number: int, frame: Any) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
