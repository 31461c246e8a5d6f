"""What the tests of feeds do with batches."""

import itertools

import numpy as np


def take(feed, count, start_step=0):
    return list(itertools.islice(feed.train_batches(start_step), count))


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
