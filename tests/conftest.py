"""Every test runs on the CPU, with JAX refusing silent promotion of ranks and dtypes.

Code that must mix dtypes on purpose says so there; a test of foreign code may relax it with
`with jax.numpy_dtype_promotion("standard"):`.
"""

import os

# Before jax is imported: tests never take an accelerator, and no test process grabs every core's worth of logs.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
