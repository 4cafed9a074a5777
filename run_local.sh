#!/usr/bin/env bash
# Sets up .venv from the hashed lock, then runs the main job with DirectRunner.
# Usage: ./run_local.sh [flags of python -m pipeline.extract]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
"$root/setup_venv.sh" "$root/requirements/runtime.txt" >&2
# The caller's folder may hold a models.py or a pipeline/, which must not stand for ours.
export PYTHONSAFEPATH=1
exec "$root/.venv/bin/python" -m pipeline.demo --root "$root" "$@"
