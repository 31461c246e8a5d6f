"""README.md, CONTRIBUTING.md and docs/: links lead somewhere, Python imports what is there, commands work as printed.

A block of commands without a title is run here, page by page, in a folder with two small untrained runs. One with a
title says in it why not ("40 minutes", "needs the download"), and is parsed: by the commands' own parsers up to the
first work, with recipes and overrides read as gin reads them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from music_synth import __version__, config, errors
from music_synth.__main__ import COMMANDS
from music_synth.midi.notes import Note, write_midi
from tests import tiny_runs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER_PROGRAMS = {"aplay", "apt-get", "docker", "ffplay", "git", "npm", "sudo", "tar", "tensorboard"}  # not ours


class Block(NamedTuple):
    page: str
    line: int
    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    pattern = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    text = page.read_text(encoding="utf-8")
    assert len(re.findall("^```", text, re.MULTILINE)) == 2 * len(pattern.findall(text)), f"{page}: a block"
    name = page.relative_to(ROOT).as_posix()
    return [
        Block(name, text.count("\n", 0, match.start()) + 1, match[1], match[2] or "", match[3])
        for match in pattern.finditer(text)
    ]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command; what follows a pipe is a command of its own."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words:
            commands.append(words[: words.index("|")])
            words = words[words.index("|") + 1 :]
        commands += [words] if words else []
    return commands


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PRINTED = [
    pytest.param(words, id=f"{block.page}:{block.line}: {' '.join(words)[:60]}")
    for block in BLOCKS
    if block.language == "sh"
    for words in commands_of(block)
]
RUN = sorted({block.page for block in BLOCKS if block.language in ("sh", "python") and not block.title})


# --- commands ----------------------------------------------------------------------------------------------------


class Parsed(Exception):
    """In place of the work that follows the flags."""


@pytest.fixture
def stop_after_flags(monkeypatch):
    def parse(self, argv=None, namespace=None):
        super(errors.ArgumentParser, self).parse_args(argv, namespace)
        raise Parsed

    monkeypatch.setattr(errors.ArgumentParser, "parse_args", parse)


def main_of(words: list[str]):
    """(the `main` of one of our commands, its arguments); None of another program, which must be known."""
    program = words[0]
    if program in OTHER_PROGRAMS or words[:2] == ["source", ".venv/bin/activate"]:
        return None
    if program == "pip":
        for package, extras in re.findall(r"^(\S+)\[(.+)\]$", words[-1]):
            assert package != "music_synth" or set(extras.split(",")) <= extras_of_setup(), words
        return None
    if program.endswith(".sh"):
        assert os.access(ROOT / program, os.X_OK), f"{program} is not there, or cannot be run"
        return None
    if program == "music_synth":
        return importlib.import_module(f"music_synth.{COMMANDS[words[1]][0]}").main, words[2:]
    assert program == "python", f"unknown program {program}: add it to OTHER_PROGRAMS"
    if words[1] == "-m":
        if not words[2].startswith("music_synth"):
            module = words[2].partition(".")[0]  # T5X is on no package index
            assert module == "t5x" or importlib.util.find_spec(module), f"no module {words[2]}"
            return None
        return importlib.import_module(words[2]).main, words[3:]
    return script(words[1]).main, words[2:]


def extras_of_setup() -> set[str]:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    extras = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "EXTRAS")
    return set(ast.literal_eval(extras))


def script(name: str):
    """The module of a script, made once."""
    key = f"tests.docs.{Path(name).stem}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / name)
        sys.modules[key] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[key]


@pytest.mark.parametrize("words", PRINTED)
def test_flags_recipes_and_overrides_are_known(words, stop_after_flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = main_of(words)
    if found is None:
        return
    main, argv = found
    with pytest.raises(Parsed):
        main(argv)
    files, overrides, rest = config.split_flags(argv)
    models = [[word for word in argument.split() if word.endswith(".gin")] for argument in rest]  # of a sweep
    default = "evaluate.gin" if "evaluate" in words[-len(argv) - 1] else "diffusion.gin"
    for recipe in [files] if files else [model for model in models if model] or [[default]]:
        config.parse(recipe, overrides)


# --- what runs in seconds ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, quick_compilation):
    """What a reader has who followed the pages so far: pieces to play, two runs, the prepared test data."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("in.mid", "pieces/a.mid", "pieces/b.mid", "data/string_quartet.mid"):
        (folder / name).parent.mkdir(exist_ok=True)
        write_midi([Note(60, 90, 40, 0.0, 0.5), Note(64, 90, 40, 0.5, 1.0)], folder / name)
    prepared = tiny_runs.prepare(folder / "runs/prepared", audio=True)
    for model_dir in ("runs/diffusion", "runs/demo/diffusion"):
        tiny_runs.start(folder / model_dir, "diffusion.gin", prepared)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_blocks_without_a_title_run(page, workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    for block in BLOCKS:
        if block.page != page or block.title:
            continue
        if block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), {})
        elif block.language == "sh":
            for words in commands_of(block):
                found = main_of(words)
                if found is not None:
                    main, argv = found
                    main(argv)
                else:
                    assert words[0] in ("source", "pip"), f"{page}:{block.line}: say in a title why this is not run"


@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"{b.page}:{b.line}") for b in BLOCKS if b.language == "python" and b.title]
)
def test_python_imports_what_is_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), (
                    alias.name
                )


# --- pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page.name}: {target}"


def slug(heading: str) -> str:
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


@pytest.mark.parametrize(
    "name, entry",
    [
        ("README.md", r"^\| .* \| \[\w+\]\(docs/(\w+\.md)\) \|$"),
        ("docs/index.md", r"^\| .* \| \[[\w ,]+\]\((\w+\.md)\) \|$"),
        ("mkdocs.yml", r"^  - [\w ,]+: (?!index)(\w+\.md)$"),
    ],
)
def test_every_page_is_listed_once(name, entry):
    listed = re.findall(entry, (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted({page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"})


def test_the_readme_is_read_to_its_end():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 170
    assert len(text.encode()) <= 12_000


def test_citations_of_the_specification_open():
    sections = re.split(r"^### (\d+\.\d+) .*$", (ROOT / "docs/spec.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    rules = dict(zip(sections[1::2], sections[2::2], strict=True))
    cited = [
        (path.relative_to(ROOT), numbers)
        for path in [*(ROOT / "music_synth").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        for numbers in re.findall(r"docs/spec\.md (3\.[\d.]*\d)", path.read_text(encoding="utf-8"))
    ]
    assert len(cited) > 20
    for path, numbers in cited:
        section, _, rule = (numbers + ".").rstrip(".").partition(".")[2].partition(".")
        text = rules.get(f"3.{section}")
        assert text is not None, f"{path} cites {numbers}"
        assert not rule or re.search(rf"^{rule}\. ", text, re.MULTILINE), f"{path} cites {numbers}"


def test_the_version_is_said_once():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(
        rf"^## \[?({re.escape(__version__)}|Unreleased)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
