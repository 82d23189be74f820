#!/usr/bin/env bash
# Lint, format and tests, as in continuous integration. Arguments go to pytest: bash scripts/test.sh -k config
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process more than cores (at most 4), as many tests wait for others; each has one thread, enough for small tensors.
# worksteal keeps most tests of a file in one process, which makes what they share once.
PROCESSES=$("$PYTHON" -c "import os; print(min(4, os.cpu_count() + 1))")
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest --numprocesses "$PROCESSES" --dist worksteal "$@"
