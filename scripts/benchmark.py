#!/usr/bin/env python
"""How fast this machine is, as a table and as JSON: python scripts/benchmark.py [SECTION ...]

    feed       random windows with context: from the data set itself, from seqio's cache, from prepared arrays
    tokenizer  whole pieces to tokens
    mel        audio to log-mel, as data sets are read (NumPy) and on the device (JAX)
    decoder    encoding, a step of sampling, a guided step, a segment of 5.12 s with the recipe's sampler
    piece      MIDI to audio, decoder and inverter: the whole, and the time until a stream begins
    training   updates, and the share of the machine's matrix products that they reach

The last three are of --sizes (configs/models/), with random parameters, at batch 1 but for training. The decoder stands
beside the plain way of the published code: cross-attention computed anew in each step, guidance in two passes, tokens
padded to 2,048, 1,000 steps, of which 1 is measured and multiplied. Encoding and steps are those of the published
network in both ways, with the same parameters, so that the outputs can be compared; the rest is diffusion.gin's.
--gin_file=FILE and --gin.NAME=VALUE change the recipes (--gin.NetworkConfig.dtype=bfloat16).

A rate is the median of several measurements, with the lowest and the highest beside it; what is compared is measured in
turns. "a core" is the rate over the number of cores; "a CPU second" counts the time that cores spent on it, which other
work on the machine disturbs least. GFLOP/s are of the operations that XLA counts: on a GPU probably without those
inside fused attention.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from music_synth import config, errors
from music_synth.audio.mel import FRAME_RATE, SAMPLE_RATE, log_mel, scale_mel
from music_synth.compilation import keep_compiled
from music_synth.diffusion.process import to_x_0
from music_synth.errors import UserError
from music_synth.midi.notes import read_midi
from music_synth.midi.segments import pad_tokens, token_bucket
from music_synth.midi.tokenizer import Tokenizer
from music_synth.playing import sample_batch
from music_synth.runs import load_inverter
from music_synth.synthesize import check_writable, synthesize, synthesize_stream
from music_synth.training.step import create_state, train_step

CORES = len(os.sched_getaffinity(0))
PIECES = sorted((Path(__file__).parents[1] / "data").glob("*.mid"))
MEL_SECONDS = 60  # of the audio that becomes mel: about a piece
PUBLISHED, PLAIN_STEPS = "papers/diffusion_base.gin", 1000


class Work(NamedTuple):
    """Something to be measured."""

    name: str
    unit: str
    do: Callable[[], float]  # does some of it and tells how much
    plain: Callable[[], float] | None = None  # the same in the plain way
    flops: float | None = None  # of one unit
    peak: float | None = None  # FLOP/s of a matrix product of the same dtype
    about: str = ""  # what the numbers are of


# --- data --------------------------------------------------------------------------------------------------------


def feeds(flags: argparse.Namespace) -> Iterator[Work]:
    """The batches that training reads, from each form of a data set; forms that are not given are made."""
    from music_synth import prepare_data
    from music_synth.data.feed import open_feed

    data_dir = [f"--data_dir={flags.data_dir}"] if flags.data_dir else []
    with tempfile.TemporaryDirectory() as made:
        cache, prepared = flags.cache or Path(made) / "cache", flags.prepared or Path(made) / "prepared"
        for name, task, cache_dir, make in (
            ("the data set itself", flags.task, None, None),
            ("seqio cache", flags.task, cache, None if flags.cache else f"--cache={cache}"),
            ("prepared arrays", str(prepared), None, None if flags.prepared else f"--out={prepared}"),
        ):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    if make:
                        prepare_data.main([flags.task, make, *data_dir])
                feed = open_feed(task, Tokenizer(), flags.batch_size, data_dir=flags.data_dir, cache_dir=cache_dir)
                with contextlib.closing(feed.train_batches()) as batches:
                    next(batches)
                    yield Work(f"{flags.task}, {name}", "examples", lambda batches=batches: len(next(batches)["mel"]))
            except (UserError, ImportError) as error:  # such as a data set too large to be read without a cache
                print(f"left out: {name}: {error}", file=sys.stderr)


def tokenizer(flags: argparse.Namespace) -> Iterator[Work]:
    """The pieces of data/, one after the other."""
    pieces, encode = itertools.cycle([read_midi(path) for path in PIECES]), Tokenizer().encode

    def work() -> int:
        notes = next(pieces)
        encode(notes)
        return len(notes)

    yield Work("notes to tokens", "notes", work)


def mel(flags: argparse.Namespace) -> Iterator[Work]:
    """Noise."""
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, MEL_SECONDS * SAMPLE_RATE).astype(np.float32)
    on_device, placed = jax.jit(log_mel), jax.device_put(audio)
    for name, make in (("NumPy", lambda: log_mel(audio, np)), ("JAX", lambda: on_device(placed).block_until_ready())):

        def work(make=make):
            return len(make()) and MEL_SECONDS

        yield Work(f"audio to log-mel, {name}", "seconds of audio", work)


# --- networks ----------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    model: Any
    tokenizer: Tokenizer
    optimizer: Any
    params: Any


def recipes(flags: argparse.Namespace) -> Iterator[tuple[str, Recipe]]:
    """diffusion.gin in each of the sizes, with random parameters."""
    for size in flags.sizes:
        yield size, recipe_of("diffusion.gin", size, flags)


def recipe_of(name: str, size: str, flags: argparse.Namespace) -> Recipe:
    keys = "train.model", "Feed.tokenizer", "train.optimizer"
    files = [name, f"models/{size}.gin", *flags.files]
    model, tokens, optimizer = config.build_parts(files, flags.overrides, *keys)
    return Recipe(model, tokens, optimizer, random_parameters(model))


def random_parameters(model: Any) -> Any:
    """Numbers of the size of those that `model.init` makes, without the minutes of compiling it at base size."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * leaf.shape[-2] ** -0.5, leaf.dtype)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0)))


def segment_of(recipe: Recipe, bucket: int | None = None) -> dict[str, np.ndarray]:
    """A batch of one segment: the second of a piece of data/, and noise as its context."""
    network, rng = recipe.model.network, np.random.default_rng(0)
    tokens = recipe.tokenizer.encode(read_midi(PIECES[-1]))[1]
    context = rng.normal(-4, 2, (1, network.context_frames, network.num_mels)).astype(np.float32)
    return {
        "note_tokens": pad_tokens(tokens, bucket or token_bucket(len(tokens), network.max_tokens))[None],
        "context_mel": context,
        "context_mask": np.ones(context.shape[:2], bool),
    }


def decoder(flags: argparse.Namespace) -> Iterator[Work]:
    """What a segment is made of."""
    for size, recipe in recipes(flags):
        published = recipe_of(PUBLISHED, size, flags)  # the network that both ways can compute
        model, params = published.model, published.params
        batch, plain = segment_of(published), Plain(published)
        peak = matrix_product_rate(model.network.dtype)
        encode = jax.jit(lambda params, batch, model=model: model._encode(params, batch, None))
        cache = encode(params, batch)
        film = jax.jit(functools.partial(model._apply, method="condition_time"))(params, plain.t)
        about = "the published network, as are the steps"
        plain_encode = once(plain.encode, params, plain.batch)
        yield Work(f"{size}, encode", "segments", once(encode, params, batch), plain_encode, about=about)
        for name, scale in (("step", 1.0), ("guided step", 2.0)):
            chosen = model.with_sampling(guidance_scale=scale)
            step = jax.jit(lambda p, x, snr, film, cache, model=chosen: model.denoiser(p, cache)(x, snr, film))
            inputs = params, plain.x_t, plain.log_snr, film, cache
            ours, theirs = step(*inputs), plain.step(scale)
            difference = float(jnp.max(jnp.abs(ours - theirs())))
            yield Work(
                f"{size}, {name}",
                "steps",
                once(step, *inputs),
                once(theirs),
                flops_of(step, *inputs),
                peak,
                f"{batch['note_tokens'].shape[1]} tokens; x_0, in [-1, 1], differs by {difference:.1g} at most",
            )
        seed, index = np.zeros(1, np.uint32), np.ones(1, np.uint32)
        model, params, batch = recipe.model, recipe.params, segment_of(recipe)
        yield Work(
            f"{size}, segment",
            "segments",
            once(sample_batch, model, params, batch, seed, index),
            plain.share_of(1),
            about=sampling(model),
        )


def piece(flags: argparse.Namespace) -> Iterator[Work]:
    """The beginning of a piece of data/, MIDI to audio."""
    notes = [note for note in read_midi(PIECES[-1]) if note.onset < flags.piece_seconds]
    inverter = load_inverter(flags.inverter)
    for size, recipe in recipes(flags):
        play = notes, recipe.model, recipe.params, recipe.tokenizer, inverter
        plain = Plain(recipe_of(PUBLISHED, size, flags))

        def whole(play=play):
            return len(synthesize(*play)[0]) / SAMPLE_RATE

        def first(play=play):
            return len(next(synthesize_stream(*play))) > 0

        seconds = recipe.model.network.target_frames / FRAME_RATE
        yield Work(f"{size}, piece", "seconds of music", whole, plain.share_of(seconds), about=sampling(recipe.model))
        yield Work(f"{size}, first audio of a stream", "starts", first, plain.share_of(1), about=sampling(recipe.model))


def sampling(model: Any) -> str:
    s = model.sampler
    return f"{s.name}, {s.num_steps} steps, guidance {s.guidance_scale:g}; plain: {PLAIN_STEPS} guided, 1 measured"


class Plain:
    """The way of the published code, on our own network."""

    def __init__(self, recipe: Recipe):
        model, self.params = recipe.model, recipe.params
        self.model, self.batch = model, segment_of(recipe, recipe.model.network.max_tokens)
        self.t, self.log_snr = jnp.full(1, 0.5), model.schedule.log_snr(jnp.float32(0.5))
        self.x_t = jax.random.normal(jax.random.key(1), (1, model.network.target_frames, model.network.num_mels))
        self.encode = jax.jit(self._encode)  # once a segment, as published

    def _encode(self, params: Any, batch: dict) -> Any:
        tokens, context = batch["note_tokens"], scale_mel(batch["context_mel"], clip=True)
        inputs = tokens, tokens > 0, context, batch["context_mask"], True
        return self.model._apply(params, *inputs, method="encodings")

    def step(self, guidance_scale: float) -> Callable[[], jax.Array]:
        """x_0 of one step, guided by a second pass over encodings that are zero and masked."""
        model, log_snr = self.model, self.log_snr
        encodings = self.encode(self.params, self.batch)
        nothing = jax.tree.map(jnp.zeros_like, encodings)

        @jax.jit
        def denoise(params: Any, x_t: jax.Array, t: jax.Array, encodings: Any, nothing: Any) -> jax.Array:
            def decode(sources: Any, masks: Any, roll: Any) -> jax.Array:
                cache = model._apply(params, sources, masks, method="precompute")._replace(roll=roll)
                film = model._apply(params, t, method="condition_time")
                return model._apply(params, x_t, film, cache, method="decode")

            output = decode(*encodings)
            if guidance_scale != 1.0:
                output = guidance_scale * output + (1.0 - guidance_scale) * decode(*nothing)
            x_0 = to_x_0(output, x_t, log_snr, model.prediction_type)
            return jnp.clip(x_0, -1.0, 1.0) if model.sampler.clip_x_0 else x_0

        return functools.partial(denoise, self.params, self.x_t, self.t, encodings, nothing)

    def share_of(self, amount: float) -> Callable[[], float]:
        """One guided step of the `PLAIN_STEPS` that `amount` takes; encoding and inverter are left out."""
        step = once(self.step(2.0))
        return lambda: step() * amount / PLAIN_STEPS


def training(flags: argparse.Namespace) -> Iterator[Work]:
    """Updates of a batch of equal segments, with the recipe's optimizer."""
    for size, recipe in recipes(flags):
        model, optimizer, rows = recipe.model, recipe.optimizer, flags.train_batch
        batch = {name: np.repeat(array, rows, axis=0) for name, array in segment_of(recipe).items()}
        batch |= {"mel": batch["context_mel"], "mel_mask": batch["context_mask"]}
        update = jax.jit(functools.partial(train_step, model, optimizer, 1, 0.999), donate_argnums=0)
        start = types.SimpleNamespace(init=lambda key, recipe=recipe: recipe.params)
        states = [create_state(start, optimizer, jax.random.key(0), 0.999)]

        def work(update=update, states=states, batch=batch) -> int:
            states[0], metrics = update(states[0], batch)
            jax.block_until_ready(metrics)
            return len(batch["mel"])

        flops, peak = flops_of(update, states[0], batch) / rows, matrix_product_rate(model.network.dtype)
        yield Work(f"{size}, training", "examples", work, flops=flops, peak=peak, about=f"batches of {rows}")


def once(function: Callable, *args: Any) -> Callable[[], int]:
    """Does it once, until the device is done."""
    return lambda: 1 if jax.block_until_ready(function(*args)) is not None else 0


def flops_of(function: Any, *args: Any) -> float:
    """Floating-point operations of a call of a jitted function, as XLA counts them in its program; 0: it does not.

    Some backends count only in what they compiled (CUDA). There, what is inside a fused attention kernel is probably
    not counted, so that the true rate is higher.
    """
    lowered = function.lower(*args)
    cost = lowered.cost_analysis() or lowered.compile().cost_analysis() or {}
    cost = cost[0] if isinstance(cost, (list, tuple)) else cost
    return max(float(cost.get("flops", 0.0)), 0.0)  # XLA's -1 is "unknown"


@functools.cache
def matrix_product_rate(dtype: str) -> float:
    """Operations a second of a large product of two matrices: the most that can be hoped for, best of ten."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(jnp.matmul)
    times = []
    for _ in range(11):
        begin = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        times.append(time.perf_counter() - begin)
    return 2 * size**3 / min(times)


SECTIONS = {
    "feed": feeds,
    "tokenizer": tokenizer,
    "mel": mel,
    "decoder": decoder,
    "piece": piece,
    "training": training,
}


# --- measuring ---------------------------------------------------------------------------------------------------


def measure(work: Callable[[], float], plain: Callable[[], float] | None, seconds: float, repeats: int) -> dict:
    """Works for `seconds`, once to warm up and then `repeats` times; in turns with the plain way, if there is one."""
    rates: dict[Callable, list[float]] = {way: [] for way in (work, plain) if way}
    cpu_rates = []
    for _ in range(repeats + 1):
        for way, measured in rates.items():
            done, begin, cpu = 0.0, time.perf_counter(), time.process_time()
            while not done or time.perf_counter() < begin + seconds:
                done += way()
            measured.append(done / (time.perf_counter() - begin))
            if way is work:
                cpu_rates.append(done / (time.process_time() - cpu))
    median = statistics.median(rates[work][1:])
    result = {
        "median": median,
        "lowest": min(rates[work][1:]),
        "highest": max(rates[work][1:]),
        "per_core": median / CORES,
        "per_cpu_second": statistics.median(cpu_rates[1:]),
    }
    if plain:
        result["plain"] = statistics.median(rates[plain][1:])
        result["times_faster"] = statistics.median(a / b for a, b in list(zip(*rates.values(), strict=True))[1:])
    return result


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at once so far, and those of the device."""
    kept = {"peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return kept if device is None else kept | {"device_peak_memory": device}


def machine() -> dict[str, str | int | float]:
    """What the numbers are of."""
    models = [platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(": ")[2] for line in lines if line.startswith("model name")] or models
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": models[0],
        "cores": CORES,
        "other_load": round(os.getloadavg()[0], 1),  # before anything is measured
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def table(results: list[dict]) -> str:
    rows = [["", "median", "lowest", "highest", "a core", "a CPU second", "plain", "times faster", "GFLOP/s", "unit"]]
    for result in results:
        numbers = [result[key] for key in ("median", "lowest", "highest", "per_core", "per_cpu_second")]
        numbers += [result.get("plain"), result.get("times_faster"), result.get("gflops")]
        rows.append([result["name"], *map(short, numbers), f"{result['unit']}/s"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers, unit in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=False)), unit]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def short(number: float | None) -> str:
    return "" if number is None else f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def main(argv: list[str]) -> None:
    keep_compiled()
    files, overrides, rest = config.split_flags(argv)
    parser = errors.ArgumentParser("python scripts/benchmark.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--sizes", default="tiny,small,base", help="of the networks, from configs/models/")
    parser.add_argument("--piece_seconds", type=float, default=14.0, help="of the piece that is played")
    parser.add_argument("--inverter", help="of the piece, as for synthesize (default: the one that ships)")
    parser.add_argument("--task", default="synthetic", help="name of the data set of `feed`")
    parser.add_argument("--data_dir", help="where data sets live (default: data/ of the checkout)")
    parser.add_argument("--cache", type=Path, help="seqio cache of the task (default: made for the occasion)")
    parser.add_argument("--prepared", type=Path, help="prepared arrays of the task (default: made for the occasion)")
    parser.add_argument("--batch_size", type=int, default=32, help="of `feed`")
    parser.add_argument("--train_batch", type=int, default=8, help="of `training`")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each rate")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"), help="the JSON file")
    flags = parser.parse_args(rest)
    flags.overrides, flags.files, flags.sizes = overrides, files, flags.sizes.split(",")
    for name in flags.sections:
        if name not in SECTIONS:
            raise UserError(f"no section {name!r}: choose from {', '.join(SECTIONS)}")
    for name in ("repeats", "batch_size", "train_batch"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)}: must be at least 1")
    try:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {flags.out}: cannot make its folder ({error.strerror})") from error
    check_writable(flags.out, (flags.out.suffix.lower(),))  # any name will do
    report = machine() | {"command": shlex.join(["python", "scripts/benchmark.py", *argv]), "results": []}
    for section in flags.sections or SECTIONS:
        for work in SECTIONS[section](flags):
            result = {"section": section, "name": work.name, "unit": work.unit}
            result |= measure(work.do, work.plain, flags.seconds, flags.repeats) | peak_memory()
            if work.flops:
                rate = result["median"] * work.flops
                result |= {"gflops": rate / 1e9, "utilization": rate / work.peak, "matrix_product": work.peak / 1e9}
            report["results"].append(result | ({"about": work.about} if work.about else {}))
            print(f"measured: {work.name}", file=sys.stderr)
    print("{date}, {cpu}, {cores} cores (load {other_load} before), {device}: {command}".format(**report))
    print(table(report["results"]))
    for result in report["results"]:
        told = [result["about"]] if "about" in result else []
        if "utilization" in result:
            told.append(f"{result['utilization']:.0%} of a matrix product's {result['matrix_product']:,.0f} GFLOP/s")
        if told:
            print(f"{result['name']}: {'; '.join(told)}")
    memory = [f"{name.replace('_', ' ')} {n / 1e9:.2f} GB" for name, n in peak_memory().items()]
    print(f"median of {flags.repeats} measurements of {flags.seconds:g} s; {', '.join(memory)}")
    try:
        flags.out.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--out {flags.out}: cannot write ({error.strerror})") from error
    print(f"also in {flags.out}")


if __name__ == "__main__":
    errors.run(main)
