#!/usr/bin/env bash
# Lint, format and tests, as continuous integration runs them; arguments go to pytest: bash scripts/test.sh -k config
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process a core, each with one thread: many small tensors gain nothing from more.
# worksteal keeps most tests of a file in one process, so that what they share is made once.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
