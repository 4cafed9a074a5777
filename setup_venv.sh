#!/usr/bin/env bash
# Makes .venv hold the lock given, by hash, and the project itself. Quick when it already does.
# Called by run_local.sh and run_tests.sh. PYTHON names another interpreter than python3.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
lock="${1:?tell which lock to install, such as requirements/runtime.txt}"
if [ ! -f "$lock" ]; then
  echo "error: $lock: no such lock here; give its path, such as $root/requirements/runtime.txt" >&2
  exit 2
fi
venv="$root/.venv"
python="${PYTHON:-python3}"

# Two calls at once would install over each other.
exec 9>"$root/.venv.lock"
flock 9

version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
case "$version" in
  3.11 | 3.12 | 3.13) ;;
  *)
    echo "error: $python is Python $version, and this needs 3.11 to 3.13; set PYTHON to one" >&2
    exit 2
    ;;
esac
if [ "$(cat "$venv/made-for" 2>/dev/null)" != "$version" ]; then
  rm -rf "$venv"
  "$python" -m venv "$venv"
  echo "$version" >"$venv/made-for"
fi

pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps)
have="$venv/holds-$(basename "$lock")"
if ! cmp -s "$lock" "$have"; then
  # It may replace what a lock of another commit has put there, which that holds no more then; those
  # of one commit agree.
  for held in "$venv"/holds-*.txt; do
    cmp -s "$held" "$(dirname "$lock")/${held##*/holds-}" || rm -f "$held"
  done
  echo "installing $(basename "$lock"), about two minutes" >&2
  # Without dependency resolution: Beam's pin on Pillow would refuse the lock's Pillow 13.
  "${pip[@]}" --require-hashes --requirement "$lock"
  cp "$lock" "$have"
fi
project() { # what its installation is made of, with its folder, which that names
  echo "# $root"
  cat "$root/pyproject.toml" "$root/setup.py" "$root"/{formats/_resampling,models/_separable,models/_separable_avx512}.c
  command -v "${CC:-gcc}" || true # what compiles
  "$python" -c 'import os, sysconfig; print(os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
}
if [ "$(project)" != "$(cat "$venv/holds-project" 2>/dev/null)" ]; then
  # One that cannot be made again would stay.
  rm -f "$root"/{formats/_resampling,models/_separable}*.so
  "${pip[@]}" --no-build-isolation --editable "$root"
  project >"$venv/holds-project"
fi
