#!/usr/bin/env bash
# Trains the sgd row of the One Billion Words table, five seeds. Options: --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row one_billion_words sgd "$@"
