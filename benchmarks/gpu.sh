#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in a few minutes: is the code right there, and how fast is it?
#
#   bash benchmarks/gpu.sh [--minutes 9] [OUT]    check and measure; OUT (gpu_results) gets record.json and summary.md
#   bash benchmarks/gpu.sh --dry-run [OUT]        go through all of it on the CPU, at toy size
#   bash benchmarks/gpu.sh --pack [PYTHON]        on a machine with network: put what a bare machine lacks into
#                                                 benchmarks/gpu/packages, for its Python (e.g. 3.12; default: this one)
#
# The machine needs a driver, Python 3.10 and torch 2.6 or newer, and no network: the rest comes from
# benchmarks/gpu/packages, which travels with the checkout. PYTHON=... chooses the interpreter.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
for python in ${PYTHON:-python3 python "$root/.venv/bin/python"}; do
  if "$python" -c 'import sys, torch; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    exec "$python" -m benchmarks.gpu.main "$@"
  fi
done
echo "error: no Python 3.10 or newer with torch was found; name one: PYTHON=/path/to/python bash benchmarks/gpu.sh" >&2
exit 2
