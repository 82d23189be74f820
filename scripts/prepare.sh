#!/usr/bin/env bash
# The data of a table, ready for training: bash scripts/prepare.sh cifar10|imagenet|one_billion_words|wmt14 [SOURCE] [DEST]
# Without SOURCE it is downloaded (all but ImageNet). What is there is said before anything is written: --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.prepare "$@"
