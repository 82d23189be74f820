#!/usr/bin/env bash
# Trains whole tables, several runs at a time, and resumes after any kill. Options: bash scripts/reproduce.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.reproduce "$@"
