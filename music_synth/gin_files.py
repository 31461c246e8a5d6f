"""Gin files as data: reading one imports and makes nothing, whoever wrote it.

A binding "Diffusion.network = @NetworkConfig()" is {"Diffusion.network": Reference("NetworkConfig", True)}; names lose
their modules and keep their scopes. `gin_objects.Maker` makes what bindings stand for.
"""

from __future__ import annotations

import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gin import config_parser

from music_synth.errors import UserError

CONFIG_FILE = "config.gin"  # of a run: everything that was in force, defaults too
MAX_BYTES = 2**20  # of a file; a run's config has some 5 kB
MAX_FILES = 100  # that one file includes, with those that they include
MAX_BRACKETS = 30  # within one another; so many references and macros, too
MAX_VALUES = 100_000  # that one file's references and macros stand for

Bindings = dict[str, Any]  # "scope/Name.parameter", or the name of a macro, to a value


@dataclass(frozen=True)
class Macro:
    """%NAME in a gin file."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Reference:
    """@scope/Name or, if it is to be called, @scope/Name()."""

    name: str
    evaluate: bool

    def __repr__(self) -> str:
        return f"@{self.name}{'()' * self.evaluate}"


# --- reading -----------------------------------------------------------------------------------------------------


class _AsData(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Reference:
        return Reference(without_module(scoped_selector), evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def without_module(selector: str) -> str:
    """ "scope/package.module.Name" -> "scope/Name" """
    scope, slash, name = selector.rpartition("/")
    return scope + slash + name.rsplit(".", 1)[-1]


def statements(text: str, where: Callable[[int], str]) -> Iterator[tuple[Any, str]]:
    """Each statement of gin's parser with the place it stands at, as `where` says it of a line.

    Raises:
        UserError: the text does not parse, or its brackets are too deep.
    """
    parser = None
    try:
        _check_brackets(text)
        parser = config_parser.ConfigParser(text, _AsData())
        while (statement := next(parser, None)) is not None:
            yield statement, where(statement.location.line_num)
    except tokenize.TokenError as error:
        raise UserError(f"{where(error.args[1][0])}: {error.args[0]}: a bracket or quote is left open") from error
    except SyntaxError as error:
        message = error.msg.splitlines()[-1].strip().rstrip(".")
        raise UserError(f"{where(error.lineno or 1)}: {message} in {(error.text or '').strip()[:80]!r}") from error
    except (ValueError, RecursionError) as error:
        line = parser.current_token.start[0] if parser else 1
        raise UserError(f"{where(line)}: {str(error).splitlines()[0]}") from error


def _check_brackets(text: str) -> None:
    depth, lines = 0, iter(text.splitlines(keepends=True))
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        if depth > MAX_BRACKETS:
            raise SyntaxError(f"more than {MAX_BRACKETS} brackets in one another", ("", *token.start, token.line))


def read_file(path: Path) -> str:
    """The text of a gin file; UserError if it is no plain file, larger than `MAX_BYTES`, or no text."""
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(f"it is larger than {MAX_BYTES >> 20} MB")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from error


def read(path: Path, find: Callable[[str, Path], Path | None]) -> Bindings:
    """What a gin file and those that it includes bind, of whatever program; what comes later wins.

    Args:
        find: what an included name stands for, given the file that includes it; None: it is passed over.

    Raises:
        UserError: a file cannot be read or does not parse, or includes itself, or too many are included.
    """
    bindings: Bindings = {}
    for statement, _ in all_statements(path, find):
        if isinstance(statement, config_parser.BindingStatement):
            bindings[key_of(statement)] = statement.value
    return bindings


def all_statements(path: Path, find: Callable[[str, Path], Path | None]) -> Iterator[tuple[Any, str]]:
    """`statements` of a file, with those of a file in place of each line that includes it."""
    left = MAX_FILES

    def walk(path: Path, including: tuple[Path, ...]) -> Iterator[tuple[Any, str]]:
        nonlocal left
        left -= 1
        for statement, place in statements(read_file(path), lambda line: f"{path}, line {line}"):
            if not isinstance(statement, config_parser.IncludeStatement):
                yield statement, place
                continue
            included = located(place, find, statement.filename, path)
            if included in including:
                raise UserError(f"{place}: {included} includes itself")
            if left < 0:
                raise UserError(f"{place}: more than {MAX_FILES} files are included")
            if included is not None:
                yield from walk(included, (*including, included))

    return walk(path, (path,))


def located(place: str, function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)`, whose complaint is said with the place of the statement that it is about."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def key_of(statement: Any) -> str:
    """ "scope/Name.parameter", or a macro's name, of a binding."""
    scope, selector, parameter, _ = statement[:4]
    name = without_module(f"{scope}/{selector}" if scope else selector)
    return f"{name}.{parameter}" if parameter else name


def none_included(name: str, path: Path) -> None:
    """For `read`: a file that stands for itself alone."""
    raise UserError(f"the config of a run includes no other file, and this one {name!r}")


def included_beside(name: str, path: Path) -> Path | None:
    """For `read`: an included file in the folder of the file, or below it; others are passed over."""
    return _within(path.parent, name)


def included_around(name: str, path: Path) -> Path | None:
    """For `read`: as `included_beside`, or "top/base.gin" where the file lies somewhere in a folder `top`."""
    tops = [folder for folder in path.absolute().parents if folder.name == Path(name).parts[0]]
    places = (_within(top, str(Path(*Path(name).parts[1:]))) for top in tops)
    return _within(path.parent, name) or next(filter(None, places), None)


def _within(folder: Path, name: str) -> Path | None:
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None


def read_values(path: Path, find: Callable[[str, Path], Path | None] = included_beside) -> Bindings:
    """`read`, where a macro stands for its value, a reference for its text, "@T5Config()".

    A macro that nothing sets, or that stands for itself, is None.

    Raises:
        UserError: as of `read`, and where macros stand for more than `MAX_VALUES` values.
    """
    bindings, left = read(path, find), MAX_VALUES

    def resolved(value: Any, within: frozenset[str]) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"{path}: its macros stand for more than {MAX_VALUES:,} values")
        if isinstance(value, Macro):
            return None if value.name in within else resolved(bindings.get(value.name), within | {value.name})
        if isinstance(value, Reference):
            return repr(value)
        return mapped(value, lambda part: resolved(part, within))

    return {key: resolved(value, frozenset()) for key, value in bindings.items()}


def mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value`, with the function applied to the elements of a container."""
    if isinstance(value, dict):
        return {key: function(one) for key, one in value.items()}
    return type(value)(map(function, value)) if isinstance(value, (list, tuple)) else value
