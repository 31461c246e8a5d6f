#!/usr/bin/env python
"""How fast this machine is, as a table and as JSON: python scripts/benchmark.py [SECTION ...]

    feed       random windows with context: from the tfds data set, from seqio's cache, from prepared arrays
    tokenizer  whole pieces to tokens
    mel        audio to log-mel, as data sets are read (NumPy) and on the device (JAX)

A rate is the median of several measurements, with the lowest and the highest beside it. "a core" is the rate over the
number of cores; "a CPU second" counts the time that cores spent on it, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from music_synth import errors, prepare_data
from music_synth.audio.mel import SAMPLE_RATE, log_mel
from music_synth.data.feed import open_feed
from music_synth.errors import UserError
from music_synth.midi.notes import read_midi
from music_synth.midi.tokenizer import Tokenizer

CORES = len(os.sched_getaffinity(0))
PIECES = sorted((Path(__file__).parents[1] / "data").glob("*.mid"))
MEL_SECONDS = 60  # of the audio that becomes mel: about a piece

Work = tuple[str, str, Callable[[], float]]  # name, unit, and what does some of it and tells how much


def feeds(flags: argparse.Namespace) -> Iterator[Work]:
    """The batches that training reads, from each form of a data set; forms that are not given are made."""
    data_dir = [f"--data_dir={flags.data_dir}"] if flags.data_dir else []
    with tempfile.TemporaryDirectory() as made:
        cache, prepared = flags.cache or Path(made) / "cache", flags.prepared or Path(made) / "prepared"
        for name, task, cache_dir, make in (
            ("tfds data set", flags.task, None, None),
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
                    yield f"{flags.task}, {name}", "examples", lambda batches=batches: len(next(batches)["mel"])
            except UserError as error:  # such as a data set too large to be read without a cache
                print(f"left out: {name}: {error}", file=sys.stderr)


def tokenizer(flags: argparse.Namespace) -> Iterator[Work]:
    """The pieces of data/, one after the other."""
    pieces, encode = itertools.cycle([read_midi(path) for path in PIECES]), Tokenizer().encode

    def work() -> int:
        notes = next(pieces)
        encode(notes)
        return len(notes)

    yield "notes to tokens", "notes", work


def mel(flags: argparse.Namespace) -> Iterator[Work]:
    """Noise."""
    audio = np.random.default_rng(0).uniform(-0.5, 0.5, MEL_SECONDS * SAMPLE_RATE).astype(np.float32)
    on_device, placed = jax.jit(log_mel), jax.device_put(audio)
    for name, make in (("NumPy", lambda: log_mel(audio, np)), ("JAX", lambda: on_device(placed).block_until_ready())):
        yield f"audio to log-mel, {name}", "seconds of audio", lambda make=make: len(make()) and MEL_SECONDS


SECTIONS = {"feed": feeds, "tokenizer": tokenizer, "mel": mel}


def measure(work: Callable[[], float], seconds: float, repeats: int) -> dict[str, float]:
    """Works for `seconds`, once to warm up and then `repeats` times."""
    rates, cpu_rates = [], []
    for _ in range(repeats + 1):
        done, begin, cpu = 0.0, time.perf_counter(), time.process_time()
        while not done or time.perf_counter() < begin + seconds:
            done += work()
        rates.append(done / (time.perf_counter() - begin))
        cpu_rates.append(done / (time.process_time() - cpu))
    median = statistics.median(rates[1:])
    return {
        "median": median,
        "lowest": min(rates[1:]),
        "highest": max(rates[1:]),
        "per_core": median / CORES,
        "per_cpu_second": statistics.median(cpu_rates[1:]),
    }


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
    }


def table(results: list[dict]) -> str:
    rows = [["", "median", "lowest", "highest", "a core", "a CPU second", "unit"]]
    for result in results:
        numbers = [result[key] for key in ("median", "lowest", "highest", "per_core", "per_cpu_second")]
        rows.append([result["name"], *(f"{number:,.0f}" for number in numbers), f"{result['unit']}/s"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers, unit in rows:
        cells = [name.ljust(widths[0]), *(n.rjust(width) for n, width in zip(numbers, widths[1:], strict=False)), unit]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = errors.ArgumentParser("python scripts/benchmark.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--task", default="synthetic", help="name of the data set of `feed`")
    parser.add_argument("--data_dir", help="where data sets live (default: data/ of the checkout)")
    parser.add_argument("--cache", type=Path, help="seqio cache of the task (default: made for the occasion)")
    parser.add_argument("--prepared", type=Path, help="prepared arrays of the task (default: made for the occasion)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each rate")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"), help="the JSON file")
    flags = parser.parse_args(argv)
    for name in flags.sections:
        if name not in SECTIONS:
            raise UserError(f"no section {name!r}: choose from {', '.join(SECTIONS)}")
    if flags.repeats < 1:
        raise UserError(f"--repeats {flags.repeats}: must be at least 1")
    report = machine() | {"command": shlex.join(["python", "scripts/benchmark.py", *argv]), "results": []}
    for section in flags.sections or SECTIONS:
        for name, unit, work in SECTIONS[section](flags):
            rate = measure(work, flags.seconds, flags.repeats)
            report["results"].append({"section": section, "name": name, "unit": unit} | rate)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(report, indent=1) + "\n")
    print("{date}, {cpu}, {cores} cores (load {other_load} before), {device}: {command}".format(**report))
    print(table(report["results"]))
    print(f"median of {flags.repeats} measurements of {flags.seconds:g} s; also in {flags.out}")


if __name__ == "__main__":
    errors.run(main)
