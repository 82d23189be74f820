#!/usr/bin/env bash
# Optimizers compared, each tuned by the same protocol; resumed after any kill. Options: bash scripts/compare.sh --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.compare "$@"
