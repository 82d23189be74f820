#!/usr/bin/env bash
# Gives a table and a picture in a few minutes after a fresh clone: installs what is missing, then trains a small ResNet
# on scikit-learn's digits with SGD, Adam, RAdam and Apollo, two seeds each. Options: bash scripts/quickstart.sh --help
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m scripts.quickstart "$@"
