#!/usr/bin/env bash
# Sets up .venv with the test dependencies, then runs the suite.
# Usage: ./run_tests.sh [flags of pytest]; without -m the tests marked `engines` are left out. Files
# of tests run side by side, which -n 0 forbids.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$root/setup_venv.sh" "$root/requirements/test.txt" >&2
marker=(-m "not engines")
for flag in "$@"; do
  case "$flag" in -m | -m*) marker=() ;; esac
done
# In the order of their names: by xdist's own, files of few and long tests would come last.
beside=(-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
cd "$root"
exec "$root/.venv/bin/python" -m pytest ${marker[@]+"${marker[@]}"} "${beside[@]}" "$@"
