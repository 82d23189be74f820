#!/usr/bin/env bash
# The adam_adj row of the CIFAR-10 table, five seeds of each schedule. Options: bash scripts/cifar_adam_adj.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row cifar10 adam_adj "$@"
