"""One training at a time in a MODEL_DIR."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from music_synth.errors import UserError, telling
from music_synth.training.partitioning import in_all_processes

FILE = "train.lock"  # in MODEL_DIR; left there, empty, when nobody trains


@contextlib.contextmanager
def lock_model_dir(model_dir: str | Path) -> Iterator[Path]:
    """Makes MODEL_DIR and yields it, closed to every other training until the block or the process ends.

    The lock is the kernel's (flock), so it goes with a process that is killed. Between machines it holds where the
    network file system passes locks on (NFS does; Lustre only when mounted with `flock`). Of the processes of one
    run the first locks for all.

    Raises:
        UserError: another training holds it (the message names process, host, start and command), or the folder
            cannot be written.
    """
    folder, problem = Path(model_dir), None
    with contextlib.ExitStack() as held:
        if jax.process_index() == 0:
            try:
                held.enter_context(_locked(folder))
            except UserError as error:
                problem = error
        if not in_all_processes(problem is None):
            raise problem or UserError(f"process 0 cannot train in MODEL_DIR {folder}; it says why")
        yield folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with telling(f"cannot write to MODEL_DIR {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((folder / FILE).open("a+b", buffering=0))
            _take(file.fileno(), folder)
            file.truncate(0)  # in place: a file renamed to this name would be another one, without the lock
            file.write(_this_process().encode())
        held.callback(file.truncate, 0)
        yield


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        raise UserError(
            f"another training is at work in MODEL_DIR {folder}: {holder}; stop it first, or choose another MODEL_DIR"
        ) from None
    except OSError as error:
        warnings.warn(
            f"MODEL_DIR {folder} cannot be locked ({error.strerror}): start no second training in it", stacklevel=2
        )


def _this_process() -> str:
    command = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}, {command[:400]}"
