"""Gin files as data, and what they stand for made from a table of names: reading alone imports and makes nothing.

A binding "Diffusion.network = @NetworkConfig()" is {"Diffusion.network": Reference("NetworkConfig", True)}; names lose
their modules and keep their scopes. A `Maker` follows references and macros with bounds on depth and size, calls only
what its table names, and only where the kind of the thing suits the parameter it is for.

So the config of a run that somebody sent can be read: `PARTS` are what a model and tokenizer are made of.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import importlib
import inspect
import math
import tokenize
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gin import config_parser

from music_synth.errors import UserError

PARTS = {  # of a trained model; nothing here reads or writes a file
    "Tokenizer": "music_synth.midi.tokenizer:Tokenizer",
    "Vocabulary": "music_synth.midi.vocabulary:Vocabulary",
    "NetworkConfig": "music_synth.models.layers:NetworkConfig",
    "Diffusion": "music_synth.diffusion.objective:Diffusion",
    "CosineSchedule": "music_synth.diffusion.schedule:CosineSchedule",
    "LinearSchedule": "music_synth.diffusion.schedule:LinearSchedule",
    "SquaredCosineSchedule": "music_synth.diffusion.schedule:SquaredCosineSchedule",
    "Sampler": "music_synth.diffusion.sampler:Sampler",
    "Autoregressive": "music_synth.autoregressive.objective:Autoregressive",
    "Deterministic": "music_synth.autoregressive.outputs:Deterministic",
    "GaussianMixture": "music_synth.autoregressive.outputs:GaussianMixture",
    "Vocoder": "music_synth.vocoder.objective:Vocoder",
    "MelGANGenerator": "music_synth.vocoder.melgan:MelGANGenerator",
    "ISTFTGenerator": "music_synth.vocoder.istft:ISTFTGenerator",
    "Discriminators": "music_synth.vocoder.melgan:Discriminators",
}
OPTIMIZERS = {
    name: f"music_synth.training.optimizer:{name}"
    for name in ("adafactor", "adamw", "muon", "constant_rate", "warmup_constant", "warmup_cosine", "warmup_rsqrt")
}

CONFIG_FILE = "config.gin"  # of a run: everything that was in force, defaults too
MAX_BYTES = 2**20  # of a file; a run's config has some 5 kB
MAX_FILES = 100  # that one file includes, with those that they include
MAX_BRACKETS = 30  # within one another; so many references and macros, too
MAX_VALUES = 100_000  # that one file's references and macros stand for
MAX_INT = 2**63 - 1

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
        message = error.msg.rstrip(".")
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
        return _mapped(value, lambda part: resolved(part, within))

    return {key: resolved(value, frozenset()) for key, value in bindings.items()}


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    """`value`, with the function applied to the elements of a container."""
    if isinstance(value, dict):
        return {key: function(one) for key, one in value.items()}
    return type(value)(map(function, value)) if isinstance(value, (list, tuple)) else value


# --- making ------------------------------------------------------------------------------------------------------


class Maker:
    """Makes what bindings stand for.

    Args:
        bindings: as `read` gives them.
        table: what references may name, as "module:attribute"; it is imported when it is named.
        source: put before every complaint, such as the file that the bindings are from.
        withheld: parameters of what is in the table that no binding may set.
    """

    def __init__(self, bindings: Bindings, table: Mapping[str, str], source: str = "", withheld: Collection[str] = ()):
        self.bindings, self.table, self.withheld = bindings, table, withheld
        self.prefix = f"{source}: " if source else ""
        self.used: Bindings = {}  # what was read so far, and the defaults of what was made
        self._left = MAX_VALUES

    def value(self, key: str) -> Any:
        """What "train.model" or "MACRO" stands for; UserError if nothing sets it, or it is not to be had."""
        if key not in self.bindings:
            raise UserError(f"{self.prefix}nothing sets {key}")
        self.used[key] = self.bindings[key]
        return self._resolve(self.bindings[key], "", Any, key, 0)

    def arguments(self, name: str, scope: str = "", depth: int = 0, target: Any = None) -> dict[str, Any]:
        """What the bindings of `name` say, made: the arguments to call it with. `target`: it, if not in the table."""
        signature, hints = _signature(target or self._find(name))
        bound = self._bound(name, scope)
        if unknown := sorted(bound.keys() - signature.keys() | bound.keys() & set(self.withheld)):
            raise UserError(f"{self.prefix}{parameter_missing(name, unknown[0], signature)}")
        given = {}
        for parameter, (key, value) in bound.items():
            self.used[key] = value
            made = self._resolve(value, scope, hints.get(parameter, Any), f"{name}.{parameter}", depth + 1)
            if not _fits(made, hints.get(parameter, Any)):
                raise self._unfit(f"{name}.{parameter}", made, signature[parameter].annotation)
            if isinstance(made, list) and typing.get_origin(hints.get(parameter)) is tuple:
                made = tuple(made)  # such as a dataclass can be hashed with
            given[parameter] = made
        for parameter, declared in signature.items():
            if parameter not in bound and declared.default is declared.empty:
                raise UserError(
                    f"{self.prefix}{name} is missing a required argument: {parameter!r}; bind it in a config, or choose"
                    " a recipe that does"
                )
            if parameter not in bound and parameter not in self.withheld and is_literal(declared.default):
                self.used.setdefault(f"{name}.{parameter}", declared.default)
        return given

    def _bound(self, name: str, scope: str) -> dict[str, tuple[str, Any]]:
        """Parameter -> (key, value) of all bindings of `name` in force in a scope; the innermost counts."""
        parts = scope.split("/") if scope else []
        found = {}
        for depth in range(len(parts) + 1):
            start = "/".join([*parts[:depth], name]) + "."
            found |= {
                key.removeprefix(start): (key, value)
                for key, value in self.bindings.items()
                if key.startswith(start) and "/" not in key[len(start) :]
            }
        return found

    def _resolve(self, value: Any, scope: str, hint: Any, what: str, depth: int) -> Any:
        self._left -= 1
        if depth > MAX_BRACKETS or self._left < 0:
            raise UserError(f"{self.prefix}{what}: references or macros go in a circle, or stand for too much")
        if isinstance(value, Macro):
            if value.name not in self.bindings:
                raise UserError(f"{self.prefix}{what} = {value}: nothing sets {value.name}")
            self.used[value.name] = self.bindings[value.name]
            return self._resolve(self.bindings[value.name], scope, hint, what, depth + 1)
        if isinstance(value, Reference):
            return self._make(value, scope, hint, what, depth)
        if isinstance(value, int) and abs(value) > MAX_INT:
            raise UserError(f"{self.prefix}{what} is a number of {len(str(value))} digits: too large")
        return _mapped(value, lambda one: self._resolve(one, scope, Any, what, depth + 1))

    def _make(self, reference: Reference, scope: str, hint: Any, what: str, depth: int) -> Any:
        own_scope, _, name = reference.name.rpartition("/")
        target = self._find(name, f"{what} = {reference}: ")
        if not reference.evaluate:
            raise UserError(f"{self.prefix}{what} = {reference}: write {reference}()")
        if not _suits(_kind(target), hint):
            raise self._unfit(what, reference, hint)
        arguments = self.arguments(name, own_scope or scope, depth)
        try:
            return target(**arguments)
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(f"{self.prefix}{error}") from error

    def _find(self, name: str, said: str = "") -> Any:
        if name not in self.table:
            raise UserError(f"{self.prefix}{said}{name_unknown(name, self.table)}")
        module, attribute = self.table[name].split(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise UserError(f"{name} cannot be imported: {error}") from error

    def parameters(self, name: str, target: Any = None) -> list[str]:
        """That bindings of `name` may set; UserError if nothing is called so. `target`: as for `arguments`."""
        return [name for name in _signature(target or self._find(name))[0] if name not in self.withheld]

    def _unfit(self, what: str, value: Any, hint: Any) -> UserError:
        return UserError(f"{self.prefix}{what} = {value!r}: must be {getattr(hint, '__name__', hint)}")


def name_unknown(name: str, names: Collection[str]) -> str:
    return f"nothing is called {name!r}: choose from {', '.join(nearest(name, names) or names)}"


def parameter_missing(name: str, parameter: str, parameters: Collection[str]) -> str:
    chosen = ", ".join(nearest(parameter, parameters) or parameters)
    return f"{name} has no parameter {parameter!r}: choose from {chosen}"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name[:100], list(names), n=3, cutoff=0.5)


def is_literal(value: Any) -> bool:
    """Whether a gin file can say the value: numbers, strings, None, and containers of them."""
    if isinstance(value, dict):
        return all(is_literal(one) for pair in value.items() for one in pair)
    if isinstance(value, (list, tuple)):
        return all(map(is_literal, value))
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


@functools.cache
def _signature(target: Callable) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters, and the types that they are declared with."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    return dict(inspect.signature(target).parameters), hints


def _kind(target: Any) -> Any:
    """What calling `target` gives: a class, or what a function is declared to return."""
    return target if inspect.isclass(target) else _signature(target)[1].get("return", Any)


def _suits(kind: Any, hint: Any) -> bool:
    """Whether a thing of a kind may stand where `hint` is declared, as far as the two are classes or callables."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_suits(kind, choice) for choice in typing.get_args(hint))
    if origin is collections.abc.Callable:
        return not inspect.isclass(kind) or any("__call__" in vars(base) for base in kind.__mro__)
    if hint is Any or kind is Any:
        return True
    if hint in (int, float, bool, str, type(None)):
        return False
    hint = origin or hint
    if getattr(hint, "_is_protocol", False):
        return all(hasattr(kind, name) for name in vars(hint) if not name.startswith("_"))
    return inspect.isclass(kind) and inspect.isclass(hint) and issubclass(kind, hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain number, string, None or sequence may stand where `hint` is declared; all else was seen to."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if origin in (collections.abc.Sequence, tuple):
        each = next(iter(typing.get_args(hint)), Any)
        return isinstance(value, (list, tuple)) and all(_fits(one, each) for one in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    if hint is Any:
        return True
    plain = value is None or type(value) in (bool, int, float, str, list, tuple)
    return not plain or (origin is typing.Literal and value in typing.get_args(hint))
