#!/usr/bin/env bash
# Trains the apollo_2021 row of the WMT14 English-German table, five seeds. Options: --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.run_row wmt14_en_de apollo_2021 "$@"
