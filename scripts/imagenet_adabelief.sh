#!/usr/bin/env bash
# Trains the adabelief row of the ImageNet table, five seeds per schedule. Options: --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row imagenet adabelief "$@"
