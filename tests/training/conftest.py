"""Compiling is most of the time of these tests, and nothing in them is large: let XLA compile fast, not well."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """Here and, through the environment, in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        before = jax.config.read("jax_disable_most_optimizations")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", before)
