#!/usr/bin/env bash
# Makes this checkout ready to run. You can call it again: it installs only what is missing.
#
#   bash scripts/setup.sh                   set up, then print which interpreter is used
#   bash scripts/setup.sh --print-python    the same for other scripts: standard output is only the interpreter's path
#   bash scripts/setup.sh --locked          set up a .venv with the versions of requirements.lock, which were tested
#
# If the current python has torch and torchvision (a container, a conda environment), it is used, and the small packages
# that it lacks are installed. Otherwise a virtual environment is made in .venv with the newest Python found.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "$*" >&2; }
fail() { say "error: $*"; exit 2; }

case "${1:-}" in
  "" | --print-python | --locked) ;;
  -h | --help) sed -n '2,10s/^# \{0,1\}//p' scripts/setup.sh; exit 0 ;;
  *) fail "unknown option '$1'; usage: bash scripts/setup.sh [--print-python | --locked]" ;;
esac

is_suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# True if the interpreter has torchvision and a new enough torch. Importing them would take seconds.
has_torch() {
  is_suitable "$1" && "$1" -c 'import sys; from importlib.util import find_spec
sys.exit(not (find_spec("torch") and find_spec("torchvision")))' 2>/dev/null &&
    ! "$1" -m scripts.missing 2>/dev/null | grep -q '^torch'
}

# True if pip would refuse to install (PEP 668: the system's Python on Debian, Homebrew and others).
is_externally_managed() {
  [ -z "${PIP_BREAK_SYSTEM_PACKAGES:-}" ] && "$1" -c 'import os, sys, sysconfig
mark = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(not (sys.prefix == sys.base_prefix and os.path.exists(mark)))'
}

# The newest Python that torch is built for, by name; otherwise python3 or python.
newest_python() {
  local name without_venv=""
  for name in python3.14 python3.13 python3.12 python3.11 python3.10 python3 python; do
    is_suitable "$name" || continue
    if "$name" -c 'import venv, ensurepip' 2>/dev/null; then
      command -v "$name"
      return
    fi
    without_venv=${without_venv:-$name}
  done
  [ -z "$without_venv" ] || fail "$without_venv cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install $without_venv-venv)"
  fail "no Python 3.10 or newer found; install one (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python)"
}

# The interpreter: the current one if it has torch, else the one in .venv.
python=.venv/bin/python
for current in python python3; do
  if [ "${1:-}" != --locked ] && has_torch "$current"; then
    python=$("$current" -c 'import sys; print(sys.executable)')
    break
  fi
done

# If the current python lacks something, and pip may not install into it, a .venv on top uses its torch.
options=""
if [ "$python" != .venv/bin/python ] && [ -n "$("$python" -m scripts.missing)" ] && is_externally_managed "$python"; then
  base=$python
  options=--system-site-packages
  python=.venv/bin/python
fi
if [ "$python" = .venv/bin/python ]; then
  if ! is_suitable "$python" || ! "$python" -c 'import pip' 2>/dev/null; then
    base=${base:-$(newest_python)}
    say "making .venv with $("$base" --version), $base"
    "$base" -m venv --clear ${options:+"$options"} .venv
  fi
  python=$PWD/$python
fi

if [ "${1:-}" = --locked ]; then
  say "installing requirements.lock into $("$python" -c 'import sys; print(sys.prefix)')"
  "$python" -m pip install --disable-pip-version-check --requirement requirements.lock >&2
fi

missing=$("$python" -m scripts.missing)
if [ -n "$missing" ]; then
  "$python" -c 'import pip' 2>/dev/null || fail "$python has no pip; add it with: $python -m ensurepip"
  say "installing into $("$python" -c 'import sys; print(sys.prefix)'): $(echo "$missing" | tr '\n' ' ')"
  # shellcheck disable=SC2086  # one requirement is one word
  "$python" -m pip install --disable-pip-version-check $missing >&2
fi

if [ "${1:-}" = --print-python ]; then
  echo "$python"
else
  say "ready: $python ($("$python" -c 'import platform, torch; print(f"Python {platform.python_version()}, torch {torch.__version__}")'))"
fi
