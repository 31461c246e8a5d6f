"""Configurations: find, parse and save gin files, and rebuild what a run was made of.

Beside the entry points this is the only module that knows gin. A recipe is found by its bare name from any folder;
`include` looks in the same place. `build("train")` turns what is bound into a function that only waits to be called.
Every mistake in a file or a flag is a `UserError` of one line.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin

from music_synth.errors import UserError

CONFIG_FILE = "config.gin"  # in MODEL_DIR: everything that was in force, defaults too

# Names that a config may use, and what they stand for; imported only when a config uses them.
CONFIGURABLES = {
    "train": "music_synth.training.loop:train",
    "evaluate": "music_synth.evaluate:evaluate",
    "Feed": "music_synth.data.feed:open_feed",
    "Tokenizer": "music_synth.midi.tokenizer:Tokenizer",
    "Vocabulary": "music_synth.midi.tokenizer:Vocabulary",
    "NetworkConfig": "music_synth.models.layers:NetworkConfig",
    "Diffusion": "music_synth.diffusion.objective:Diffusion",
    "CosineSchedule": "music_synth.diffusion.schedule:CosineSchedule",
    "LinearSchedule": "music_synth.diffusion.schedule:LinearSchedule",
    "SquaredCosineSchedule": "music_synth.diffusion.schedule:SquaredCosineSchedule",
    "Sampler": "music_synth.diffusion.sampler:Sampler",
    "TaughtFeed": "music_synth.diffusion.distillation:TaughtFeed",
    "Autoregressive": "music_synth.autoregressive.objective:Autoregressive",
    "Deterministic": "music_synth.autoregressive.outputs:Deterministic",
    "GaussianMixture": "music_synth.autoregressive.outputs:GaussianMixture",
    "InitialCheckpoint": "music_synth.interop.decoders:InitialCheckpoint",
    "AudioFeed": "music_synth.data.audio_feed:open_audio_feed",
    "Vocoder": "music_synth.vocoder.objective:Vocoder",
    "MelGANGenerator": "music_synth.vocoder.melgan:MelGANGenerator",
    "ISTFTGenerator": "music_synth.vocoder.istft:ISTFTGenerator",
    "Discriminators": "music_synth.vocoder.melgan:Discriminators",
    "load_inverter": "music_synth.vocoder.inverter:load_inverter",
    "adafactor": "music_synth.training.optimizer:adafactor",
    "adamw": "music_synth.training.optimizer:adamw",
    "muon": "music_synth.training.optimizer:muon",
    "constant_rate": "music_synth.training.optimizer:constant_rate",
    "warmup_constant": "music_synth.training.optimizer:warmup_constant",
    "warmup_cosine": "music_synth.training.optimizer:warmup_cosine",
    "warmup_rsqrt": "music_synth.training.optimizer:warmup_rsqrt",
}
DEFERRED = ("train", "evaluate")  # what `build` prepares and the entry point calls
GIVEN = ("config_text",)  # arguments that the entry point gives


# --- files and flags ---------------------------------------------------------------------------------------------


def configs_dir() -> Path:
    """The folder of the shipped recipes: package data where music_synth is installed, configs/ of a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find(name: str | Path, beside: Path | None = None) -> Path:
    """Full path of a config: a path as it is, else a name among the recipes, else one `beside` the including file.

    Raises:
        UserError: nothing there; names the nearest recipes.
    """
    folders = [Path.cwd(), configs_dir()] if beside is None else [configs_dir(), beside]
    for folder in folders:
        path = folder / Path(name).expanduser()
        if path.is_file():
            return path.resolve()
    recipes = [path.relative_to(configs_dir()).as_posix() for path in sorted(configs_dir().rglob("*.gin"))]
    names = _nearest(str(name), recipes) or [recipe for recipe in recipes if "/" not in recipe]
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
    gin.clear_config()
    for name in files:
        _parse_file(find(name))
    known = set(_macros_read()) | set(_macros_set())
    for override in overrides:
        _bind_override(override, known)
    for name in sorted(set(_macros_read()) - set(_macros_set())):
        raise UserError(f"nothing sets {name}, which the configuration needs: add --gin.{name}=VALUE")


def _parse_file(path: Path, including: tuple[Path, ...] = ()) -> None:
    if path in including:
        raise ValueError(f"{path} includes itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from error
    _parse_text(text, lambda line: f"{path}, line {line}", path.parent, (*including, path))


def _parse_text(text: str, where: Callable[[int], str], folder: Path, including: tuple[Path, ...] = ()) -> None:
    """Binds what a text says; `where` names its lines in messages, `folder` is where its includes may lie."""
    line, parser = 0, None
    try:
        parser = gin.config_parser.ConfigParser(text, _Delegate())
        while True:
            line = 0
            statement = next(parser, None)
            if statement is None:
                return
            line = statement.location.line_num
            if isinstance(statement, gin.config_parser.BindingStatement):
                _bind(*statement[:4])
            elif isinstance(statement, gin.config_parser.IncludeStatement):
                _parse_file(_find_included(statement.filename, folder), including)
            elif isinstance(statement, gin.config_parser.BlockDeclaration):
                _register(statement.selector)
            else:
                raise ValueError("import has no place in a config of music_synth")
    except tokenize.TokenError as error:
        raise UserError(f"{where(error.args[1][0])}: {error.args[0]}: a bracket or quote is left open") from error
    except SyntaxError as error:
        said = f"{where(error.lineno or 1)}: {error.msg.rstrip('.')} in {(error.text or '').strip()!r}"
        raise UserError(said) from error
    except ValueError as error:
        number = line or (parser.current_token.start[0] if parser else 1)
        message = str(error).split("\n")[0]  # gin adds the place in its own words
        raise UserError(f"{where(number)}: {message}") from error


def _find_included(name: str, folder: Path) -> Path:
    try:
        return find(name, beside=folder)
    except UserError as error:
        raise ValueError(error) from error  # said again with the line that includes it


class _Delegate(gin.config.ParserDelegate):
    """Registers what a reference names before gin looks it up."""

    def configurable_reference(self, scoped_selector: str, evaluate: bool):
        _register(scoped_selector.rsplit("/", 1)[-1])
        return super().configurable_reference(scoped_selector, evaluate)


def _bind(scope: str, selector: str, parameter: str, value: Any) -> None:
    if not parameter:  # NAME = value
        gin.bind_parameter((f"{scope}/{selector}" if scope else selector, "gin.macro", "value"), value)
        return
    names = _register(selector)
    if parameter not in names:
        nearest = _nearest(parameter, names) or names
        raise ValueError(f"{selector} has no parameter {parameter!r}: choose from {', '.join(nearest)}")
    gin.bind_parameter((scope, selector, parameter), value)


def _bind_override(override: str, known: set[str]) -> None:
    name, _, value = override.partition("=")
    if "." not in name and name not in known:
        raise UserError(
            f"--gin.{name}: no config given reads {name}; did you mean"
            f" {' or '.join(_nearest(name, known) or sorted(known)) or 'to give --gin_file'}?"
        )
    if _is_plain_word(value):
        value = repr(value)
    _parse_text(f"{name} = {value}", lambda line: f"--gin.{override}", Path.cwd())


def _is_plain_word(value: str) -> bool:
    """Whether a value is a string without quotes, such as a path: it is no literal, reference or macro."""
    if not value or value[0] in "@%'\"([{":
        return False
    try:
        return len(list(gin.config_parser.ConfigParser(f"NAME = {value}", gin.config.ParserDelegate()))) != 1
    except (SyntaxError, tokenize.TokenError):
        return True


def _macros_set() -> list[str]:
    return [scope for scope, selector in gin.config._CONFIG if selector == "gin.macro"]


def _macros_read() -> list[str]:
    references = gin.config.iterate_references(gin.config._CONFIG, to=gin.get_configurable(gin.config.macro))
    return ["/".join(reference.scopes) for reference in references]


# --- building ----------------------------------------------------------------------------------------------------


def build(name: str, overrides: Iterable[str] = ()) -> Callable[..., Any]:
    """`train` or `evaluate` with all its arguments made as the configuration says, ready to be called.

    Raises:
        UserError: a value of the wrong type or out of range, an argument that nothing sets, and an override that
            nothing reads, such as a parameter of the optimizer that is not in use.
    """
    _register(name)
    with _plain_errors():
        function = gin.get_configurable(name)()
    ignored = set(unread())
    for override in overrides:
        key = override.partition("=")[0]
        if key in ignored:
            raise UserError(f"--gin.{key}: nothing in this run reads it; leave it out, or choose what would read it")
    return function


def build_parts(files: Iterable[str | Path], overrides: Iterable[str], *keys: tuple[str, str]) -> list[Any]:
    """What a recipe binds, for example ("train", "model"), made without the rest. Leaves the configuration as it is."""
    with _isolated(), _plain_errors():
        parse(files, overrides)
        return [_bound(" ".join(map(str, files)), *key) for key in keys]


def operative_text() -> str:
    """The configuration as far as it was read since `parse`, defaults included, as the text of a gin file."""
    return gin.operative_config_str(max_line_length=100)


def unread() -> list[str]:
    """What is bound but was not read since `parse`: ["adamw.b1", "TRAIN_STEPS", ...]."""
    read = {
        (scope, selector, parameter)
        for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items()
        for parameter in values
    }

    def is_read(scope: str, selector: str, parameter: str) -> bool:
        return any((selector, parameter) == key[1:] and (key[0] + "/").startswith(scope) for key in read)

    missed = []
    for (scope, selector), values in gin.config._CONFIG.items():
        for parameter in values:
            if selector == "gin.macro":
                if (scope, selector, parameter) not in read:
                    missed.append(scope)
            elif not is_read(scope, selector, parameter):
                missed.append(f"{scope}/" * bool(scope) + f"{selector.removeprefix(_MODULE + '.')}.{parameter}")
    return missed


def run_text(recipe: str, parts: Iterable[Any], overrides: Iterable[str] = ()) -> str:
    """The text of a config that makes `parts`, such as a model and a tokenizer, and takes the rest from a recipe.

    The parts are dataclasses; every field of theirs is said. Leaves the configuration in force as it is.
    """
    with _isolated(), _plain_errors():
        parse([recipe], overrides)
        knobs: dict[str, Any] = {}
        for part in parts:
            _bind_fields(part, knobs)
        return gin.config_str(max_line_length=100)


def _bind_fields(part: Any, knobs: dict[str, Any]) -> None:
    """Binds all fields of a dataclass; where a knob stands for one, sets the knob, unless `knobs` has another value."""
    name = type(part).__name__
    _register(name)
    bindings = gin.get_bindings(name, resolve_references=False)
    for field in dataclasses.fields(part):
        value, bound = getattr(part, field.name), bindings.get(field.name)
        if dataclasses.is_dataclass(value):
            _parse_text(f"{name}.{field.name} = @{type(value).__name__}()", lambda line: name, Path.cwd())
            _bind_fields(value, knobs)
            continue
        is_knob = isinstance(bound, gin.config.ConfigurableReference) and bound.selector == "gin.macro"
        if is_knob and knobs.setdefault("/".join(bound.scopes), value) == value:
            _bind("", "/".join(bound.scopes), "", value)
        else:
            _bind("", name, field.name, value)


def load_run(model_dir: str | Path, step: int | None = None, ema: bool = True) -> tuple[Any, Any, Any, int]:
    """(model, tokenizer, params, step) of a training run, from its config.gin and a checkpoint of it.

    Leaves the configuration in force as it is. `step` None: the newest whole checkpoint; `ema`: the moving average
    of the parameters where the run keeps one.

    Raises:
        UserError: no such folder, no config.gin in it, no checkpoint, or one of other shapes.
    """
    (model, tokenizer), params, step = _load(model_dir, [("train", "model"), ("Feed", "tokenizer")], step, ema)
    return model, tokenizer, params, step


def load_generator(model_dir: str | Path, step: int | None = None, ema: bool = True) -> tuple[Any, Any]:
    """(generator, its params) of a run that trained an inverter; see `load_run`."""
    (model,), params, _ = _load(model_dir, [("train", "model")], step, ema)
    if not hasattr(model, "generator"):
        raise UserError(f"{model_dir} is a run of {type(model).__name__}, not of an inverter (istft.gin, melgan.gin)")
    return model.generator, params["generator"]


def _load(model_dir: str | Path, keys: list[tuple[str, str]], step: int | None, ema: bool):
    from music_synth.training.checkpoint import check_shapes, load_params

    made = _make(model_dir, keys)
    params, step = load_params(model_dir, step, ema)
    check_shapes(params, made[0], where=f"{model_dir}, step {step}")
    return made, params, step


def _make(model_dir: str | Path, keys: list[tuple[str, str]]) -> list[Any]:
    """What a run's config binds to these parameters of what it names: [("train", "model"), ...]."""
    path = Path(model_dir) / CONFIG_FILE
    if not Path(model_dir).is_dir():
        raise UserError(f"no folder {model_dir}: give the MODEL_DIR of a training run")
    if not path.is_file():
        raise UserError(f"no {CONFIG_FILE} in {model_dir}: give the MODEL_DIR of a training run")
    return build_parts([path.resolve()], (), *keys)


def _bound(path: Path | str, name: str, parameter: str) -> Any:
    _register(name)
    bindings = gin.get_bindings(name, resolve_references=False)
    if parameter not in bindings:
        raise UserError(f"{path} does not say {name}.{parameter}: it is not the config of a training run")
    return copy.deepcopy(bindings[parameter])  # gin's way of making what a reference stands for


def load_optimizer(model_dir: str | Path) -> tuple[Any, float]:
    """(optimizer, decay of the moving average) of a training run, from its config.gin; see `load_run`."""
    optimizer, ema_decay = _make(model_dir, [("train", "optimizer"), ("train", "ema_decay")])
    return optimizer, ema_decay


def read_values(path: Path) -> dict[str, Any]:
    """What a gin file binds, of whatever program: {"T5Config.emb_dim": 768, "train/DatasetConfig.split": "train", ...}.

    Nothing that it names is imported or made. Names lose their modules and keep their scopes. A macro stands for its
    value; a reference for its text, "@T5Config()"; an include that lies nowhere near is passed over.

    Raises:
        UserError: it cannot be read, or does not parse.
    """
    values: dict[str, Any] = {}
    _read_values(path, values)
    return {name: _resolved(value, values) for name, value in values.items()}


class _Macro(typing.NamedTuple):
    name: str


class _NamesDelegate(gin.config_parser.ParserDelegate):
    def configurable_reference(self, scoped_selector: str, evaluate: bool) -> str:
        return f"@{_without_module(scoped_selector)}{'()' * evaluate}"

    def macro(self, macro_name: str) -> _Macro:
        return _Macro(macro_name)


def _without_module(selector: str) -> str:
    scope, slash, name = selector.rpartition("/")
    return scope + slash + name.rsplit(".", 1)[-1]


def _read_values(path: Path, values: dict[str, Any]) -> None:
    try:
        for statement in gin.config_parser.ConfigParser(path.read_text(encoding="utf-8"), _NamesDelegate()):
            if isinstance(statement, gin.config_parser.BindingStatement):
                scope, selector, parameter, value = statement[:4]
                name = _without_module(f"{scope}/{selector}" if scope else selector)
                values[f"{name}.{parameter}" if parameter else name] = value
            elif isinstance(statement, gin.config_parser.IncludeStatement):
                places = (folder / statement.filename for folder in path.absolute().parents)
                if included := next((place for place in places if place.is_file()), None):
                    _read_values(included, values)
    except (OSError, ValueError, SyntaxError, tokenize.TokenError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a gin file ({str(error).splitlines()[0]})") from error


def _resolved(value: Any, values: dict[str, Any], depth: int = 0) -> Any:
    """`value` with macros replaced; one that nothing sets, or that stands for itself, is None."""
    if isinstance(value, _Macro):
        return _resolved(values.get(value.name), values, depth + 1) if depth < 100 else None
    if isinstance(value, dict):
        return {key: _resolved(one, values, depth) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolved(one, values, depth) for one in value)
    return value


_MODULE = "music_synth"


@functools.cache
def _register(name: str) -> tuple[str, ...]:
    """Makes a configurable known to gin; returns its parameters. ValueError with the nearest names if none."""
    if name not in CONFIGURABLES:
        nearest = _nearest(name, CONFIGURABLES) or CONFIGURABLES
        raise ValueError(f"nothing is called {name!r}: choose from {', '.join(nearest)}")
    module, attribute = CONFIGURABLES[name].split(":")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"{name} cannot be imported: {error}") from error
    denied = [parameter for parameter in GIVEN if parameter in inspect.signature(target).parameters]
    gin.external_configurable(_checked(name, target), name=name, module=_MODULE, denylist=denied)
    return tuple(parameter for parameter in inspect.signature(target).parameters if parameter not in denied)


def _checked(name: str, target: Callable) -> Callable:
    """`target` whose complaints, and wrong or missing arguments, are `UserError`s with the names of the config."""
    signature = inspect.signature(target)
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)

    def make(*args, **kwargs):
        for parameter, value in kwargs.items():
            if not _fits(value, hints.get(parameter, Any)):
                hint = signature.parameters[parameter].annotation
                raise UserError(f"{name}.{parameter} = {value!r}: must be {getattr(hint, '__name__', hint)}")
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"{name} is {error}; bind it in a config, or choose a recipe that does") from error
        if name in DEFERRED:
            return functools.partial(target, *args, **kwargs)
        try:
            return target(*args, **kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from error

    make.__name__ = make.__qualname__ = name
    make.__doc__ = target.__doc__
    make.__signature__ = signature
    return make


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value suits a type hint, as far as plain numbers, strings and None go; all else is let through."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(v, *typing.get_args(hint)) for v in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool, type(None)):
        return isinstance(value, hint)
    return not isinstance(value, str) or hint is Any or typing.get_origin(hint) is typing.Literal


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Takes off what gin adds to a message about the calls it came through."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).split("\n  In call to configurable")[0]) from error


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Inside, gin's global state may be changed at will; outside it is as before."""
    state = (gin.config._CONFIG, gin.config._OPERATIVE_CONFIG, gin.config._SINGLETONS)
    saved = [dict(part) for part in state]
    try:
        yield
    finally:
        gin.clear_config()
        for part, values in zip(state, saved, strict=True):
            part.update(values)


def _nearest(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
