"""Threads of libraries on cores that are shared."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

from threadpoolctl import ThreadpoolController


def one_blas_thread() -> AbstractContextManager:
    """Keeps OpenBLAS to one thread inside the block.

    Eigenvalues and products of our sizes take it as long on one as on many, which spin where cores are shared: a
    hundred times the CPU time on two busy cores.
    """
    return _blas().limit(limits=1, user_api="blas")


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
