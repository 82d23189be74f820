#!/usr/bin/env bash
# The sgd row of the ImageNet table, five seeds of each schedule. Options: bash scripts/imagenet_sgd.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row imagenet sgd "$@"
