#!/usr/bin/env bash
# The apollo row of the CIFAR-10 table, five seeds of each schedule. Options: bash scripts/cifar_apollo.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row cifar10 apollo "$@"
