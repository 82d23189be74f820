#!/usr/bin/env bash
# Prepares a table's data for training: bash scripts/prepare.sh cifar10|imagenet|one_billion_words|wmt14 [SOURCE] [DEST]
# Without SOURCE it downloads the data (except ImageNet's). It says what it found before it writes. Options: --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.prepare "$@"
