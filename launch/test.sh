#!/usr/bin/env bash
# Runs the checks of CI on a machine that has only Python:
#
#   bash launch/test.sh                  formatting, linting, types, all tests
#   bash launch/test.sh tests/a_test.py  pytest only, with these arguments
#
# Without arguments it takes about 25 minutes on 2 cores, and some more to install
# the pinned packages once.
#
# The first failing check ends the script with its exit code.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ensure_venv
cd "$root"
bin=$venv/bin

if (($# == 0)); then
  "$bin/ruff" format --check .
  "$bin/ruff" check .
  "$bin/pyright" --pythonpath "$bin/python"
  if [[ -x $bin/shellcheck ]]; then
    "$bin/shellcheck" --external-sources launch/*.sh launch/pod/*.sh \
      benchmarks/*.sh tests/*.sh tests/launch/*.sh .ci/run
  else
    say "Skipped shellcheck, which has no wheel for this machine."
  fi
  # The tests of a file share one process and its fixtures. The longest files
  # come first, see tests/conftest.py.
  set -- --numprocesses=auto --maxprocesses=4 --dist=loadfile \
    --no-loadscope-reorder
fi
exec "$bin/python" -m pytest -m "not tpu and not nightly" "$@"
