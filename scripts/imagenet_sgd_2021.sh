#!/usr/bin/env bash
# Trains the sgd_2021 row of the ImageNet table, five seeds per schedule. Options: --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row imagenet sgd_2021 "$@"
