#!/usr/bin/env bash
# Whole tables, several runs at a time, resumed after any kill. Options: bash scripts/reproduce.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.reproduce "$@"
