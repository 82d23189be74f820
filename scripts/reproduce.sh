#!/usr/bin/env bash
# Trains whole tables, several runs at a time, and resumes after any kill. Options: bash scripts/reproduce.sh --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.reproduce "$@"
