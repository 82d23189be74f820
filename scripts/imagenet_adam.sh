#!/usr/bin/env bash
# The adam row of the ImageNet table, five seeds of each schedule. Options: bash scripts/imagenet_adam.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row imagenet adam "$@"
