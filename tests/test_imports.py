"""Modules that can be read to their end, and imports that flow one way.

Imports within functions and the names of tables ("module:name") are counted.
"""

import ast
import functools
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "music_synth"


def modules() -> dict[str, Path]:
    """Every module but the packages' own, which import nothing until they are asked."""
    paths = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def imported(tree: ast.AST) -> Iterator[str]:
    """What a module names: "a.b" and, as b may be a module or a thing in one, "a" of `from a import b`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"^(music_synth[\w.]+):\w+$", node.value)
        yield from imported(node)


@functools.cache
def graph() -> dict[str, set[str]]:
    known = modules()
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in known.items()}
    return {name: (set(imported(tree)) & known.keys()) - {name} for name, tree in trees.items()}


def test_no_module_imports_one_that_imports_it():
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from error


def test_lazy_imports_and_tables_are_counted():
    found = graph()
    assert "music_synth.training.loop" in found["music_synth.config"]  # in the table alone
    assert "music_synth.interop.onnx" in found["music_synth.pipeline"]  # in a function alone


def test_only_configurations_know_gin():
    names = {name for name, path in modules().items() if re.search(r"^\s*(import|from) gin\b", path.read_text(), re.M)}
    assert names == {"music_synth.config", "music_synth.gin_files"}


def test_no_module_is_above_400_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > 400}
