#!/usr/bin/env bash
# Makes .venv in the checkout and installs music_synth there with everything it needs. Safe to run again: what is
# in place is kept. PYTHON=/path/to/python3 picks the interpreter of a new environment (3.11 or later). --browser also
# installs Chromium, where apt-get can, for the tests of the studio's page.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '[setup] %s\n' "$*"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    recent "$PYTHON" || fail "PYTHON=$PYTHON is not a Python of version 3.11 or later"
    printf '%s' "$PYTHON"
    return
  fi
  for candidate in python3 python3.13 python3.12 python3.11; do
    if recent "$candidate"; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "no Python of version 3.11 or later found (python3 is: $(python3 --version 2>&1 || true)); install one or set PYTHON=/path/to/python3"
}

has_fluidsynth() { "$1" -c 'import ctypes.util as u, sys; sys.exit(u.find_library("fluidsynth") is None)'; }
has_browser() {
  command -v chromedriver >/dev/null && { command -v chromium || command -v google-chrome; } >/dev/null
}
has_venv() { "$1" -c 'import venv, ensurepip' >/dev/null 2>&1; }

install_system_packages() { # names of Debian packages
  if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
    say "installing $* by apt-get"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -qq --yes --no-install-recommends "$@"; } >/dev/null </dev/null ||
      fail "apt-get could not install: $*"
  else
    fail "please install the system packages: $* (Debian: sudo apt-get install $*; macOS: brew install fluid-synth)"
  fi
}

if [[ -x .venv/bin/python ]]; then
  recent .venv/bin/python || fail ".venv holds a Python older than 3.11; remove it (rm -r .venv) and run this again"
  python=.venv/bin/python
else
  python=$(find_python)
fi

missing=()
has_fluidsynth "$python" || missing+=(libfluidsynth3)
[[ -x .venv/bin/pip ]] || has_venv "$python" || missing+=(python3-venv)
if ((${#missing[@]})); then
  install_system_packages "${missing[@]}"
fi

if [[ "${1:-}" == --browser ]] && ! has_browser; then
  # In a subshell, which a failure ends: without a browser all else is tested.
  (install_system_packages chromium chromium-driver) ||
    say "no Chromium with chromedriver: the tests of the studio's page will be skipped"
fi

if [[ ! -x .venv/bin/pip ]]; then
  say "making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# The stamp ties the environment to setup.py, this script and this folder: after a change of any, pip runs again.
stamp=$({ cat setup.py scripts/setup.sh && pwd && .venv/bin/python --version; } | cksum)
if [[ -f .venv/music_synth.stamp && "$(cat .venv/music_synth.stamp)" == "$stamp" ]]; then
  say "ready (nothing changed)"
  exit 0
fi

say "installing Python packages into .venv (about 3 minutes the first time)"
SECONDS=0
# Twice quiet: errors only. Not compiled: Python compiles what it imports, pip would compile all of TensorFlow.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile --editable '.[data,eval,studio,hub,dev,docs]' </dev/null ||
  fail "pip could not install the packages; its messages stand above"
# Only for the ONNX file that it carries: what it asks for clashes with every current TensorFlow.
.venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile --no-deps 'basic-pitch==0.4.0' </dev/null ||
  fail "pip could not install basic-pitch; its messages stand above"
say "playing a piece: then all is in place, and compiled for the next"
heard=$(mktemp -d)
.venv/bin/python -m music_synth play data/band_with_drums.mid --out "$heard/heard.wav" &>"$heard/said" || {
  cat "$heard/said" >&2
  fail "music_synth cannot play; why stands above"
}
rm -r "$heard"
printf '%s' "$stamp" >.venv/music_synth.stamp
say "ready after $SECONDS s"
