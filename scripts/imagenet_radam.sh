#!/usr/bin/env bash
# The radam row of the ImageNet table, five seeds of each schedule. Options: bash scripts/imagenet_radam.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row imagenet radam "$@"
