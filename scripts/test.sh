#!/usr/bin/env bash
# Lint, format and tests, as in continuous integration. Arguments go to pytest: bash scripts/test.sh -k config
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process per core (at most 4), each with one thread, because small tensors gain nothing from more threads.
# worksteal keeps most tests of a file in one process, so that they make what they share only once.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
