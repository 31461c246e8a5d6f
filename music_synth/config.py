"""Recipes: gin files found by name, put in force, made into a run's parts, and written again.

A recipe is found by its bare name from any folder; `include` looks in the same place. `build("train")` turns what is
bound into a function that only waits to be called. Every mistake in a file or a flag is a `UserError` of one line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gin import config_parser

from music_synth.errors import UserError
from music_synth.gin_files import (
    CONFIG_FILE,
    Bindings,
    Macro,
    Reference,
    all_statements,
    key_of,
    located,
    statements,
)
from music_synth.gin_objects import OPTIMIZERS, PARTS, RETIRED, Maker, nearest, parameter_missing

__all__ = ["CONFIGURABLES", "CONFIG_FILE", "ENTRIES", "build", "find", "parse", "run_text"]

# Names that a recipe may use, and what they stand for; imported only when a recipe uses them. All lie below this.
CONFIGURABLES = {
    **PARTS,
    **OPTIMIZERS,
    "Feed": "music_synth.data.feed:Feed",
    "AudioFeed": "music_synth.data.audio_feed:AudioFeed",
    "InitialCheckpoint": "music_synth.training.initial:InitialCheckpoint",
    "load_inverter": "music_synth.runs:load_inverter",
}
ENTRIES = {  # what `build` prepares and the entry point calls
    "train": "music_synth.training.loop:train",
    "evaluate": "music_synth.evaluation.scoring:evaluate",
}
WITHHELD = ("config_text", "transcriber", "embeddings", "trust")  # arguments that the entry point gives, and no file

_in_force = Maker({}, CONFIGURABLES)


# --- files and flags ---------------------------------------------------------------------------------------------


def configs_dir() -> Path:
    """Returns the folder of the shipped recipes: package data where installed, configs/ of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(name: str | Path, beside: Path | None = None) -> Path:
    """Finds a config: a path as it is, else a name among the recipes, else one `beside` the including file.

    Raises:
        UserError: nothing there; names the nearest recipes.
    """
    folders = [Path.cwd(), configs_dir()] if beside is None else [configs_dir(), beside]
    for folder in folders:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path.resolve()
    recipes = [path.relative_to(configs_dir()).as_posix() for path in sorted(configs_dir().rglob("*.gin"))]
    names = nearest(str(name), recipes) or [recipe for recipe in recipes if "/" not in recipe]
    raise UserError(f"no config {str(name)!r} here or in {configs_dir()}: did you mean {' or '.join(names)}?")


def split_flags(argv: Iterable[str]) -> tuple[list[str], list[str], list[str]]:
    """Takes --gin_file=FILE and --gin.NAME=VALUE, any number of each, out of a command line.

    Returns (files, overrides "NAME=VALUE", the rest of the arguments).
    """
    files, overrides, rest = [], [], []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag == "--gin_file":
            if not equals:
                value = next(arguments, "")
            if not value:
                raise UserError("--gin_file needs a file: --gin_file=diffusion.gin")
            files.append(value)
        elif flag.startswith("--gin."):
            if not equals:
                raise UserError(f"{flag} needs a value: {flag}=VALUE")
            overrides.append(argument.removeprefix("--gin."))
        else:
            rest.append(argument)
    return files, overrides, rest


# --- parsing -----------------------------------------------------------------------------------------------------


def parse(files: Iterable[str | Path], overrides: Iterable[str] = ()) -> None:
    """Makes the files, in order, and then the overrides ("NAME=VALUE") the configuration in force.

    A macro's value may stand without quotes: "MODEL_DIR=/tmp/run".

    Raises:
        UserError: a file that is missing or does not parse, an unknown name or parameter, an override of a macro that
            nothing reads, a macro that nothing sets.
    """
    global _in_force
    _in_force = _parsed(files, overrides)


def _parsed(files: Iterable[str | Path], overrides: Iterable[str]) -> Maker:
    maker = Maker({}, CONFIGURABLES, withheld=WITHHELD)
    for name in files:
        for statement, place in all_statements(find(name), lambda name, path: find(name, beside=path.parent)):
            located(place, _bind, maker, statement)
    known = {key for key in maker.bindings if "." not in key} | set(_macros_in(maker.bindings))
    for override in overrides:
        _bind_override(maker, override, known)
    for name in sorted(set(_macros_in(maker.bindings)) - maker.bindings.keys()):
        raise UserError(f"nothing sets {name}, which the configuration needs: add --gin.{name}=VALUE")
    return maker


def _bind(maker: Maker, statement: Any) -> None:
    """Adds what a statement binds, if what it names is there."""
    if isinstance(statement, config_parser.ImportStatement):
        raise UserError("import has no place in a config of music_synth")
    key = statement.selector if isinstance(statement, config_parser.BlockDeclaration) else key_of(statement)
    scoped, dot, parameter = key.partition(".")
    name = scoped.rsplit("/", 1)[-1]
    if isinstance(statement, config_parser.BlockDeclaration):
        _parameters(maker, name)
        return
    if dot and parameter not in (names := _parameters(maker, name)):
        if statement.value == RETIRED.get(f"{name}.{parameter}", ...):
            return
        raise UserError(parameter_missing(name, parameter, names))
    for reference in _leaves(statement.value, Reference):
        _parameters(maker, reference.name.rsplit("/", 1)[-1])
        if not reference.evaluate:
            raise UserError(f"{key} = {reference}: write {reference}()")
    maker.bindings[key] = statement.value


def _parameters(maker: Maker, name: str) -> list[str]:
    return maker.parameters(name, _target(name) if name in ENTRIES else None)


def _target(name: str) -> Callable:
    module, attribute = ENTRIES[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def _bind_override(maker: Maker, override: str, known: set[str]) -> None:
    name, _, value = override.partition("=")
    if "." not in name and name not in known:
        raise UserError(
            f"--gin.{name}: no config given reads {name}; did you mean"
            f" {' or '.join(nearest(name, known) or sorted(known)) or 'to give --gin_file'}?"
        )
    if _is_plain_word(value):
        value = repr(value)
    place = f"--gin.{override}"
    for statement, _ in statements(f"{name} = {value}", lambda line: place):
        if not isinstance(statement, config_parser.BindingStatement):
            raise UserError(f"{place}: it sets no value")
        located(place, _bind, maker, statement)


def _is_plain_word(value: str) -> bool:
    """Whether a value is a string without quotes, such as a path: it is no literal, reference or macro."""
    if not value or value[0] in "@%'\"([{":
        return False
    try:
        return len(list(statements(f"NAME = {value}", str))) != 1
    except UserError:
        return True


def _macros_in(bindings: Bindings) -> Iterator[str]:
    return (macro.name for value in bindings.values() for macro in _leaves(value, Macro))


def _leaves(value: Any, kind: type) -> Iterator[Any]:
    """Everything of a kind in a value and the containers in it."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _leaves(one, kind)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one, kind)


# --- building ----------------------------------------------------------------------------------------------------


def build(name: str, overrides: Iterable[str] = ()) -> functools.partial:
    """Makes all arguments of `train` or `evaluate` as the configuration says; the result is ready to be called.

    Raises:
        UserError: a value of the wrong type or out of range, an argument that nothing sets, and an override that
            nothing reads, such as a parameter of the optimizer that is not in use.
    """
    target = _target(name)
    function = functools.partial(target, **_in_force.arguments(name, target=target))
    ignored = set(unread())
    for override in overrides:
        key = override.partition("=")[0]
        if key in ignored:
            raise UserError(f"--gin.{key}: nothing in this run reads it; leave it out, or choose what would read it")
    return function


def build_parts(files: Iterable[str | Path], overrides: Iterable[str], *keys: str) -> list[Any]:
    """Makes what a recipe binds, for example to "train.model", without the rest. The configuration in force stays."""
    maker = _parsed(files, overrides)
    return [maker.value(key) for key in keys]


def operative_text() -> str:
    """Writes the configuration as far as it was read since `parse`, defaults included, as the text of a gin file."""
    return _text(_in_force.used)


def unread() -> list[str]:
    """Lists what is bound but was not read since `parse`: ["adamw.b1", "TRAIN_STEPS", ...]."""
    return [key for key in _in_force.bindings if key not in _in_force.used]


def run_text(recipe: str, parts: Iterable[Any], overrides: Iterable[str] = ()) -> str:
    """Writes the text of a config that makes `parts`, such as a model and a tokenizer, and is else as a recipe.

    The parts are dataclasses; every field of theirs is said. The configuration in force stays.
    """
    bindings, knobs = _parsed([recipe], overrides).bindings, dict[str, Any]()
    for part in parts:
        _bind_fields(bindings, part, knobs)
    return _text(bindings)


def _bind_fields(bindings: Bindings, part: Any, knobs: dict[str, Any]) -> None:
    """Binds all fields of a dataclass; where a knob stands for one, sets the knob, unless `knobs` has another value."""
    for field in dataclasses.fields(part):
        key, value = f"{type(part).__name__}.{field.name}", getattr(part, field.name)
        bound = bindings.get(key)
        if dataclasses.is_dataclass(value):
            bindings[key] = Reference(type(value).__name__, True)
            _bind_fields(bindings, value, knobs)
        elif isinstance(bound, Macro) and knobs.setdefault(bound.name, value) == value:
            bindings[bound.name] = value
        else:
            bindings[key] = value


def _text(bindings: Mapping[str, Any]) -> str:
    """A gin file: macros first, then what belongs to each name."""
    lines, before = ["# Written by music_synth."], ""
    for key in sorted(bindings, key=lambda key: ("." in key, key)):
        name = key.rpartition(".")[0]
        lines += [""] * (name != before or len(lines) == 1) + [f"{key} = {bindings[key]!r}"]
        before = name
    return "\n".join([*lines, ""])
