# shellcheck shell=bash
# Sourced by the other scripts: goes to the root of the repository and sets PYTHON to the interpreter that setup.sh
# chooses, which is first made ready where that has not been done.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh --print-python)
