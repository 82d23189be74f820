#!/usr/bin/env bash
# Lint, format and tests, as in continuous integration. Arguments go to pytest: bash scripts/test.sh -k config
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# One process per core (at most 4), each with one thread: small tensors gain nothing from more.
# worksteal keeps most tests of a file in one process, which makes what they share once.
OMP_NUM_THREADS=1 exec "$PYTHON" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
