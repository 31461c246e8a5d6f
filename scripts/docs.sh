#!/usr/bin/env bash
# Builds docs/ as a site into site/; fails on a dead link. `scripts/docs.sh serve` shows it at http://localhost:8000.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/setup.sh
export NO_MKDOCS_2_WARNING=1  # Material's word on its future, printed at every build
if [[ "${1:-build}" == serve ]]; then
  exec .venv/bin/python -m mkdocs serve
fi
exec .venv/bin/python -m mkdocs build --strict --quiet
