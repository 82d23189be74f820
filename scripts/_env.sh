# shellcheck shell=bash
# The other scripts source this file. It stops them at the first error, goes to the root of the repository, and sets
# PYTHON to the interpreter that setup.sh chooses.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=$(bash scripts/setup.sh --print-python)
