"""What bindings of gin files stand for, made from a table of names.

A `Maker` follows references and macros with bounds on depth and size, calls only what its table names, and only where
the kind of the thing suits the parameter that it is for. So the config of a run that somebody sent can be followed:
`PARTS` are what a model and tokenizer are made of.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from music_synth.errors import UserError
from music_synth.gin_files import MAX_BRACKETS, MAX_VALUES, Bindings, Macro, Reference, mapped

PARTS = {  # of a trained model; nothing here reads or writes a file
    "Tokenizer": "music_synth.midi.tokenizer:Tokenizer",
    "Vocabulary": "music_synth.midi.vocabulary:Vocabulary",
    "NetworkConfig": "music_synth.models.layers:NetworkConfig",
    "Diffusion": "music_synth.diffusion.objective:Diffusion",
    "CosineSchedule": "music_synth.diffusion.schedule:CosineSchedule",
    "LogNormalSchedule": "music_synth.diffusion.schedule:LogNormalSchedule",
    "LinearSchedule": "music_synth.diffusion.schedule:LinearSchedule",
    "SquaredCosineSchedule": "music_synth.diffusion.schedule:SquaredCosineSchedule",
    "Sampler": "music_synth.diffusion.sampler:Sampler",
    "Autoregressive": "music_synth.autoregressive.objective:Autoregressive",
    "Deterministic": "music_synth.autoregressive.outputs:Deterministic",
    "GaussianMixture": "music_synth.autoregressive.outputs:GaussianMixture",
    "VocoderObjective": "music_synth.vocoder.objective:VocoderObjective",
    "MelGANGenerator": "music_synth.vocoder.melgan:MelGANGenerator",
    "ISTFTGenerator": "music_synth.vocoder.istft:ISTFTGenerator",
    "Discriminators": "music_synth.vocoder.melgan:Discriminators",
    "SpectrogramDiscriminators": "music_synth.vocoder.discriminators:SpectrogramDiscriminators",
}
OPTIMIZERS = {
    name: f"music_synth.training.optimizer:{name}"
    for name in ("adafactor", "adamw", "muon", "constant_rate", "warmup_constant", "warmup_cosine")
}
RETIRED = {  # parameters that were there once -> the value at which they did nothing: configs may still say it
    "CosineSchedule.max_log_snr": 20.0,
    "CosineSchedule.shift": 0.0,
    "Diffusion.distilled": False,
    "Diffusion.loss_weighting": "none",
    "Diffusion.max_loss_weight": 10.0,
    "LogNormalSchedule.max_log_snr": 20.0,
    "Sampler.clip_quantile": None,
    "Sampler.guidance_max_log_snr": None,
    "Sampler.guidance_min_log_snr": None,
    "Sampler.guidance_rescale": 0.0,
    "warmup_cosine.final_fraction": 0.0,
}
MAX_INT = 2**63 - 1


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
        # A feed may have to make its data, which takes minutes: all else is made, and found wrong, before.
        for parameter, (key, value) in sorted(bound.items(), key=lambda item: item[0] == "feed"):
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
        found: dict[str, tuple[str, Any]] = {}
        for depth in range(len(parts) + 1):
            start = "/".join([*parts[:depth], name]) + "."
            found |= {
                key.removeprefix(start): (key, value)
                for key, value in self.bindings.items()
                if key.startswith(start) and "/" not in key[len(start) :]
            }
        return {key: pair for key, pair in found.items() if pair[1] != RETIRED.get(f"{name}.{key}", ...)}

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
        return mapped(value, lambda one: self._resolve(one, scope, Any, what, depth + 1))

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
            choices = ", ".join(nearest(name, self.table) or self.table)
            raise UserError(f"{self.prefix}{said}nothing is called {name!r}: choose from {choices}")
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
