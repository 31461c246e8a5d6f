#!/usr/bin/env bash
# Sets up, lints and runs the tests. `--all` adds the tests marked slow; other arguments go to pytest, for example
# --cov=music_synth, which prints what the tests leave out (and takes a quarter longer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

selection=(-m 'not slow') browser=()
if [[ "${1:-}" == --all ]]; then
  selection=() browser=(--browser)
  shift
fi

scripts/setup.sh ${browser[@]+"${browser[@]}"}
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
.venv/bin/mypy
# One process a core; a file stays in one process, so that what it compiled serves all its tests.
exec .venv/bin/python -m pytest --quiet --numprocesses auto --dist loadfile ${selection[@]+"${selection[@]}"} "$@"
