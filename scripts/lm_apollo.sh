#!/usr/bin/env bash
# The apollo row of the One Billion Words table, five seeds. Options: bash scripts/lm_apollo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row one_billion_words apollo "$@"
