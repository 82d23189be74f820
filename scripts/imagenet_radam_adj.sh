#!/usr/bin/env bash
# The radam_adj row of the ImageNet table, five seeds of each schedule. Options: bash scripts/imagenet_radam_adj.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row imagenet radam_adj "$@"
