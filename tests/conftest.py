"""Every test runs on the CPU, with JAX refusing silent promotion of ranks and dtypes.

Code that must mix dtypes on purpose says so there; a test of foreign code may relax it with
`with jax.numpy_dtype_promotion("standard"):`.
"""

import os

# Before jax is imported: tests never take an accelerator, and no test process grabs every core's worth of logs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # nor does one write to the home folder; see `quick_compilation`
# Before NumPy is: on cores that other processes use too, OpenBLAS's threads spin a hundred times what they compute.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The folder where `quick_compilation` keeps what was compiled."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def quick_compilation(compiled):
    """For tests of small things, whose time is XLA's: compile fast, not well, and the same program only once.

    Here and, through the environment, in the processes that a test starts.
    """
    settings = {  # name: (in these tests, by default)
        "jax_disable_most_optimizations": (True, False),
        "jax_enable_compilation_cache": (True, False),
        "jax_compilation_cache_dir": (str(compiled), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, (value, _) in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), "1" if value is True else str(value))
        reset_cache()
        yield
    for name, (_, default) in settings.items():
        jax.config.update(name, default)
    reset_cache()


@pytest.fixture
def compilations():
    """A list that grows by one with every program that XLA compiles."""
    programs = []

    def note(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield programs
    jax.monitoring.unregister_event_duration_listener(note)
