#!/usr/bin/env bash
# Lint, format and tests, as in continuous integration. Arguments go to pytest: bash scripts/test.sh -k config
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process more than cores (at most 4), because many tests wait for something; one thread each, because small tensors
# gain nothing from more. worksteal keeps most tests of a file in one process, so that they make what they share once.
processes=$("$PYTHON" -c 'from engine.machine import core_count; print(min(4, core_count() + 1))')
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest --numprocesses "$processes" --dist worksteal "$@"
