"""TensorFlow, tfds and seqio as this package imports them: without noise, and never on the accelerator.

    from music_synth.data.quiet_tensorflow import seqio, tf, tfds

TensorFlow's C++ side reports missing CUDA libraries before any logging can be set up, so the only way to keep a
console readable is to close standard error while it is imported. Python errors are raised as ever.
"""

import atexit
import contextlib
import functools
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar


@contextlib.contextmanager
def silent_stderr():
    """Sends what is written to file descriptor 2 to nowhere."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read when TensorFlow is first imported
with silent_stderr():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    tf.config.set_visible_devices([], "GPU")  # the accelerator is JAX's

# seqio asks every tfds feature for a property that tfds calls deprecated, and its cache tool says at every file
# where the data set is, and of every task that it caches whether other folders hold it.
NOISE = ("FeatureConnector.dtype", "Overriding TFDS data directory", "--ignore_other_caches")
logging.getLogger("absl").addFilter(lambda record: not any(noise in record.getMessage() for noise in NOISE))


P = ParamSpec("P")
T = TypeVar("T")


def closed_at_exit(function: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """Closes what a generator function returned before Python ends, if it is still there.

    An iterator of tf.data that is left to the very end waits for threads that wait for Python: the process hangs.
    """

    @functools.wraps(function)
    def begin(*args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        generator: Any = function(*args, **kwargs)
        reference = weakref.ref(generator)

        def close() -> None:
            if (left := reference()) is not None:
                left.close()

        atexit.register(close)
        return generator

    return begin


__all__ = ["closed_at_exit", "seqio", "tf", "tfds"]
