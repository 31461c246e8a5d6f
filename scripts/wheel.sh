#!/usr/bin/env bash
# Builds the wheel into dist/, installs it into a new environment and checks there, far from the checkout, that recipes
# and weights came along and the commands start. PYTHON=/path/to/python3 picks the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
rm -rf build  # setuptools would pack what an earlier version left there
"${PYTHON:-python3}" -m venv "$place/venv"
python=$place/venv/bin/python
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$place/wheel" .
"$python" -m pip install --quiet --disable-pip-version-check --no-compile "$place"/wheel/*.whl
mkdir -p dist
cp "$place"/wheel/*.whl dist/
wheel=$(cd "$place/wheel" && echo *.whl)

shopt -s nullglob
decoders=(music_synth/shipped/*/)

cd "$place"
"$python" - "${decoders[@]}" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np

import music_synth
from music_synth import config, runs

recipes = sorted(config.configs_dir().rglob("*.gin"))
assert config.find("models/small.gin").is_file() and len(recipes) > 20, recipes
audio = runs.load_inverter()(np.full((50, 128), -5, np.float32))
assert audio.shape == (16000,) and np.isfinite(audio).all(), audio.shape
names = {folder: name for name, folder in runs.DECODERS.items()}
for folder in sys.argv[1:]:  # of the checkout
    assert runs.load(names[Path(folder).name]).step > 0, folder
print(f"music_synth {music_synth.__version__}: {len(recipes)} recipes, {len(sys.argv) - 1} decoders, and the inverter plays")
PYTHON
for command in $("$place/venv/bin/music_synth" --help | sed -n "s/^  \([a-z]*\) .*/\1/p"); do
  "$place/venv/bin/music_synth" "$command" --help >/dev/null
done
printf 'dist/%s installs and runs\n' "$wheel"
