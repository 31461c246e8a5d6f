"""Errors that are the user's to mend, and how an entry point reports them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TextIO

LONGEST_LINE = 600  # characters of an error


class UserError(Exception):
    """Bad input. The message is one line that names the bad value and the way out."""


@contextlib.contextmanager
def needing(what: str, extra: str, otherwise: str = "") -> Iterator[None]:
    """Turns a failing import of the block into a UserError: what needs it, and the extra that brings it."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"{what} ({error}): pip install 'music_synth[{extra}]'{otherwise}") from error


@contextlib.contextmanager
def telling(what: str, remedy: str = "") -> Iterator[None]:
    """Turns an OSError of the block into a UserError: what could not be done, why, and the way out."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror or error}{remedy}") from error


def check_range(settings: Any, least: int, most: int, *names: str) -> None:
    """Raises a ValueError unless the whole numbers that an object has by these names are in least .. most."""
    for name in names:
        value = getattr(settings, name)
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most:,}"
            raise ValueError(f"{type(settings).__name__}.{name} = {value}: must be {bound}")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser for entry points: a wrong flag is a `UserError`; flags are never abbreviated."""

    def __init__(self, prog: str, description: str):
        shown = argparse.RawDescriptionHelpFormatter  # a module's docstring, as it is
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=shown)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main(argv)`; an error that is not the program's own becomes one line on stderr and exit status 1.

    Those are a `UserError`, Ctrl-C, and what the system refuses: a name that is too long or no UTF-8, a full disk, a
    folder that is read-only or gone, memory. Where stdout or stderr can no longer be written, the work goes on without,
    and the status is 1.

    `--debug` anywhere in the command line is taken out of it and shows the traceback instead. Warnings are shown as one
    line each.
    """
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    if not debug:
        warnings.showwarning = lambda message, *_: print(f"warning: {one_line(message)}", file=sys.stderr)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = shown = [_Tolerant(stream, number) for number, stream in enumerate(streams, 1)]
    failed = None
    try:
        try:
            os.getcwd()
        except OSError as error:
            raise UserError("the current folder is gone: change to one that is there") from error
        main(argv)
        shown[0].flush()
        if shown[0].error is not None:
            failed = (
                f"stdout cannot be written ({shown[0].error.strerror}): what it was to show is lost, all else is done"
            )
    except (UserError, KeyboardInterrupt, OSError, UnicodeError, MemoryError, RecursionError) as error:
        if debug:
            raise
        failed = _said(error)
    finally:
        if failed is not None:
            print(f"error: {failed}", file=sys.stderr)
        for stream in shown:
            stream.flush()
        sys.stdout, sys.stderr = streams
    if failed is not None or any(stream.error for stream in shown):
        sys.exit(1)


def _said(error: BaseException) -> str:
    """What is wrong, in one line of bounded length."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    if isinstance(error, OSError):
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return one_line(": ".join([*names, error.strerror or str(error)]))
    if isinstance(error, UnicodeError):
        return one_line(f"a name or text is no UTF-8 ({error}): rename or mend it")
    return one_line(error if isinstance(error, UserError) else f"something is nested too deeply ({error})")


def one_line(message: object) -> str:
    """The message on one line; of a long one the beginning and the end."""
    text = " ".join(str(message).split())
    if len(text) > LONGEST_LINE:
        text = f"{text[: LONGEST_LINE * 2 // 3]} ... {text[-LONGEST_LINE // 3 :]}"
    return text.encode("utf-8", "backslashreplace").decode()  # names of files may hold what is no UTF-8


class _Tolerant:
    """A text stream like `stream` that remembers a first error, and from then on swallows what is written to it.

    So a run whose terminal or log is gone goes on. stream: None, where the process began with it closed.
    """

    def __init__(self, stream: TextIO | None, number: int):
        self.error: OSError | None = None
        self.closed = stream is None
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")
        self._number = number

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text.encode("utf-8", "backslashreplace").decode()))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            self.error = self.error or error
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._number)  # what waits in the buffer goes there
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
