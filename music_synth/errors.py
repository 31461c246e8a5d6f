"""Errors that are the user's to mend, and how an entry point reports them."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message is one line that names the bad value and the way out."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser for entry points: a wrong flag is a `UserError`; flags are never abbreviated."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def run(main: Callable[[list[str]], None]) -> None:
    """Calls `main(argv)`; a `UserError` becomes one line on stderr and exit status 1.

    `--debug` anywhere in the command line is taken out of it and shows the traceback instead. Warnings are
    shown as one line each.
    """
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    if not debug:
        warnings.showwarning = lambda message, *_: print(f"warning: {_one_line(message)}", file=sys.stderr)
    try:
        main(argv)
    except (UserError, KeyboardInterrupt) as error:
        if debug:
            raise
        message = _one_line(error) if isinstance(error, UserError) else "interrupted"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())
