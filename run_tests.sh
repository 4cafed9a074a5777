#!/usr/bin/env bash
# Sets up .venv with the test dependencies, then runs the suite.
# Usage: ./run_tests.sh [flags of pytest]; without -m the tests marked `engines` are left out, and
# files of tests run side by side, as -n 0 forbids.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$root/setup_venv.sh" "$root/requirements/test.txt" >&2
chosen=(-m "not engines" -n auto --maxprocesses 4 --dist loadfile)
for flag in "$@"; do
  case "$flag" in -m | -m*) chosen=() ;; esac # an engine has the machine for itself
done
cd "$root"
exec "$root/.venv/bin/python" -m pytest ${chosen[@]+"${chosen[@]}"} "$@"
