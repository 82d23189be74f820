#!/usr/bin/env bash
# From a fresh clone to a table and a picture in a few minutes: sets everything up, then trains a small ResNet on
# scikit-learn's digits with SGD, Adam, RAdam and Apollo, two seeds each. Options: bash scripts/quickstart.sh --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.quickstart "$@"
