"""Builds of data sets in processes of their own, to be killed, and what they made."""

import subprocess
import sys

from music_synth.data.datasets import builder

ANY_TIME = 240  # seconds, which no build takes


def started(argv, **settings):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "music_synth.prepare_data", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def records(data_set, data_dir):
    """Every split of a data set, in order."""
    made = builder.open_built(data_set, data_dir)
    return {
        split: [
            (r["id"], r["audio"].tobytes(), r["sequence"], r["programs"].tolist())
            for r in made.as_dataset(split=split).as_numpy_iterator()
        ]
        for split in made.info.splits
    }
