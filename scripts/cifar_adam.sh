#!/usr/bin/env bash
# Trains the adam row of the CIFAR-10 table, five seeds per schedule. Options: --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row cifar10 adam "$@"
