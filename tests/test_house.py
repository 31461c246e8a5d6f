"""The shape of the package: modules that can be read to their end, and imports that flow one way."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "music_synth").rglob("*.py")
}


def imported(path: Path) -> set[str]:
    """The modules of the package that a module names: imports anywhere in it, and strings "music_synth.x:name"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                names |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(module)):
                names |= {f"{module}.{alias.name}" for alias in node.names} & MODULES.keys() or {module}
            case ast.Constant(value=str(text)) if re.fullmatch(r"music_synth[\w.]*:\w+", text):
                names.add(text.partition(":")[0])
    return names & MODULES.keys()


def test_no_circle_of_imports():
    """Lazy ones and registries counted: what is left when modules without imports go, again and again, is circles."""
    left = {name: imported(path) - {name} for name, path in MODULES.items()}
    assert len(left) > 100 and sum(map(len, left.values())) > 300
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left, {name: sorted(needs & left.keys()) for name, needs in left.items()}
