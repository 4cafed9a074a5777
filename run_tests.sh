#!/usr/bin/env bash
# Sets up .venv with the test dependencies, then runs the suite.
# Usage: ./run_tests.sh [flags of pytest]; without -m the tests marked `engines` are left out.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$root/setup_venv.sh" "$root/requirements/test.txt" >&2
marker=(-m "not engines")
for flag in "$@"; do
  case "$flag" in -m | -m*) marker=() ;; esac
done
cd "$root"
exec "$root/.venv/bin/python" -m pytest ${marker[@]+"${marker[@]}"} "$@"
