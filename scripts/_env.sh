# shellcheck shell=bash
# The other scripts source this file. It goes to the root of the repository and sets PYTHON to the interpreter that
# setup.sh chooses.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh --print-python)
